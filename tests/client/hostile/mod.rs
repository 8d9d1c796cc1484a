//! A hostile guest, drawn by chance, against a daemon that serves it, its base and a sibling at once.
//!
//! It knows ext4 and owns its whole ring. Whatever it does, nothing changes by a byte that is not its own, the daemon
//! lives and serves the others, and neither its memory nor its log grows with what is tried. By hand, for longer:
//!
//!     SEETHROUGH_TEST_ROUNDS=100 cargo test --release --test client hostile -- --nocapture

mod attacks;
mod guest;
mod kept;
mod scene;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::ext4::layout::Kind;
use seethrough::units::FsBlock;
use seethrough::view::declaration::GroupList;
use seethrough::view::probe::Probe;

use attacks::{Ground, Tally, attack};
use guest::Guest;
use kept::{Part, assert_counted, assert_kept};
use scene::{ANN, BASE, Direct, Place, Regions, Scene, Setup, TOM};

/// Attacks in a run of the default length.
const ATTACKS: u64 = 150;
/// After how many of them the sibling is looked at.
const BETWEEN: u64 = 50;
/// Log lines of one run that are no flood: everything that has a line of its own, and what limits let through.
const MAX_LINES: usize = 1000;
/// What the daemon's resident memory may grow by.
const MAX_GROWTH: u64 = 64 << 20;

/// Where the data blocks of `groups` are.
fn data_of(probe: &Probe, groups: &GroupList) -> Vec<u64> {
    let block_size = u64::from(probe.superblock().block_size);
    (0..probe.superblock().blocks_count)
        .filter(|&block| {
            let kind = probe
                .layout()
                .classify(FsBlock(block))
                .map(|(kind, _)| kind);
            matches!(kind, Some(Kind::Data { group }) if groups.contains(group))
        })
        .map(|block| probe.place().start.0 + block * block_size)
        .collect()
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("small")
}

/// The sibling, who writes her own files all the while.
struct Sibling {
    guest: Guest,
    own: Vec<u64>,
    expected: Vec<u8>,
}

