//! A journal that is in use, seen through: what children are shown of a base that is mounted is what e2fsck makes of
//! the same disk when it replays the journal, after every commit of a real kernel.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::ext4::layout::Kind;
use seethrough::image::{Access, Image, ImageFuture, Mapped, RawImage};
use seethrough::storage::{Delays, FaultStorage, IoFuture, MemoryStorage, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{FsBlock, GuestOffset, HostOffset};
use seethrough::view::View;
use seethrough::view::declaration::Extent;
use seethrough::view::open::open_base;

use crate::bed::{Bed, Changed, Kernel, Recipe, can_mount, dump, try_run};

/// A filesystem, and how it is mounted.
struct Case {
    recipe: Recipe,
    options: &'static str,
}

macro_rules! case {
    ($name:literal, [$($argument:literal),*], $megabytes:literal, $groups:literal, $options:literal) => {
        Case {
            recipe: Recipe {
                name: $name,
                mke2fs: &["-t", "ext4", $($argument),*],
                megabytes: $megabytes,
                groups: $groups,
                start: 0,
            },
            options: $options,
        }
    };
}

/// The smallest journals, so that logs come round several times; every kind of tag and of checksum. Nothing is committed
/// but when the test asks for it.
const CASES: &[Case] = &[
    case!(
        "checksums of version 3",
        ["-b", "4096", "-g", "2048", "-J", "size=4"],
        64,
        "6-7",
        "commit=600"
    ),
    case!(
        "no checksums",
        ["-b", "1024", "-J", "size=1", "-O", "^metadata_csum"],
        40,
        "3-4",
        "commit=600"
    ),
    case!(
        "32-bit tags",
        ["-b", "1024", "-J", "size=1", "-O", "^metadata_csum,^64bit"],
        40,
        "3-4",
        "commit=600"
    ),
    case!(
        "one checksum for all",
        ["-b", "1024", "-J", "size=1", "-O", "^metadata_csum"],
        40,
        "3-4",
        "commit=600,journal_checksum"
    ),
    case!(
        "early commits",
        ["-b", "1024", "-J", "size=1"],
        40,
        "3-4",
        "commit=600,journal_async_commit,data=writeback"
    ),
    case!(
        "data in the journal",
        ["-b", "1024", "-J", "size=1"],
        40,
        "3-4",
        "commit=600,data=journal"
    ),
];

const COMMITS: u32 = 12;
const MAGIC: [u8; 4] = 0xc03b_3998u32.to_be_bytes();

/// Changes files as programs do; some begin with the journal's magic number, which a log has to escape.
fn use_filesystem(top: &Path, rng: &mut StdRng) {
    let name = |rng: &mut StdRng| top.join(format!("d{}", rng.random_range(0..4)));
    for _ in 0..rng.random_range(1..12) {
        let directory = name(rng);
        let file = directory.join(format!("f{}", rng.random_range(0..20)));
        let _ = fs::create_dir(&directory);
        match rng.random_range(0..8) {
            0 => drop(fs::remove_file(&file)),
            1 => drop(fs::remove_dir_all(&directory)),
            2 => drop(fs::rename(&file, name(rng).join("renamed"))),
            3 => drop(fs::hard_link(&file, directory.join("linked"))),
            _ => {
                let mut bytes = MAGIC.repeat(256);
                bytes.resize(rng.random_range(4..40_000), rng.random());
                let mut file = fs::File::create(&file).unwrap();
                file.write_all(&bytes).unwrap();
            }
        }
    }
}

/// The disk after e2fsck has replayed its journal.
fn replayed(bed: &Bed, disk: &[u8]) -> Vec<u8> {
    let path = bed.path("replayed");
    fs::write(&path, disk).unwrap();
    let (code, text) = try_run(
        "e2fsck",
        &["-y", "-E", "journal_only", path.to_str().unwrap()],
    );
    assert!(matches!(code, Some(0 | 1)), "e2fsck: {text}");
    fs::read(&path).unwrap()
}

/// Whether a block is the base's alone.
fn base_blocks(bed: &Bed) -> Vec<bool> {
    let probe = bed.probe();
    let reserved: Vec<u32> = bed
        .declaration
        .regions
        .iter()
        .flat_map(|region| match &region.extent {
            Extent::Groups { list, .. } => list.iter().map(|group| group.0).collect(),
            _ => Vec::new(),
        })
        .collect();
    (0..probe.superblock().blocks_count)
        .map(|block| match probe.layout().classify(FsBlock(block)) {
            Some((
                Kind::Data { group }
                | Kind::BlockBitmap { group }
                | Kind::InodeBitmap { group }
                | Kind::InodeTable { group, .. },
                _,
            )) => !reserved.contains(&group.0),
            _ => false,
        })
        .collect()
}

fn assert_shows(
    shown: &dyn Image,
    expected: &[u8],
    block_size: usize,
    is_base: &[bool],
    what: &str,
) {
    let shown = dump(shown);
    let blocks = shown.chunks(block_size).zip(expected.chunks(block_size));
    let wrong: Vec<usize> = blocks
        .enumerate()
        .filter(|(block, (shown, expected))| {
            is_base.get(*block).copied().unwrap_or(false) && shown != expected
        })
        .map(|(block, _)| block)
        .collect();
    assert!(
        wrong.is_empty(),
        "{what}: blocks {wrong:?} are not as e2fsck replays them"
    );
}

/// Sorts blocks as a kernel writes them: what had been committed before to its place, then the journal's superblock,
/// then the log, from its `head` on and around its end. `journal` says where the journal's blocks are.
fn sort_as_written(journal: &[u64], head: usize, changed: &mut [Changed]) {
    let position = |at: u64| journal.iter().position(|block| *block == at);
    changed.sort_by_cached_key(|one| match position(one.at) {
        None => 0,
        Some(0) => 1,
        Some(index) => 2 + (index + journal.len() - head) % journal.len(),
    });
}

/// Where the log goes on: behind the last commit block.
fn head_of(journal: &[u64], disk: &[u8]) -> usize {
    const COMMIT: [u8; 4] = [0, 0, 0, 2];
    let block = |at: u64| &disk[usize::try_from(at).unwrap()..][..12];
    let commits = journal
        .iter()
        .enumerate()
        .skip(1)
        .filter(|(_, at)| block(**at).starts_with(&[MAGIC, COMMIT].concat()));
    let last = commits.max_by_key(|(_, at)| sequence_of(block(**at)));
    last.map_or(1, |(position, _)| position % (journal.len() - 1) + 1)
}

fn sequence_of(block: &[u8]) -> u32 {
    u32::from_be_bytes(block[8..12].try_into().unwrap())
}

/// Runs the base's kernel over a copy, and after every commit looks at what children are shown: by those who followed
/// every write, and by those who scan the log anew.
fn follow(case: &Case, seed: u64) -> usize {
    let what = format!("{} (seed {seed})", case.recipe.name);
    let bed = Bed::new(&case.recipe);
    let mut rng = StdRng::seed_from_u64(seed);
    let is_base = base_blocks(&bed);
    let probe = bed.probe();
    let size = usize::try_from(probe.superblock().block_size).unwrap();
    let journal: Vec<u64> = probe
        .journal()
        .iter()
        .flat_map(|extent| {
            (0..u64::from(extent.len)).map(|block| (extent.start.0 + block) * size as u64)
        })
        .collect();
    let view = bed.base_view();
    let followed = Arc::clone(bed.shared().committed());
    let mut kernel = Kernel::mount(&bed, &view, "base", case.options);
    let mut disk = bed.stored();
    let mut in_log = 0;
    for commit in 0..COMMITS {
        // Often, so that the log comes round and its beginning moves.
        for _ in 0..rng.random_range(1..12) {
            use_filesystem(&kernel.mount, &mut rng);
            kernel.commit_unwritten();
        }
        disk =
            kernel.commit(|changed| sort_as_written(&journal, head_of(&journal, &disk), changed));
        let expected = replayed(&bed, &disk);
        let changed = disk.chunks(size).zip(expected.chunks(size));
        in_log += changed
            .zip(&is_base)
            .filter(|((disk, new), base)| **base && disk != new)
            .count();
        assert_shows(
            &*followed,
            &expected,
            size,
            &is_base,
            &format!("{what}: commit {commit}, followed"),
        );
        let stored = RawImage::new(Arc::new(MemoryStorage::new(disk.clone())), Access::ReadOnly);
        let scanned = bed.share(Arc::new(stored));
        assert_shows(
            &**scanned.committed(),
            &expected,
            size,
            &is_base,
            &format!("{what}: commit {commit}, scanned"),
        );
    }
    let disk = kernel.unmount();
    assert_shows(
        &*followed,
        &disk,
        size,
        &is_base,
        &format!("{what}: unmounted"),
    );
    in_log
}

#[test]
fn children_see_what_the_base_has_committed_at_every_commit() {
    if !can_mount() {
        return;
    }
    let rounds = std::env::var("SEETHROUGH_TEST_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    for case in CASES {
        let in_log: usize = (0..rounds).map(|seed| follow(case, seed)).sum();
        assert!(
            in_log > 0,
            "{}: nothing was ever in the log alone",
            case.recipe.name
        );
        println!(
            "{}: {in_log} blocks were in the log alone",
            case.recipe.name
        );
    }
}

/// A base that goes on writing in the middle of a read.
struct Interrupted {
    storage: Arc<MemoryStorage>,
    interruption: Mutex<Option<Interruption>>,
}

/// What the base's VM writes right before these bytes of its disk are read.
struct Interruption {
    at: u64,
    view: Arc<View>,
    writes: Vec<Changed>,
}

impl Interrupted {
    fn interruption(&self, at: HostOffset) -> Option<Interruption> {
        let mut interruption = self.interruption.lock().unwrap();
        interruption.take_if(|interruption| interruption.at == at.0)
    }
}

impl Storage for Interrupted {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            if let Some(Interruption { view, writes, .. }) = self.interruption(at) {
                for Changed { at, bytes } in writes {
                    view.write(GuestOffset(at), IoBuf::from_bytes(&bytes))
                        .await?;
                }
            }
            self.storage.readv(at, buf).await
        })
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.storage.writev(at, buf)
    }

    fn flush(&self) -> IoFuture<'_> {
        self.storage.flush()
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        self.storage.discard(at, len)
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        self.storage.write_zeroes(at, len, mode)
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        self.storage.set_len(len)
    }

    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn alignment(&self) -> u32 {
        self.storage.alignment()
    }

    fn name(&self) -> &str {
        "interrupted"
    }
}

