//! States that an image brings along (snapshots, dirty and corrupt bits, autoclear bits), and structures that grow.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

mod engine;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::workload::{perform_batch, random_batch, read_range};
use engine::{Allowed, check, load, qemu_img, rng};
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Allocation, Image, Mapped};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::header::Header;
use seethrough::storage::{
    CrashStorage, Delays, Fault, FaultStorage, Lost, MemoryStorage, Operation, Storage, ZeroMode,
};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{GuestOffset, HostOffset};

const CLUSTER: usize = 65536;

/// An image file in a directory that goes with it.
struct File {
    directory: tempfile::TempDir,
    path: PathBuf,
}

impl File {
    fn create(options: &str, size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let name = path.display().to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &name, size]);
        Self { directory, path }
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn load(&self) -> Arc<MemoryStorage> {
        load(&self.path)
    }

    fn save(&self, storage: &MemoryStorage) {
        std::fs::write(&self.path, storage.contents()).unwrap();
    }

    fn check(&self, allowed: Allowed) {
        check(&self.path, allowed).unwrap();
    }
}

fn open(storage: &Arc<MemoryStorage>) -> Qcow2 {
    open_on(Arc::clone(storage) as Arc<dyn Storage>)
}

fn open_on(storage: Arc<dyn Storage>) -> Qcow2 {
    block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap()
}

fn write(image: &Qcow2, at: u64, bytes: &[u8]) -> seethrough::error::Result<()> {
    block_on(image.write(GuestOffset(at), IoBuf::from_bytes(bytes)))
}

fn read(image: &Qcow2, at: u64, len: u64) -> Vec<u8> {
    read_range(image, at..at + len).unwrap()
}

fn flush(image: &Qcow2) {
    block_on(image.flush()).unwrap();
}

/// Changes the header of an image at rest.
fn patch(storage: &MemoryStorage, at: u64, bytes: &[u8]) {
    block_on(storage.writev(HostOffset(at), IoBuf::from_bytes(bytes))).unwrap();
}

fn word_at(storage: &MemoryStorage, at: usize) -> u64 {
    u64::from_be_bytes(storage.contents()[at..at + 8].try_into().unwrap())
}

fn raw_copy_of_snapshot(file: &File, snapshot: &str) -> Vec<u8> {
    let copy: &Path = &file.directory.path().join("copy.raw");
    let snapshot = format!("snapshot.name={snapshot}");
    let to = copy.display().to_string();
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "-l",
        &snapshot,
        &file.name(),
        &to,
    ]);
    std::fs::read(copy).unwrap()
}

#[test]
fn writes_zeroes_and_discards_leave_internal_snapshots_as_they_were() {
    for options in [
        "cluster_size=4096",
        "cluster_size=16k,extended_l2=on",
        "compat=0.10,cluster_size=4096",
    ] {
        let mut rng = rng(7);
        let file = File::create(options, "600k");
        let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
        for round in 0..3 {
            let storage = file.load();
            let image = open(&storage);
            for _ in 0..10 {
                let batch = random_batch(&mut rng, image.virtual_size(), &[1, 512, 4096]);
                for result in perform_batch(&image, &batch, &mut rng) {
                    result.unwrap();
                }
            }
            let now = read(&image, 0, image.virtual_size());
            flush(&image);
            drop(image);
            file.save(&storage);
            file.check(Allowed::Nothing);
            for (name, content) in &snapshots {
                assert!(
                    &raw_copy_of_snapshot(&file, name) == content,
                    "{options}: snapshot {name} in round {round}"
                );
            }
            let name = format!("round{round}");
            qemu_img(&["snapshot", "-q", "-c", &name, &file.name()]);
            snapshots.push((name, now));
        }
    }
}

