//! Random operations on chains of images against a flat vector of bytes; stock tools judge what is left.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

mod engine;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use engine::{Allowed, Backing, Chain, Shape, rng, run_interleaved, seeds};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::error::Result;
use seethrough::image::{Image, Mapped};
use seethrough::storage::ZeroMode;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

const KIB: u64 = 1 << 10;

const SHAPES: &[Shape] = &[
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

/// An operation on a range of its own.
#[derive(Clone, Debug)]
enum Operation {
    Read,
    Write(Vec<u8>),
    Zero(ZeroMode),
    Discard,
    Flush,
}

/// A range of at most a few clusters, aligned more often than not.
fn random_range(rng: &mut StdRng, within: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let align = [1, 512, 512, 4096, 65536][rng.random_range(0..5)];
    let longest = [600, 5000, 70_000, 300_000][rng.random_range(0..4)];
    let start = rng.random_range(within.clone()) / align * align;
    let end = (start + 1 + rng.random_range(0..longest)).next_multiple_of(align);
    let start = start.max(within.start);
    start..end.clamp(start + 1, within.end)
}

fn random_operation(rng: &mut StdRng, len: u64) -> Operation {
    match rng.random_range(0..20) {
        0..6 => Operation::Read,
        6..13 => {
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            if rng.random_bool(0.9) {
                rng.fill(&mut bytes[..]);
            }
            Operation::Write(bytes)
        }
        13..15 => Operation::Zero(ZeroMode::MayUnmap),
        15 => Operation::Zero(ZeroMode::KeepAllocated),
        16..19 => Operation::Discard,
        _ => Operation::Flush,
    }
}

/// Runs an operation as a device would: by the fast path where that knows the way.
async fn perform(
    image: &dyn Image,
    range: std::ops::Range<u64>,
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

fn read_all(image: &dyn Image, range: std::ops::Range<u64>) -> Vec<u8> {
    let buf = IoBuf::zeroed(usize::try_from(range.end - range.start).unwrap());
    block_on(image.read(GuestOffset(range.start), buf.clone())).unwrap();
    buf.to_vec()
}

fn check_same(found: &[u8], expected: &[u8], start: u64, what: &str) {
    if let Some(at) = (0..expected.len()).find(|at| found[*at] != expected[*at]) {
        panic!(
            "{what}: byte {} is {:#x} and should be {:#x}",
            start + at as u64,
            found[at],
            expected[at]
        );
    }
}

/// A few operations on ranges that do not overlap, all under way at the same time.
fn one_batch(image: &Arc<dyn Image>, chain: &mut Chain, rng: &mut StdRng) {
    let size = image.virtual_size();
    let count = rng.random_range(1..=6u64);
    let stride = size / count;
    let batch: Vec<_> = (0..count)
        .map(|number| {
            let range = random_range(rng, number * stride..(number + 1) * stride);
            let operation = random_operation(rng, range.end - range.start);
            (range, operation)
        })
        .collect();
    let futures = batch
        .iter()
        .map(
            |(range, operation)| -> Pin<Box<dyn Future<Output = Result<Vec<u8>>> + '_>> {
                Box::pin(perform(image.as_ref(), range.clone(), operation))
            },
        )
        .collect();
    let results = run_interleaved(rng, futures);
    for ((range, operation), result) in batch.into_iter().zip(results) {
        let found = result.unwrap_or_else(|error| panic!("{operation:?} at {range:?}: {error}"));
        let indices = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        let expected = &mut chain.flat[indices];
        match operation {
            Operation::Read => check_same(&found, expected, range.start, "read"),
            Operation::Write(bytes) => expected.copy_from_slice(&bytes),
            Operation::Zero(_) => expected.fill(0),
            Operation::Discard => {
                let now = read_all(image.as_ref(), range.clone());
                for (byte, now) in expected.iter_mut().zip(now) {
                    assert!(
                        now == 0 || now == *byte,
                        "a discard at {range:?} made up {now:#x}"
                    );
                    *byte = now;
                }
            }
            Operation::Flush => {}
        }
    }
}

fn run_seed(shape: &Shape, seed: u64) {
    let mut rng = rng(seed);
    let mut chain = Chain::create(shape, &mut rng);
    let mut image = chain.open_yielding(seed);
    for _ in 0..60 {
        if rng.random_range(0..20) == 0 {
            block_on(image.flush()).unwrap();
            drop(image);
            image = chain.open_yielding(seed + 1);
        }
        one_batch(&image, &mut chain, &mut rng);
    }
    check_same(
        &read_all(image.as_ref(), 0..shape.size),
        &chain.flat,
        0,
        "the whole disk",
    );
    block_on(image.flush()).unwrap();
    drop(image);
    chain.judge(Allowed::Nothing).unwrap();
}

#[test]
fn random_operations_leave_the_bytes_of_a_flat_disk_and_a_sound_image() {
    for shape in SHAPES {
        for seed in seeds(2) {
            let result = std::panic::catch_unwind(|| run_seed(shape, seed));
            if let Err(cause) = result {
                eprintln!("{shape:?}: replay with SEETHROUGH_TEST_SEED={seed}");
                std::panic::resume_unwind(cause);
            }
        }
    }
}
