//! One sequence: a base, children and a daemon, and whatever happens to them, until everything is unmounted and held to
//! the stock tools.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::fs::StatVfs;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use seethrough::image::Image;
use seethrough::sys::block_on;
use seethrough::view::room::Room;

use crate::fuse::Disks;
use crate::host::{Host, Recipe, some_regions, succeed};
use crate::model::Tree;
use crate::vm::{Home, Vm, unmount as unmount_disk};

const MAX_CHILDREN: usize = 3;
const BASE: usize = 0;
/// How long a sequence is.
const EVENTS: u32 = 24;
/// How many lines of what was done are printed after a failure.
const LAST_LINES: usize = 40;

/// How filesystems are mounted, and how those with a journal are besides.
const COMMON: &[&str] = &["defaults", "discard", "nodelalloc", "lazytime"];
const JOURNALED: &[&str] = &[
    "commit=600",
    "data=writeback",
    "journal_async_commit,data=writeback",
    "data=journal",
];

struct Sequence {
    rng: StdRng,
    recipe: Recipe,
    directory: PathBuf,
    host: Host,
    /// What the daemon serves to each VM.
    views: Vec<Arc<dyn Image>>,
    vms: Vec<Vm>,
    /// How many times the base has changed.
    epoch: u64,
    log: Vec<String>,
    // Last, for it is dropped last: the VMs' disks.
    disks: Disks,
}

/// Runs the sequence of `seed` in a mount namespace, which ends with this process whatever becomes of it.
pub(crate) fn run_sequence(recipe: Recipe, seed: u64) {
    std::thread::scope(|scope| {
        let outcome = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            let_go_of_others();
            let directory = tempfile::tempdir().unwrap();
            // Nothing here has to outlive the host, so nothing waits for its disk.
            mount(
                "images",
                directory.path(),
                "tmpfs",
                MountFlags::empty(),
                None,
            )
            .unwrap();
            let outcome = catch_unwind(|| run_in(directory.path(), recipe, seed));
            let _ = unmount(directory.path(), UnmountFlags::DETACH);
            if let Err(cause) = outcome {
                resume_unwind(cause);
            }
        });
        if let Err(cause) = outcome.join() {
            resume_unwind(cause);
        }
    });
}

/// Takes the mounts of others out of this namespace, which has copies of them: they would outlive their unmount.
fn let_go_of_others() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    for line in mounts.lines().filter(|line| line.starts_with("/dev/loop")) {
        if let Some(directory) = line.split(' ').nth(1) {
            let _ = unmount(directory, UnmountFlags::DETACH);
        }
    }
}

fn run_in(directory: &Path, recipe: Recipe, seed: u64) {
    let mut sequence = Sequence::new(directory, recipe, seed);
    let outcome = catch_unwind(AssertUnwindSafe(|| sequence.run()));
    if let Err(cause) = outcome {
        let from = sequence.log.len().saturating_sub(LAST_LINES);
        eprintln!("{}, seed {seed}; the last of what was done:", recipe.name);
        eprintln!("{}", sequence.log[from..].join("\n"));
        resume_unwind(cause);
    }
}

impl Sequence {
    fn new(directory: &Path, recipe: Recipe, seed: u64) -> Self {
        let host = Host::new(directory, recipe);
        let mountpoint = directory.join("disks");
        fs::create_dir(&mountpoint).unwrap();
        let disks = Disks::mount(&mountpoint, MAX_CHILDREN + 1, recipe.megabytes << 20);
        let base = Vm::new(BASE, disks.file(BASE), directory, vec![Home::of_base()]);
        let mut sequence = Self {
            rng: StdRng::seed_from_u64(seed),
            recipe,
            directory: directory.to_owned(),
            host,
            views: Vec::new(),
            vms: vec![base],
            epoch: 0,
            log: Vec::new(),
            disks,
        };
        sequence.start_daemon();
        sequence
    }

    fn run(&mut self) {
        self.work(BASE);
        for _ in 0..EVENTS {
            self.event();
        }
        self.finish();
    }