#[test]
fn compressed_clusters_are_replaced_and_their_room_freed() {
    for compression in ["zlib", "zstd"] {
        let source = File::create("cluster_size=64k", "2M");
        let storage = source.load();
        let text: Vec<u8> = (0..2u32 << 20)
            .map(|i| u8::try_from(i / 100 % 251).unwrap())
            .collect();
        let image = open(&storage);
        write(&image, 0, &text).unwrap();
        flush(&image);
        source.save(&storage);
        let file = File::create("cluster_size=64k", "2M");
        let option = format!("compression_type={compression}");
        qemu_img(&[
            "convert",
            "-c",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "-o",
            &option,
            &source.name(),
            &file.name(),
        ]);

        let storage = file.load();
        let image = open(&storage);
        assert!(read(&image, 0, 2 << 20) == text);
        let mut expected = text.clone();
        write(&image, 70_000, b"inside").unwrap();
        expected[70_000..70_006].copy_from_slice(b"inside");
        block_on(image.write_zeroes(GuestOffset(4 << 16), 2 << 16, ZeroMode::MayUnmap)).unwrap();
        expected[4 << 16..6 << 16].fill(0);
        write(&image, 8 << 16, &[5; 3 * CLUSTER]).unwrap();
        expected[8 << 16..11 << 16].fill(5);
        assert!(read(&image, 0, 2 << 20) == expected);
        flush(&image);
        drop(image);
        file.save(&storage);
        file.check(Allowed::Nothing);
    }
}

