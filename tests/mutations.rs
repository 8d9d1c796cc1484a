//! Images that somebody has tampered with: whatever they hold, opening, reading, writing and checking end, with an
//! error that gives a reason at worst, and need no more memory than an honest image.
//!
//! Every case is a sound image in which some fields of the header, entries of the tables or bytes have got other
//! values, by a seed that a failure prints. What is done to it is shared with the fuzz targets (`fuzz/bodies`).

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic)]

#[path = "../fuzz/bodies/mod.rs"]
#[allow(dead_code, unreachable_pub)]
mod bodies;
mod engine;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use engine::{for_each_seed, qemu_img, rng, run};
use nix::sys::resource::{Resource, setrlimit};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::qcow2::header::Header;

/// Address space of this process in bytes, the test runner included.
const MEMORY: u64 = 2 << 30;

/// Cases of each kind of image in each round.
const CASES: u64 = 60;

const KINDS: &[&str] = &[
    "compat=0.10,cluster_size=4k",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=4k,refcount_bits=64,lazy_refcounts=on",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=16k,extended_l2=on",
];

/// The header's fields: where they begin, and how many bytes they have.
const HEADER_FIELDS: &[(usize, usize)] = &[
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    // The first extensions' types and lengths.
    (112, 4),
    (116, 4),
    (120, 8),
    (128, 8),
    (136, 8),
];

/// The fields of an ext4 superblock that say where things are and how many, and of the first group descriptor.
const FILESYSTEM_FIELDS: &[(usize, usize)] = &[
    (1024, 4),
    (1028, 4),
    (1044, 4),
    (1048, 4),
    (1052, 4),
    (1056, 4),
    (1060, 4),
    (1064, 4),
    (1082, 2),
    (1100, 4),
    (1108, 4),
    (1112, 2),
    (1116, 4),
    (1120, 4),
    (1124, 4),
    (1230, 2),
    (1248, 4),
    (1278, 2),
    (1284, 4),
    (1360, 4),
    (1396, 1),
    (4096, 4),
    (4100, 4),
    (4104, 4),
    (4114, 2),
    (4160, 4),
    (4168, 4),
];

#[test]
fn tampered_images_end_in_errors_at_worst() {
    limit_memory();
    let sound: Vec<Vec<u8>> = KINDS.iter().map(|options| sound_image(options)).collect();
    for image in &sound {
        for (_, body) in bodies::QCOW2 {
            body(image);
        }
    }
    for_each_seed(CASES, "tampering", |seed| {
        for (kind, image) in KINDS.iter().zip(&sound) {
            let tampered = tamper(image, &mut rng(seed));
            run_all(bodies::QCOW2, &tampered, kind);
        }
    });
}

#[test]
fn tampered_disks_end_in_errors_at_worst() {
    limit_memory();
    let filesystem = sound_filesystem();
    let partitions = sound_partitions();
    for_each_seed(4 * CASES, "tampering with disks", |seed| {
        let mut rng = rng(seed);
        let mut disk = filesystem.clone();
        for _ in 0..rng.random_range(1..4) {
            change_field(&mut disk, FILESYSTEM_FIELDS, &mut rng);
        }
        run_all(bodies::RAW, &disk, "a filesystem");
        let mut disk = partitions.clone();
        for _ in 0..rng.random_range(1..4) {
            // The tables' sectors: boot record, GPT header and its first entries.
            let at = rng.random_range(440..1536);
            let width = [1, 2, 4, 8][rng.random_range(0..4)];
            change_field(&mut disk, &[(at, width)], &mut rng);
        }
        run_all(bodies::RAW, &disk, "partitions");
    });
}

fn limit_memory() {
    setrlimit(Resource::RLIMIT_AS, MEMORY, MEMORY).expect("memory can be limited");
}

/// Runs every body, and says which one has failed.
fn run_all(bodies: &[bodies::Body], bytes: &[u8], what: &str) {
    for (name, body) in bodies {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(bytes))) {
            eprintln!("{name} with {what}");
            resume_unwind(panic);
        }
    }
}

/// An image with data, zeros, compressed clusters, a snapshot and bitmaps, made by stock tools.
fn sound_image(options: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let image = directory.path().join("image.qcow2");
    let path = image.display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &path, "4M"]);
    write(
        &image,
        &[
            "write -P 1 0 256k",
            "write -c -P 2 512k 64k",
            "write -c -P 3 576k 64k",
        ],
    );
    if !options.contains("refcount_bits=1") {
        qemu_img(&["snapshot", "-c", "one", &path]);
    }
    if !options.contains("0.10") {
        qemu_img(&["bitmap", "--add", &path, "records"]);
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
    let (code, text) = run("qemu-io", &arguments);
    assert_eq!(code, 0, "{text}");
}

fn sound_filesystem() -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("disk");
    let file = std::fs::File::create(&path).expect("made");
    file.set_len(4 << 20).expect("grown");
    let path = path.display().to_string();
    let (code, text) = run(
        "mkfs.ext4",
        &["-q", "-F", "-b", "4096", "-O", "^has_journal", &path],
    );
    assert_eq!(code, 0, "{text}");
    std::fs::read(&path).expect("readable")
}

