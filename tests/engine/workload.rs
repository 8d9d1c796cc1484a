//! Random operations on a disk, performed as a device would, and what the disk may hold after some of them were
//! cut short.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::error::Result;
use seethrough::image::{Image, Mapped};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::compressed::compress;
use seethrough::storage::ZeroMode;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use super::{Backing, Shape, run_interleaved};

const KIB: u64 = 1 << 10;
const SECTOR: usize = 512;

/// Images of every kind of entry and refcount.
pub const SHAPES: &[Shape] = &[
    shape("cluster_size=512", 300 * KIB, Backing::None),
    shape(
        "cluster_size=512,refcount_bits=64",
        200 * KIB + 512,
        Backing::Raw,
    ),
    shape(
        "cluster_size=1024,refcount_bits=1",
        400 * KIB,
        Backing::ShortRaw,
    ),
    shape(
        "cluster_size=2048,refcount_bits=2",
        400 * KIB,
        Backing::LongRaw,
    ),
    shape(
        "cluster_size=4096,refcount_bits=4",
        900 * KIB,
        Backing::Qcow2OnRaw,
    ),
    shape(
        "cluster_size=4096,refcount_bits=8",
        900 * KIB + 1536,
        Backing::None,
    ),
    shape("cluster_size=64k", 2048 * KIB, Backing::Qcow2OnRaw),
    shape(
        "cluster_size=64k,preallocation=metadata",
        2048 * KIB,
        Backing::None,
    ),
    shape(
        "cluster_size=64k,lazy_refcounts=on,refcount_bits=32",
        1500 * KIB,
        Backing::Raw,
    ),
    shape(
        "cluster_size=32k,compression_type=zstd",
        1500 * KIB,
        Backing::None,
    ),
    shape("cluster_size=2M", 9000 * KIB, Backing::Raw),
    shape("cluster_size=16k,extended_l2=on", 700 * KIB, Backing::Raw),
    shape(
        "cluster_size=128k,extended_l2=on",
        1800 * KIB,
        Backing::Qcow2OnRaw,
    ),
    shape(
        "cluster_size=128k,extended_l2=on,preallocation=metadata",
        1800 * KIB,
        Backing::None,
    ),
    shape(
        "cluster_size=64k,extended_l2=on,refcount_bits=1",
        1200 * KIB + 512,
        Backing::ShortRaw,
    ),
    shape("compat=0.10,cluster_size=4096", 600 * KIB, Backing::None),
    shape("compat=0.10,cluster_size=512", 150 * KIB, Backing::Raw),
    shape(
        "compat=0.10,cluster_size=64k",
        1200 * KIB,
        Backing::Qcow2OnRaw,
    ),
];

const fn shape(options: &'static str, size: u64, backing: Backing) -> Shape {
    Shape {
        options,
        size,
        backing,
    }
}

/// An operation on a range.
#[derive(Clone, Debug)]
pub enum Operation {
    Read,
    Write(Vec<u8>),
    Zero(ZeroMode),
    Discard,
    Flush,
}

impl Operation {
    pub fn random(rng: &mut StdRng, len: u64) -> Self {
        match rng.random_range(0..20) {
            0..6 => Self::Read,
            6..13 => {
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                match rng.random_range(0..10) {
                    0 => {}
                    1..4 => fill_compressibly(rng, &mut bytes),
                    _ => rng.fill(&mut bytes[..]),
                }
                Self::Write(bytes)
            }
            13..15 => Self::Zero(ZeroMode::MayUnmap),
            15 => Self::Zero(ZeroMode::KeepAllocated),
            16..19 => Self::Discard,
            _ => Self::Flush,
        }
    }
}

/// Every sector differs, and yet there is much to be saved, more or less.
fn fill_compressibly(rng: &mut StdRng, bytes: &mut [u8]) {
    let noise = rng.random_range(1..400);
    for sector in bytes.chunks_mut(SECTOR) {
        let noise = noise.min(sector.len());
        rng.fill(&mut sector[..noise]);
    }
}

