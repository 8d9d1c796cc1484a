//! Internal snapshots and sizes that change, by turns through the engine and through stock tools: every snapshot keeps
//! its bytes, what a power cut leaves is the state before or the one after, and stock tools find all of it sound.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

mod engine;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use engine::workload::{
    Operation, SHAPES, check_same, part_of, perform_batch, perform_batch_compressing, random_batch,
    read_range,
};
use engine::{Allowed, Backing, Chain, Shape, check, for_each_seed, load, qemu_img, rng, run};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::error::{ErrorKind, Result};
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{
    CrashStorage, Delays, Fault, FaultStorage, Lost, MemoryStorage, Moment, Storage,
};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

/// Images in which power is cut: small, as every cut is looked at.
const CUT_SHAPES: &[Shape] = &[
    Shape {
        options: "cluster_size=512",
        size: 60 << 10,
        backing: Backing::None,
    },
    Shape {
        options: "cluster_size=512,refcount_bits=64",
        size: 40 << 10,
        backing: Backing::LongRaw,
    },
    Shape {
        options: "cluster_size=4096,refcount_bits=8",
        size: 150 << 10,
        backing: Backing::Raw,
    },
    Shape {
        options: "cluster_size=16k,extended_l2=on",
        size: (200 << 10) + 512,
        backing: Backing::LongRaw,
    },
];

const ALIGNMENTS: &[u64] = &[1, 512, 4096];

/// What changes an image as a whole.
#[derive(Clone, Debug)]
enum Change {
    Create(String),
    Apply(String),
    Delete(String),
    Resize(u64),
}

impl Change {
    async fn make(&self, image: Qcow2) -> Result<Qcow2> {
        match self {
            Self::Create(name) => image.create_snapshot(OsStr::new(name), a_moment()).await,
            Self::Apply(id) => image.apply_snapshot(OsStr::new(id)).await,
            Self::Delete(id) => image.delete_snapshot(OsStr::new(id)).await,
            Self::Resize(size) => image.resize(*size).await,
        }
    }

    /// The arguments for `qemu-img` that do the same to `file`.
    fn arguments(&self, file: &str) -> Vec<String> {
        let words: &[&str] = match self {
            Self::Create(name) => &["snapshot", "-c", name, file],
            Self::Apply(id) => &["snapshot", "-a", id, file],
            Self::Delete(id) => &["snapshot", "-d", id, file],
            Self::Resize(size) => {
                let size = size.to_string();
                return ["resize", "-q", "-f", "qcow2", "--shrink", file, &size]
                    .map(str::to_owned)
                    .to_vec();
            }
        };
        words.iter().map(|word| (*word).to_owned()).collect()
    }
}

fn a_moment() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_180_333_499)
}

/// What an image holds: the disk's bytes, and every snapshot's, by its ID and name.
#[derive(Clone, PartialEq, Eq)]
struct Contents {
    disk: Vec<u8>,
    snapshots: Vec<(String, String, Vec<u8>)>,
}

impl Contents {
    /// Makes a change here that has been made to an image, whose new snapshot has `new_id`.
    fn follow(&mut self, change: &Change) {
        match change {
            Change::Create(name) => {
                let numbers = self
                    .snapshots
                    .iter()
                    .map(|(id, ..)| id.parse::<u64>().unwrap());
                let id = (numbers.max().unwrap_or(0) + 1).to_string();
                self.snapshots.push((id, name.clone(), self.disk.clone()));
            }
            Change::Apply(wanted) => {
                let found = self.snapshots.iter().find(|(id, ..)| id == wanted);
                self.disk = found.unwrap().2.clone();
            }
            Change::Delete(wanted) => self.snapshots.retain(|(_, name, _)| name != wanted),
            Change::Resize(size) => self.disk.resize(usize::try_from(*size).unwrap(), 0),
        }
    }

