//! A hostile guest, drawn by chance, against a daemon that serves it, its base and a sibling at once.
//!
//! It knows ext4 and owns its whole ring. Whatever it does, nothing changes by a byte that is not its own, the daemon
//! lives and serves the others, and neither its memory nor its log grows with what is tried. By hand, for longer:
//!
//!     SEETHROUGH_TEST_ROUNDS=100 cargo test --release --test client hostile -- --nocapture

mod attacks;
mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::ext4::layout::Kind;
use seethrough::image::{Access, Image, RawImage};
use seethrough::storage::MemoryStorage;
use seethrough::sys::block_on;
use seethrough::units::{BlockGroup, FsBlock};
use seethrough::view::declaration::GroupList;
use seethrough::view::probe::{Probe, locate};
use tempfile::TempDir;

use crate::common::Backend;
use attacks::{Ground, Tally, attack};
use guest::Guest;

/// Attacks in a run of the default length.
const ATTACKS: u64 = 150;
/// After how many of them the sibling is looked at.
const BETWEEN: u64 = 50;
const RESERVED: &str = "4-5";
/// Log lines of one run that are no flood: everything that has a line of its own, and what limits let through.
const MAX_LINES: usize = 1000;
/// What the daemon's resident memory may grow by.
const MAX_GROWTH: u64 = 64 << 20;

/// A base and two children, and the daemon that serves them.
struct Scene {
    dir: TempDir,
    daemon: Option<Backend>,
}

fn run(program: &str, arguments: &[&str], dir: &Path) {
    let path = format!(
        "/usr/sbin:/sbin:{}",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .env("PATH", path)
        .output();
    let output = output.expect("the program starts");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Scene {
    fn new(mke2fs: &[&str]) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let at = dir.path();
        fs::create_dir_all(at.join("root/usr/bin")).expect("a directory");
        for n in 0..40u8 {
            let name = at.join(format!("root/usr/bin/program{n}"));
            fs::write(name, vec![n; 1000 * usize::from(n)]).expect("a file");
        }
        let options = [
            &["-q", "-t", "ext4", "-d", "root"],
            mke2fs,
            &["base.raw", "48M"],
        ]
        .concat();
        run("mke2fs", &options, at);
        run(
            "qemu-img",
            &["convert", "-O", "qcow2", "base.raw", "base.qcow2"],
            at,
        );
        let program = env!("CARGO_BIN_EXE_seethrough");
        let reserve = format!("local=groups:{RESERVED}");
        run(
            program,
            &[
                "prepare",
                "base.qcow2",
                "--reserve",
                &reserve,
                "--dir",
                "/local",
            ],
            at,
        );
        for child in ["tom", "ann"] {
            let image = format!("{child}.qcow2");
            run(
                program,
                &["create", "-b", "base.qcow2", "--region", "local", &image],
                at,
            );
        }
        let mut scene = Self { dir, daemon: None };
        scene.serve();
        scene
    }

    fn serve(&mut self) {
        let names = ["base", "tom", "ann"];
        let path = |name: String| self.dir.path().join(name).display().to_string();
        let vms = names.iter().flat_map(|name| {
            let (image, socket) = (path(format!("{name}.qcow2")), path(format!("{name}.sock")));
            [
                "--vm".to_owned(),
                format!("name={name},image={image},socket={socket}"),
            ]
        });
        let arguments = ["serve".to_owned()].into_iter().chain(vms);
        let sockets: Vec<PathBuf> = names.iter().map(|name| self.socket(name)).collect();
        self.daemon = Some(Backend::seethrough(arguments, &sockets));
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }

    fn guest(&self, name: &str) -> Guest {
        Guest::connect(&self.socket(name))
    }

    fn daemon(&self) -> &Backend {
        self.daemon.as_ref().expect("it is served")
    }

    /// Ends the daemon, which has to end well; what it logged.
    fn stop(&mut self) -> Vec<String> {
        let log = self.daemon.take().expect("it is served").stop();
        assert!(
            !log.iter().any(|line| line.contains("panicked")),
            "{}",
            log.join("\n")
        );
        log
    }

    fn file(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir.path().join(name)).expect("an image")
    }

    /// What an image holds, by a program that knows nothing of views.
    fn contents(&self, name: &str) -> Vec<u8> {
        let image = format!("{name}.qcow2");
        run(
            "qemu-img",
            &["convert", "-U", "-O", "raw", &image, "contents.raw"],
            self.dir.path(),
        );
        self.file("contents.raw")
    }

    fn check_images(&self) {
        for name in ["base", "tom", "ann"] {
            run(
                "qemu-img",
                &["check", "-q", &format!("{name}.qcow2")],
                self.dir.path(),
            );
        }
    }

    /// The daemon's resident memory, in bytes.
    fn resident(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.daemon().id())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("a line");
        let kib: u64 = line
            .split_whitespace()
            .next()
            .expect("a number")
            .parse()
            .expect("a number");
        kib << 10
    }

    fn probe(&self) -> Probe {
        let storage = Arc::new(MemoryStorage::new(self.contents("base")));
        let image: Arc<dyn Image> = Arc::new(RawImage::new(storage, Access::ReadOnly));
        let place = block_on(locate(&*image, None)).expect("a filesystem");
        block_on(Probe::read(&*image, place)).expect("a filesystem")
    }
}

