//! What is done to bytes that somebody has tampered with: the bodies of the fuzz targets, and of the seeded loops in
//! `tests/mutations.rs`.
//!
//! Whatever the bytes hold, a body ends, in a bounded number of operations on the file, with an error that gives a
//! reason at worst. A panic is a finding, and so is memory beyond the limit that whoever calls has set.

pub mod bounded;

use std::sync::Arc;
use std::time::SystemTime;

use bounded::Bounded;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::error::{Error, ErrorKind, Result};
use seethrough::ext4::group_descriptor::GroupDescriptor;
use seethrough::ext4::superblock::{self, SUPERBLOCK_SIZE, Superblock};
use seethrough::image::{Access, Allocation, Image, RawImage};
use seethrough::partition::Scan;
use seethrough::progress::Progress;
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::bitmap::BitmapDirectory;
use seethrough::qcow2::check::{Finding, Repair, Report, Severity, check, repair};
use seethrough::qcow2::commitment::committed_length;
use seethrough::qcow2::dump::Dump;
use seethrough::qcow2::header::Header;
use seethrough::qcow2::snapshot_table::read_snapshots;
use seethrough::storage::{MemoryStorage, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{FsBlock, GuestOffset, HostOffset};
use seethrough::view::probe::{Probe, locate, read_partitions};

/// How far into a disk bodies look, from its start and before its end.
const REACH: u64 = 64 << 20;

/// How much of it they skip behind a broken entry.
const STEP: u64 = 64 << 10;

/// A body, with its name.
pub type Body = (&'static str, fn(&[u8]));

/// Every body for qcow2 images.
pub const QCOW2: &[Body] = &[
    ("header", header),
    ("snapshot_table", snapshot_table),
    ("bitmaps", bitmaps),
    ("tables", tables),
    ("check", check_image),
    ("repair", repair_image),
    ("dirty", dirty),
    ("commitment", commitment),
    ("dump", dump),
    ("whole_image", whole_image),
    ("changes", changes),
];

/// Every body for raw disks.
pub const RAW: &[Body] = &[("filesystem", filesystem), ("partitions", partitions)];

/// A refusal has to say why.
fn refused(error: &Error) {
    assert!(
        !error.to_string().trim().is_empty(),
        "a refusal without a reason"
    );
}

fn judged<T>(result: Result<T>) -> Option<T> {
    result.inspect_err(refused).ok()
}

/// Reads the header, and writes it back: nothing may be lost.
pub fn header(image: &[u8]) {
    let Some(mut header) = judged(Header::parse(image)) else {
        return;
    };
    let _ = judged(header.require_readable());
    let _ = judged(header.require_writable());
    let Some(bytes) = judged(header.encode()) else {
        return;
    };
    let again = Header::parse(&bytes).expect("a header that was written can be read");
    assert!(again == header, "a header has changed by being written");
}

/// Reads the table of internal snapshots.
pub fn snapshot_table(image: &[u8]) {
    let storage = Bounded::new(image);
    if let Some(header) = judged(block_on(Header::read(&storage))) {
        let _ = judged(block_on(read_snapshots(&storage, &header)));
    }
}

/// Reads the directory of persistent bitmaps, and their tables.
pub fn bitmaps(image: &[u8]) {
    let storage = Bounded::new(image);
    let Some(header) = judged(block_on(Header::read(&storage))) else {
        return;
    };
    let directory = judged(block_on(BitmapDirectory::read(&storage, &header))).flatten();
    for bitmap in directory.iter().flat_map(|directory| &directory.bitmaps) {
        for cluster in judged(block_on(bitmap.read_table(&storage, &header)))
            .into_iter()
            .flatten()
        {
            let _ = judged(cluster);
        }
    }
}

/// Opens the image for reading, and maps its disk.
pub fn tables(image: &[u8]) {
    let storage = Arc::new(Bounded::new(image));
    let Some(disk) = judged(block_on(Qcow2::open(storage, None, Access::ReadOnly))) else {
        return;
    };
    let size = disk.virtual_size();
    for start in [0, size.saturating_sub(REACH)] {
        let end = size.min(start.saturating_add(REACH));
        let mut at = start;
        while at < end {
            let Some((_, run)) = judged(block_on(disk.allocation(GuestOffset(at), end - at)))
            else {
                // One broken entry says nothing of those further on.
                at = (at / STEP + 1) * STEP;
                continue;
            };
            assert!(run > 0, "an answer for nothing");
            at += run;
        }
    }
}

/// Checks the image.
pub fn check_image(image: &[u8]) {
    let storage = Bounded::new(image);
    let _ = judged(checked(&storage, &mut |_| {}));
}

fn checked(storage: &Bounded, listener: &mut dyn FnMut(Finding)) -> Result<Report> {
    block_on(check(storage, listener, &Progress::default()))
}

/// Repairs the image, in part and whole: no more is wrong afterwards than before, and what the repair calls sound can
/// be read.
pub fn repair_image(image: &[u8]) {
    for what in [Repair::Leaks, Repair::Refcounts, Repair::All] {
        let storage = Arc::new(Bounded::new(image));
        let mut findings = Vec::new();
        let mut listener = |finding: Finding| findings.push(finding.to_string());
        let progress = Progress::default();
        let repaired = block_on(repair(storage.as_ref(), what, &mut listener, &progress));
        let Some(repaired) = judged(repaired) else {
            continue;
        };
        let (before, after) = (repaired.before, repaired.after);
        // Freeing what the broken entries of a corrupt image may have meant shows in their flags.
        let is_no_worse = match what {
            Repair::Leaks => {
                corruptions(&storage, is_no_flag).len()
                    <= corruptions(&Bounded::new(image), is_no_flag).len()
            }
            Repair::Refcounts | Repair::All => after.corruptions <= before.corruptions,
        };
        assert!(
            is_no_worse,
            "repairing {what:?} corrupts: {before:?}, then {after:?}: {findings:#?}"
        );
        let again = checked(&storage, &mut |_| {}).expect("what was repaired can be checked");
        assert_eq!(again, after, "a repair of {what:?} misjudges its outcome");
        if what == Repair::All && after.corruptions == 0 {
            assert!(after.is_clean(), "a repair leaves leaks: {findings:#?}");
            read_sound(storage, &findings);
        }
    }
}

/// The corruptions of an image that can be checked.
fn corruptions(storage: &Bounded, counts: fn(&str) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut listener = |finding: Finding| {
        if finding.severity == Severity::Corruption && counts(&finding.text) {
            found.push(finding.text);
        }
    };
    let _ = checked(storage, &mut listener).expect("it could be checked before");
    found
}

/// Whether a finding is of something else than COPIED flags, which follow from refcounts.
fn is_no_flag(text: &str) -> bool {
    !text.contains("COPIED flag contradicts")
}

/// Reads the whole disk of an image that contradicts itself nowhere.
fn read_sound(storage: Arc<Bounded>, findings: &[String]) {
    let sound = |error: &Error| {
        refused(error);
        let is_corrupt = error.kind() == ErrorKind::Corrupt;
        assert!(
            !is_corrupt,
            "a sound image cannot be read: {error}: {findings:#?}"
        );
    };
    let backing = RawImage::new(
        Arc::new(MemoryStorage::new(vec![6; 1 << 20])),
        Access::ReadOnly,
    );
    let disk = Qcow2::open(storage, Some(Arc::new(backing)), Access::ReadOnly);
    let Ok(disk) = block_on(disk).inspect_err(sound) else {
        return;
    };
    let size = disk.virtual_size();
    for start in [0, size.saturating_sub(REACH)] {
        let end = size.min(start.saturating_add(REACH));
        let mut at = start;
        while at < end {
            let allocation = block_on(disk.allocation(GuestOffset(at), end - at));
            let Ok((allocation, run)) = allocation.inspect_err(sound) else {
                return;
            };
            assert!(run > 0, "an answer for nothing");
            // Compressed bytes are data: whether they can be decompressed no check says.
            if matches!(allocation, Allocation::Data(_) | Allocation::Zero(_)) {
                let buf = IoBuf::zeroed(usize::try_from(run.min(STEP)).expect("small"));
                let _ = block_on(disk.read(GuestOffset(at), buf)).inspect_err(sound);
            }
            at += run;
        }
    }
}

/// Opens the image for writing as one that was not closed cleanly, which repairs it in place: once it is open nothing
/// is corrupt, and what guests do leaves it as sound.
pub fn dirty(image: &[u8]) {
    let mut image = image.to_vec();
    let Some(bits) = image.get_mut(INCOMPATIBLE_FEATURES_END) else {
        return;
    };
    *bits |= 1;
    let mut rng = seeded(&image);
    let storage = Arc::new(Bounded::new(&image));
    for round in 0..2 {
        let shared = Arc::clone(&storage) as Arc<dyn Storage>;
        let Some(disk) = judged(block_on(Qcow2::open(shared, None, Access::ReadWrite))) else {
            assert!(round == 0, "an image that was sound cannot be opened again");
            return;
        };
        if is_version_3(&image) {
            // Who of several users of one cluster is the last has no flag for that: a copy too many is made.
            let corruptions = match round {
                0 => corruptions(&storage, |_| true),
                _ => corruptions(&storage, is_no_flag),
            };
            assert!(
                corruptions.is_empty(),
                "corrupt in round {round}: {corruptions:#?}"
            );
        }
        for _ in 0..12 {
            request(&disk, &mut rng);
        }
        let _ = judged(block_on(disk.flush()));
    }
}

/// Where the lowest of the incompatible features' bits lie: version 3 alone has them.
const INCOMPATIBLE_FEATURES_END: usize = 79;

fn is_version_3(image: &[u8]) -> bool {
    image.get(4..8) == Some(&[0, 0, 0, 3])
}

/// Random numbers that follow from the image alone.
fn seeded(image: &[u8]) -> StdRng {
    StdRng::seed_from_u64(image.iter().fold(0, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    }))
}

/// Reckons what the image can come to.
pub fn commitment(image: &[u8]) {
    let storage = Bounded::new(image);
    if let Some(header) = judged(block_on(Header::read(&storage))) {
        let _ = judged(block_on(committed_length(&storage, &header)));
    }
}

/// Shows the image's tables, and follows offsets through them in both directions.
pub fn dump(image: &[u8]) {
    let storage = Bounded::new(image);
    let Some(header) = judged(block_on(Header::read(&storage))) else {
        return;
    };
    let dump = Dump::new(&storage, &header);
    let _ = judged(block_on(dump.l1_table()));
    let _ = judged(block_on(dump.refcount_table()));
    let _ = judged(block_on(dump.l2_table(header.l1_table_offset)));
    for at in [0, 4096, 3 << 20, header.size / 2, u64::MAX] {
        let _ = judged(block_on(dump.trace(GuestOffset(at))));
    }
    for at in [0, image.len() as u64 / 2, 0x50000, u64::MAX] {
        let _ = judged(block_on(dump.find(HostOffset(at))));
    }
}

/// Opens the image for reading and then for writing, over another one, and does what guests do.
pub fn whole_image(image: &[u8]) {
    let mut rng = seeded(image);
    let storage = Arc::new(Bounded::new(image));
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let backing = RawImage::new(
            Arc::new(MemoryStorage::new(vec![6; 1 << 20])),
            Access::ReadOnly,
        );
        let storage = Arc::clone(&storage) as Arc<dyn Storage>;
        let Some(disk) = judged(block_on(Qcow2::open(
            storage,
            Some(Arc::new(backing)),
            access,
        ))) else {
            return;
        };
        for _ in 0..12 {
            request(&disk, &mut rng);
        }
        let _ = judged(block_on(disk.flush()));
    }
    let _ = judged(block_on(check(
        storage.as_ref(),
        &mut |_| {},
        &Progress::default(),
    )));
}

