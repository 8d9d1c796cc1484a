//! Filling images in random order.

use std::fmt::Write as _;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::header::Header;
use seethrough::storage::{MemoryStorage, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::engine::{Allowed, check, for_each_seed, load, rng};
use crate::made::{Made, Past, SHAPES};

/// The disk in pieces that cover it, in random order, some of them more than once.
fn pieces(size: u64, rng: &mut StdRng) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size {
        let end = size.min(at + rng.random_range(1..=64) * 512 * rng.random_range(1..=8));
        pieces.push(at..end);
        if rng.random_bool(0.2) {
            pieces.push(at..end);
        }
        at = end;
    }
    pieces.shuffle(rng);
    pieces
}

#[test]
fn no_order_of_writes_takes_our_engine_beyond_the_commitment_and_it_is_reached() {
    for_each_seed(1, "filling", |seed| {
        for shape in SHAPES {
            let mut rng = rng(seed);
            let made = Made::new(shape, &mut rng);
            let committed = made.committed();
            let storage = load(&made.path());
            fill(&storage, shape.1, &made.name, committed, &mut rng);
            let slack = committed - storage.len();
            let bound = made.replaced(shape.2)
                + superseded_tables(&made.header())
                + made.header().cluster_size()
                - 1;
            assert!(slack <= bound, "{}: {slack} bytes too much", made.name);
            std::fs::write(made.path(), storage.contents()).expect("writable");
            let allowed = if shape.2 == Past::Leaked {
                Allowed::Leaks
            } else {
                Allowed::Nothing
            };
            check(&made.path(), allowed).expect("sound");
            // An image that is full has come to what it was said to come to, and says the same.
            if shape.2 != Past::Compressed {
                assert!(made.committed() <= committed, "{}", made.name);
            }
        }
    });
}

/// Refcount tables that the fill leaves behind, whose room may be used again, or not.
fn superseded_tables(header: &Header) -> u64 {
    if header.cluster_size() == 512 {
        16 * 512
    } else {
        0
    }
}

fn fill(storage: &Arc<MemoryStorage>, size: u64, name: &str, committed: u64, rng: &mut StdRng) {
    let disk = Qcow2::open(
        Arc::clone(storage) as Arc<dyn Storage>,
        None,
        Access::ReadWrite,
    );
    let disk = block_on(disk).expect("a sound image");
    for piece in pieces(size, rng) {
        let len = usize::try_from(piece.end - piece.start).expect("small");
        block_on(disk.write(GuestOffset(piece.start), IoBuf::from_bytes(&vec![7; len])))
            .expect("written");
        if rng.random_bool(0.05) {
            block_on(disk.flush()).expect("flushed");
        }
        assert!(
            storage.len() <= committed,
            "{name}: {} of {committed} bytes",
            storage.len()
        );
    }
    block_on(disk.close()).expect("closed");
    assert!(
        storage.len() <= committed,
        "{name}: {} of {committed} bytes",
        storage.len()
    );
}

/// Stock tools leave gaps in the file where a request needs contiguous clusters, and in front of a larger refcount
/// table: what the host allocates stays within the bound, the file's length need not.
#[test]
fn no_order_of_writes_takes_stock_tools_beyond_the_commitment() {
    for_each_seed(1, "filling by qemu-io", |seed| {
        for shape in SHAPES {
            let mut rng = rng(seed);
            let made = Made::new(shape, &mut rng);
            let committed = made.committed();
            let mut commands = Vec::new();
            for piece in pieces(shape.1, &mut rng) {
                let mut command = String::new();
                let _ = write!(
                    command,
                    "write -P 7 {} {}",
                    piece.start,
                    piece.end - piece.start
                );
                commands.push(command);
            }
            made.qemu_io(&commands);
            let metadata = std::fs::metadata(made.path()).expect("there");
            let allocated = metadata.blocks() * 512;
            // Blocks of the host; those in which it notes the file's extents, if there are many; and gaps between
            // the free clusters that there were, too small for a request of a stock tool.
            let gaps = if shape.2 == Past::Fragmented {
                committed / 16
            } else {
                0
            };
            let bound = committed.next_multiple_of(4096) + 8 * 4096 + gaps;
            assert!(
                allocated <= bound,
                "{}: {allocated} bytes allocated, committed to {committed}",
                made.name
            );
        }
    });
}