/// The base checkpoints, empties its journal and overwrites the log between a child's look at the index and its read.
#[test]
fn a_block_that_leaves_the_log_while_it_is_read_is_read_from_its_place() {
    if !can_mount() {
        return;
    }
    let bed = Bed::new(&CASES[0].recipe);
    let is_base = base_blocks(&bed);
    let probe = bed.probe();
    let size = u64::from(probe.superblock().block_size);
    let log = probe.journal()[0].start.0 + 1
        ..probe.journal()[0].start.0 + u64::from(probe.journal()[0].len);
    let storage = Arc::new(Interrupted {
        storage: bed.storage.clone(),
        interruption: Mutex::default(),
    });
    let disk = RawImage::new(Arc::clone(&storage) as Arc<dyn Storage>, Access::ReadWrite);
    let shared = bed.share(Arc::new(disk));
    let view = Arc::new(block_on(open_base("base", &shared)).unwrap());
    let mut kernel = Kernel::mount(&bed, &*view, "base", "commit=600");
    fs::create_dir(kernel.mount.join("new")).unwrap();
    let stored = kernel.commit(|changed| sort_as_written(&[], 1, changed));

    let shown = dump(&**shared.committed());
    let differs = |block: &u64| {
        let range =
            usize::try_from(block * size).unwrap()..usize::try_from((block + 1) * size).unwrap();
        shown[range.clone()] != stored[range]
    };
    let blocks = 0..probe.superblock().blocks_count;
    let block = blocks
        .filter(|block| is_base[usize::try_from(*block).unwrap()])
        .find(differs)
        .unwrap();
    let mut writes = kernel.unmount_unwritten();
    writes.sort_by_key(|one| log.contains(&(one.at / size)));
    writes.extend(log.map(|block| Changed {
        at: block * size,
        bytes: vec![0xee; usize::try_from(size).unwrap()],
    }));
    let expected = writes
        .iter()
        .rfind(|one| one.at == block * size)
        .unwrap()
        .bytes
        .clone();
    let place = log_place(&shown, &stored, block, size);
    *storage.interruption.lock().unwrap() = Some(Interruption {
        at: place,
        view,
        writes,
    });
    let buf = IoBuf::zeroed(usize::try_from(size).unwrap());
    block_on(
        shared
            .committed()
            .read(GuestOffset(block * size), buf.clone()),
    )
    .unwrap();
    assert!(
        storage.interruption.lock().unwrap().is_none(),
        "the read was not interrupted"
    );
    assert!(buf.to_vec() == expected);
}

