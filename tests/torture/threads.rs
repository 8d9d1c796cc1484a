//! Real threads on real files, each with its own ring, and the proof that allocating writes do not wait for one
//! another.

use std::ffi::OsStr;
use std::future::Future;
use std::ops::Range;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use rand::RngExt;
use seethrough::chain::format::Format;
use seethrough::chain::host::HostOptions;
use seethrough::chain::registry::{DiskRequest, Registry};
use seethrough::image::{Access, Image, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{MemoryStorage, Storage};
use seethrough::sys::{IoBuf, Reactor, block_on};
use seethrough::units::GuestOffset;

use crate::engine::workload::{Operation, check_same, perform, random_range, read_range};
use crate::engine::{Allowed, check, for_each_seed, load, qemu_img, rng, run_interleaved};
use crate::guests::{Guests, Record, sectors};
use crate::storage::Company;

const THREADS: usize = 5;
const SIZE: u64 = 8 << 20;

const KINDS: &[(&str, u64)] = &[
    ("cluster_size=4k", 4 << 10),
    ("cluster_size=64k,extended_l2=on", 2 << 10),
];

/// What a sector of the base holds at first.
fn initial(sector: u64) -> u64 {
    sector + (1 << 40)
}

/// A qcow2 base with a value in every sector, and two children of it, in one directory.
fn create_family(directory: &Path, options: &str) {
    let path = |name: &str| directory.join(name);
    std::fs::write(path("flat.raw"), sectors((0..SIZE / 512).map(initial))).unwrap();
    let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", options].map(OsStr::new);
    let (flat, base) = (path("flat.raw"), path("base.qcow2"));
    qemu_img(&[&convert[..], &[flat.as_os_str(), base.as_os_str()]].concat());
    for child in ["one.qcow2", "two.qcow2"] {
        let create = [
            "create", "-q", "-f", "qcow2", "-o", options, "-F", "qcow2", "-b",
        ]
        .map(OsStr::new);
        let child = path(child);
        qemu_img(&[&create[..], &[OsStr::new("base.qcow2"), child.as_os_str()]].concat());
    }
}

/// The base and the two children, open for writing: one object for each file.
fn open_family(directory: &Path) -> Vec<Arc<dyn Image>> {
    let registry = Registry::new(HostOptions::default());
    let disks = ["base.qcow2", "one.qcow2", "two.qcow2"].map(|name| DiskRequest {
        path: directory.join(name),
        format: Some(Format::Qcow2),
        access: Access::ReadWrite,
    });
    let opened = block_on(registry.open_family(&disks)).unwrap();
    opened.into_iter().map(|open| open.image).collect()
}

/// Stock tools find the images sound and read what we do.
fn judge(directory: &Path, images: Vec<Arc<dyn Image>>) {
    let mut shown = Vec::new();
    for image in &images {
        block_on(image.flush()).unwrap();
        shown.push(read_range(image.as_ref(), 0..SIZE).unwrap());
    }
    drop(images);
    for (name, shown) in ["base.qcow2", "one.qcow2", "two.qcow2"].iter().zip(shown) {
        let (image, raw) = (directory.join(name), directory.join("stock.raw"));
        check(&image, Allowed::Nothing).unwrap();
        let convert = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
        qemu_img(&[&convert[..], &[image.as_os_str(), raw.as_os_str()]].concat());
        check_same(&shown, &std::fs::read(raw).unwrap(), 0, name);
    }
}

/// Several queues on the calling thread, at the same time.
fn run_queues(guests: &Arc<Guests>, queues: usize, seed: u64) -> Vec<Record> {
    block_on(async {
        let reactor = Reactor::current().unwrap();
        let mut rng = rng(seed);
        let tasks: Vec<_> = (0..queues)
            .map(|_| {
                let guests = Arc::clone(guests);
                let layer = rng.random_range(0..2);
                let rng = crate::engine::rng(rng.random());
                reactor.spawn_local(async move { guests.queue(layer, 7, rng).await })
            })
            .collect();
        let mut records = Vec::new();
        for task in tasks {
            records.extend(task.await);
        }
        records
    })
}

#[test]
fn every_sector_is_a_register_for_real_threads() {
    for (options, unit) in KINDS {
        for_each_seed(1, options, |seed| {
            let directory = tempfile::tempdir().unwrap();
            create_family(directory.path(), options);
            let images = open_family(directory.path());
            // Every history has a part of the disk of its own.
            for start in (0..25u64).map(|number| number * (256 << 10)) {
                let area = start..start + (8 << 10);
                let guests = Guests::new(images[..2].to_vec(), vec![*unit; 2], area);
                one_history(&Arc::new(guests), seed ^ start);
            }
            judge(directory.path(), images);
        });
    }
}

fn one_history(guests: &Arc<Guests>, seed: u64) {
    let mut records = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS as u64)
            .map(|number| scope.spawn(move || run_queues(guests, 2, seed * 100 + number)))
            .collect();
        let ended = threads.into_iter().map(|thread| thread.join().unwrap());
        ended.collect::<Vec<_>>().concat()
    });
    for layer in 0..2 {
        let whole = guests.request(layer, guests.area.clone(), &Operation::Read);
        records.push(block_on(whole));
    }
    guests.judge(&records, initial);
}