    fn event(&mut self) {
        let vm = self.rng.random_range(0..self.vms.len());
        match self.rng.random_range(0..100) {
            0..10 if self.vms.len() <= MAX_CHILDREN => self.add_child(),
            0..55 => self.work(vm),
            55..63 => self.see_through(vm),
            63..70 => self.remount(vm),
            70..76 => self.sync(vm),
            76..84 if self.recipe.has_journal => self.lose_power(vm),
            84..90 => self.restart_daemon(),
            90..93 if self.recipe.has_journal => self.power_cut(),
            _ => self.trespass(vm),
        }
    }

    fn start_daemon(&mut self) {
        self.log.push("daemon: start".into());
        self.views = self.host.serve();
        let mut sockets = self.disks.sockets.pause();
        for (socket, view) in sockets.iter_mut().zip(&self.views) {
            block_on(view.begin_session()).unwrap();
            *socket = Some(Arc::clone(view));
        }
    }

    /// Stops the daemon as a service manager does; VMs that are running wait meanwhile.
    fn restart_daemon(&mut self) {
        self.log.push("daemon: restart".into());
        let sockets = Arc::clone(&self.disks.sockets);
        let mut sockets = sockets.pause();
        sockets.fill(None);
        self.close();
        self.views = self.host.serve();
        for (socket, view) in sockets.iter_mut().zip(&self.views) {
            block_on(view.begin_session()).unwrap();
            *socket = Some(Arc::clone(view));
        }
    }

    fn close(&mut self) {
        for view in self.views.drain(..) {
            block_on(view.close()).unwrap();
        }
    }

    /// Everything loses its power: the VMs, and the daemon with whatever it has not stored.
    fn power_cut(&mut self) {
        self.log.push("power cut".into());
        self.disks.sockets.pause().fill(None);
        for vm in &mut self.vms {
            vm.lose_power(&mut self.log);
        }
        self.views.clear();
        self.epoch += 1;
        self.start_daemon();
    }

    fn lose_power(&mut self, vm: usize) {
        if !self.vms[vm].is_mounted {
            return;
        }
        self.disks.sockets.pause()[vm] = None;
        self.vms[vm].lose_power(&mut self.log);
        let view = &self.views[vm];
        block_on(view.begin_session()).unwrap();
        self.disks.sockets.pause()[vm] = Some(Arc::clone(view));
        if vm == BASE {
            self.epoch += 1;
            self.see_what_is_recovered();
        }
    }

    /// A child sees of a base that has crashed what the base's kernel makes of it afterwards.
    fn see_what_is_recovered(&mut self) {
        if self.vms.len() == 1 {
            return;
        }
        let child = self.rng.random_range(1..self.vms.len());
        self.remount(child);
        let seen = self.vms[child].read(&self.vms[BASE].homes[0]);
        self.mount(BASE);
        if let Some(text) = seen.difference(&self.vms[BASE].homes[0].tree) {
            panic!("vm {child} has seen something else in the base: {text}");
        }
    }

    fn add_child(&mut self) {
        let regions = some_regions(&mut self.rng);
        let number = self.host.create_child(&regions);
        self.log.push(format!("vm {number} owns {regions:?}"));
        let homes = regions
            .iter()
            .map(|region| Home::of_region(region))
            .collect();
        let vm = Vm::new(number, self.disks.file(number), &self.directory, homes);
        self.vms.push(vm);
        self.restart_daemon();
    }

    fn mount(&mut self, vm: usize) {
        if self.vms[vm].is_mounted {
            return;
        }
        let journaled = if self.recipe.has_journal {
            JOURNALED
        } else {
            &[]
        };
        let choice = self.rng.random_range(0..COMMON.len() + journaled.len());
        let options = COMMON.iter().chain(journaled).nth(choice).unwrap();
        self.vms[vm].mount(options, &mut self.log);
        self.vms[vm].seen = self.epoch;
        if vm == BASE {
            // Recovering and mounting change the base, too.
            self.epoch += 1;
        }
    }

    fn remount(&mut self, vm: usize) {
        if self.vms[vm].is_mounted {
            self.vms[vm].unmount(&mut self.log);
        }
        if vm == BASE {
            self.epoch += 1;
        }
        self.mount(vm);
    }

    fn work(&mut self, vm: usize) {
        self.mount(vm);
        if vm == BASE {
            self.epoch += 1;
        }
        let steps = self.rng.random_range(1..14);
        self.vms[vm].work(steps, &mut self.rng, &mut self.log);
    }

