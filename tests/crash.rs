//! The power is cut at every kind of moment, with any subset of what was not flushed lost: what was flushed is
//! there, nothing else than what was written shows, and the metadata has leaks at worst.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

mod engine;

use std::sync::Arc;

use engine::workload::{
    Operation, SHAPES, Uncertain, part_of, perform_batch, perform_batch_compressing, random_batch,
    read_range,
};
use engine::{Allowed, Chain, Shape, check, for_each_seed, is_dirty, rng};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
use seethrough::sys::block_on;

const SECTORS: &[u64] = &[512, 512, 4096, 65536];

/// What was known when, one after the other: a flush that returned, and the operations begun after it.
struct Epoch {
    flushed: Moment,
    content: Uncertain,
    /// When each of `content.later` may have begun.
    begun: Vec<Moment>,
}

/// Runs random operations, and returns what a power cut may leave.
fn run_workload(storage: &Arc<CrashStorage>, chain: &mut Chain, rng: &mut StdRng) -> Vec<Epoch> {
    let image = open(Arc::clone(storage) as Arc<dyn Storage>, chain);
    let epoch = |flat: &[u8]| Epoch {
        flushed: storage.now(),
        content: Uncertain {
            durable: flat.to_vec(),
            later: Vec::new(),
        },
        begun: Vec::new(),
    };
    let mut epochs = vec![epoch(&chain.flat)];
    for _ in 0..25 {
        if rng.random_range(0..4) == 0 {
            block_on(image.flush()).unwrap();
            epochs.push(epoch(&chain.flat));
        }
        let batch = random_batch(rng, image.virtual_size(), SECTORS);
        let begun = storage.now();
        let present = epochs.last_mut().unwrap();
        for (range, operation) in &batch {
            present.content.add(range, operation);
            present.begun.resize(present.content.later.len(), begun);
        }
        let results = if rng.random_bool(0.3) {
            perform_batch_compressing(&image, &batch, rng)
        } else {
            perform_batch(image.as_ref(), &batch, rng)
        };
        for ((range, operation), result) in batch.iter().zip(results) {
            result.unwrap();
            match operation {
                Operation::Write(bytes) => part_of(&mut chain.flat, range).copy_from_slice(bytes),
                Operation::Zero(_) => part_of(&mut chain.flat, range).fill(0),
                Operation::Discard => {
                    let now = read_range(image.as_ref(), range.clone()).unwrap();
                    part_of(&mut chain.flat, range).copy_from_slice(&now);
                }
                Operation::Read | Operation::Flush => {}
            }
        }
    }
    epochs
}

fn open(top: Arc<dyn Storage>, chain: &Chain) -> Arc<Qcow2> {
    let opened = Qcow2::open(top, chain.open_backing(), Access::ReadWrite);
    Arc::new(block_on(opened).expect("the image opens"))
}

/// What the disk may hold after a cut.
fn expected_after(epochs: &[Epoch], cut: Moment) -> Uncertain {
    let epoch = epochs
        .iter()
        .rev()
        .find(|epoch| epoch.flushed <= cut)
        .expect("the first is at 0");
    let begun = epoch.begun.iter().take_while(|begun| **begun < cut).count();
    Uncertain {
        durable: epoch.content.durable.clone(),
        later: epoch.content.later[..begun].to_vec(),
    }
}

/// Looks at what a power cut has left, and goes on using it.
fn check_survivor(
    bytes: Vec<u8>,
    expected: &Uncertain,
    chain: &Chain,
    rng: &mut StdRng,
) -> Result<(), String> {
    check(&chain.save_top(&bytes), Allowed::Leaks)?;
    let was_dirty = is_dirty(&bytes);
    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>, chain);
    let found =
        read_range(image.as_ref(), 0..image.virtual_size()).map_err(|error| error.to_string())?;
    expected.check(&found)?;
    if was_dirty {
        // Opening has made the refcounts anew; nothing is left for others to do.
        let bytes = storage.contents();
        if is_dirty(&bytes) {
            return Err("opening has left the image dirty".into());
        }
        check(&chain.save_top(&bytes), Allowed::Nothing)?;
    }
    for _ in 0..4 {
        let batch = random_batch(rng, image.virtual_size(), SECTORS);
        for result in perform_batch(image.as_ref(), &batch, rng) {
            result.map_err(|error| format!("going on: {error}"))?;
        }
    }
    block_on(image.close()).map_err(|error| error.to_string())?;
    let bytes = storage.contents();
    if is_dirty(&bytes) {
        return Err("closing has left the image dirty".into());
    }
    check(&chain.save_top(&bytes), Allowed::Leaks)
        .map_err(|error| format!("after going on: {error}"))
}

fn run_seed(shape: &Shape, seed: u64) {
    let mut rng = rng(seed);
    let mut chain = Chain::create(shape, &mut rng);
    let mut bytes = chain.top().contents();
    if rng.random_bool(0.7) {
        // What free clusters hold must never show, nor be taken for a table.
        bytes.resize(bytes.len() + (4 << 20), 0xd5);
    }
    let storage = Arc::new(CrashStorage::new(bytes, Delays::up_to(3, seed)));
    let epochs = run_workload(&storage, &mut chain, &mut rng);
    for _ in 0..10 {
        let cut = Moment(rng.random_range(0..=storage.now().0));
        let lost = match rng.random_range(0..6) {
            0 => Lost::All,
            1 => Lost::None,
            _ => Lost::Some { seed: rng.random() },
        };
        let bytes = storage.after_power_cut(cut, lost);
        check_survivor(bytes, &expected_after(&epochs, cut), &chain, &mut rng)
            .unwrap_or_else(|error| panic!("power cut at {cut:?} with {lost:?}: {error}"));
    }
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed_and_leaves_leaks_at_worst() {
    for shape in SHAPES {
        for_each_seed(1, &format!("{shape:?}"), |seed| run_seed(shape, seed));
    }
}