    /// A change that can be made, to an image of `shape`.
    fn random_change(&self, shape: &Shape, rng: &mut StdRng) -> Change {
        let pick = |rng: &mut StdRng| rng.random_range(0..self.snapshots.len());
        // Refcounts of two bits count an active disk and two snapshots.
        let has = |option: &str| shape.options.split(',').any(|one| one == option);
        let most = if has("refcount_bits=2") { 2 } else { 4 };
        let may_create = !has("refcount_bits=1");
        match rng.random_range(0..8) {
            0..3 if self.snapshots.len() < most && may_create => {
                Change::Create(format!("name {}", rng.random_range(0..1_000_000)))
            }
            0..5 if !self.snapshots.is_empty() => {
                Change::Apply(self.snapshots[pick(rng)].0.clone())
            }
            5 if !self.snapshots.is_empty() => Change::Delete(self.snapshots[pick(rng)].1.clone()),
            _ if shape.options.contains("compat=0.10") && !self.snapshots.is_empty() => {
                Change::Apply(self.snapshots[pick(rng)].0.clone())
            }
            _ => Change::Resize(rng.random_range(1..=shape.size * 2 / 512) * 512),
        }
    }
}

fn open(storage: Arc<dyn Storage>, chain: &Chain) -> Qcow2 {
    block_on(Qcow2::open(
        storage,
        chain.open_backing(),
        Access::ReadWrite,
    ))
    .expect("it opens")
}

fn top(chain: &Chain) -> Arc<dyn Storage> {
    Arc::clone(chain.top()) as Arc<dyn Storage>
}

/// What the image of these bytes holds.
fn contents(bytes: &[u8], chain: &Chain) -> Result<Contents> {
    let opened = |bytes: Vec<u8>| {
        let storage = Arc::new(MemoryStorage::new(bytes));
        block_on(Qcow2::open(storage, chain.open_backing(), Access::ReadOnly))
    };
    let image = opened(bytes.to_vec())?;
    let mut snapshots = Vec::new();
    for snapshot in block_on(image.snapshots())? {
        // Its disk, as the active one of a copy that is only read.
        let mut copy = bytes.to_vec();
        let size = snapshot.disk_size(image.virtual_size());
        copy[24..32].copy_from_slice(&size.to_be_bytes());
        copy[36..40].copy_from_slice(&snapshot.l1_size.to_be_bytes());
        copy[40..48].copy_from_slice(&snapshot.l1_table_offset.0.to_be_bytes());
        let text = |name: &OsStr| String::from_utf8(name.as_bytes().to_vec()).unwrap();
        let bytes = read_range(&opened(copy)?, 0..size)?;
        snapshots.push((text(&snapshot.id), text(&snapshot.name), bytes));
    }
    Ok(Contents {
        disk: read_range(&image, 0..image.virtual_size())?,
        snapshots,
    })
}

fn check_contents(found: &Contents, expected: &Contents, what: &str) {
    assert_eq!(
        found.disk.len(),
        expected.disk.len(),
        "{what}: the disk's length"
    );
    check_same(&found.disk, &expected.disk, 0, what);
    let ids = |contents: &Contents| -> Vec<(String, String)> {
        let all = contents.snapshots.iter();
        all.map(|(id, name, _)| (id.clone(), name.clone()))
            .collect()
    };
    assert_eq!(ids(found), ids(expected), "{what}");
    for ((id, _, found), (.., expected)) in found.snapshots.iter().zip(&expected.snapshots) {
        assert_eq!(
            found.len(),
            expected.len(),
            "{what}: length of snapshot {id}"
        );
        check_same(found, expected, 0, &format!("{what}: snapshot {id}"));
    }
}

/// A few batches of a guest's operations.
fn guest_operations(chain: &Chain, disk: &mut [u8], rng: &mut StdRng) {
    let image = open(top(chain), chain);
    for _ in 0..rng.random_range(1..5) {
        if image.virtual_size() < 4096 {
            break;
        }
        let batch = random_batch(rng, image.virtual_size(), ALIGNMENTS);
        let results = if rng.random_bool(0.3) {
            perform_batch_compressing(&image, &batch, rng)
        } else {
            perform_batch(&image, &batch, rng)
        };
        for ((range, operation), result) in batch.into_iter().zip(results) {
            result.unwrap_or_else(|error| panic!("{operation:?} at {range:?}: {error}"));
            let expected = part_of(disk, &range);
            match operation {
                Operation::Write(bytes) => expected.copy_from_slice(&bytes),
                Operation::Zero(_) => expected.fill(0),
                Operation::Discard => {
                    expected.copy_from_slice(&read_range(&image, range).unwrap());
                }
                Operation::Read | Operation::Flush => {}
            }
        }
    }
    block_on(image.flush()).unwrap();
}

