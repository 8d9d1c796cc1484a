//! What the layout of a large filesystem costs: time to read it, memory for each TiB, time for a question.
//!
//! `cargo bench --bench layout`. The filesystems are as mke2fs would make them by default, but only their descriptor
//! tables exist.

#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "a bench fails by panicking, and prints approximations"
)]

use std::hint::black_box;
use std::time::Instant;

use seethrough::ext4::group_descriptor::{self, GroupDescriptor, INODE_ZEROED, Locations};
use seethrough::ext4::layout::InternalFiles;
use seethrough::ext4::layout_builder::LayoutBuilder;
use seethrough::ext4::superblock::{self, SUPERBLOCK_SIZE, Superblock};
use seethrough::units::{BlockGroup, FsBlock};

const GROUPS_PER_TIB: u64 = 8192;
const BLOCKS_PER_GROUP: u32 = 32768;
const INODES_PER_GROUP: u32 = 2048;
const FLEX: u32 = 16;
const QUESTIONS: u64 = 50_000;
const BATCHES: u64 = 400;

/// The superblock of a filesystem of `tib` TiB: blocks of 4 KiB, 64bit, flex_bg, sparse_super, metadata_csum.
fn make_superblock(tib: u64) -> Superblock {
    let mut bytes = [0; SUPERBLOCK_SIZE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let blocks = tib * GROUPS_PER_TIB * u64::from(BLOCKS_PER_GROUP);
    let inodes = u32::try_from(tib * GROUPS_PER_TIB).unwrap() * INODES_PER_GROUP;
    put(0x00, &inodes.to_le_bytes());
    put(0x04, &blocks.to_le_bytes()[..4]);
    put(0x150, &blocks.to_le_bytes()[4..]);
    for (at, value) in [
        (0x18, 2),
        (0x1c, 2),
        (0x20, BLOCKS_PER_GROUP),
        (0x24, BLOCKS_PER_GROUP),
        (0x28, INODES_PER_GROUP),
        (0x4c, 1),
        (0x54, 11),
        (0x60, 0x2c2),
        (0x64, 0x401),
    ] {
        put(at, &value.to_le_bytes());
    }
    put(0x38, &[0x53, 0xef, 1, 0]);
    put(0x58, &256u16.to_le_bytes());
    put(0xfe, &64u16.to_le_bytes());
    put(0x175, &[1]);
    superblock::seal(&mut bytes);
    Superblock::parse(&bytes).unwrap()
}

/// The descriptor of `group`: the structures of sixteen groups lie together in the first of them.
fn descriptor(superblock: &Superblock, group: BlockGroup) -> [u8; 64] {
    let leader = BlockGroup(group.0 - group.0 % FLEX);
    let index = u64::from(group.0 % FLEX);
    let start = superblock.group_start(leader).0 + superblock.group_head(leader).len();
    let table = start + 2 * u64::from(FLEX);
    let descriptor = GroupDescriptor {
        locations: Locations {
            block_bitmap: FsBlock(start + index),
            inode_bitmap: FsBlock(start + u64::from(FLEX) + index),
            inode_table: FsBlock(table + index * u64::from(superblock.inode_table_blocks())),
        },
        free_blocks_count: 0,
        free_inodes_count: 0,
        used_dirs_count: 0,
        flags: INODE_ZEROED,
        block_bitmap_csum: 0,
        inode_bitmap_csum: 0,
        itable_unused: 0,
        checksum: 0,
    };
    let mut bytes = [0; 64];
    descriptor.write_to(&mut bytes);
    group_descriptor::seal(&superblock.checksums, group, &mut bytes);
    bytes
}

/// Nanoseconds for one question, the blocks being those of `next`: those of the fastest batch, for others use the machine
/// too.
fn time_questions(ask: impl Fn(u64), mut next: impl FnMut() -> u64) -> f64 {
    let batches = (0..BATCHES).map(|_| {
        let started = Instant::now();
        for _ in 0..QUESTIONS {
            ask(next());
        }
        started.elapsed().as_nanos() as f64 / QUESTIONS as f64
    });
    batches.fold(f64::INFINITY, f64::min)
}

fn main() {
    for tib in [1, 16, 64, 128] {
        let superblock = make_superblock(tib);
        let table: Vec<u8> = superblock
            .groups()
            .flat_map(|group| descriptor(&superblock, group))
            .collect();
        let read = || {
            let started = Instant::now();
            let mut builder = LayoutBuilder::new(&superblock);
            builder.add(&table).unwrap();
            let layout = builder.finish(InternalFiles::default()).unwrap();
            (started.elapsed(), layout)
        };
        let (read, layout) = (0..5)
            .map(|_| read())
            .min_by_key(|(time, _)| *time)
            .unwrap();
        let memory = layout.memory() as f64 / 1024.0 / tib as f64;
        let ask = |block: u64| {
            black_box(layout.classify(FsBlock(black_box(block))));
        };
        let blocks = superblock.blocks_count;
        let mut at = 1u64;
        let random = time_questions(ask, || {
            at ^= at << 13;
            at ^= at >> 7;
            at ^= at << 17;
            at % blocks
        });
        let mut at = 0;
        let sequential = time_questions(ask, || {
            at = (at + 1) % blocks;
            at
        });
        println!(
            "{tib:4} TiB: read in {read:?}, {memory:.0} KiB for a TiB, a question {random:.1} ns at random, \
             {sequential:.1} ns in order"
        );
    }
}
