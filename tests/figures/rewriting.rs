//! Rewriting full images without a flush: what is discarded is not free yet, and still the file goes no further.

use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Waker};

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image, Mapped};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::commitment::committed_length;
use seethrough::qcow2::header::Header;
use seethrough::storage::{self, Fault, FaultStorage, MemoryStorage, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::engine::workload::{self, Operation, perform_batch};
use crate::engine::{Allowed, Chain, Yielding, check, for_each_seed, load, qemu_img, rng};
use crate::made::{Made, Past, SHAPES};

/// A few requests on the disk, many of which give room back and none of which is a flush, each in a part of its own.
fn batch(size: u64, rng: &mut StdRng) -> Vec<(Range<u64>, Operation)> {
    let count = rng.random_range(1..=6u64);
    let part = (size / count).max(1);
    (0..count)
        .map(|number| {
            let start = number * part + rng.random_range(0..part.div_ceil(3));
            let end = start + rng.random_range(1..=part - (start - number * part));
            // Most requests are for whole clusters; what they are aligned to fits all sizes but the largest.
            let align = [1, 512, 65536][rng.random_range(0..3)];
            let start = start / align * align;
            let range = start..end.next_multiple_of(align).min(size).max(start + 1);
            let len = usize::try_from(range.end - range.start).unwrap();
            let operation = match rng.random_range(0..10) {
                0..5 => Operation::Write(vec![7; len]),
                5 => Operation::Zero(ZeroMode::KeepAllocated),
                6..8 => Operation::Zero(ZeroMode::MayUnmap),
                _ => Operation::Discard,
            };
            (range, operation)
        })
        .collect()
}

/// Fills the disk, and rewrites it; the file never becomes longer than `committed`.
fn rewrite(disk: &Qcow2, file: &MemoryStorage, committed: u64, what: &str, rng: &mut StdRng) {
    let size = disk.virtual_size();
    if rng.random_bool(0.7) {
        let all = IoBuf::from_bytes(&vec![9; usize::try_from(size).unwrap()]);
        block_on(disk.write(GuestOffset(0), all)).unwrap();
    }
    for _ in 0..15 {
        for outcome in perform_batch(disk, &batch(size, rng), rng) {
            outcome.unwrap();
        }
        let len = file.len();
        assert!(len <= committed, "{what}: {len} of {committed} bytes");
    }
    block_on(disk.close()).unwrap();
    let len = file.len();
    assert!(
        len <= committed,
        "{what}: closed, {len} of {committed} bytes"
    );
}

fn committed(file: &MemoryStorage) -> u64 {
    let header = Header::parse(&file.contents()).unwrap();
    block_on(committed_length(file, &header)).unwrap()
}

#[test]
fn rewriting_what_was_discarded_stays_within_the_commitment_without_a_flush() {
    for_each_seed(2, "rewriting", |seed| {
        for shape in SHAPES {
            // With snapshots there is no bound.
            if shape.1 == 0 || shape.2 == Past::Snapshot {
                continue;
            }
            let mut rng = rng(seed);
            let made = Made::new(shape, &mut rng);
            let file = load(&made.path());
            let slow = Yielding::new(Arc::clone(&file) as Arc<dyn Storage>, seed);
            let disk = block_on(Qcow2::open(Arc::new(slow), None, Access::ReadWrite)).unwrap();
            rewrite(&disk, &file, committed(&file), &made.name, &mut rng);
            std::fs::write(made.path(), file.contents()).unwrap();
            let allowed = match shape.2 {
                Past::Leaked => Allowed::Leaks,
                _ => Allowed::Nothing,
            };
            check(&made.path(), allowed).unwrap();
        }
    });
}

#[test]
fn rewriting_an_overlay_stays_within_the_commitment_without_a_flush() {
    for_each_seed(2, "rewriting overlays", |seed| {
        for shape in workload::SHAPES {
            let mut rng = rng(seed);
            let chain = Chain::create(shape, &mut rng);
            let committed = committed(chain.top());
            let disk = chain.open_yielding(seed);
            rewrite(&disk, chain.top(), committed, shape.options, &mut rng);
            check(&chain.save_top(&chain.top().contents()), Allowed::Nothing).unwrap();
        }
    });
}

#[test]
fn a_data_file_never_becomes_longer_than_its_disk_nor_its_image_than_its_commitment() {
    for_each_seed(2, "rewriting data files", |seed| {
        for options in ["cluster_size=512", "cluster_size=64k", "extended_l2=on"] {
            let mut rng = rng(seed);
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name).display().to_string();
            let size = (2 << 20) + 3 * 512;
            let options = format!("{options},data_file={}", path("data"));
            let image = path("top");
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &options,
                &image,
                &size.to_string(),
            ]);
            let file = load(image.as_ref());
            let data = load(path("data").as_ref());
            let both = (
                Arc::new(Yielding::new(Arc::clone(&file) as Arc<dyn Storage>, seed)),
                Arc::new(Yielding::new(Arc::clone(&data) as Arc<dyn Storage>, seed)),
            );
            let disk = Qcow2::open_with_data(both.0, Some(both.1), None, Access::ReadWrite);
            let disk = block_on(disk).unwrap();
            rewrite(&disk, &file, committed(&file), &options, &mut rng);
            assert!(data.len() <= size, "{options}: {} bytes", data.len());
        }
    });
}