/// A range of at most a few clusters, aligned to one of `alignments`.
pub fn random_range(rng: &mut StdRng, within: Range<u64>, alignments: &[u64]) -> Range<u64> {
    let align = alignments[rng.random_range(0..alignments.len())];
    let longest = [600, 5000, 70_000, 300_000][rng.random_range(0..4)];
    let start = rng.random_range(within.clone()) / align * align;
    let end = (start + 1 + rng.random_range(0..longest)).next_multiple_of(align);
    let start = start.max(within.start);
    start..end.clamp(start + 1, within.end)
}

/// A few operations on ranges that do not overlap.
pub fn random_batch(
    rng: &mut StdRng,
    size: u64,
    alignments: &[u64],
) -> Vec<(Range<u64>, Operation)> {
    let count = rng.random_range(1..=6u64);
    let stride = size / count / SECTOR as u64 * SECTOR as u64;
    (0..count)
        .map(|number| {
            let range = random_range(rng, number * stride..(number + 1) * stride, alignments);
            let operation = Operation::random(rng, range.end - range.start);
            (range, operation)
        })
        .collect()
}

/// Runs an operation as a device would: by the fast path where that knows the way.
pub async fn perform(
    image: &dyn Image,
    range: Range<u64>,
    operation: &Operation,
) -> Result<Vec<u8>> {
    let at = GuestOffset(range.start);
    let len = range.end - range.start;
    match operation {
        Operation::Read => {
            let buf = IoBuf::from_bytes(&vec![0xaa; usize::try_from(len).unwrap()]);
            match image.map_read(at, len) {
                Mapped::Extent { storage, at, guard } => {
                    storage.readv(at, buf.clone()).await?;
                    drop(guard);
                }
                Mapped::Zeroes => buf.zero(0..buf.len()),
                Mapped::Slow => image.read(at, buf.clone()).await?,
            }
            return Ok(buf.to_vec());
        }
        Operation::Write(bytes) => {
            let buf = IoBuf::from_bytes(bytes);
            match image.map_write(at, len) {
                Mapped::Extent { storage, at, guard } => {
                    storage.writev(at, buf).await?;
                    drop(guard);
                }
                Mapped::Zeroes => panic!("a write is mapped to zeros"),
                Mapped::Slow => image.write(at, buf).await?,
            }
        }
        Operation::Zero(mode) => image.write_zeroes(at, len, *mode).await?,
        Operation::Discard => image.discard(at, len).await?,
        Operation::Flush => image.flush().await?,
    }
    Ok(Vec::new())
}

/// Runs the operations of a batch at the same time, in an order given by `rng`.
pub fn perform_batch(
    image: &dyn Image,
    batch: &[(Range<u64>, Operation)],
    rng: &mut StdRng,
) -> Vec<Result<Vec<u8>>> {
    let futures = batch
        .iter()
        .map(
            |(range, operation)| -> Pin<Box<dyn Future<Output = Result<Vec<u8>>> + '_>> {
                Box::pin(perform(image, range.clone(), operation))
            },
        )
        .collect();
    run_interleaved(rng, futures)
}

/// As [`perform`], but the clusters that a write covers are compressed where that saves room.
pub async fn perform_compressing(
    image: &Qcow2,
    range: Range<u64>,
    operation: &Operation,
) -> Result<Vec<u8>> {
    let Operation::Write(bytes) = operation else {
        return perform(image, range, operation).await;
    };
    let cluster = image.cluster_size();
    let disk_end = image.virtual_size();
    let mut at = range.start;
    let mut compressed = vec![0; usize::try_from(cluster).unwrap()];
    while at < range.end {
        let end = (at + 1).next_multiple_of(cluster).min(range.end);
        let part = &bytes[usize::try_from(at - range.start).unwrap()..]
            [..usize::try_from(end - at).unwrap()];
        let is_whole =
            at.is_multiple_of(cluster) && (end.is_multiple_of(cluster) || end == disk_end);
        let mut whole = part.to_vec();
        whole.resize(compressed.len(), 0);
        match compress(image.compression_type(), &whole, &mut compressed) {
            Some(len) if is_whole => {
                let data = IoBuf::from_bytes(&compressed[..len]);
                image.write_compressed(GuestOffset(at), data).await?;
            }
            _ => {
                perform(image, at..end, &Operation::Write(part.to_vec())).await?;
            }
        }
        at = end;
    }
    Ok(Vec::new())
}