    fn sync(&mut self, vm: usize) {
        self.mount(vm);
        self.vms[vm].sync(&mut self.log);
        if vm == BASE {
            self.epoch += 1;
        }
        if self.rng.random_range(0..4) == 0 {
            self.vms[vm].trim(&mut self.log);
        }
    }

    /// A child reads everything of the base's, after a sync there and with a mount of its own that is newer.
    fn see_through(&mut self, vm: usize) {
        if vm == BASE {
            return;
        }
        if self.vms[BASE].is_mounted {
            if self.recipe.has_journal && self.rng.random_range(0..3) != 0 {
                self.vms[BASE].commit(&mut self.log);
                self.epoch += 1;
            } else {
                self.sync(BASE);
            }
        } else if self.vms[BASE].has_crashed {
            return;
        }
        self.refresh(vm);
        let base = &self.vms[BASE].homes[0];
        let found: Tree = self.vms[vm].read(base);
        if let Some(text) = base.tree.difference(&found) {
            panic!("vm {vm} sees of the base: {text}");
        }
    }

    /// Has a child look at the base as it is now.
    fn refresh(&mut self, vm: usize) {
        if !self.vms[vm].is_mounted || self.vms[vm].seen != self.epoch {
            self.remount(vm);
        }
    }

    fn trespass(&mut self, vm: usize) {
        self.mount(vm);
        if vm == BASE {
            self.log.push("the base trespasses".into());
            self.vms[BASE].trespass_in_region(&mut self.rng);
            return;
        }
        if self.vms[BASE].has_crashed {
            return;
        }
        if self.vms[BASE].is_mounted {
            self.sync(BASE);
        }
        self.refresh(vm);
        self.log.push(format!("vm {vm} trespasses"));
        for _ in 0..6 {
            self.vms[vm].trespass(&self.vms[BASE].homes[0], &mut self.rng);
        }
    }

    /// Unmounts everything, stops the daemon, and holds all images to the stock tools and to the models.
    fn finish(&mut self) {
        let mut told = Vec::new();
        for vm in 0..self.vms.len() {
            // A file without a name may live on in a program that another test is just starting, until the unmount.
            self.remount(vm);
            told.push(self.vms[vm].statfs());
            self.vms[vm].unmount(&mut self.log);
        }
        self.disks.sockets.pause().fill(None);
        self.close();
        let merged = self.host.assert_true();
        let rooms = self.host.rooms();
        for (vm, (told, (room, _))) in told.iter().zip(&rooms).enumerate() {
            assert_told(vm, told, room);
        }
        let flat = self.directory.join("flat");
        fs::create_dir(&flat).unwrap();
        for (disk, vm) in merged.iter().zip(&self.vms[1..]) {
            succeed(
                "mount",
                &[
                    "-t",
                    "ext4",
                    "-o",
                    "loop,ro",
                    disk.to_str().unwrap(),
                    flat.to_str().unwrap(),
                ],
            );
            let (_, map) = &rooms[vm.number];
            let free = map
                .groups
                .iter()
                .map(|group| group.blocks.total - group.blocks.used);
            let told = rustix::fs::statvfs(&flat).unwrap();
            assert_eq!(
                free.sum::<u64>(),
                told.f_bfree,
                "vm {} merged with its base",
                vm.number
            );
            for home in self.vms[BASE].homes.iter().chain(&vm.homes) {
                let found = Tree::read(&flat.join(&home.path), &home.except).unwrap();
                if let Some(text) = home.tree.difference(&found) {
                    panic!("vm {} merged with its base: {text}", vm.number);
                }
            }
            unmount_disk(&flat);
        }
    }
}

/// What `df` says of a VM's image is what the VM's kernel told its programs.
fn assert_told(vm: usize, told: &StatVfs, room: &Room) {
    let statfs = room.statfs.unwrap();
    let said = (statfs.blocks, statfs.free_blocks, statfs.available_blocks);
    assert_eq!(
        said,
        (told.f_blocks, told.f_bfree, told.f_bavail),
        "blocks of vm {vm}"
    );
    let said = (u64::from(statfs.inodes), u64::from(statfs.free_inodes));
    assert_eq!(said, (told.f_files, told.f_ffree), "inodes of vm {vm}");
}
