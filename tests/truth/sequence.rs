//! One sequence: a base, children and a daemon, and whatever happens to them, until everything is unmounted and held to
//! the stock tools.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{RngExt, SeedableRng};
use rustix::fs::StatVfs;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use seethrough::image::Image;
use seethrough::sys::block_on;
use seethrough::view::View;
use seethrough::view::declaration::Sharing;
use seethrough::view::group_map::GroupMap;
use seethrough::view::refresh::Policy;
use seethrough::view::room::Room;

use crate::fuse::{Disk, Disks};
use crate::host::{Extra, Host, REGIONS, Recipe, some_policy, some_regions, succeed};
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
    /// What the daemon serves to each VM that it serves.
    views: Vec<Option<Arc<View>>>,
    vms: Vec<Vm>,
    /// The directories of shared regions that nobody holds.
    unheld: Vec<Home>,
    /// How many groups regions may still get.
    spare: u32,
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
        let disks = Disks::mount(&mountpoint, MAX_CHILDREN + 1, recipe.longest_disk_len());
        let mut base = Vm::new(BASE, disks.file(BASE), directory, recipe.loop_options());
        base.homes.push(Home::of_base());
        let unheld = match recipe.sharing {
            Sharing::Private => Vec::new(),
            Sharing::Shared => REGIONS.map(Home::of_region).into(),
        };
        let mut sequence = Self {
            rng: StdRng::seed_from_u64(seed),
            recipe,
            directory: directory.to_owned(),
            host,
            views: Vec::new(),
            vms: vec![base],
            unheld,
            spare: 2,
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
        let vm = self.any_vm(0);
        match self.rng.random_range(0..100) {
            0..10 if self.vms.len() <= MAX_CHILDREN => self.add_child(),
            0..5 if self.is_shared() => self.pass_on(),
            5..8 if self.spare > 0 => self.enlarge(),
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

    /// One of the VMs from `first` on that are served, or the base's.
    fn any_vm(&mut self, first: usize) -> usize {
        let served = (first..self.vms.len()).filter(|vm| self.host.serves(*vm));
        served.choose(&mut self.rng).unwrap_or(BASE)
    }

    fn is_shared(&self) -> bool {
        self.recipe.sharing == Sharing::Shared
    }

    fn policy(&mut self, vm: usize) -> Policy {
        match vm {
            BASE => Policy::Live,
            child => self.host.child(child).policy,
        }
    }

    fn start_daemon(&mut self) {
        self.log.push("daemon: start".into());
        let sockets = Arc::clone(&self.disks.sockets);
        self.open_views(&mut sockets.pause());
    }

    fn open_views(&mut self, sockets: &mut [Disk]) {
        self.views = self.host.serve();
        for (socket, view) in sockets.iter_mut().zip(&self.views) {
            if let Some(view) = view {
                block_on(view.begin_session()).unwrap();
                *socket = Some(Arc::clone(view) as Arc<dyn Image>);
            }
        }
    }

    fn view(&self, vm: usize) -> &Arc<View> {
        self.views[vm].as_ref().unwrap()
    }

    /// Stops the daemon as a service manager does; VMs that are running wait meanwhile.
    fn restart_daemon(&mut self) {
        self.log.push("daemon: restart".into());
        let sockets = Arc::clone(&self.disks.sockets);
        let mut sockets = sockets.pause();
        sockets.fill(None);
        self.close();
        self.open_views(&mut sockets);
    }

    fn close(&mut self) {
        for view in self.views.drain(..).flatten() {
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
        let view = Arc::clone(self.view(vm));
        block_on(view.begin_session()).unwrap();
        self.disks.sockets.pause()[vm] = Some(view);
        if vm == BASE {
            self.epoch += 1;
            self.see_what_is_recovered();
        }
    }

    /// A child sees of a base that has crashed what the base's kernel makes of it afterwards.
    fn see_what_is_recovered(&mut self) {
        let child = self.any_vm(1);
        if child == BASE {
            return;
        }
        self.look_anew(child);
        let seen = self.vms[child].read(&self.vms[BASE].homes[0]);
        self.mount(BASE);
        if let Some(text) = seen.difference(&self.vms[BASE].homes[0].tree) {
            panic!("vm {child} has seen something else in the base: {text}");
        }
    }

    fn add_child(&mut self) {
        let mut regions = some_regions(&mut self.rng);
        if self.is_shared() && self.vms.len() > 1 {
            // A kernel lays a file across all groups that it may write: a region that was written together with another
            // one cannot be passed on without it.
            let first = self.host.child(1).regions.len();
            regions = match first {
                1 => vec![regions[0]],
                _ => REGIONS.to_vec(),
            };
        }
        let policy = some_policy(&mut self.rng, &self.recipe);
        let extra = if self.recipe.may_grow() && self.rng.random_bool(0.5) {
            Extra::Grown
        } else {
            Extra::None
        };
        let number = self.host.create_child(&regions, policy, extra);
        self.log.push(format!(
            "vm {number} owns {regions:?}, besides {extra:?}, refresh={policy}"
        ));
        let disk = self.disks.file(number);
        self.vms.push(Vm::new(
            number,
            disk,
            &self.directory,
            self.host.loop_options(number),
        ));
        if self.is_shared() {
            self.host.child(number).is_served = false;
            self.pass_on_to(number);
        } else {
            let homes = regions.iter().map(|region| Home::of_region(region));
            self.vms[number].homes.extend(homes);
            self.restart_daemon();
        }
    }

    /// Another child gets its turn in its shared regions.
    fn pass_on(&mut self) {
        let resting = (1..self.vms.len()).filter(|vm| !self.host.serves(*vm));
        if let Some(vm) = resting.choose(&mut self.rng) {
            self.pass_on_to(vm);
        }
    }

    /// Whoever holds a region of `vm`'s lets go of all of its own.
    fn pass_on_to(&mut self, vm: usize) {
        self.log.push(format!("vm {vm} gets its turn"));
        let wanted = self.host.child(vm).regions.clone();
        for other in 1..self.vms.len() {
            let child = self.host.child(other);
            if child.is_served && child.regions.iter().any(|one| wanted.contains(one)) {
                self.unmount(other);
                self.host.child(other).is_served = false;
                self.unheld.append(&mut self.vms[other].homes);
            }
        }
        let is_wanted = |home: &mut Home| wanted.iter().any(|name| home.path == Path::new(name));
        self.vms[vm].homes = self.unheld.extract_if(.., is_wanted).collect();
        self.host.child(vm).is_served = true;
        self.restart_daemon();
        if let Some(view) = &self.views[vm] {
            assert!(!view.is_read_only());
        }
    }

    /// A region gets another group, which its children may take over at once or never; those of a shared region do, for
    /// they are to change what the others have written there.
    fn enlarge(&mut self) {
        for vm in 0..self.vms.len() {
            if self.host.serves(vm) {
                self.unmount(vm);
            }
        }
        self.disks.sockets.pause().fill(None);
        self.close();
        let region = REGIONS[self.rng.random_range(0..REGIONS.len())];
        self.spare -= 1;
        let is_larger = self.host.enlarge(region);
        self.log.push(format!("enlarge {region}: {is_larger}"));
        for vm in 1..self.vms.len() {
            let owns = self.host.child(vm).regions.contains(&region);
            if is_larger && owns && (self.is_shared() || self.rng.random()) {
                self.log.push(format!("vm {vm}: adopt"));
                self.host.adopt(vm);
            }
        }
        self.start_daemon();
    }

    /// Leaves a VM cleanly unmounted.
    fn unmount(&mut self, vm: usize) {
        if self.vms[vm].has_crashed {
            self.mount(vm);
        }
        if self.vms[vm].is_mounted {
            self.vms[vm].unmount(&mut self.log);
        }
        if vm == BASE {
            self.epoch += 1;
        }
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
        let policy = self.policy(vm);
        let moves = match policy {
            Policy::Live => true,
            // A guest that has crashed goes on with the view that it had.
            Policy::OnMount => !self.vms[vm].has_crashed,
            Policy::Manual => false,
        };
        self.vms[vm].mount(options, &mut self.log);
        if moves {
            self.vms[vm].seen = self.epoch;
        }
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

    /// A VM reads everything of the base's, after a sync there and with a mount of its own that is newer; and what
    /// others have written to shared regions.
    fn see_through(&mut self, vm: usize) {
        if vm == BASE && !self.is_shared() {
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
        if self.is_shared() {
            self.bring_to_place(vm);
        }
        self.refresh(vm);
        let vms = self.vms.iter().enumerate();
        let others = vms.filter(|(other, _)| self.is_shared() && *other != vm && *other != BASE);
        let shared = others.flat_map(|(_, vm)| &vm.homes);
        let base = (vm != BASE).then(|| &self.vms[BASE].homes[0]);
        for home in base.into_iter().chain(shared).chain(&self.unheld) {
            let found: Tree = self.vms[vm].read(home);
            if let Some(text) = home.tree.difference(&found) {
                panic!("vm {vm} sees in \"{}\": {text}", home.path.display());
            }
        }
    }

    /// Whoever writes a shared region brings it to its place, but for `vm`.
    fn bring_to_place(&mut self, vm: usize) {
        for other in 1..self.vms.len() {
            if other == vm || !self.host.serves(other) {
                continue;
            }
            if self.vms[other].has_crashed || self.vms[other].options.contains("data=journal") {
                // Data are brought to their place some time after a sync.
                self.unmount(other);
            } else if self.vms[other].is_mounted {
                self.sync(other);
            }
        }
        self.epoch += 1;
    }

    /// Has a VM look at the base as it is now.
    fn refresh(&mut self, vm: usize) {
        if !self.vms[vm].is_mounted || self.vms[vm].seen != self.epoch {
            self.look_anew(vm);
        }
    }

    /// Has a VM mount its disk anew, with a view that has moved to now.
    fn look_anew(&mut self, vm: usize) {
        if self.policy(vm) != Policy::Live {
            self.unmount(vm);
        }
        if self.policy(vm) == Policy::Manual {
            self.log.push(format!("vm {vm}: refresh"));
            block_on(self.view(vm).refresh()).unwrap();
            self.vms[vm].seen = self.epoch;
        }
        self.remount(vm);
    }

    fn trespass(&mut self, vm: usize) {
        self.mount(vm);
        if self.is_shared() {
            // A kernel that reads what another one is just writing takes it for corruption.
            self.bring_to_place(vm);
            self.look_anew(vm);
        }
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
            if !self.host.serves(vm) {
                told.push(None);
                continue;
            }
            // A file without a name may live on in a program that another test is just starting, until the unmount.
            self.remount(vm);
            told.push(Some(self.vms[vm].statfs()));
            self.vms[vm].unmount(&mut self.log);
        }
        self.disks.sockets.pause().fill(None);
        self.close();
        let filesystems = self.host.assert_true();
        let rooms = self.host.rooms();
        for (vm, (told, (room, _))) in told.iter().zip(&rooms).enumerate() {
            if let Some(told) = told {
                assert_told(vm, told, room);
            }
        }
        let shared = self.vms[1..].iter().flat_map(|vm| &vm.homes);
        let shared: Vec<&Home> = shared.chain(&self.unheld).collect();
        for (disk, vm) in filesystems.iter().zip(&self.vms) {
            let own = vm.homes.iter().filter(|_| vm.number != BASE);
            let mut homes = vec![&self.vms[BASE].homes[0]];
            if self.is_shared() {
                homes.extend(&shared);
            } else {
                homes.extend(own);
            }
            self.assert_flat(disk, vm.number, &rooms[vm.number].1, &homes);
        }
    }

    /// A filesystem by itself is as full as `map` says, and holds `homes`.
    fn assert_flat(&self, disk: &Path, vm: usize, map: &GroupMap, homes: &[&Home]) {
        let flat = self.directory.join("flat");
        fs::create_dir_all(&flat).unwrap();
        let (disk, mountpoint) = (disk.to_str().unwrap(), flat.to_str().unwrap());
        succeed("mount", &["-t", "ext4", "-o", "loop,ro", disk, mountpoint]);
        let free = map
            .groups
            .iter()
            .map(|group| group.blocks.total - group.blocks.used);
        let told = rustix::fs::statvfs(&flat).unwrap();
        if vm != BASE || self.is_shared() {
            assert_eq!(free.sum::<u64>(), told.f_bfree, "vm {vm} by itself");
        }
        for home in homes {
            let found = Tree::read(&flat.join(&home.path), &home.except).unwrap();
            if let Some(text) = home.tree.difference(&found) {
                panic!("vm {vm} by itself: {text}");
            }
        }
        unmount_disk(&flat);
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