/// Where the children's own data blocks are.
fn own_data(probe: &Probe) -> Vec<u64> {
    let groups: GroupList = RESERVED.parse().expect("groups");
    let block_size = u64::from(probe.superblock().block_size);
    (0..probe.superblock().blocks_count)
        .filter(|&block| {
            let kind = probe
                .layout()
                .classify(FsBlock(block))
                .map(|(kind, _)| kind);
            matches!(kind, Some(Kind::Data { group }) if groups.contains(group))
        })
        .map(|block| block * block_size)
        .collect()
}

/// The sibling, who writes her own files all the while.
struct Sibling {
    guest: Guest,
    own: Vec<u64>,
    expected: Vec<u8>,
}

impl Sibling {
    fn new(scene: &Scene, own: Vec<u64>, disk_len: usize) -> Self {
        let mut guest = scene.guest("ann");
        let expected = guest.read(0, disk_len);
        Self {
            guest,
            own,
            expected,
        }
    }

    /// She writes, and reads what she has written and what the base holds.
    fn live_on(&mut self, rng: &mut StdRng) {
        for _ in 0..8 {
            let at = self.own[rng.random_range(0..self.own.len())];
            let bytes = vec![rng.random(); 1024];
            assert_eq!(self.guest.write(at, &bytes), 0, "an honest write at {at}");
            let start = usize::try_from(at).expect("small");
            self.expected[start..start + bytes.len()].copy_from_slice(&bytes);
            assert_eq!(self.guest.read(at, bytes.len()), bytes);
        }
    }
}

fn rounds() -> u64 {
    let rounds = std::env::var("SEETHROUGH_TEST_ROUNDS").ok();
    rounds.map_or(1, |rounds| rounds.parse().expect("a number of rounds"))
}

fn seed() -> u64 {
    let given = std::env::var("SEETHROUGH_TEST_SEED").ok();
    let seed = given.map_or_else(rand::random, |seed| seed.parse().expect("a seed"));
    println!("SEETHROUGH_TEST_SEED={seed}");
    seed
}

/// Holds a log to what it may be.
fn assert_bounded(log: &[String], growth: u64, tally: &Tally) {
    println!(
        "{tally:?}; {} log lines; {} KiB more memory",
        log.len(),
        growth >> 10
    );
    assert!(
        log.len() < MAX_LINES,
        "{} lines:\n{}",
        log.len(),
        log[..100].join("\n")
    );
    assert!(growth < MAX_GROWTH, "{growth} bytes more");
}

fn hostile_child(mke2fs: &[&str]) {
    let mut scene = Scene::new(mke2fs);
    let base = scene.file("base.qcow2");
    let probe = scene.probe();
    let disk_len = scene.contents("base").len();
    let mut sibling = Sibling::new(&scene, own_data(&probe), disk_len);
    let groups: GroupList = RESERVED.parse().expect("groups");
    let ground = Ground::new(probe, groups, false, disk_len as u64);
    let mut rng = StdRng::seed_from_u64(seed());
    let mut tom = scene.guest("tom");
    let mut tally = Tally::default();
    let mut before = None;
    for n in 0..ATTACKS * rounds() {
        attack(&mut tom, &ground, &mut rng, &mut tally);
        if n % BETWEEN == BETWEEN - 1 {
            sibling.live_on(&mut rng);
            before.get_or_insert_with(|| scene.resident());
        }
    }
    assert!(tally.refused > 0, "nothing was refused");
    assert!(
        sibling.guest.read(0, disk_len) == sibling.expected,
        "the sibling sees something else"
    );
    let growth = scene.resident().saturating_sub(before.unwrap_or_default());
    drop((tom, sibling));
    let log = scene.stop();
    assert_bounded(&log, growth, &tally);
    assert!(
        scene.file("base.qcow2") == base,
        "the base's image has changed"
    );
    scene.check_images();
    assert_overlay_holds_nothing_foreign(&scene, &ground);
}

