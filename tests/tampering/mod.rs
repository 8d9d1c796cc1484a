//! Sound images of every kind, and changes to their metadata.

// Each test binary includes this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::qcow2::header::Header;
use seethrough::qcow2::header_extension::ExtensionType;

use crate::engine::qemu_img;

/// How a sound image is made.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Options for `qemu-img create -o`.
    pub options: &'static str,
    /// The disk's size in KiB.
    pub kib: u64,
}

const fn kind(options: &'static str, kib: u64) -> Kind {
    Kind { options, kib }
}

pub const KINDS: &[Kind] = &[
    kind("compat=0.10,cluster_size=4k", 2048),
    kind("cluster_size=512", 256),
    kind("cluster_size=512,refcount_bits=64", 200),
    kind("cluster_size=1k,refcount_bits=1", 400),
    kind("cluster_size=4k,refcount_bits=4", 1000),
    kind("cluster_size=4k,refcount_bits=8,lazy_refcounts=on", 2048),
    kind("cluster_size=64k,compression_type=zstd", 8192),
    kind("cluster_size=64k,preallocation=metadata", 4096),
    kind("cluster_size=2M", 32768),
    kind("cluster_size=16k,extended_l2=on", 4096),
    kind(
        "cluster_size=16k,extended_l2=on,preallocation=metadata",
        2048,
    ),
];

impl Kind {
    /// Whether refcounts can count what snapshots share.
    fn can_share(self) -> bool {
        !self.options.contains("refcount_bits=1") || self.options.contains("refcount_bits=16")
    }

    /// Whether the image has a bitmap: version 2 cannot, and with a broken one stock tools check nothing else.
    fn has_bitmap(self) -> bool {
        !self.options.contains("compat=0.10") && self.options.contains('5')
    }
}

/// An image with data, zeros, compressed clusters, snapshots and a bitmap, as far as its kind has them, made by
/// stock tools.
pub fn sound_image(kind: &Kind, directory: &Path) -> PathBuf {
    let image = directory.join("sound.qcow2");
    let path = image.display().to_string();
    let size = format!("{}k", kind.kib);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        kind.options,
        &path,
        &size,
    ]);
    let k = kind.kib / 16;
    write(
        &path,
        &[
            format!("write -q -P 1 0 {}k", k * 4),
            format!("write -q -z {}k {}k", k * 5, k),
            format!("write -q -P 2 {}k {k}k", k * 7),
        ],
    );
    if !kind.options.contains("preallocation") {
        compress(kind, &path, k * 8);
    }
    if kind.can_share() {
        qemu_img(&["snapshot", "-c", "first", &path]);
        write(&path, &[format!("write -q -P 3 {k}k {k}k")]);
        qemu_img(&["snapshot", "-c", "second", &path]);
    }
    write(
        &path,
        &[
            format!("write -q -P 4 {}k {}k", k * 3, k * 3),
            format!("discard -q {}k {k}k", k * 7),
            format!("write -q -P 5 {}k {}k", k * 13, k / 2),
        ],
    );
    if kind.has_bitmap() {
        qemu_img(&["bitmap", "--add", "--enable", "-g", "64k", &path, "dirty"]);
        write(&path, &[format!("write -q -P 6 0 {k}k")]);
    }
    image
}

fn write(path: &str, commands: &[String]) {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(path);
    let (code, text) = crate::engine::run("qemu-io", &arguments);
    assert_eq!(code, 0, "qemu-io {arguments:?}: {text}");
}

/// Writes two compressed clusters at `at` KiB.
fn compress(kind: &Kind, path: &str, at: u64) {
    let cluster = kind
        .options
        .split(',')
        .find_map(|option| option.strip_prefix("cluster_size="))
        .unwrap_or("64k");
    let bytes: u64 = match cluster {
        "512" => 512,
        "1k" => 1 << 10,
        "4k" => 4 << 10,
        "16k" => 16 << 10,
        "2M" => 2 << 20,
        _ => 64 << 10,
    };
    let at = (at << 10).next_multiple_of(bytes);
    write(
        path,
        &[
            format!("write -q -c -P 7 {at} {bytes}"),
            format!("write -q -c -P 8 {} {bytes}", at + bytes),
        ],
    );
}

