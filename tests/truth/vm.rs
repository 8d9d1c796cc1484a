//! A VM: a kernel that has its disk mounted, the directories it writes in, and what should be there.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rand::RngExt;
use rand::rngs::StdRng;
use rustix::fs::StatVfs;

use crate::engine::run;
use crate::host::{REGIONS, succeed};
use crate::model::Tree;
use crate::work::{Work, trespass, trespass_in};

/// A directory that a VM may write in.
pub(crate) struct Home {
    /// Its path in the VM's filesystem: empty for the whole of it.
    pub(crate) path: PathBuf,
    /// What should be in it.
    pub(crate) tree: Tree,
    /// Names in it that are not the VM's.
    pub(crate) except: Vec<PathBuf>,
}

/// What the base has in its root directory that no program has put there.
fn not_the_bases() -> Vec<PathBuf> {
    ["lost+found"]
        .iter()
        .chain(&REGIONS)
        .map(PathBuf::from)
        .collect()
}

impl Home {
    pub(crate) fn of_base() -> Self {
        Self {
            path: PathBuf::new(),
            tree: Tree::default(),
            except: not_the_bases(),
        }
    }

    pub(crate) fn of_region(name: &str) -> Self {
        Self {
            path: name.into(),
            tree: Tree::default(),
            except: Vec::new(),
        }
    }
}

pub(crate) struct Vm {
    pub(crate) number: usize,
    disk: PathBuf,
    mountpoint: PathBuf,
    pub(crate) is_mounted: bool,
    /// Its power has gone, and no kernel has recovered the journal yet.
    pub(crate) has_crashed: bool,
    pub(crate) homes: Vec<Home>,
    held: Vec<File>,
    /// How many times the base had changed when this VM mounted its disk.
    pub(crate) seen: u64,
    /// How a loop device finds the filesystem on the disk.
    loop_options: String,
    /// What it was mounted with last.
    pub(crate) options: String,
}

impl Vm {
    /// The VM of disk `number`, whose file is `disk`.
    pub(crate) fn new(
        number: usize,
        disk: PathBuf,
        directory: &Path,
        loop_options: String,
    ) -> Self {
        let mountpoint = directory.join(format!("mnt{number}"));
        fs::create_dir(&mountpoint).unwrap();
        Self {
            number,
            disk,
            mountpoint,
            is_mounted: false,
            has_crashed: false,
            homes: Vec::new(),
            held: Vec::new(),
            seen: 0,
            loop_options,
            options: String::new(),
        }
    }

    /// Mounts the disk, and compares what is there with what should be.
    pub(crate) fn mount(&mut self, options: &str, log: &mut Vec<String>) {
        log.push(format!("vm {}: mount {options}", self.number));
        options.clone_into(&mut self.options);
        let options = format!("{},errors=remount-ro,{options}", self.loop_options);
        let (disk, mountpoint) = (
            self.disk.to_str().unwrap(),
            self.mountpoint.to_str().unwrap(),
        );
        succeed("mount", &["-t", "ext4", "-o", &options, disk, mountpoint]);
        self.is_mounted = true;
        if !std::mem::take(&mut self.has_crashed) {
            self.check();
            return;
        }
        for home in &mut self.homes {
            let found = Tree::read(&self.mountpoint.join(&home.path), &home.except).unwrap();
            if let Some(lost) = home.tree.lost(&found) {
                panic!("vm {} after its power went: {lost}", self.number);
            }
            home.tree = found;
        }
    }

    /// What is there is what should be.
    pub(crate) fn check(&self) {
        for home in &self.homes {
            let found = self.read(home);
            if let Some(text) = home.tree.difference(&found) {
                panic!("vm {}: {text}", self.number);
            }
        }
    }

    /// What this VM reads in somebody's directory.
    pub(crate) fn read(&self, home: &Home) -> Tree {
        Tree::read(&self.mountpoint.join(&home.path), &home.except)
            .unwrap_or_else(|error| panic!("vm {}: {error}", self.number))
    }