#[test]
fn an_image_with_out_of_date_refcounts_is_read_as_it_is_and_repaired_before_it_is_written() {
    let file = File::create("lazy_refcounts=on", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[1; CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    let left = storage.contents();
    assert_eq!(left[79] & 1, 1, "the dirty bit");
    let open = |access| {
        block_on(Qcow2::open(
            Arc::clone(&storage) as Arc<dyn Storage>,
            None,
            access,
        ))
    };
    assert_eq!(read(&open(Access::ReadOnly).unwrap(), 0, 512), [1; 512]);
    assert_eq!(storage.contents(), left);
    let image = open(Access::ReadWrite).unwrap();
    assert_eq!(read(&image, 0, 512), [1; 512]);
    assert_eq!(storage.contents()[79] & 1, 0, "the dirty bit");
    file.save(&storage);
    file.check(Allowed::Nothing);
}

#[test]
fn an_image_with_out_of_date_refcounts_and_more_wrong_is_not_written() {
    let file = File::create("lazy_refcounts=on", "1M");
    let storage = file.load();
    patch(&storage, 79, &[1]);
    // An L1 entry with a reserved bit.
    let l1 = Header::parse(&storage.contents())
        .unwrap()
        .l1_table_offset
        .0;
    patch(&storage, l1, &[0x40]);
    let before = storage.contents();
    let shared = Arc::clone(&storage) as Arc<dyn Storage>;
    let error = block_on(Qcow2::open(shared, None, Access::ReadWrite))
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error.to_string().contains("seethrough check -r all IMAGE"),
        "{error}"
    );
    assert!(storage.contents() == before, "a refused image is changed");
}

#[test]
fn with_lazy_refcounts_the_dirty_bit_is_there_from_the_first_write_until_the_image_is_closed() {
    let file = File::create("lazy_refcounts=on,cluster_size=64k", "1M");
    let storage = file.load();
    let is_dirty = || storage.contents()[79] & 1 == 1;
    let image = open(&storage);
    assert_eq!(read(&image, 0, 512), [0; 512]);
    assert!(!is_dirty());
    for round in 0..3 {
        write(
            &image,
            u64::from(round) * CLUSTER as u64,
            &[round + 1; CLUSTER],
        )
        .unwrap();
        assert!(is_dirty());
        flush(&image);
        assert!(is_dirty());
        block_on(image.close()).unwrap();
        assert!(!is_dirty());
        file.save(&storage);
        file.check(Allowed::Nothing);
    }
}

#[test]
fn autoclear_bits_are_cleared_before_the_first_write_and_not_by_reading() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    // The first cluster is allocated, so that only autoclear bits keep the fast path from writing.
    let image = open(&storage);
    write(&image, 0, &[1; CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    patch(&storage, 88, &0x8000_0000_0000_0001u64.to_be_bytes());
    let image = open(&storage);
    read(&image, 0, 512);
    flush(&image);
    assert_eq!(word_at(&storage, 88), 0x8000_0000_0000_0001);
    assert!(matches!(image.map_write(GuestOffset(0), 512), Mapped::Slow));
    write(&image, 0, &[2; 512]).unwrap();
    assert_eq!(word_at(&storage, 88), 0);
    assert!(matches!(
        image.map_write(GuestOffset(0), 512),
        Mapped::Extent { .. }
    ));
}

/// The host offset of the L2 table of an image of one table, and of its L1 table.
fn tables(storage: &MemoryStorage) -> (usize, usize) {
    let l1 = word_at(storage, 40);
    let l2 = word_at(storage, usize::try_from(l1).unwrap()) & 0x00ff_ffff_ffff_fe00;
    (usize::try_from(l2).unwrap(), usize::try_from(l1).unwrap())
}

#[test]
fn a_broken_entry_sets_the_corrupt_bit_and_ends_writing_but_not_reading() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[7; 2 * CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    let (l2, _) = tables(&storage);
    // Not aligned to a cluster.
    patch(
        &storage,
        l2 as u64 + 8,
        &(1u64 << 63 | 0x5_0200).to_be_bytes(),
    );
    let image = open(&storage);
    let error = read_range(&image, CLUSTER as u64..2 * CLUSTER as u64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert_eq!(word_at(&storage, 72) & 2, 2, "the corrupt bit");
    assert_eq!(read(&image, 0, 512), [7; 512]);
    assert_eq!(
        write(&image, 0, &[1; 512]).unwrap_err().kind(),
        ErrorKind::Poisoned
    );
    assert!(matches!(image.map_write(GuestOffset(0), 512), Mapped::Slow));
    let again = block_on(Qcow2::open(
        storage as Arc<dyn Storage>,
        None,
        Access::ReadWrite,
    ));
    assert_eq!(again.err().unwrap().kind(), ErrorKind::Corrupt);
}

#[test]
fn an_entry_that_gives_metadata_to_the_guest_ends_writing_before_it_can_be_used() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[7; CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    let (l2, l1) = tables(&storage);
    for metadata in [l1, l2, CLUSTER] {
        patch(&storage, 72, &[0; 8]);
        patch(
            &storage,
            l2 as u64 + 8,
            &(1u64 << 63 | metadata as u64).to_be_bytes(),
        );
        let image = open(&storage);
        let before = storage.contents()[512..].to_vec();
        assert!(write(&image, CLUSTER as u64, &[1; 512]).is_err());
        assert!(matches!(
            image.map_write(GuestOffset(CLUSTER as u64), 512),
            Mapped::Slow
        ));
        assert!(
            storage.contents()[512..] == before,
            "metadata at {metadata:#x} was overwritten"
        );
        assert_eq!(word_at(&storage, 72) & 2, 2, "the corrupt bit");
    }
}

#[test]
fn free_metadata_is_found_before_it_is_allocated() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    // The refcount of the L1 table, which is in cluster 3, becomes 0.
    let table = usize::try_from(word_at(&storage, 48)).unwrap();
    let block = word_at(&storage, table);
    patch(&storage, block + 6, &[0, 0]);
    let image = open(&storage);
    assert_eq!(
        write(&image, 0, &[1; 512]).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    assert_eq!(word_at(&storage, 72) & 2, 2, "the corrupt bit");
}

/// Small clusters and wide refcounts: 64 clusters to a refcount block, 64 blocks to a cluster of the table.
const SMALL: &str = "cluster_size=512,refcount_bits=64";

#[test]
fn the_refcount_table_grows_and_stays_sound() {
    let file = File::create(SMALL, "8M");
    let storage = file.load();
    let first_table = word_at(&storage, 48);
    let image = open(&storage);
    let bytes: Vec<u8> = (0..8u32 << 20)
        .map(|i| u8::try_from(i / 512 % 255).unwrap())
        .collect();
    for (number, part) in bytes.chunks(300_000).enumerate() {
        write(&image, number as u64 * 300_000, part).unwrap();
    }
    assert_ne!(word_at(&storage, 48), first_table, "the table has grown");
    flush(&image);
    assert!(read(&image, 0, 8 << 20) == bytes);
    drop(image);
    file.save(&storage);
    file.check(Allowed::Nothing);
    assert!(read(&open(&storage), 0, 8 << 20) == bytes);
}

#[test]
fn a_power_cut_at_any_moment_of_growth_leaves_leaks_at_worst() {
    let file = File::create(SMALL, "3M");
    let mut bytes = file.load().contents();
    bytes.resize(4 << 20, 0xd5);
    let storage = Arc::new(CrashStorage::new(bytes, Delays::none()));
    let image = open_on(Arc::clone(&storage) as Arc<dyn Storage>);
    let mut flushed = Vec::new();
    for step in 0..24u64 {
        write(
            &image,
            step * 100_000,
            &[u8::try_from(step + 1).unwrap(); 100_000],
        )
        .unwrap();
        if step % 5 == 4 || step == 21 {
            flush(&image);
            flushed.push((storage.now(), step));
        }
    }
    let moments: Vec<_> = storage.moments().collect();
    let stride = (moments.len() / 150).max(1);
    for (number, cut) in moments.into_iter().enumerate().step_by(stride) {
        let left = storage.after_power_cut(
            cut,
            Lost::Some {
                seed: number as u64,
            },
        );
        std::fs::write(&file.path, &left).unwrap();
        check(&file.path, Allowed::Leaks).unwrap_or_else(|error| panic!("cut at {cut:?}: {error}"));
        let image = open_on(Arc::new(MemoryStorage::new(left)));
        let Some((_, last)) = flushed.iter().rev().find(|(moment, _)| *moment <= cut) else {
            continue;
        };
        for step in 0..=*last {
            assert_eq!(
                read(&image, step * 100_000, 1)[0],
                u8::try_from(step + 1).unwrap(),
                "cut at {cut:?}"
            );
        }
    }
}

#[test]
fn a_new_refcount_table_is_durable_before_the_header_points_to_it() {
    let file = File::create(SMALL, "3M");
    let mut bytes = file.load().contents();
    // A table that was not written shows as this.
    bytes.resize(4 << 20, 0xd5);
    let storage = Arc::new(CrashStorage::new(bytes, Delays::none()));
    let image = open_on(Arc::clone(&storage) as Arc<dyn Storage>);
    let table_at = || storage.contents()[48..56].to_vec();
    let mut grown = 0;
    for step in 0..24u64 {
        let (begun, before) = (storage.now(), table_at());
        write(&image, step * 100_000, &[1; 100_000]).unwrap();
        if table_at() == before {
            continue;
        }
        grown += 1;
        for cut in storage.moments().filter(|moment| *moment >= begun) {
            for lost in [0, 1, 2, 3].map(|seed| Lost::Some { seed }) {
                let left = storage.after_power_cut(cut, lost);
                std::fs::write(&file.path, left).unwrap();
                check(&file.path, Allowed::Leaks)
                    .unwrap_or_else(|error| panic!("{lost:?} lost at {cut:?}: {error}"));
            }
        }
    }
    assert!(grown > 0, "the table never grew");
}

#[test]
fn new_refcount_blocks_are_durable_before_the_table_points_to_them() {
    // A block of zeros would free what is in use; one of other bytes would never free it.
    for before in [0, 0xd5] {
        let file = File::create(SMALL, "1M");
        let mut bytes = file.load().contents();
        bytes.resize(1 << 20, before);
        let storage = Arc::new(CrashStorage::new(bytes, Delays::none()));
        let image = open_on(Arc::clone(&storage) as Arc<dyn Storage>);
        write(&image, 0, &[1; 100_000]).unwrap();
        let begun = storage.now();
        flush(&image);
        for cut in storage.moments().filter(|moment| *moment >= begun) {
            for seed in 0..6 {
                let left = storage.after_power_cut(cut, Lost::Some { seed });
                std::fs::write(&file.path, left).unwrap();
                check(&file.path, Allowed::Leaks)
                    .unwrap_or_else(|error| panic!("cut at {cut:?}, seed {seed}: {error}"));
            }
        }
    }
}

#[test]
fn a_failed_flush_poisons_the_image_until_it_is_reopened() {
    let file = File::create("cluster_size=64k", "1M");
    let memory = file.load();
    let storage = Arc::new(FaultStorage::new(Arc::clone(&memory) as Arc<dyn Storage>));
    let image = open_on(Arc::clone(&storage) as Arc<dyn Storage>);
    write(&image, 0, &[1; 512]).unwrap();
    storage.inject(Fault::nth(0, ErrorKind::Io).only(Operation::Flush));
    assert_eq!(block_on(image.flush()).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(
        block_on(image.flush()).unwrap_err().kind(),
        ErrorKind::Poisoned
    );
    assert_eq!(
        write(&image, 0, &[2; 512]).unwrap_err().kind(),
        ErrorKind::Poisoned
    );
    assert!(matches!(image.map_write(GuestOffset(0), 512), Mapped::Slow));
    assert_eq!(read(&image, 0, 512), [1; 512]);
    drop(image);
    write(&open(&memory), 0, &[3; 512]).unwrap();
}

/// Counts the flushes of the file below.
fn flushes_of(storage: &FaultStorage, image: &Qcow2) -> u64 {
    let before = storage.operations();
    flush(image);
    storage.operations() - before
}

#[test]
fn a_flush_costs_one_barrier_without_new_metadata_and_two_after_an_allocation() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = Arc::new(FaultStorage::new(file.load() as Arc<dyn Storage>));
    let image = open_on(Arc::clone(&storage) as Arc<dyn Storage>);
    write(&image, 0, &[1; CLUSTER]).unwrap();
    flush(&image);
    write(&image, 0, &[2; CLUSTER]).unwrap();
    assert_eq!(flushes_of(&storage, &image), 1, "rewritten in place");
    write(&image, CLUSTER as u64, &[2; CLUSTER]).unwrap();
    // Refcounts, barrier, L2 table, barrier.
    assert_eq!(flushes_of(&storage, &image), 4, "one cluster allocated");
}

#[test]
fn a_freed_cluster_is_not_reused_while_io_on_it_is_under_way() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[1; CLUSTER]).unwrap();
    let Mapped::Extent { at: old, guard, .. } = image.map_read(GuestOffset(0), CLUSTER as u64)
    else {
        panic!("the cluster is mapped");
    };
    block_on(image.discard(GuestOffset(0), CLUSTER as u64)).unwrap();
    for _ in 0..3 {
        flush(&image);
    }
    let host_of = |at: u64| match image.map_read(GuestOffset(at), CLUSTER as u64) {
        Mapped::Extent { at, .. } => at,
        _ => panic!("the cluster is mapped"),
    };
    write(&image, CLUSTER as u64, &[2; CLUSTER]).unwrap();
    assert_ne!(host_of(CLUSTER as u64), old);
    drop(guard);
    flush(&image);
    write(&image, 2 * CLUSTER as u64, &[3; CLUSTER]).unwrap();
    assert_eq!(
        host_of(2 * CLUSTER as u64),
        old,
        "its room is used again afterwards"
    );
}

#[test]
fn a_freed_cluster_is_not_reused_before_a_flush() {
    let file = File::create("cluster_size=64k", "1M");
    let image = open(&file.load());
    write(&image, 0, &[1; CLUSTER]).unwrap();
    let Mapped::Extent { at: old, .. } = image.map_read(GuestOffset(0), 512) else {
        panic!("mapped")
    };
    block_on(image.discard(GuestOffset(0), CLUSTER as u64)).unwrap();
    write(&image, CLUSTER as u64, &[2; CLUSTER]).unwrap();
    let Mapped::Extent { at: new, .. } = image.map_read(GuestOffset(CLUSTER as u64), 512) else {
        panic!("mapped")
    };
    assert_ne!(old, new);
}

#[test]
fn clusters_of_one_request_are_contiguous_and_map_in_one_piece() {
    let file = File::create("cluster_size=4096", "4M");
    let image = open(&file.load());
    write(&image, 4096, &[1; 1 << 20]).unwrap();
    for mapped in [
        image.map_read(GuestOffset(4096), 1 << 20),
        image.map_write(GuestOffset(4096), 1 << 20),
    ] {
        assert!(matches!(mapped, Mapped::Extent { .. }));
    }
}

#[test]
fn zeroes_that_keep_room_reuse_the_cluster_and_those_that_do_not_free_it() {
    let file = File::create("cluster_size=64k", "1M");
    let image = open(&file.load());
    write(&image, 0, &[1; 2 * CLUSTER]).unwrap();
    let Mapped::Extent { at: old, .. } = image.map_read(GuestOffset(0), 512) else {
        panic!("mapped")
    };
    block_on(image.write_zeroes(GuestOffset(0), CLUSTER as u64, ZeroMode::KeepAllocated)).unwrap();
    assert!(matches!(
        image.map_read(GuestOffset(0), CLUSTER as u64),
        Mapped::Zeroes
    ));
    let allocation = block_on(image.allocation(GuestOffset(0), 1 << 20)).unwrap();
    assert_eq!(allocation, (Allocation::Zero(Some(old)), CLUSTER as u64));
    write(&image, 0, &[2; 512]).unwrap();
    let Mapped::Extent { at: new, .. } = image.map_read(GuestOffset(0), 512) else {
        panic!("mapped")
    };
    assert_eq!(old, new);
    assert_eq!(read(&image, 512, 512), [0; 512]);
    block_on(image.write_zeroes(GuestOffset(0), CLUSTER as u64, ZeroMode::MayUnmap)).unwrap();
    write(&image, 0, &[2; 512]).unwrap();
    let Mapped::Extent { at: new, .. } = image.map_read(GuestOffset(0), 512) else {
        panic!("mapped")
    };
    assert_ne!(old, new);
}

#[test]
fn threads_that_write_different_clusters_of_one_table_all_get_their_bytes() {
    let file = File::create("cluster_size=4096", "16M");
    let storage = file.load();
    let image = open(&storage);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let image = &image;
            scope.spawn(move || {
                for number in 0..500u64 {
                    let at = (number * 4 + thread) * 4096;
                    let byte = u8::try_from((number + thread) % 255).unwrap();
                    write(image, at, &[byte; 1000]).unwrap();
                    if number % 100 == 0 {
                        flush(image);
                    }
                    assert_eq!(read(image, at, 1000), vec![byte; 1000]);
                    if number % 7 == 0 {
                        block_on(image.discard(GuestOffset(at), 4096)).unwrap();
                    }
                }
            });
        }
    });
    flush(&image);
    drop(image);
    file.save(&storage);
    file.check(Allowed::Nothing);
}