/// One thread's work on its own parts of a disk, which lie in between everybody else's.
fn work(image: &dyn Image, parts: &[Range<u64>], operations: usize, seed: u64) {
    let mut rng = rng(seed);
    let mut flat: Vec<Vec<u8>> = parts
        .iter()
        .map(|part| read_range(image, part.clone()).unwrap())
        .collect();
    for _ in 0..operations {
        let number = rng.random_range(0..parts.len());
        let (part, flat) = (&parts[number], &mut flat[number]);
        let range = random_range(&mut rng, part.clone(), &[512, 512, 4096]);
        let operation = Operation::random(&mut rng, range.end - range.start);
        let found = block_on(perform(image, range.clone(), &operation)).unwrap();
        let within = |at: u64| usize::try_from(at - part.start).unwrap();
        let expected = &mut flat[within(range.start)..within(range.end)];
        match operation {
            Operation::Read => check_same(&found, expected, range.start, "read"),
            Operation::Write(bytes) => expected.copy_from_slice(&bytes),
            Operation::Zero(_) => expected.fill(0),
            Operation::Discard => expected.copy_from_slice(&read_range(image, range).unwrap()),
            Operation::Flush => {}
        }
    }
    for (part, flat) in parts.iter().zip(&flat) {
        check_same(
            &read_range(image, part.clone()).unwrap(),
            flat,
            part.start,
            "at the end",
        );
    }
}

#[test]
fn threads_that_allocate_copy_free_and_flush_side_by_side_keep_what_is_theirs() {
    for (options, unit) in KINDS {
        for_each_seed(1, options, |seed| {
            let directory = tempfile::tempdir().unwrap();
            create_family(directory.path(), options);
            let images = open_family(directory.path());
            let whole: Vec<Range<u64>> = (0..SIZE / unit)
                .map(|number| number * unit..(number + 1) * unit)
                .collect();
            std::thread::scope(|scope| {
                for number in 0..THREADS {
                    // Neighbours in a cluster and in a table belong to different threads.
                    let parts: Vec<_> = whole
                        .iter()
                        .skip(number)
                        .step_by(THREADS)
                        .cloned()
                        .collect();
                    let images = &images;
                    scope.spawn(move || {
                        let child = &images[1 + number % 2];
                        work(child.as_ref(), &parts, 400, seed * 10 + number as u64);
                    });
                }
            });
            judge(directory.path(), images);
        });
    }
}

/// Writes that only end when all of them are under way: they would wait for ever for one that has to wait for them.
fn write_together(image: &dyn Image, places: &[u64], len: usize) {
    type Write<'a> = Pin<Box<dyn Future<Output = seethrough::error::Result<()>> + 'a>>;
    let writes = places.iter().map(|at| -> Write<'_> {
        let bytes = IoBuf::from_bytes(&vec![0x77; len]);
        image.write(GuestOffset(*at), bytes)
    });
    for result in run_interleaved(&mut rng(1), writes.collect()) {
        result.unwrap();
    }
    for at in places {
        let found = read_range(image, *at..at + len as u64).unwrap();
        assert!(found.iter().all(|byte| *byte == 0x77));
    }
}

#[test]
fn allocating_writes_to_different_clusters_are_under_way_at_the_same_time() {
    const CLUSTER: u64 = 4096;
    // In one L2 table, neighbours first; and each in a table of its own, which covers 2 MiB.
    let places = [
        (0..8).map(|number| number * CLUSTER).collect::<Vec<_>>(),
        (0..8).map(|number| number * (2 << 20)).collect(),
    ];
    for places in places {
        for len in [4096, 1000] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk.qcow2");
            let name = path.display().to_string();
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=4k",
                &name,
                "64M",
            ]);
            let base = Arc::new(MemoryStorage::new(vec![0x11; 32 << 20])) as Arc<dyn Storage>;
            for backing in [None, Some(base)] {
                let backing = backing
                    .map(|base| Arc::new(RawImage::new(base, Access::ReadOnly)) as Arc<dyn Image>);
                let storage = Arc::new(Company::new(load(&path) as Arc<dyn Storage>, places.len()));
                let image = block_on(Qcow2::open(storage, backing, Access::ReadWrite)).unwrap();
                write_together(&image, &places, len);
            }
        }
    }
}