/// The base has committed a block, and brings it to its place while a child still reads what was there before.
#[test]
fn a_committed_block_comes_to_its_place_after_the_reads_that_began_before() {
    if !can_mount() {
        return;
    }
    let bed = Bed::new(&CASES[0].recipe);
    let is_base = base_blocks(&bed);
    let probe = bed.probe();
    let size = u64::from(probe.superblock().block_size);
    let delayed = FaultStorage::with_delays(bed.storage.clone(), Delays::up_to(8, 1));
    let disk = RawImage::new(Arc::new(delayed), Access::ReadWrite);
    let shared = bed.share(Arc::new(disk));
    let committed = shared.committed();
    let view = block_on(open_base("base", &shared)).unwrap();
    let mut kernel = Kernel::mount(&bed, &view, "base", "commit=600");

    let bytes = usize::try_from(size).unwrap();
    let mut context = Context::from_waker(Waker::noop());
    let mapped = committed.map_read(GuestOffset(size), size);
    assert!(matches!(mapped, Mapped::Extent { .. }));
    let buf = IoBuf::zeroed(bytes);
    let mut read = committed.read(GuestOffset(size), buf.clone());
    while read.as_mut().poll(&mut context).is_ready() {
        read = committed.read(GuestOffset(size), buf.clone());
    }
    fs::create_dir(kernel.mount.join("new")).unwrap();
    let stored = kernel.commit(|changed| sort_as_written(&[], 1, changed));
    let shown = dump(&**committed);
    let block = (0..probe.superblock().blocks_count)
        .filter(|block| is_base[usize::try_from(*block).unwrap()])
        .map(|block| usize::try_from(block * size).unwrap())
        .find(|at| shown[*at..at + bytes] != stored[*at..at + bytes])
        .unwrap();
    let at = GuestOffset(block as u64);
    assert!(matches!(committed.map_read(at, size), Mapped::Slow));
    assert!(matches!(view.map_write(at, size), Mapped::Slow));

    let new = shown[block..block + bytes].to_vec();
    let is_in_place = || bed.storage.contents()[block..block + bytes] == new;
    let mut write = view.write(at, IoBuf::from_bytes(&new));
    let mut waits = |write: &mut ImageFuture<'_>| {
        (0..100).all(|_| write.as_mut().poll(&mut context).is_pending()) && !is_in_place()
    };
    assert!(waits(&mut write), "both reads are under way");
    drop(mapped);
    assert!(waits(&mut write), "one read is under way");
    block_on(read).unwrap();
    block_on(write).unwrap();
    assert!(is_in_place());

    // Whoever reads now finds it in the log.
    let _late = committed.map_read(GuestOffset(size), size);
    block_on(view.write(at, IoBuf::from_bytes(&new))).unwrap();
    drop(kernel.unmount_unwritten());
}

