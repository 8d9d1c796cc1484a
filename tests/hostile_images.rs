//! Images that somebody has tampered with: whatever they hold, opening, reading and writing end, with an error at
//! worst, and need no more memory than an honest image.
//!
//! Every case is a sound image with some of its fields, table entries or bytes changed at random, by a seed that a
//! failure prints.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::oracle;
use nix::sys::resource::{Resource, setrlimit};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::error::{Error, ErrorKind, Result};
use seethrough::image::{Access, Image, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::header::Header;
use seethrough::storage::{IoFuture, MemoryStorage, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{GuestOffset, HostOffset};

/// Address space of this process in bytes, the test runner included.
const MEMORY: u64 = 2 << 30;

/// How far a hostile image may make its file grow.
const LARGEST_FILE: u64 = 64 << 20;

/// Operations on the file that a case may take: honest ones take some hundreds.
const OPERATIONS: u64 = 200_000;

const CASES_PER_KIND: u64 = 150;

const KINDS: &[&str] = &[
    "compat=0.10,cluster_size=4k",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=4k,refcount_bits=64,lazy_refcounts=on",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=16k,extended_l2=on",
];

#[test]
fn tampered_images_end_in_errors_at_worst() {
    setrlimit(Resource::RLIMIT_AS, MEMORY, MEMORY).expect("memory can be limited");
    for (kind, options) in KINDS.iter().enumerate() {
        let sound = sound_image(options);
        exercise(&sound, &mut StdRng::seed_from_u64(0)).expect("a sound image can be opened");
        for case in 0..CASES_PER_KIND {
            let seed = kind as u64 * CASES_PER_KIND + case;
            let mut rng = StdRng::seed_from_u64(seed);
            let tampered = tamper(&sound, &mut rng);
            let outcome = catch_unwind(AssertUnwindSafe(|| exercise(&tampered, &mut rng)));
            if let Err(panic) = outcome {
                eprintln!("{options}: seed {seed}");
                resume_unwind(panic);
            }
        }
    }
}

/// An image with data, zeros, compressed clusters and a snapshot, made by stock tools.
fn sound_image(options: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let image = directory.path().join("image.qcow2");
    let path = image.display().to_string();
    oracle::ok(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", "-o", options, &path, "4M"],
    );
    write(
        &image,
        &[
            "write -P 1 0 256k",
            "write -c -P 2 512k 64k",
            "write -c -P 3 576k 64k",
        ],
    );
    if !options.contains("refcount_bits=1") {
        oracle::ok("qemu-img", ["snapshot", "-c", "one", &path]);
    }
    write(
        &image,
        &[
            "write -P 4 4k 8k",
            "write -z 1M 1M",
            "discard 64k 64k",
            "write -P 5 3M 64k",
        ],
    );
    std::fs::read(&image).expect("readable")
}

fn write(image: &Path, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    let path = image.display().to_string();
    arguments.push(&path);
    oracle::ok("qemu-io", arguments);
}

/// Values that break careless arithmetic.
fn hostile_value(rng: &mut StdRng, sound: u64, file_len: u64) -> u64 {
    match rng.random_range(0..8) {
        0 => 0,
        1 => u64::MAX,
        2 => sound ^ 1 << rng.random_range(0..64),
        3 => rng.random(),
        4 => sound.wrapping_add(512),
        5 => rng.random_range(0..file_len) & !511 | sound & 0xffff << 48,
        6 => (1 << 56) - (1 << rng.random_range(9..22)),
        _ => sound & !(0xff << 48) | rng.random_range(0..file_len) & !0xfff,
    }
}

fn tamper(sound: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let header = Header::parse(sound).expect("the image is sound");
    let mut image = sound.to_vec();
    let tables = [
        (0, 112),
        (header.l1_table_offset.0, u64::from(header.l1_size) * 8),
        (header.refcount_table_offset.0, 64),
        (header.snapshots_offset.0, 64),
        (l2_table(sound, &header), header.cluster_size()),
    ];
    for _ in 0..rng.random_range(1..5) {
        let (start, len) = tables[rng.random_range(0..tables.len())];
        match rng.random_range(0..10) {
            0 => {
                let at = rng.random_range(0..image.len());
                image[at] = rng.random();
            }
            1 => image.truncate(rng.random_range(0..=image.len())),
            2 => {
                let at = usize::try_from(start).expect("small") + rng.random_range(8..100);
                put(
                    &mut image,
                    at & !3,
                    &hostile_value(rng, 0, 1 << 20).to_be_bytes()[4..],
                );
            }
            _ => {
                let at = start + rng.random_range(0..len.max(8) / 8) * 8;
                let at = usize::try_from(at).expect("small");
                let Some(entry) = image.get(at..at + 8) else {
                    continue;
                };
                let entry = u64::from_be_bytes(entry.try_into().expect("8 bytes"));
                let value = hostile_value(rng, entry, sound.len() as u64);
                put(&mut image, at, &value.to_be_bytes());
            }
        }
        if image.is_empty() {
            break;
        }
    }
    image
}

/// The first L2 table.
fn l2_table(image: &[u8], header: &Header) -> u64 {
    let at = usize::try_from(header.l1_table_offset.0).expect("small");
    let entry = image[at..at + 8].try_into().expect("8 bytes");
    u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(room) = image.get_mut(at..at + bytes.len()) {
        room.copy_from_slice(bytes);
    }
}

/// Opens the image twice, for reading and for writing, and does what guests do.
fn exercise(image: &[u8], rng: &mut StdRng) -> Result<()> {
    let storage = Arc::new(Bounded::new(image));
    let operations = Arc::clone(&storage.operations);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let backing = RawImage::new(
            Arc::new(MemoryStorage::new(vec![6; 1 << 20])),
            Access::ReadOnly,
        );
        let storage = Arc::clone(&storage) as Arc<dyn Storage>;
        let disk = block_on(Qcow2::open(storage, Some(Arc::new(backing)), access))?;
        for _ in 0..12 {
            request(&disk, rng);
        }
        // Failing is allowed here, and everywhere above.
        let _ = block_on(disk.flush());
    }
    let operations = operations.load(Ordering::Relaxed);
    assert!(
        operations < OPERATIONS,
        "{operations} operations on the file"
    );
    Ok(())
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
    let _ = match rng.random_range(0..8) {
        0 => block_on(disk.discard(at, len as u64)),
        1 => block_on(disk.write_zeroes(at, len as u64, ZeroMode::MayUnmap)),
        2 => block_on(disk.write_zeroes(at, len as u64, ZeroMode::KeepAllocated)),
        3 | 4 => block_on(disk.write(at, IoBuf::zeroed(len))),
        5 => block_on(disk.allocation(at, len as u64)).map(|_| ()),
        _ => block_on(disk.read(at, IoBuf::zeroed(len))),
    };
    drop(disk.map_read(at, 512));
    drop(disk.map_write(at, 512));
}

/// Memory that grows only so far, and counts what is done to it.
struct Bounded {
    bytes: MemoryStorage,
    operations: Arc<AtomicU64>,
}

impl Bounded {
    fn new(image: &[u8]) -> Self {
        Self {
            bytes: MemoryStorage::new(image.to_vec()),
            operations: Arc::default(),
        }
    }

    fn admits(&self, at: HostOffset, len: u64) -> Result<()> {
        self.operations.fetch_add(1, Ordering::Relaxed);
        match at.checked_add(len) {
            Some(end) if end.0 <= LARGEST_FILE => Ok(()),
            _ => Err(Error::new(
                ErrorKind::NoSpace,
                "the file has grown too large",
            )),
        }
    }
}

impl Storage for Bounded {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.operations.fetch_add(1, Ordering::Relaxed);
        if at.0 > LARGEST_FILE {
            buf.zero(0..buf.len());
            return IoFuture::ready(Ok(()));
        }
        self.bytes.readv(at, buf)
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        match self.admits(at, buf.len() as u64) {
            Ok(()) => self.bytes.writev(at, buf),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn flush(&self) -> IoFuture<'_> {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.flush()
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.discard(at, len)
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        match self.admits(at, len) {
            Ok(()) => self.bytes.write_zeroes(at, len, mode),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        match self.admits(HostOffset(0), len) {
            Ok(()) => self.bytes.set_len(len),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn name(&self) -> &str {
        "hostile image"
    }
}