/// Takes, applies and deletes snapshots, and makes the disk longer and shorter.
pub fn changes(image: &[u8]) {
    let open = || -> Option<Qcow2> {
        let storage = Arc::new(Bounded::new(image));
        let disk = judged(block_on(Qcow2::open(storage, None, Access::ReadWrite)))?;
        Some(disk)
    };
    for number in 0..6 {
        let Some(disk) = open() else {
            return;
        };
        let name = if number == 0 { "two" } else { "one" };
        let changed = match number {
            0 => block_on(disk.create_snapshot(name.as_ref(), SystemTime::UNIX_EPOCH)),
            1 => block_on(disk.apply_snapshot(name.as_ref())),
            2 => block_on(disk.delete_snapshot(name.as_ref())),
            3 => block_on(disk.resize(0)),
            4 => block_on(disk.resize(1 << 20)),
            _ => block_on(disk.resize(9 << 20)),
        };
        if let Some(disk) = judged(changed) {
            let _ = judged(block_on(disk.write(GuestOffset(0), IoBuf::zeroed(512))));
            let _ = judged(block_on(disk.flush()));
        }
    }
}

fn request(disk: &Qcow2, rng: &mut StdRng) {
    let size = disk.virtual_size().max(512);
    let at = match rng.random_range(0..4) {
        0 => rng.random_range(0..size),
        1 => size - 512,
        _ => rng.random_range(0..size.min(4 << 20)),
    };
    let at = GuestOffset(at / 512 * 512);
    let len = rng.random_range(1..256) * 512;
    let bytes = len as u64;
    let result = match rng.random_range(0..8) {
        0 => block_on(disk.discard(at, bytes)),
        1 => block_on(disk.write_zeroes(at, bytes, ZeroMode::MayUnmap)),
        2 => block_on(disk.write_zeroes(at, bytes, ZeroMode::KeepAllocated)),
        3 | 4 => block_on(disk.write(at, IoBuf::zeroed(len))),
        5 => block_on(disk.allocation(at, bytes)).map(|_| ()),
        _ => block_on(disk.read(at, IoBuf::zeroed(len))),
    };
    let _ = judged(result);
    drop(disk.map_read(at, 512));
    drop(disk.map_write(at, 512));
}