fn sound_partitions() -> Vec<u8> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("disk");
    let file = std::fs::File::create(&path).expect("made");
    file.set_len(4 << 20).expect("grown");
    let path = path.display().to_string();
    let (code, text) = run(
        "sgdisk",
        &["-a", "1", "-n", "1:64:2000", "-n", "2:2048:+1M", &path],
    );
    assert_eq!(code, 0, "{text}");
    std::fs::read(&path).expect("readable")
}

fn tamper(sound: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let header = Header::parse(sound).expect("the image is sound");
    let cluster = header.cluster_size();
    let l1_at = header.l1_table_offset.0;
    let refcounts_at = header.refcount_table_offset.0;
    let tables = [
        (l1_at, u64::from(header.l1_size) * 8),
        (refcounts_at, 64),
        (header.snapshots_offset.0, 96),
        (entry(sound, l1_at), cluster),
        (entry(sound, refcounts_at), cluster.min(256)),
        (bitmap_directory(sound), 64),
        (snapshot_l1(sound, &header), 64),
    ];
    let mut image = sound.to_vec();
    for _ in 0..rng.random_range(1..5) {
        match rng.random_range(0..16) {
            0 => {
                let at = rng.random_range(0..image.len());
                image[at] = rng.random();
            }
            1 => image.truncate(rng.random_range(0..=image.len())),
            2..=5 => change_field(&mut image, HEADER_FIELDS, rng),
            6..=8 => {
                // What one entry leads to becomes another one's, too.
                let [from, to] = [0; 2].map(|_| word_of(&tables, rng));
                if let Some(bytes) = image.get(from..from + 8).map(<[u8]>::to_vec)
                    && let Some(other) = image.get_mut(to..to + 8)
                {
                    other.copy_from_slice(&bytes);
                }
            }
            _ => {
                let at = word_of(&tables, rng);
                // Mostly whole words, and now and then narrower fields.
                let width = [8, 8, 8, 4, 2][rng.random_range(0..5)];
                change_field(&mut image, &[(at, width)], rng);
            }
        }
        if image.is_empty() {
            break;
        }
    }
    image
}

/// Where one of the words of these tables lies.
fn word_of(tables: &[(u64, u64)], rng: &mut StdRng) -> usize {
    let (start, len) = tables[rng.random_range(0..tables.len())];
    let at = start + rng.random_range(0..len.max(8) / 8) * 8;
    usize::try_from(at).expect("small")
}

/// Gives one of these big-endian fields (little-endian on a filesystem, which makes other values hostile) a value
/// that breaks careless arithmetic.
fn change_field(image: &mut [u8], fields: &[(usize, usize)], rng: &mut StdRng) {
    let (at, width) = fields[rng.random_range(0..fields.len())];
    let file_len = image.len() as u64;
    let Some(bytes) = image.get_mut(at..at + width) else {
        return;
    };
    let sound = bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte));
    let largest = u64::MAX >> (64 - 8 * width);
    let value = match rng.random_range(0..16) {
        0 => 0,
        1 => 1,
        2 => largest,
        3 => largest / 2,
        4 => largest / 2 + 1,
        5 => sound.wrapping_add(1),
        6 => sound.wrapping_sub(1),
        7 => sound.wrapping_add(512),
        8 => sound.wrapping_mul(2),
        9 | 10 => sound ^ 1 << rng.random_range(0..8 * width),
        11 => rng.random(),
        12 => file_len,
        13 => (1 << 56) - (1 << rng.random_range(9..22)),
        14 => rng.random_range(0..file_len.max(1)) & !511 | sound & 0xffff << 48,
        _ => sound & !(0xff << 48) | rng.random_range(0..file_len.max(1)) & !0xfff,
    };
    let little_endian = rng.random_bool(0.1);
    for (number, byte) in bytes.iter_mut().enumerate() {
        let shift = if little_endian {
            number
        } else {
            width - 1 - number
        };
        *byte = value.to_le_bytes()[shift];
    }
}

/// Where the first entry of the table at `at` points to.
fn entry(image: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).expect("small");
    let word = image[at..at + 8].try_into().expect("8 bytes");
    u64::from_be_bytes(word) & 0x00ff_ffff_ffff_fe00
}

/// Where the L1 table of the first snapshot lies, or the header where there is none.
fn snapshot_l1(image: &[u8], header: &Header) -> u64 {
    match header.nb_snapshots {
        0 => 0,
        _ => entry(image, header.snapshots_offset.0),
    }
}

/// Where the directory of bitmaps lies, or anything that looks like it.
fn bitmap_directory(image: &[u8]) -> u64 {
    let kind = 0x2385_2875u32.to_be_bytes();
    let found = image.windows(4).take(4096).position(|bytes| bytes == kind);
    found.map_or(0, |at| entry(image, at as u64 + 24))
}
