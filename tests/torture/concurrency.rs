//! Many requests at the same time, under a scheduler that a seed decides, and on real threads.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::{Access, Image, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{MemoryStorage, Storage};
use seethrough::sys::block_on;

use crate::engine::workload::{Operation, read_range};
use crate::engine::{Allowed, check, for_each_seed, qemu_img, rng, run_interleaved};
use crate::guests::{Guests, Record, sectors};
use crate::storage::Tearing;

/// A kind of image, what is allocated together in it, and how large a part of it guests fight for.
struct Kind {
    options: &'static str,
    unit: u64,
    area: u64,
}

const KINDS: &[Kind] = &[
    kind("cluster_size=512", 512, 5 << 10),
    kind("cluster_size=1k,refcount_bits=1", 1 << 10, 5 << 10),
    kind("cluster_size=4k", 4 << 10, 12 << 10),
    kind("compat=0.10,cluster_size=2k", 2 << 10, 8 << 10),
    // Subclusters of 512 bytes and of 2 KiB.
    kind("cluster_size=16k,extended_l2=on", 512, 6 << 10),
    kind("cluster_size=64k,extended_l2=on", 2 << 10, 8 << 10),
];

const fn kind(options: &'static str, unit: u64, area: u64) -> Kind {
    Kind {
        options,
        unit,
        area,
    }
}

const SIZE: u64 = 1 << 20;

/// What a sector of the base holds at first.
fn initial(sector: u64) -> u64 {
    sector + (1 << 40)
}

/// A chain in which every layer is written: the base by one guest, what stands on it by others.
struct Family {
    files: Vec<Arc<MemoryStorage>>,
    images: Vec<Arc<dyn Image>>,
}

impl Family {
    /// A raw base, and layers of these kinds: the first of them on the base, the others on the first.
    fn create(kinds: &[&Kind], seed: u64) -> Self {
        let bytes = sectors((0..SIZE / 512).map(initial));
        let mut files = vec![Arc::new(MemoryStorage::new(bytes))];
        let tearing = |file: &Arc<MemoryStorage>| -> Arc<dyn Storage> {
            Arc::new(Tearing::new(Arc::clone(file) as Arc<dyn Storage>, seed))
        };
        let base = RawImage::new(tearing(&files[0]), Access::ReadWrite);
        let mut images: Vec<Arc<dyn Image>> = vec![Arc::new(base)];
        for kind in kinds {
            let below = images.len().min(2) - 1;
            let file = Arc::new(MemoryStorage::new(new_overlay(kind.options, below)));
            let backing = Some(Arc::clone(&images[below]));
            let image = block_on(Qcow2::open(tearing(&file), backing, Access::ReadWrite)).unwrap();
            if seed % 2 == 1 {
                image.set_metadata_cache(0);
            }
            images.push(Arc::new(image));
            files.push(file);
        }
        Self { files, images }
    }

    /// Stock tools find the images sound and read what we do.
    fn judge(self) {
        let directory = tempfile::tempdir().unwrap();
        let path = |number: usize| directory.path().join(format!("layer{number}"));
        let read = |image: &Arc<dyn Image>| read_range(image.as_ref(), 0..SIZE).unwrap();
        let shown: Vec<Vec<u8>> = self.images.iter().map(read).collect();
        for (number, (image, file)) in self.images.iter().zip(&self.files).enumerate() {
            block_on(image.flush()).unwrap();
            std::fs::write(path(number), file.contents()).unwrap();
        }
        for (number, shown) in shown.iter().enumerate().skip(1) {
            check(&path(number), Allowed::Nothing).unwrap();
            let (from, raw) = (path(number), path(number).with_extension("raw"));
            let convert = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
            qemu_img(&[&convert[..], &[from.as_os_str(), raw.as_os_str()]].concat());
            assert!(std::fs::read(raw).unwrap() == *shown, "layer {number}");
        }
    }
}

/// The bytes of a new overlay of `layer0`, which is raw, or of `layer1`, which is qcow2: made once for each kind.
fn new_overlay(options: &str, below: usize) -> Vec<u8> {
    static MADE: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::new(BTreeMap::new());
    let format = ["raw", "qcow2"][below];
    let mut made = MADE.lock().unwrap();
    let make = || {
        let directory = tempfile::tempdir().unwrap();
        let name = directory.path().join("overlay").display().to_string();
        let (backing, size) = (format!("layer{below}"), SIZE.to_string());
        // Unsafe: the backing file need not exist now.
        let create = [
            "create", "-u", "-q", "-f", "qcow2", "-o", options, "-F", format,
        ];
        qemu_img(&[&create[..], &["-b", &backing, &name, &size]].concat());
        std::fs::read(name).unwrap()
    };
    made.entry(format!("{options} {format}"))
        .or_insert_with(make)
        .clone()
}

type Queue<'a> = Pin<Box<dyn Future<Output = Vec<Record>> + 'a>>;

/// A base, a child of it, and perhaps a grandchild; every one has guests with several queues.
fn run_seed(kind: &Kind, seed: u64) {
    let mut rng = rng(seed);
    let second = &KINDS[rng.random_range(0..KINDS.len())];
    let kinds = if rng.random_bool(0.4) {
        vec![kind, second]
    } else {
        vec![kind]
    };
    let family = Family::create(&kinds, seed);
    let units = [512].into_iter().chain(kinds.iter().map(|kind| kind.unit));
    let start = rng.random_range(0..4) * 512;
    let guests = Guests::new(
        family.images.clone(),
        units.collect(),
        start..start + kind.area,
    );
    let mut queues: Vec<Queue<'_>> = Vec::new();
    let count = rng.random_range(4..9);
    for _ in 0..count {
        let layer = rng.random_range(0..family.images.len());
        queues.push(Box::pin(guests.queue(layer, 40 / count, fork(&mut rng))));
    }
    let mut records: Vec<Record> = run_interleaved(&mut rng, queues).concat();
    for layer in 0..family.images.len() {
        let area = guests.area.clone();
        records.push(block_on(guests.request(layer, area, &Operation::Read)));
    }
    guests.judge(&records, initial);
    if seed.is_multiple_of(8) {
        family.judge();
    }
}

fn fork(rng: &mut StdRng) -> StdRng {
    crate::engine::rng(rng.random())
}

#[test]
fn every_sector_of_every_layer_is_a_register_under_any_schedule() {
    for kind in KINDS {
        for_each_seed(100, kind.options, |seed| run_seed(kind, seed));
    }
}