/// Where on the disk the last committed contents of a block are: in the log, since they differ from its place.
fn log_place(shown: &[u8], stored: &[u8], block: u64, size: u64) -> u64 {
    let size = usize::try_from(size).unwrap();
    let block = usize::try_from(block).unwrap();
    let wanted = &shown[block * size..(block + 1) * size];
    let found = stored.chunks(size).position(|bytes| bytes == wanted);
    (found.unwrap() * size) as u64
}

/// What `dumpe2fs` says is free in the reserved groups of `recipe`, which are 6 and 7.
fn free_in_reserved_groups(path: &Path) -> Vec<String> {
    let text = crate::bed::run("dumpe2fs", &[path.to_str().unwrap()]);
    let groups = text
        .split("\nGroup ")
        .filter(|group| group.starts_with("6:") || group.starts_with("7:"));
    let lines = groups.flat_map(str::lines);
    lines
        .filter(|line| line.contains(" free blocks, "))
        .map(|line| line.trim().to_owned())
        .collect()
}

#[test]
fn a_stock_e2fsck_that_replays_a_crashed_base_leaves_reserved_groups_as_they_really_are() {
    if !can_mount() {
        return;
    }
    let bed = Bed::new(&CASES[0].recipe);
    let before = bed.path("before");
    fs::write(&before, bed.stored()).unwrap();
    let view = bed.base_view();
    let mut kernel = Kernel::mount(&bed, &view, "base", CASES[0].options);
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..4 {
        use_filesystem(&kernel.mount, &mut rng);
        kernel.commit(|_| ());
    }
    drop(kernel.unmount_unwritten());
    // The log holds the base's view of the descriptors, in which the groups are full.
    let crashed = bed.path("crashed");
    fs::write(&crashed, bed.stored()).unwrap();
    let (code, text) = try_run("e2fsck", &["-fy", crashed.to_str().unwrap()]);
    assert!(matches!(code, Some(0 | 1)), "e2fsck: {text}");
    assert!(text.contains("recovering journal"), "{text}");
    crate::bed::assert_clean(&crashed);
    let expected = free_in_reserved_groups(&before);
    assert_eq!(expected.len(), 2);
    assert_eq!(free_in_reserved_groups(&crashed), expected);
}