/// As [`perform_batch`], by [`perform_compressing`].
pub fn perform_batch_compressing(
    image: &Qcow2,
    batch: &[(Range<u64>, Operation)],
    rng: &mut StdRng,
) -> Vec<Result<Vec<u8>>> {
    let futures = batch
        .iter()
        .map(
            |(range, operation)| -> Pin<Box<dyn Future<Output = Result<Vec<u8>>> + '_>> {
                Box::pin(perform_compressing(image, range.clone(), operation))
            },
        )
        .collect();
    run_interleaved(rng, futures)
}

/// Reads a range.
pub fn read_range(image: &dyn Image, range: Range<u64>) -> Result<Vec<u8>> {
    let buf = IoBuf::zeroed(usize::try_from(range.end - range.start).unwrap());
    block_on(image.read(GuestOffset(range.start), buf.clone()))?;
    Ok(buf.to_vec())
}

/// Panics at the first byte that differs.
pub fn check_same(found: &[u8], expected: &[u8], start: u64, what: &str) {
    if let Some(at) = (0..expected.len()).find(|at| found[*at] != expected[*at]) {
        panic!(
            "{what}: byte {} is {:#x} and should be {:#x}",
            start + at as u64,
            found[at],
            expected[at]
        );
    }
}

/// The bytes of `flat` that a range covers.
pub fn part_of<'a>(flat: &'a mut [u8], range: &Range<u64>) -> &'a mut [u8] {
    &mut flat[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
}

/// What a disk may hold when operations on whole sectors were cut short: each sector as it durably was, or as any
/// later operation made it.
#[derive(Clone, Debug, Default)]
pub struct Uncertain {
    /// The durable bytes.
    pub durable: Vec<u8>,
    /// Later changes: writes with their bytes, the others with none for zeros.
    pub later: Vec<(Range<u64>, Option<Vec<u8>>)>,
}

impl Uncertain {
    /// Notes an operation that has begun since.
    pub fn add(&mut self, range: &Range<u64>, operation: &Operation) {
        match operation {
            Operation::Write(bytes) => self.later.push((range.clone(), Some(bytes.clone()))),
            Operation::Zero(_) | Operation::Discard => self.later.push((range.clone(), None)),
            Operation::Read | Operation::Flush => {}
        }
    }

    /// Whether the disk may hold these bytes.
    pub fn check(&self, found: &[u8]) -> std::result::Result<(), String> {
        for (number, sector) in found.chunks(SECTOR).enumerate() {
            let start = number * SECTOR;
            if sector == &self.durable[start..start + sector.len()] {
                continue;
            }
            let explained = self.later.iter().any(|(range, bytes)| {
                let begin = usize::try_from(range.start).unwrap();
                let end = usize::try_from(range.end).unwrap();
                let covered = begin <= start && start + sector.len() <= end;
                covered
                    && match bytes {
                        Some(bytes) => &bytes[start - begin..][..sector.len()] == sector,
                        None => sector.iter().all(|byte| *byte == 0),
                    }
            });
            if !explained {
                return Err(format!(
                    "the sector at {start} ({:02x?}…) is neither what was flushed ({:02x?}…) nor what was written since",
                    &sector[..8],
                    &self.durable[start..start + 8]
                ));
            }
        }
        Ok(())
    }
}
