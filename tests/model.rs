//! Random operations on chains of images against a flat vector of bytes; stock tools judge what is left.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

mod engine;

use std::sync::Arc;

use engine::workload::{
    Operation, SHAPES, check_same, part_of, perform_batch, perform_batch_compressing, random_batch,
    read_range,
};
use engine::{Allowed, Chain, Shape, for_each_seed, rng};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::Image;
use seethrough::qcow2::Qcow2;
use seethrough::storage::Storage;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::HostOffset;

/// A few operations, all under way at the same time, on the image and on the flat disk.
fn one_batch(image: &Arc<Qcow2>, chain: &mut Chain, rng: &mut StdRng) {
    let batch = random_batch(rng, image.virtual_size(), &[1, 512, 512, 4096, 65536]);
    let results = if rng.random_bool(0.3) {
        perform_batch_compressing(image, &batch, rng)
    } else {
        perform_batch(image.as_ref(), &batch, rng)
    };
    for ((range, operation), result) in batch.into_iter().zip(results) {
        let found = result.unwrap_or_else(|error| panic!("{operation:?} at {range:?}: {error}"));
        let expected = part_of(&mut chain.flat, &range);
        match operation {
            Operation::Read => check_same(&found, expected, range.start, "read"),
            Operation::Write(bytes) => expected.copy_from_slice(&bytes),
            Operation::Zero(_) => expected.fill(0),
            Operation::Discard => {
                let now = read_range(image.as_ref(), range.clone()).unwrap();
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
    if rng.random_bool(0.5) {
        // What free clusters hold must never show.
        let top = chain.top();
        let end = HostOffset(top.len());
        block_on(top.writev(end, IoBuf::from_bytes(&[0xd5; 1 << 20]))).unwrap();
    }
    let mut image = chain.open_yielding(seed);
    for _ in 0..60 {
        if rng.random_range(0..20) == 0 {
            block_on(image.flush()).unwrap();
            drop(image);
            image = chain.open_yielding(seed + 2);
        }
        one_batch(&image, &mut chain, &mut rng);
    }
    let found = read_range(image.as_ref(), 0..shape.size).unwrap();
    check_same(&found, &chain.flat, 0, "the whole disk");
    block_on(image.flush()).unwrap();
    drop(image);
    chain.judge(Allowed::Nothing).unwrap();
}

#[test]
fn random_operations_leave_the_bytes_of_a_flat_disk_and_a_sound_image() {
    for shape in SHAPES {
        for_each_seed(2, &format!("{shape:?}"), |seed| run_seed(shape, seed));
    }
}