/// Looks for an ext4 filesystem on a disk, reads what is where in it, and parses its superblock and descriptors,
/// sealed by a checksum where the tampering has broken it.
pub fn filesystem(disk: &[u8]) {
    let mut sealed = disk.to_vec();
    if let Some(bytes) = sealed.get_mut(SUPERBLOCK_AT..SUPERBLOCK_AT + SUPERBLOCK_SIZE)
        && let Ok(bytes) = <&mut [u8; SUPERBLOCK_SIZE]>::try_from(bytes)
    {
        superblock::seal(bytes);
        let _ = judged(Superblock::parse(bytes));
    }
    for disk in [disk, &sealed] {
        let image = RawImage::new(Arc::new(Bounded::new(disk)), Access::ReadOnly);
        let Some(place) = judged(block_on(locate(&image, None))) else {
            continue;
        };
        let Some(probe) = judged(block_on(Probe::read(&image, place))) else {
            continue;
        };
        for block in [0, 1, 8192, 8193, u64::MAX] {
            let _ = probe.layout().classify(FsBlock(block));
        }
    }
    for descriptor in disk.chunks(64).take(64) {
        let _ = GroupDescriptor::parse(descriptor);
    }
}

/// Where a filesystem that begins with the disk has its superblock.
const SUPERBLOCK_AT: usize = 1024;

/// Reads the partition tables of a disk.
pub fn partitions(disk: &[u8]) {
    let image = RawImage::new(Arc::new(Bounded::new(disk)), Access::ReadOnly);
    let _ = judged(block_on(read_partitions(&image)));
    // A disk that is said to be longer than it is.
    let mut scan = Scan::new(u64::MAX / 2);
    while let Some((_, len)) = scan.next_read() {
        let mut sector = disk.get(..len.min(disk.len())).unwrap_or_default().to_vec();
        sector.resize(len, 0xff);
        if judged(scan.supply(&sector)).is_none() {
            return;
        }
    }
    let _ = scan.finish();
}