/// What stock tools read from a snapshot.
fn stock_copy(chain: &Chain, id: &str) -> Vec<u8> {
    let (image, copy) = (
        chain.directory.path().join("top.qcow2"),
        chain.directory.path().join("copy.raw"),
    );
    let snapshot = format!("snapshot.id={id}");
    let words = ["convert", "-f", "qcow2", "-O", "raw", "-l", &snapshot].map(OsStr::new);
    qemu_img(&[&words[..], &[image.as_os_str(), copy.as_os_str()]].concat());
    std::fs::read(copy).unwrap()
}

/// Makes a change through stock tools, and takes over what only they do: the rest of the last cluster of a disk that
/// they shrink and grow again may have its old bytes.
fn change_by_stock_tools(chain: &mut Chain, expected: &mut Contents, change: &Change) {
    let path = chain.save_top(&chain.top().contents());
    qemu_img(&change.arguments(&path.display().to_string()));
    *chain.layers.last_mut().unwrap() = load(&path);
    let old_size = expected.disk.len();
    expected.follow(change);
    if expected.disk.len() > old_size {
        let image = open(top(chain), chain);
        let end = old_size.next_multiple_of(2 << 20).min(expected.disk.len());
        let range = old_size as u64..end as u64;
        expected.disk[old_size..end].copy_from_slice(&read_range(&image, range).unwrap());
    }
}

/// Stock QEMU counts a snapshot that it applies before it lets go of the disk, and leaks what it has counted before it
/// meets a limit, which is near with a few bits and compressed clusters; and it does not hide a longer backing image from a version 2 disk that grows.
fn stock_tools_can(change: &Change, shape: &Shape) -> bool {
    match change {
        Change::Create(_) | Change::Apply(_) => !["=2", "=4"]
            .iter()
            .any(|bits| shape.options.contains(&format!("refcount_bits{bits}"))),
        Change::Resize(_) => {
            !shape.options.contains("compat=0.10") || shape.backing == Backing::None
        }
        Change::Delete(_) => true,
    }
}

fn random_history(shape: &Shape, seed: u64) {
    let mut rng = rng(seed);
    let mut chain = Chain::create(shape, &mut rng);
    let mut expected = Contents {
        disk: chain.flat.clone(),
        snapshots: Vec::new(),
    };
    for step in 0..6 {
        guest_operations(&chain, &mut expected.disk, &mut rng);
        let change = expected.random_change(shape, &mut rng);
        let what = format!("step {step}, {change:?}");
        if stock_tools_can(&change, shape) && rng.random_bool(0.3) {
            change_by_stock_tools(&mut chain, &mut expected, &change);
        } else {
            let image = open(top(&chain), &chain);
            match block_on(change.make(image)) {
                Ok(_) => expected.follow(&change),
                // Everything stays as it was then.
                Err(error) => assert!(
                    error.to_string().contains("cannot count one more"),
                    "{what}: {error}"
                ),
            }
        }
        let bytes = chain.top().contents();
        check(&chain.save_top(&bytes), Allowed::Nothing)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let found = contents(&bytes, &chain).unwrap_or_else(|error| panic!("{what}: {error}"));
        check_contents(&found, &expected, &what);
        if let Some((id, _, bytes)) = expected.snapshots.first().filter(|_| step % 3 == 2) {
            // They read as much of it as the disk is long now.
            let found = stock_copy(&chain, id);
            let both = found.len().min(bytes.len());
            assert!(
                found[..both] == bytes[..both],
                "{what}: stock tools read snapshot {id}"
            );
        }
    }
}