/// What was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Refcount,
    RefcountTable,
    L1,
    L2,
    SnapshotTable,
    SnapshotL1,
    BitmapDirectory,
    BitmapTable,
    Truncation,
    AnyByte,
}

/// An image that somebody has tampered with.
pub struct Tampered {
    pub bytes: Vec<u8>,
    /// Each with the place and the new value.
    pub changes: Vec<(Change, usize, u64)>,
}

/// Where the tables of a sound image lie.
struct Tables {
    header: Header,
    cluster: u64,
    blocks: Vec<u64>,
    l2_tables: Vec<u64>,
    snapshot_l1s: Vec<(u64, u64)>,
    bitmaps: Option<(u64, u64)>,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn word(image: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).expect("small");
    image.get(at..at + 8).map_or(0, |bytes| {
        u64::from_be_bytes(bytes.try_into().expect("8 bytes"))
    })
}

fn half(image: &[u8], at: u64) -> u64 {
    word(image, at) >> 32
}

impl Tables {
    fn of(image: &[u8]) -> Self {
        let header = Header::parse(image).expect("the image is sound");
        let cluster = header.cluster_size();
        let words = |at: u64, count: u64| (0..count).map(move |index| word(image, at + index * 8));
        let table_words = u64::from(header.refcount_table_clusters) * cluster / 8;
        let blocks = words(header.refcount_table_offset.0, table_words)
            .filter(|word| *word != 0)
            .collect();
        let mut l1s = vec![(header.l1_table_offset.0, u64::from(header.l1_size))];
        let mut at = header.snapshots_offset.0;
        for _ in 0..header.nb_snapshots {
            l1s.push((word(image, at), half(image, at + 8)));
            let strings = half(image, at + 12);
            let len = 40 + half(image, at + 36) + (strings >> 16) + (strings & 0xffff);
            at = (at + len).next_multiple_of(8);
        }
        let mut l2_tables: Vec<u64> = l1s
            .iter()
            .flat_map(|(at, count)| words(*at, *count))
            .map(|word| word & OFFSET)
            .filter(|at| *at != 0)
            .collect();
        l2_tables.sort_unstable();
        l2_tables.dedup();
        let bitmaps = header
            .extension(ExtensionType::BITMAPS)
            .map(|data| (word(data, 16), word(data, 8)));
        Self {
            cluster,
            blocks,
            l2_tables,
            snapshot_l1s: l1s.split_off(1),
            bitmaps,
            header,
        }
    }

    /// A cluster of metadata.
    fn metadata(&self, rng: &mut StdRng) -> u64 {
        match rng.random_range(0..6) {
            0 => self.header.l1_table_offset.0,
            1 => self.header.refcount_table_offset.0,
            2 => self.blocks[rng.random_range(0..self.blocks.len())],
            3 => self.header.snapshots_offset.0,
            4 => self.bitmaps.map_or(self.cluster, |(at, _)| at),
            _ => self.l2_tables[rng.random_range(0..self.l2_tables.len())],
        }
    }
}

/// Changes a sound image in so many places.
pub fn tamper(sound: &[u8], changes: usize, rng: &mut StdRng) -> Tampered {
    let tables = Tables::of(sound);
    let mut tampered = Tampered {
        bytes: sound.to_vec(),
        changes: Vec::new(),
    };
    while tampered.changes.len() < changes {
        change(&tables, &mut tampered, rng);
    }
    tampered
}

