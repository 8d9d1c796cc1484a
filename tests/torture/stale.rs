//! Other people's bytes: the host file goes on behind the image, full of what someone else has left there (a block
//! device is like that), and what is freed turns into it. Whatever a guest does, and wherever the power is cut, its
//! disk and its snapshots never show any of it.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::{Access, Image, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::compressed::compress;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::engine::workload::{Operation, perform, random_range, read_range};
use crate::engine::{for_each_seed, qemu_img, rng};

const MARKER: &[u8; 8] = b"TENANT-B";
/// What `CrashStorage` turns discarded bytes into.
const DISCARDED: &[u8; 8] = &[0xd5; 8];

const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=4k,refcount_bits=8",
    "cluster_size=64k",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=128k,extended_l2=on",
    "cluster_size=64k,preallocation=metadata",
    "cluster_size=64k,extended_l2=on,preallocation=metadata",
    "compat=0.10,cluster_size=2k",
];

/// Bytes that others have left behind the image.
const LEFT: usize = 3 << 20;
const SIZE: u64 = 700 << 10;

fn new_image(options: &str, backed: bool) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let name = directory.path().join("disk.qcow2").display().to_string();
    let (size, create) = (
        SIZE.to_string(),
        ["create", "-u", "-q", "-f", "qcow2", "-o", options],
    );
    let backing: &[&str] = if backed {
        &["-b", "base", "-F", "raw"]
    } else {
        &[]
    };
    qemu_img(&[&create[..], backing, &[&name, &size]].concat());
    let mut bytes = std::fs::read(name).unwrap();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend(MARKER.repeat(LEFT / 8));
    bytes
}

fn open(storage: Arc<dyn Storage>, backed: bool) -> Qcow2 {
    let base = backed.then(|| {
        let bytes = MemoryStorage::new(vec![0x11; 300_000]);
        Arc::new(RawImage::new(Arc::new(bytes), Access::ReadOnly)) as Arc<dyn Image>
    });
    block_on(Qcow2::open(storage, base, Access::ReadWrite)).unwrap()
}

/// The disk shows nothing of others.
fn check_own(image: &Qcow2, what: &str) {
    let found = read_range(image, 0..image.virtual_size()).unwrap();
    let (words, _) = found.as_chunks::<8>();
    for (number, word) in words.iter().enumerate() {
        // Odd offsets: a marker may show shifted.
        let is_foreign = word == MARKER || word == DISCARDED;
        assert!(
            !is_foreign,
            "{what}: other people's bytes at {}",
            number * 8
        );
    }
}

fn write_compressed(image: &Qcow2, rng: &mut StdRng) {
    let size = image.cluster_size();
    let at = rng.random_range(0..image.virtual_size() / size) * size;
    let bytes = vec![rng.random_range(1..100u8); usize::try_from(size).unwrap()];
    let mut out = vec![0; bytes.len()];
    if let Some(len) = compress(image.compression_type(), &bytes, &mut out) {
        let compressed = IoBuf::from_bytes(&out[..len]);
        block_on(image.write_compressed(GuestOffset(at), compressed)).unwrap();
    }
}

/// One step of what guests and their keepers do.
fn step(image: Qcow2, rng: &mut StdRng, number: usize) -> Qcow2 {
    let name = |number: usize| OsString::from(format!("s{number}"));
    let snapshots = block_on(image.snapshots()).unwrap();
    match rng.random_range(0..16) {
        0 => write_compressed(&image, rng),
        // Not so many that the workload is about them alone.
        1 if snapshots.len() < 2 => {
            return block_on(image.create_snapshot(&name(number), UNIX_EPOCH)).unwrap();
        }
        2 if !snapshots.is_empty() => {
            return block_on(image.delete_snapshot(&snapshots[0].id)).unwrap();
        }
        3 if !snapshots.is_empty() => {
            return block_on(image.apply_snapshot(&snapshots[0].id)).unwrap();
        }
        4 if snapshots.is_empty() => {
            let size = rng.random_range(400..1000) * 1024;
            return block_on(image.resize(size)).unwrap();
        }
        5 => block_on(image.flush()).unwrap(),
        _ => {
            let range = random_range(rng, 0..image.virtual_size(), &[1, 512, 4096]);
            let operation = Operation::random(rng, range.end - range.start);
            block_on(perform(&image, range, &operation)).unwrap();
        }
    }
    image
}

fn run_seed(options: &str, seed: u64) {
    let mut rng = rng(seed);
    let backed = !options.contains("preallocation") && rng.random_bool(0.5);
    let storage = Arc::new(CrashStorage::new(
        new_image(options, backed),
        Delays::none(),
    ));
    let mut image = open(Arc::clone(&storage) as Arc<dyn Storage>, backed);
    for number in 0..60 {
        image = step(image, &mut rng, number);
        if number % 10 == 9 {
            check_own(&image, "live");
        }
    }
    drop(image);
    for _ in 0..12 {
        let cut = Moment(rng.random_range(0..=storage.now().0));
        let lost = match rng.random_range(0..4) {
            0 => Lost::All,
            1 => Lost::None,
            _ => Lost::Some { seed: rng.random() },
        };
        let what = format!("power cut at {cut:?} with {lost:?}");
        let left = Arc::new(MemoryStorage::new(storage.after_power_cut(cut, lost)));
        let mut image = open(Arc::clone(&left) as Arc<dyn Storage>, backed);
        check_own(&image, &what);
        for snapshot in block_on(image.snapshots()).unwrap() {
            image = block_on(image.apply_snapshot(&snapshot.id)).unwrap();
            check_own(&image, &format!("{what}, snapshot {:?}", snapshot.name));
        }
        for number in 100..110 {
            image = step(image, &mut rng, number);
        }
        check_own(&image, &format!("{what}, going on"));
    }
}

#[test]
fn nothing_of_others_ever_shows_whatever_is_done_and_wherever_the_power_is_cut() {
    for options in KINDS {
        for_each_seed(2, options, |seed| run_seed(options, seed));
    }
}
