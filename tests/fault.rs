//! The Nth operation of the host file fails, for every N: no panic, whoever relied on it learns of it, everything
//! flushed is there after reopening, and the metadata has leaks at worst.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

mod engine;

use std::ops::Range;
use std::sync::Arc;

use engine::workload::{Operation, Uncertain, part_of, perform_batch, random_batch, read_range};
use engine::{Allowed, Backing, Chain, Shape, check, for_each_seed, rng};
use rand::rngs::StdRng;
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{Delays, Fault, FaultStorage, MemoryStorage, Storage};
use seethrough::sys::block_on;

const SECTORS: &[u64] = &[512, 4096];

const SHAPES: &[Shape] = &[
    Shape {
        options: "cluster_size=512,refcount_bits=64",
        size: 200 << 10,
        backing: Backing::Raw,
    },
    Shape {
        options: "cluster_size=4096",
        size: 500 << 10,
        backing: Backing::None,
    },
    Shape {
        options: "cluster_size=64k,extended_l2=on",
        size: 700 << 10,
        backing: Backing::Raw,
    },
    Shape {
        options: "compat=0.10,cluster_size=1024",
        size: 100 << 10,
        backing: Backing::ShortRaw,
    },
];

/// What one run with a fault has led to.
struct Outcome {
    /// Whether any operation reported a failure.
    reported: bool,
    /// What the disk may hold after reopening.
    content: Uncertain,
    /// What it holds if every success is believed; where an operation failed, nothing is known.
    believed: Vec<u8>,
    unknown: Vec<Range<u64>>,
}

fn open(top: Arc<dyn Storage>, chain: &Chain) -> seethrough::error::Result<Qcow2> {
    block_on(Qcow2::open(top, chain.open_backing(), Access::ReadWrite))
}

/// The same batches every time, with flushes in between.
fn run_workload(image: &dyn Image, chain: &Chain, rng: &mut StdRng) -> Outcome {
    let mut outcome = Outcome {
        reported: false,
        content: Uncertain {
            durable: chain.flat.clone(),
            later: Vec::new(),
        },
        believed: chain.flat.clone(),
        unknown: Vec::new(),
    };
    for number in 0..6 {
        let batch = random_batch(rng, image.virtual_size(), SECTORS);
        for (range, operation) in &batch {
            outcome.content.add(range, operation);
        }
        for ((range, operation), result) in batch.iter().zip(perform_batch(image, &batch, rng)) {
            let believed = part_of(&mut outcome.believed, range);
            match (result, operation) {
                (Err(_), _) => {
                    outcome.reported = true;
                    outcome.unknown.push(range.clone());
                }
                (Ok(_), Operation::Write(bytes)) => believed.copy_from_slice(bytes),
                (Ok(_), Operation::Zero(_)) => believed.fill(0),
                (Ok(_), Operation::Discard) => outcome.unknown.push(range.clone()),
                (Ok(found), Operation::Read) => {
                    if !outcome
                        .unknown
                        .iter()
                        .any(|other| other.start < range.end && range.start < other.end)
                    {
                        assert!(found == believed, "read at {range:?}");
                    }
                }
                (Ok(_), Operation::Flush) => {}
            }
            if matches!(operation, Operation::Write(_) | Operation::Zero(_))
                && !outcome.unknown.contains(range)
            {
                // A success makes what an earlier failure left known again, where it covers it wholly.
                outcome
                    .unknown
                    .retain(|other| other.start < range.start || range.end < other.end);
            }
        }
        if number % 2 == 1 {
            match block_on(image.flush()) {
                Ok(()) if outcome.unknown.is_empty() => {
                    outcome.content = Uncertain {
                        durable: outcome.believed.clone(),
                        later: Vec::new(),
                    };
                }
                Ok(()) => {}
                Err(_) => outcome.reported = true,
            }
        }
    }
    outcome
}

fn check_after(bytes: &[u8], outcome: &Outcome, chain: &Chain) -> Result<(), String> {
    check(&chain.save_top(bytes), Allowed::Leaks)?;
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    let image = open(storage, chain).map_err(|error| error.to_string())?;
    let found = read_range(&image, 0..image.virtual_size()).map_err(|error| error.to_string())?;
    outcome.content.check(&found)
}