impl Sibling {
    fn new(scene: &Scene, probe: &Probe, disk_len: usize) -> Self {
        let own = data_of(probe, &scene.setup.regions.groups(ANN));
        let mut guest = scene.guest(ANN);
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

fn hostile_child(setup: Setup) {
    let mut scene = Scene::new(setup);
    let image = scene.file("base.qcow2");
    let before = scene.contents(BASE);
    let probe = scene.probe();
    let mut sibling = Sibling::new(&scene, &probe, before.len());
    let groups = setup.regions.groups(TOM);
    let ground = Ground::new(probe, groups.clone(), false, before.len() as u64);
    let mut rng = StdRng::seed_from_u64(seed());
    let mut tom = scene.guest(TOM);
    let mut tally = Tally::default();
    let mut resident = None;
    for n in 0..ATTACKS * rounds() {
        attack(&mut tom, &ground, &mut rng, &mut tally);
        if n % BETWEEN == BETWEEN - 1 {
            sibling.live_on(&mut rng);
            resident.get_or_insert_with(|| scene.resident());
        }
    }
    assert!(tally.refused > 0, "nothing was refused");
    let seen = sibling.guest.read(0, before.len());
    let is_shared = setup.regions == Regions::Shared;
    assert_kept(&ground.probe, &sibling.expected, &seen, |part| {
        // What tom writes in the base she reads.
        let is_read = matches!(
            part,
            Part::Block(Kind::Data { .. } | Kind::InodeTable { .. })
        );
        let is_toms = part.served().is_some_and(|group| groups.contains(group));
        !(is_shared && is_read && is_toms)
    });
    let growth = scene
        .resident()
        .saturating_sub(resident.unwrap_or_default());
    let expected = sibling.expected.clone();
    drop((tom, sibling));
    let log = scene.stop();
    assert_bounded(&log, growth, &tally);
    scene.check_images();
    if is_shared {
        assert_base_keeps_all_but_shared(&scene, &ground, &before, &expected);
    } else {
        assert!(
            scene.file("base.qcow2") == image,
            "the base's image has changed"
        );
    }
    assert_overlay_holds_nothing_foreign(&scene, &ground);
}

/// In the base nothing has changed but what is the attacker's, and what the sibling has written of her own.
fn assert_base_keeps_all_but_shared(
    scene: &Scene,
    ground: &Ground,
    before: &[u8],
    expected: &[u8],
) {
    let after = scene.contents(BASE);
    let [toms, anns] = [TOM, ANN].map(|child| scene.setup.regions.groups(child));
    let is_hers = |part| matches!(part, Part::Block(Kind::Data { group }) if anns.contains(group));
    assert_kept(&ground.probe, before, &after, |part| {
        let is_his = part.served().is_some_and(|group| toms.contains(group));
        !is_his && !is_hers(part) && !matches!(part, Part::Block(Kind::Superblock))
    });
    assert_kept(&ground.probe, expected, &after, is_hers);
    assert_counted(&ground.probe, &toms, before, &after);
}

/// Nothing that is the base's has reached the attacker's own image, either.
fn assert_overlay_holds_nothing_foreign(scene: &Scene, ground: &Ground) {
    let (overlay, base) = (scene.contents(TOM), scene.contents(BASE));
    let in_overlay = match scene.setup.regions {
        Regions::Private => ground.owned.clone(),
        Regions::Shared => GroupList::from_iter([]),
    };
    assert_kept(&ground.probe, &base, &overlay, |part| match part.served() {
        Some(group) => !in_overlay.contains(group),
        None => !part.is_every_childs(),
    });
}

#[test]
fn a_hostile_child_changes_nothing_foreign() {
    hostile_child(Setup::USUAL);
}

#[test]
fn a_hostile_child_changes_nothing_foreign_in_blocks_of_1_kib() {
    hostile_child(Setup {
        mke2fs: &["-b", "1024", "-O", "^flex_bg,^64bit"],
        ..Setup::USUAL
    });
}

#[test]
fn a_hostile_child_changes_nothing_foreign_in_a_partition_past_the_hosts_cache() {
    hostile_child(Setup {
        place: Place::Partition,
        direct: Direct::Yes,
        ..Setup::USUAL
    });
}

#[test]
fn a_hostile_child_of_a_shared_region_changes_nothing_else_in_the_base() {
    hostile_child(Setup {
        regions: Regions::Shared,
        ..Setup::USUAL
    });
}

#[test]
fn a_hostile_child_of_a_shared_region_of_1_kib_blocks_in_a_partition_changes_nothing_else() {
    hostile_child(Setup {
        mke2fs: &["-b", "1024", "-O", "^flex_bg,^64bit"],
        regions: Regions::Shared,
        place: Place::Partition,
        direct: Direct::Yes,
    });
}

/// The base's own VM is hostile: what it owns it may ruin, and its children see that; but what is theirs stays theirs.
fn hostile_base(setup: Setup) {
    let mut scene = Scene::new(setup);
    let probe = scene.probe();
    let before = scene.contents(BASE);
    let mut sibling = Sibling::new(&scene, &probe, before.len());
    let tom = scene.file("tom.qcow2");
    let groups: GroupList = Regions::ALL.parse().expect("groups");
    let ground = Ground::new(probe, groups.clone(), true, before.len() as u64);
    let mut rng = StdRng::seed_from_u64(seed());
    let mut base = scene.guest(BASE);
    let mut tally = Tally::default();
    let mut resident = None;
    for n in 0..ATTACKS * rounds() {
        attack(&mut base, &ground, &mut rng, &mut tally);
        if n % BETWEEN == BETWEEN - 1 {
            sibling.live_on(&mut rng);
            resident.get_or_insert_with(|| scene.resident());
        }
    }
    for at in sibling.own.clone() {
        let end = index(at + ground.block_len());
        assert!(
            sibling.guest.read(at, index(ground.block_len())) == sibling.expected[index(at)..end],
            "the sibling's block at {at}"
        );
    }
    let growth = scene
        .resident()
        .saturating_sub(resident.unwrap_or_default());
    let expected = sibling.expected.clone();
    drop((base, sibling));
    let log = scene.stop();
    assert_bounded(&log, growth, &tally);
    scene.check_images();
    assert!(
        scene.file("tom.qcow2") == tom,
        "a child's image has changed"
    );
    let after = scene.contents(BASE);
    let anns = setup.regions.groups(ANN);
    let is_hers = |part| {
        setup.regions == Regions::Shared
            && matches!(part, Part::Block(Kind::Data { group }) if anns.contains(group))
    };
    assert_kept(&ground.probe, &before, &after, |part| {
        let is_the_childrens = part.served().is_some_and(|group| groups.contains(group));
        is_the_childrens && !is_hers(part)
    });
    assert_kept(&ground.probe, &expected, &after, is_hers);
}

#[test]
fn a_hostile_base_changes_nothing_of_its_children() {
    hostile_base(Setup::USUAL);
}

#[test]
fn a_hostile_base_changes_nothing_of_regions_that_children_write_in_it() {
    hostile_base(Setup {
        regions: Regions::Shared,
        ..Setup::USUAL
    });
}

#[test]
fn memory_that_a_front_end_cuts_short_harms_no_other_vm() {
    let mut scene = Scene::new(Setup::USUAL);
    let probe = scene.probe();
    let disk_len = scene.contents(BASE).len();
    let groups = scene.setup.regions.groups(TOM);
    let mut sibling = Sibling::new(&scene, &probe, disk_len);
    let ground = Ground::new(probe, groups, false, disk_len as u64);
    let mut rng = StdRng::seed_from_u64(seed());
    for _ in 0..4 {
        let mut tom = scene.guest(TOM);
        attacks::fill(&mut tom, &ground, &mut rng, &mut Tally::default());
        tom.lose_memory();
        drop(tom);
        sibling.live_on(&mut rng);
    }
    assert_eq!(
        scene.guest(TOM).read(0, 4096).len(),
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
