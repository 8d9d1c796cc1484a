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
    Operation, SHAPES, check_same, part_of, perform_batch, random_batch, read_range,
};
use engine::{Allowed, Backing, Chain, Shape, check, for_each_seed, load, qemu_img, rng};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::error::Result;
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
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
        options: "cluster_size=4096,refcount_bits=4",
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

/// What the image of these bytes holds; snapshots are read by applying them to a copy.
fn contents(bytes: &[u8], chain: &Chain) -> Result<Contents> {
    let copy = || Arc::new(MemoryStorage::new(bytes.to_vec())) as Arc<dyn Storage>;
    let opened = |storage| Qcow2::open(storage, chain.open_backing(), Access::ReadWrite);
    let image = block_on(opened(copy()))?;
    let mut snapshots = Vec::new();
    for snapshot in block_on(image.snapshots())? {
        let applied = block_on(block_on(opened(copy()))?.apply_snapshot(&snapshot.id))?;
        let text = |name: &OsStr| String::from_utf8(name.as_bytes().to_vec()).unwrap();
        let bytes = read_range(&applied, 0..applied.virtual_size())?;
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
        let results = perform_batch(&image, &batch, rng);
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

/// Stock QEMU counts a snapshot that it applies before it lets go of the disk, which two bits cannot say; and it does
/// not hide a longer backing image from a version 2 disk that grows.
fn stock_tools_can(change: &Change, shape: &Shape) -> bool {
    match change {
        Change::Apply(_) => !shape.options.contains("refcount_bits=2"),
        Change::Resize(_) => {
            !shape.options.contains("compat=0.10") || shape.backing == Backing::None
        }
        Change::Create(_) | Change::Delete(_) => true,
    }
}

fn random_history(shape: &Shape, seed: u64) {
    let mut rng = rng(seed);
    let mut chain = Chain::create(shape, &mut rng);
    let mut expected = Contents {
        disk: chain.flat.clone(),
        snapshots: Vec::new(),
    };
    for step in 0..8 {
        guest_operations(&chain, &mut expected.disk, &mut rng);
        let change = expected.random_change(shape, &mut rng);
        let what = format!("step {step}, {change:?}");
        if stock_tools_can(&change, shape) && rng.random_bool(0.3) {
            change_by_stock_tools(&mut chain, &mut expected, &change);
        } else {
            let image = open(top(&chain), &chain);
            block_on(change.make(image)).unwrap_or_else(|error| panic!("{what}: {error}"));
            expected.follow(&change);
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
    let judged = survivors.len().div_ceil(12);
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