#[test]
fn random_histories_of_snapshots_and_sizes_keep_every_byte() {
    for shape in SHAPES {
        for_each_seed(1, &format!("{shape:?}"), |seed| random_history(shape, seed));
    }
}

/// The distinct images that a power cut at any moment may leave: with everything lost, with nothing lost, and with
/// random parts lost.
fn survivors(storage: &CrashStorage, rng: &mut StdRng) -> Vec<((Moment, Lost), Vec<u8>)> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for at in storage.moments() {
        let some = Lost::Some { seed: rng.random() };
        for lost in [Lost::All, Lost::None, some] {
            let bytes = storage.after_power_cut(at, lost);
            let mut hasher = DefaultHasher::new();
            bytes.hash(&mut hasher);
            if seen.insert(hasher.finish()) {
                found.push(((at, lost), bytes));
            }
        }
    }
    found
}

/// Makes a change with the power cut at every moment; the image and what it holds afterwards.
fn cut_while(
    change: &Change,
    bytes: &[u8],
    before: &Contents,
    chain: &Chain,
    rng: &mut StdRng,
) -> (Vec<u8>, Contents) {
    let storage = Arc::new(CrashStorage::new(
        bytes.to_vec(),
        Delays::up_to(2, rng.random()),
    ));
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>, chain);
    block_on(change.make(image)).unwrap_or_else(|error| panic!("{change:?}: {error}"));
    let mut after = before.clone();
    after.follow(change);
    let survivors = survivors(&storage, rng);
    // Stock tools take their time: they look at the first, at the last and at some others.
    let judged = survivors.len().div_ceil(8);
    for (number, (cut, bytes)) in survivors.iter().enumerate() {
        let what = format!("{change:?}, {cut:?}");
        let found = contents(bytes, chain).unwrap_or_else(|error| panic!("{what}: {error}"));
        // Everything is as it was, or as it is going to be.
        if found != *before {
            check_contents(&found, &after, &what);
        }
        if number % judged == 0 || number + 1 == survivors.len() {
            let allowed = match change {
                // What new zeros replace is freed as a guest's writes free it.
                Change::Resize(size) if *size > before.disk.len() as u64 => Allowed::Leaks,
                _ => Allowed::Nothing,
            };
            check(&chain.save_top(bytes), allowed).unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
    let last = storage.contents();
    check_contents(&contents(&last, chain).unwrap(), &after, "in the end");
    (last, after)
}

fn power_cuts(shape: &Shape, seed: u64) {
    let mut rng = rng(seed);
    let chain = Chain::create(shape, &mut rng);
    let mut now = Contents {
        disk: chain.flat.clone(),
        snapshots: Vec::new(),
    };
    guest_operations(&chain, &mut now.disk, &mut rng);
    let mut bytes = chain.top().contents();
    if rng.random_bool(0.7) {
        // What free clusters hold must never show, nor be taken for a table.
        bytes.resize(bytes.len() + (1 << 20), 0xd5);
    }
    let (grown, shrunk) = (shape.size * 3 / 2 / 512 * 512, shape.size / 3 / 512 * 512);
    let changes = [
        Change::Resize(grown),
        Change::Create("one".into()),
        Change::Resize(shrunk),
        Change::Create("two".into()),
        Change::Resize(grown + 512),
        Change::Apply("1".into()),
        Change::Delete("two".into()),
        Change::Apply("1".into()),
        Change::Delete("one".into()),
    ];
    for change in changes {
        (bytes, now) = cut_while(&change, &bytes, &now, &chain, &mut rng);
        let storage = Arc::new(MemoryStorage::new(bytes));
        let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain);
        for _ in 0..3 {
            let at = rng.random_range(0..now.disk.len() as u64 / 512) * 512;
            let content = [rng.random(); 512];
            block_on(image.write(GuestOffset(at), IoBuf::from_bytes(&content))).unwrap();
            part_of(&mut now.disk, &(at..at + 512)).copy_from_slice(&content);
        }
        block_on(image.flush()).unwrap();
        drop(image);
        bytes = storage.contents();
    }
}