/// Nothing that is the base's has reached the attacker's own image, either.
fn assert_overlay_holds_nothing_foreign(scene: &Scene, ground: &Ground) {
    let (overlay, base) = (scene.contents("tom"), scene.contents("base"));
    let block_len = ground.block_len();
    for block in 0..ground.probe.superblock().blocks_count {
        let (kind, _) = ground
            .probe
            .layout()
            .classify(FsBlock(block))
            .expect("a block");
        let start = usize::try_from(block * block_len).expect("small");
        let end = start + usize::try_from(block_len).expect("small");
        let (own, theirs) = (&overlay[start..end], &base[start..end]);
        let is_foreign = match kind {
            Kind::Data { group }
            | Kind::BlockBitmap { group }
            | Kind::InodeBitmap { group }
            | Kind::InodeTable { group, .. } => !ground.owned.contains(group),
            Kind::Backup { .. } | Kind::Boot | Kind::ReservedDescriptors => true,
            Kind::Descriptors { index } => {
                let superblock = ground.probe.superblock();
                let size = usize::from(superblock.descriptor_size);
                let first = index * superblock.descriptors_per_block();
                for (group, (own, theirs)) in
                    (first..).zip(own.chunks(size).zip(theirs.chunks(size)))
                {
                    let foreign =
                        group < superblock.group_count && !ground.owned.contains(BlockGroup(group));
                    assert!(!foreign || own == theirs, "the descriptor of group {group}");
                }
                false
            }
            Kind::Superblock
            | Kind::Journal { .. }
            | Kind::OrphanFile { .. }
            | Kind::MultipleMount => false,
        };
        assert!(!is_foreign || own == theirs, "block {block}: {kind:?}");
    }
}

#[test]
fn a_hostile_child_changes_nothing_foreign() {
    hostile_child(&["-b", "4096", "-g", "2048", "-J", "size=4"]);
}

#[test]
fn a_hostile_child_changes_nothing_foreign_in_blocks_of_1_kib() {
    hostile_child(&["-b", "1024", "-O", "^flex_bg,^64bit"]);
}

/// The base's own VM is hostile: what it owns it may ruin, and its children see that; but what is theirs stays theirs.
#[test]
fn a_hostile_base_changes_nothing_of_its_children() {
    let mut scene = Scene::new(&["-b", "4096", "-g", "2048", "-J", "size=4"]);
    let probe = scene.probe();
    let before = scene.contents("base");
    let own = own_data(&probe);
    let mut sibling = Sibling::new(&scene, own.clone(), before.len());
    let tom = scene.file("tom.qcow2");
    let groups: GroupList = RESERVED.parse().expect("groups");
    let ground = Ground::new(probe, groups.clone(), true, before.len() as u64);
    let mut rng = StdRng::seed_from_u64(seed());
    let mut base = scene.guest("base");
    let mut tally = Tally::default();
    let mut resident = None;
    for n in 0..ATTACKS * rounds() {
        attack(&mut base, &ground, &mut rng, &mut tally);
        if n % BETWEEN == BETWEEN - 1 {
            sibling.live_on(&mut rng);
            resident.get_or_insert_with(|| scene.resident());
        }
    }
    for at in &own {
        let start = usize::try_from(*at).expect("small");
        let end = start + usize::try_from(ground.block_len()).expect("small");
        assert!(
            sibling.guest.read(*at, end - start) == sibling.expected[start..end],
            "the sibling's block at {at}"
        );
    }
    let growth = scene
        .resident()
        .saturating_sub(resident.unwrap_or_default());
    drop((base, sibling));
    let log = scene.stop();
    assert_bounded(&log, growth, &tally);
    scene.check_images();
    assert!(
        scene.file("tom.qcow2") == tom,
        "a child's image has changed"
    );
    let after = scene.contents("base");
    let block_len = ground.block_len();
    for block in 0..ground.probe.superblock().blocks_count {
        let (kind, _) = ground
            .probe
            .layout()
            .classify(FsBlock(block))
            .expect("a block");
        let served = match kind {
            Kind::Data { group }
            | Kind::BlockBitmap { group }
            | Kind::InodeBitmap { group }
            | Kind::InodeTable { group, .. } => group,
            _ => continue,
        };
        if groups.contains(served) {
            let start = usize::try_from(block * block_len).expect("small");
            let end = start + usize::try_from(block_len).expect("small");
            assert!(
                before[start..end] == after[start..end],
                "block {block}: {kind:?}"
            );
        }
    }
}

#[test]
fn memory_that_a_front_end_cuts_short_harms_no_other_vm() {
    let mut scene = Scene::new(&["-b", "4096", "-g", "2048", "-J", "size=4"]);
    let probe = scene.probe();
    let disk_len = scene.contents("base").len();
    let groups: GroupList = RESERVED.parse().expect("groups");
    let mut sibling = Sibling::new(&scene, own_data(&probe), disk_len);
    let ground = Ground::new(probe, groups, false, disk_len as u64);
    let mut rng = StdRng::seed_from_u64(seed());
    for _ in 0..4 {
        let mut tom = scene.guest("tom");
        attacks::fill(&mut tom, &ground, &mut rng, &mut Tally::default());
        tom.lose_memory();
        drop(tom);
        sibling.live_on(&mut rng);
    }
    assert_eq!(
        scene.guest("tom").read(0, 4096).len(),
        4096,
        "an honest one comes back"
    );
    drop(sibling);
    let log = scene.stop();
    assert!(
        log.iter().any(|line| line.contains("memory short")),
        "{}",
        log.join("\n")
    );
    scene.check_images();
}