/// A full disk of 1 MiB, and what its file comes to.
fn full_disk(
    storage: impl FnOnce(Arc<MemoryStorage>) -> Arc<dyn Storage>,
) -> (Arc<MemoryStorage>, Qcow2) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("full.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    let file = load(&path);
    let storage = storage(Arc::clone(&file));
    let disk = block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap();
    block_on(disk.write(GuestOffset(0), IoBuf::from_bytes(&vec![1; 1 << 20]))).unwrap();
    block_on(disk.flush()).unwrap();
    (file, disk)
}

#[test]
fn a_write_to_a_full_image_waits_for_a_read_of_the_cluster_that_it_is_to_get() {
    let (file, disk) = full_disk(|file| file);
    let full = file.len();
    let Mapped::Extent { guard, .. } = disk.map_read(GuestOffset(0), 512) else {
        panic!("data is read in place");
    };
    block_on(disk.discard(GuestOffset(0), 65536)).unwrap();
    {
        let mut write = disk.write(GuestOffset(0), IoBuf::from_bytes(&[2; 512]));
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..5 {
            assert!(write.as_mut().poll(&mut context).is_pending());
        }
        // Who needs no room, or finds some, need not wait.
        block_on(disk.write(GuestOffset(65536), IoBuf::from_bytes(&[3; 512]))).unwrap();
        block_on(disk.flush()).unwrap();
        drop(guard);
        block_on(write).unwrap();
    }
    assert_eq!(file.len(), full);
}

#[test]
fn a_write_that_has_to_wait_for_a_flush_fails_with_it() {
    let mut fault = None;
    let (_, disk) = full_disk(|file| {
        let storage = Arc::new(FaultStorage::new(file));
        fault = Some(Arc::clone(&storage));
        storage
    });
    block_on(disk.discard(GuestOffset(0), 65536)).unwrap();
    let fault = fault.unwrap();
    let write = || block_on(disk.write(GuestOffset(0), IoBuf::from_bytes(&[2; 512])));
    let no_room = Fault::nth(0, ErrorKind::NoSpace).only(storage::Operation::Write);
    fault.inject(no_room.forever());
    assert_eq!(write().unwrap_err().kind(), ErrorKind::NoSpace);
    fault.heal();
    write().unwrap();
    block_on(disk.discard(GuestOffset(0), 65536)).unwrap();
    fault.inject(Fault::nth(0, ErrorKind::Io).only(storage::Operation::Flush));
    assert_eq!(write().unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(write().unwrap_err().kind(), ErrorKind::Poisoned);
}