fn change(tables: &Tables, image: &mut Tampered, rng: &mut StdRng) {
    let words = |count: u64, rng: &mut StdRng| rng.random_range(0..count.max(1)) * 8;
    let some = |list: &[u64], rng: &mut StdRng| list[rng.random_range(0..list.len())];
    let (what, at) = match rng.random_range(0..20) {
        0..4 => {
            // Of all refcounts in a block few are in use.
            let within = rng.random_range(0..tables.cluster.min(256));
            (Change::Refcount, some(&tables.blocks, rng) + within)
        }
        4..6 => (
            Change::RefcountTable,
            tables.header.refcount_table_offset.0 + words(tables.blocks.len() as u64 + 1, rng),
        ),
        6..9 => (
            Change::L1,
            tables.header.l1_table_offset.0 + words(tables.header.l1_size.into(), rng),
        ),
        9..15 => {
            let table = some(&tables.l2_tables, rng);
            // Entries in use are preferred.
            let mut at = table + words(tables.cluster / 8, rng);
            for _ in 0..50 {
                if word(&image.bytes, at) != 0 {
                    break;
                }
                at = table + words(tables.cluster / 8, rng);
            }
            (Change::L2, at)
        }
        15 if tables.header.nb_snapshots > 0 => (
            Change::SnapshotTable,
            tables.header.snapshots_offset.0 + rng.random_range(0..12) * 8,
        ),
        16 if !tables.snapshot_l1s.is_empty() => {
            let (at, count) = tables.snapshot_l1s[rng.random_range(0..tables.snapshot_l1s.len())];
            (Change::SnapshotL1, at + words(count, rng))
        }
        17 => match tables.bitmaps {
            Some((at, len)) if rng.random_bool(0.5) => {
                (Change::BitmapDirectory, at + words(len / 8, rng))
            }
            Some((at, _)) => (Change::BitmapTable, word(&image.bytes, at) & OFFSET),
            None => return,
        },
        18 => {
            let len = rng.random_range(image.bytes.len() / 2..image.bytes.len());
            image.bytes.truncate(len);
            image.changes.push((Change::Truncation, len, 0));
            return;
        }
        _ => {
            let cluster = tables.metadata(rng);
            (
                Change::AnyByte,
                cluster + rng.random_range(0..tables.cluster),
            )
        }
    };
    let place = usize::try_from(at).expect("small");
    if matches!(what, Change::Refcount | Change::AnyByte) {
        let Some(byte) = image.bytes.get_mut(place) else {
            return;
        };
        *byte = match rng.random_range(0..4) {
            0 => 0,
            1 => byte.wrapping_add(1),
            2 => byte.wrapping_sub(1),
            _ => *byte ^ 1 << rng.random_range(0..8),
        };
        image.changes.push((what, place, u64::from(*byte)));
        return;
    }
    let old = word(&image.bytes, at);
    let new = hostile_word(tables, image, old, rng);
    if let Some(bytes) = image.bytes.get_mut(place..place + 8) {
        bytes.copy_from_slice(&new.to_be_bytes());
        image.changes.push((what, place, new));
    }
}

fn hostile_word(tables: &Tables, image: &Tampered, old: u64, rng: &mut StdRng) -> u64 {
    let len = image.bytes.len() as u64;
    let flags = old & !OFFSET;
    match rng.random_range(0..12) {
        0 => 0,
        1..4 => old ^ 1 << rng.random_range(0..64),
        4 => old ^ 1 << 63,
        5 => flags | tables.metadata(rng),
        6 => flags | (rng.random_range(0..len / tables.cluster) * tables.cluster),
        7 => flags | rng.random_range(0..len * 2) & !511,
        8 => flags | (len + rng.random_range(0..4) * tables.cluster) & OFFSET,
        9 => {
            let table = tables.l2_tables[rng.random_range(0..tables.l2_tables.len())];
            word(
                &image.bytes,
                table + rng.random_range(0..tables.cluster / 8) * 8,
            )
        }
        10 => old.wrapping_add(tables.cluster),
        _ => rng.random(),
    }
}