#[test]
fn the_corrupt_bit_is_durable_before_the_error_is_returned() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[7; CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    let (l2, _) = tables(&storage);
    patch(&storage, l2 as u64, &(1u64 << 63 | 0x5_0200).to_be_bytes());
    let storage = Arc::new(CrashStorage::new(storage.contents(), Delays::none()));
    let image = open_on(Arc::clone(&storage) as Arc<dyn Storage>);
    assert!(read_range(&image, 0..512).is_err());
    let left = MemoryStorage::new(storage.after_power_cut(storage.now(), Lost::All));
    assert_eq!(word_at(&left, 72) & 2, 2, "the corrupt bit");
}

#[test]
fn giving_back_what_has_no_reference_sets_the_corrupt_bit() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[7; CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    let (l2, _) = tables(&storage);
    let data = (word_at(&storage, l2) & !(1 << 63)) / CLUSTER as u64;
    let table = usize::try_from(word_at(&storage, 48)).unwrap();
    let block = word_at(&storage, table);
    patch(&storage, block + 2 * data, &[0, 0]);
    let image = open(&storage);
    block_on(image.discard(GuestOffset(0), CLUSTER as u64)).unwrap();
    // Whatever the flush itself says.
    let _ = block_on(image.flush());
    assert_eq!(word_at(&storage, 72) & 2, 2, "the corrupt bit");
    let error = write(&image, 0, &[1; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Poisoned);
}

#[test]
fn the_cluster_of_a_table_that_was_copied_is_used_again() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[7; CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    // Without the flag that it might have, as a crash leaves it when a snapshot is deleted.
    let (old, l1) = tables(&storage);
    patch(&storage, l1 as u64, &(old as u64).to_be_bytes());
    let image = open(&storage);
    write(&image, 0, &[8; 512]).unwrap();
    flush(&image);
    assert_ne!(tables(&storage).0, old);
    write(&image, CLUSTER as u64, &[9; CLUSTER]).unwrap();
    let Mapped::Extent { at, .. } = image.map_read(GuestOffset(CLUSTER as u64), 512) else {
        panic!("mapped")
    };
    assert_eq!(at, HostOffset(old as u64));
    assert_eq!(read(&image, CLUSTER as u64, 512), [9; 512]);
    flush(&image);
    drop(image);
    file.save(&storage);
    file.check(Allowed::Nothing);
}

#[test]
fn the_end_of_a_file_inside_a_cluster_never_shows() {
    let file = File::create("cluster_size=64k", "1M");
    let storage = file.load();
    let image = open(&storage);
    write(&image, 0, &[7; CLUSTER]).unwrap();
    flush(&image);
    drop(image);
    // What another writer has left behind there when its power was cut.
    patch(&storage, storage.len(), &[0xee; 1000]);
    let image = open(&storage);
    write(&image, CLUSTER as u64, &[1; 512]).unwrap();
    assert_eq!(read(&image, CLUSTER as u64 + 512, 512), [0; 512]);
}

#[test]
fn requests_that_leave_the_disk_are_refused() {
    let file = File::create("cluster_size=64k", "1M");
    let image = open(&file.load());
    let size = image.virtual_size();
    for (at, len) in [(size, 512), (size - 512, 1024), (u64::MAX - 511, 1024)] {
        let start = GuestOffset(at);
        let buf = IoBuf::zeroed(usize::try_from(len).unwrap());
        for outcome in [
            block_on(image.read(start, buf.clone())),
            block_on(image.write(start, buf)),
            block_on(image.write_zeroes(start, len, ZeroMode::MayUnmap)),
            block_on(image.discard(start, len)),
        ] {
            let error = outcome.expect_err("it leaves the disk");
            assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{len} bytes at {at}");
        }
    }
}

/// Otherwise it would show when the disk grows, in whoever's hands.
#[test]
fn a_longer_backing_image_is_not_copied_behind_the_end_of_the_disk() {
    let backing = open(&File::create("cluster_size=64k", "1M").load());
    write(&backing, 0, &[0x77; 2 * CLUSTER]).unwrap();
    let storage = File::create("cluster_size=64k", "98304").load();
    let image = block_on(Qcow2::open(
        Arc::clone(&storage) as Arc<dyn Storage>,
        Some(Arc::new(backing)),
        Access::ReadWrite,
    ));
    let image = image.unwrap();
    write(&image, CLUSTER as u64, &[1; 512]).unwrap();
    let Mapped::Extent { at, .. } = image.map_read(GuestOffset(CLUSTER as u64), 512) else {
        panic!("mapped")
    };
    let end = CLUSTER / 2;
    let host = storage.contents().split_off(usize::try_from(at.0).unwrap());
    assert!(host[512..end].iter().all(|byte| *byte == 0x77));
    assert!(host[end..].iter().all(|byte| *byte == 0));
}