#[test]
fn a_power_cut_leaves_the_state_before_a_change_or_the_one_after() {
    for shape in CUT_SHAPES {
        for_each_seed(1, &format!("{shape:?}"), |seed| power_cuts(shape, seed));
    }
}

/// Makes a change with the file's `nth` operation failing: what is left, unless nothing failed.
fn fail_while(change: &Change, bytes: &[u8], chain: &Chain, fault: Fault) -> Option<Vec<u8>> {
    let memory = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let storage = Arc::new(FaultStorage::new(Arc::clone(&memory) as Arc<dyn Storage>));
    storage.inject(fault);
    let backing = chain.open_backing();
    let opened = block_on(Qcow2::open(storage, backing, Access::ReadWrite));
    let changed = opened.and_then(|image| block_on(change.make(image)));
    changed.is_err().then(|| memory.contents())
}

#[test]
fn a_failure_anywhere_leaves_the_state_before_a_change_or_the_one_after() {
    let shape = &CUT_SHAPES[1];
    for kind in [ErrorKind::NoSpace, ErrorKind::Io] {
        for_each_seed(1, &format!("{kind:?}"), |seed| {
            let mut rng = rng(seed);
            let chain = Chain::create(shape, &mut rng);
            let mut now = Contents {
                disk: chain.flat.clone(),
                snapshots: Vec::new(),
            };
            guest_operations(&chain, &mut now.disk, &mut rng);
            let mut bytes = chain.top().contents();
            let changes = [
                Change::Create("one".into()),
                Change::Resize(shape.size / 2),
                Change::Resize(shape.size * 2),
                Change::Apply("1".into()),
                Change::Delete("one".into()),
            ];
            for change in changes {
                let mut after = now.clone();
                after.follow(&change);
                for nth in 0.. {
                    let fault = Fault::nth(nth, kind).forever();
                    let Some(left) = fail_while(&change, &bytes, &chain, fault) else {
                        break;
                    };
                    let what = format!("{change:?}, operation {nth} fails with {kind:?}");
                    let found = contents(&left, &chain).unwrap_or_else(|e| panic!("{what}: {e}"));
                    if found != now {
                        check_contents(&found, &after, &what);
                    }
                    if nth % 16 == 0 {
                        let judged = check(&chain.save_top(&left), Allowed::Leaks);
                        judged.unwrap_or_else(|error| panic!("{what}: {error}"));
                    }
                }
                let storage = Arc::new(MemoryStorage::new(bytes));
                let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain);
                drop(block_on(change.make(image)).unwrap());
                (bytes, now) = (storage.contents(), after);
            }
        });
    }
}

#[test]
fn tables_grow_and_shrink_over_many_clusters() {
    for options in ["cluster_size=512", "cluster_size=512,refcount_bits=64"] {
        let shape = Shape {
            options,
            size: 100 << 10,
            backing: Backing::Raw,
        };
        let mut rng = rng(3);
        let chain = Chain::create(&shape, &mut rng);
        let mut disk = chain.flat.clone();
        guest_operations(&chain, &mut disk, &mut rng);
        let mut image = open(top(&chain), &chain);
        for size in [
            6 << 20,
            64 << 20,
            (64 << 20) + 512,
            9 << 20,
            512,
            0,
            3 << 20,
        ] {
            image = block_on(image.resize(size)).unwrap();
            let size = usize::try_from(size).unwrap();
            disk.resize(size, 0);
            if let Some(at) = (size as u64).checked_sub(512) {
                let content = IoBuf::from_bytes(&[9; 512]);
                block_on(image.write(GuestOffset(at), content)).unwrap();
                block_on(image.flush()).unwrap();
                disk[size - 512..].fill(9);
            }
            check(&chain.save_top(&chain.top().contents()), Allowed::Nothing).unwrap();
            let found = read_range(&image, 0..image.virtual_size()).unwrap();
            assert_eq!(found.len(), disk.len());
            check_same(&found, &disk, 0, &format!("{options}, {size} bytes"));
        }
    }
}