/// Runs the workload with one fault; the number of operations that it came to.
fn run_with(
    shape: &Shape,
    seed: u64,
    fault: Option<Fault>,
) -> (Chain, Arc<MemoryStorage>, Option<Outcome>, u64) {
    let mut rng = rng(seed);
    let chain = Chain::create(shape, &mut rng);
    let memory = Arc::clone(chain.top());
    let storage = Arc::new(FaultStorage::with_delays(
        Arc::clone(&memory) as Arc<dyn Storage>,
        Delays::up_to(2, seed),
    ));
    if let Some(fault) = fault {
        storage.inject(fault);
    }
    // Failing to open is an answer too.
    let outcome = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain)
        .ok()
        .map(|image| run_workload(&image, &chain, &mut rng));
    (chain, memory, outcome, storage.operations())
}

fn every_fault(shape: &Shape, seed: u64, kind: ErrorKind, lasting: bool) {
    let (_, _, outcome, operations) = run_with(shape, seed, None);
    assert!(!outcome.unwrap().reported, "the workload fails by itself");
    for nth in 0..operations {
        let fault = Fault::nth(nth, kind);
        let fault = if lasting { fault.forever() } else { fault };
        let (chain, memory, outcome, _) = run_with(shape, seed, Some(fault));
        let Some(outcome) = outcome else { continue };
        check_after(&memory.contents(), &outcome, &chain).unwrap_or_else(|error| {
            panic!("operation {nth} of {operations} fails with {kind:?}: {error}")
        });
    }
}

#[test]
fn a_single_io_error_anywhere_loses_nothing_that_was_flushed() {
    for shape in SHAPES {
        for_each_seed(1, &format!("{shape:?}"), |seed| {
            every_fault(shape, seed, ErrorKind::Io, false);
        });
    }
}

#[test]
fn a_disk_that_stays_broken_loses_nothing_that_was_flushed() {
    for shape in SHAPES {
        for_each_seed(1, &format!("{shape:?}"), |seed| {
            every_fault(shape, seed, ErrorKind::Io, true);
        });
    }
}

/// A full disk fails requests, not the image: once there is room again, everything acknowledged gets to the disk.
#[test]
fn a_full_disk_fails_requests_and_leaks_nothing() {
    for shape in SHAPES {
        for_each_seed(1, &format!("{shape:?}"), |seed| {
            let (_, _, _, operations) = run_with(shape, seed, None);
            for nth in 0..operations {
                let mut rng = rng(seed);
                let chain = Chain::create(shape, &mut rng);
                let memory = Arc::clone(chain.top());
                let storage = Arc::new(FaultStorage::new(Arc::clone(&memory) as Arc<dyn Storage>));
                let write = seethrough::storage::Operation::Write;
                storage.inject(Fault::nth(nth, ErrorKind::NoSpace).only(write));
                let image = open(Arc::clone(&storage) as Arc<dyn Storage>, &chain).unwrap();
                let outcome = run_workload(&image, &chain, &mut rng);
                storage.heal();
                block_on(image.flush())
                    .unwrap_or_else(|error| panic!("flush after write {nth} failed: {error}"));
                let found = read_range(&image, 0..image.virtual_size()).unwrap();
                for (at, byte) in found.iter().enumerate() {
                    let known = !outcome
                        .unknown
                        .iter()
                        .any(|range| range.contains(&(at as u64)));
                    assert!(
                        !known || *byte == outcome.believed[at],
                        "write {nth} failed: byte {at}"
                    );
                }
                drop(image);
                let reopened = open(Arc::clone(&memory) as Arc<dyn Storage>, &chain).unwrap();
                let reread = read_range(&reopened, 0..reopened.virtual_size()).unwrap();
                assert!(
                    reread == found,
                    "write {nth} failed: the disk differs after reopening"
                );
                check(&chain.save_top(&memory.contents()), Allowed::Nothing)
                    .unwrap_or_else(|error| panic!("write {nth} failed: {error}"));
            }
        });
    }
}