    /// Works in its directories for a while.
    pub(crate) fn work(&mut self, steps: u32, rng: &mut StdRng, log: &mut Vec<String>) {
        for _ in 0..steps {
            let home = rng.random_range(0..self.homes.len());
            let home = &mut self.homes[home];
            Work {
                top: &self.mountpoint.join(&home.path),
                tree: &mut home.tree,
                rng,
                held: &mut self.held,
                log,
            }
            .step();
        }
    }

    /// Tries to change what is the base's, which this child sees as `base` says.
    pub(crate) fn trespass(&self, base: &Home, rng: &mut StdRng) {
        let own = self.mountpoint.join(&self.homes[0].path);
        let paths: Vec<&Path> = base.tree.paths().collect();
        if paths.is_empty() || rng.random_range(0..8) == 0 {
            let except = self.homes.iter().map(|home| &home.path);
            let foreign: Vec<&PathBuf> = base
                .except
                .iter()
                .filter(|name| !except.clone().any(|own| own == *name))
                .collect();
            let name = foreign[rng.random_range(0..foreign.len())];
            return trespass(&self.mountpoint.join(name), &own, rng);
        }
        let path = paths[rng.random_range(0..paths.len())];
        trespass(&self.mountpoint.join(path), &own, rng);
    }

    /// As the base's VM: tries to change a directory that is the children's.
    pub(crate) fn trespass_in_region(&self, rng: &mut StdRng) {
        let region = REGIONS[rng.random_range(0..REGIONS.len())];
        trespass_in(&self.mountpoint.join(region), &self.mountpoint, rng);
    }

    /// Everything written is stored from now on.
    pub(crate) fn sync(&mut self, log: &mut Vec<String>) {
        log.push(format!("vm {}: sync", self.number));
        let top = File::open(&self.mountpoint).unwrap();
        rustix::fs::syncfs(top.as_fd()).unwrap();
        for home in &mut self.homes {
            home.tree.sync();
        }
    }

    /// Has everything committed, which need not bring metadata to its place as a sync of the filesystem does.
    pub(crate) fn commit(&mut self, log: &mut Vec<String>) {
        log.push(format!("vm {}: fsync of everything", self.number));
        for home in &mut self.homes {
            for path in home.tree.paths() {
                let real = self.mountpoint.join(&home.path).join(path);
                if !real.is_symlink() {
                    File::open(real).unwrap().sync_all().unwrap();
                }
            }
            home.tree.sync();
        }
        File::open(&self.mountpoint).unwrap().sync_all().unwrap();
    }

    /// How full its filesystem is, as its programs are told once everything is stored.
    pub(crate) fn statfs(&mut self) -> StatVfs {
        self.held.clear();
        rustix::fs::syncfs(File::open(&self.mountpoint).unwrap()).unwrap();
        rustix::fs::statvfs(&self.mountpoint).unwrap()
    }

    /// Gives back what is free.
    pub(crate) fn trim(&mut self, log: &mut Vec<String>) {
        log.push(format!("vm {}: fstrim", self.number));
        succeed("fstrim", &[&self.mountpoint]);
    }

    pub(crate) fn unmount(&mut self, log: &mut Vec<String>) {
        log.push(format!("vm {}: unmount", self.number));
        self.held.clear();
        unmount(&self.mountpoint);
        self.is_mounted = false;
        for home in &mut self.homes {
            home.tree.sync();
        }
    }

    /// Its disk is gone already: nothing more is written.
    pub(crate) fn lose_power(&mut self, log: &mut Vec<String>) {
        log.push(format!("vm {}: power lost", self.number));
        self.held.clear();
        if self.is_mounted {
            unmount(&self.mountpoint);
            self.has_crashed = true;
        }
        self.is_mounted = false;
    }
}

/// A program that another test is just starting has this process's files open until it runs: as long, the kernel calls
/// the mount busy.
pub(crate) fn unmount(mountpoint: &Path) {
    const TRIES: usize = 1000;
    for _ in 0..TRIES {
        match run("umount", &[mountpoint]) {
            (0, _) => return,
            (_, text) => assert!(text.contains("busy"), "{text}"),
        }
    }
    panic!("{} is still busy", mountpoint.display());
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.is_mounted {
            self.held.clear();
            run("umount", &[&self.mountpoint]);
        }
    }
}