#[test]
fn compressed_clusters_are_counted_by_every_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    for options in [
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
    ] {
        let mut disk: Vec<u8> = (0..600u32 << 10).map(|i| i.to_be_bytes()[2] ^ 5).collect();
        std::fs::write(path("flat.raw"), &disk).unwrap();
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
        let (from, to) = (path("flat.raw"), path("top.qcow2"));
        qemu_img(&[&convert[..], &[&from, &to]].concat());
        let chain = Chain {
            layers: vec![load(to.as_ref())],
            directory: tempfile::tempdir().unwrap(),
            raw_base: false,
            flat: disk.clone(),
        };
        let mut rng = rng(11);
        let mut expected = Contents {
            disk: disk.clone(),
            snapshots: Vec::new(),
        };
        for change in [
            Change::Create("one".into()),
            Change::Create("two".into()),
            Change::Resize(300_032),
            Change::Resize(500_224),
            Change::Apply("1".into()),
            Change::Delete("one".into()),
            Change::Delete("two".into()),
        ] {
            let image = open(top(&chain), &chain);
            drop(block_on(change.make(image)).unwrap());
            expected.follow(&change);
            disk.clone_from(&expected.disk);
            guest_operations(&chain, &mut disk, &mut rng);
            expected.disk.clone_from(&disk);
            let bytes = chain.top().contents();
            check(&chain.save_top(&bytes), Allowed::Nothing).unwrap();
            let what = format!("{options}, {change:?}");
            check_contents(&contents(&bytes, &chain).unwrap(), &expected, &what);
        }
    }
}

/// The state of a VM lies behind the disk, in the same tables.
#[test]
fn the_state_of_a_vm_never_becomes_part_of_a_disk() {
    let shape = &CUT_SHAPES[0];
    let chain = Chain::create(shape, &mut rng(1));
    let path = chain.save_top(&chain.top().contents());
    let name = path.display().to_string();
    let vm_state = ["-f", "qcow2", "-c", "write -b -P 7 0 100k", &name];
    let (code, text) = run("qemu-io", &vm_state);
    assert_eq!(code, 0, "{text}");
    qemu_img(&["snapshot", "-c", "with a VM's state", &name]);
    let (code, text) = run("qemu-io", &vm_state);
    assert_eq!(code, 0, "{text}");

    let storage = load(&path);
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain);
    // The active disk has a state behind it: a snapshot leaves it out, and growing drops it.
    let image = block_on(image.create_snapshot(OsStr::new("ours"), a_moment())).unwrap();
    let snapshots = block_on(image.snapshots()).unwrap();
    assert!(snapshots[1].l1_size < snapshots[0].l1_size);
    let image = block_on(image.resize(1 << 20)).unwrap();
    let found = read_range(&image, 0..1 << 20).unwrap();
    assert!(found.iter().all(|byte| *byte == 0));
    let image = block_on(image.apply_snapshot(OsStr::new("1"))).unwrap();
    let image = block_on(image.resize(1 << 20)).unwrap();
    let found = read_range(&image, 0..1 << 20).unwrap();
    assert!(found.iter().all(|byte| *byte == 0));
    drop(image);

    // It is still there for the stock tools, which put it behind the disk again.
    std::fs::write(&path, storage.contents()).unwrap();
    check(&path, Allowed::Nothing).unwrap();
    qemu_img(&["snapshot", "-a", "1", &name]);
    let (code, text) = run(
        "qemu-io",
        &["-f", "qcow2", "-c", "read -b -P 7 0 100k", &name],
    );
    assert!(code == 0 && !text.contains("failed"), "{text}");
}

/// Where the words at `at` point to.
fn pointer(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
}

#[test]
fn metadata_of_snapshots_is_never_given_to_a_guest_whatever_refcounts_say() {
    let shape = &CUT_SHAPES[0];
    let chain = Chain::create(shape, &mut rng(1));
    let mut disk = chain.flat.clone();
    guest_operations(&chain, &mut disk, &mut rng(1));
    let long_name = "n".repeat(600);
    let image = open(top(&chain), &chain);
    let image = block_on(image.create_snapshot(OsStr::new(&long_name), a_moment())).unwrap();
    let snapshot = block_on(image.snapshots()).unwrap().remove(0);
    // Now the disk has tables of its own.
    for at in (0..shape.size).step_by(16 << 10) {
        block_on(image.write(GuestOffset(at), IoBuf::from_bytes(&[1; 512]))).unwrap();
    }
    block_on(image.flush()).unwrap();
    drop(image);
    let sound = chain.top().contents();
    let l1 = snapshot.l1_table_offset.0;
    let table_second_cluster = pointer(&sound, 64) + 512;
    for cluster in [l1, pointer(&sound, l1), table_second_cluster] {
        let mut bytes = sound.clone();
        let refcount_block = pointer(&bytes, pointer(&bytes, 48));
        let refcount = usize::try_from(refcount_block + cluster / 512 * 2).unwrap();
        assert_eq!(bytes[refcount..refcount + 2], [0, 1]);
        bytes[refcount + 1] = 0;
        // Neither to a new revision of the metadata ...
        let storage = Arc::new(MemoryStorage::new(bytes.clone()));
        let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain);
        let refusal = block_on(image.resize(shape.size * 2)).err().unwrap();
        let uncounted = refusal.to_string().contains("has refcount 0: repair");
        assert!(uncounted, "{cluster:#x}: {refusal}");
        assert!(storage.contents() == bytes, "{cluster:#x}");
        // ... nor to a guest.
        let image = open(storage as Arc<dyn Storage>, &chain);
        let refusal = (0..shape.size).step_by(512).find_map(|at| {
            let content = IoBuf::from_bytes(&[2; 512]);
            block_on(image.write(GuestOffset(at), content)).err()
        });
        let refusal = refusal.expect("the cluster is found free").to_string();
        assert!(refusal.contains("hold metadata"), "{cluster:#x}: {refusal}");
    }
}

#[test]
fn a_version_2_snapshot_of_another_size_is_refused() {
    let shape = Shape {
        options: "compat=0.10,cluster_size=4096",
        size: 100 << 10,
        backing: Backing::None,
    };
    let chain = Chain::create(&shape, &mut rng(1));
    let image = open(top(&chain), &chain);
    drop(block_on(image.create_snapshot(OsStr::new("one"), a_moment())).unwrap());
    let mut bytes = chain.top().contents();
    let disk_size = usize::try_from(pointer(&bytes, 64)).unwrap() + 48;
    bytes[disk_size..disk_size + 8].copy_from_slice(&(50u64 << 10).to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain);
    let refusal = block_on(image.apply_snapshot(OsStr::new("one")))
        .err()
        .unwrap();
    assert_eq!(refusal.kind(), ErrorKind::Unsupported, "{refusal}");
    assert!(storage.contents() == bytes);
}

#[test]
fn a_snapshot_of_uncounted_data_is_refused() {
    let chain = Chain::create(&CUT_SHAPES[0], &mut rng(1));
    let image = open(top(&chain), &chain);
    block_on(image.write(GuestOffset(0), IoBuf::from_bytes(&[1; 512]))).unwrap();
    block_on(image.flush()).unwrap();
    drop(image);
    let mut bytes = chain.top().contents();
    let data = pointer(&bytes, pointer(&bytes, pointer(&bytes, 40)));
    let refcount = pointer(&bytes, pointer(&bytes, 48)) + data / 512 * 2;
    bytes[usize::try_from(refcount).unwrap() + 1] = 0;
    let storage = Arc::new(MemoryStorage::new(bytes.clone()));
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain);
    let refusal = block_on(image.create_snapshot(OsStr::new("one"), a_moment()));
    let refusal = refusal.err().unwrap().to_string();
    assert!(
        refusal.contains("is in use and has refcount 0: repair"),
        "{refusal}"
    );
    assert!(storage.contents() == bytes);
}
