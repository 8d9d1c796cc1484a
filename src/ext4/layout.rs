//! What every block of a filesystem is, and which group it serves.
//!
//! With `flex_bg` the bitmaps and inode tables of many groups lie together in the first of them, so where a block
//! lies does not say whose it is. The layout is read once, from the base at a trusted moment, and never
//! changes; everything else about a group may.
//!
//! A question takes a look into a table by group and a search among the few runs that begin in one, whatever
//! the size of the filesystem. Memory is 4 bytes for a group, and some 100 for each place where tables lie together:
//! regularity makes runs long, and where there is none they are short, but right all the same.
//!
//! # Invariants
//!
//! 1. `runs` are in the order of their blocks, do not overlap, lie inside the filesystem, and are as long as possible.
//! 2. Every structure of every group is in exactly one run; what is in none is data of the group that holds it.
//! 3. `first_runs[g]` is the first run that ends behind the first block of group `g`, or the number of runs. There
//!    is one more entry than groups.

use std::ops::{Range, RangeInclusive};

use super::extent::Extent;
use super::group_descriptor::Locations;
use super::layout_builder::LayoutBuilder;
use super::locations::LocationTable;
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockGroup, FsBlock};

/// What a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Before the first group: the boot block of a filesystem with 1 KiB blocks.
    Boot,
    /// The block with the superblock.
    Superblock,
    /// A block of the descriptor table; of several copies, the one that a kernel reads and writes.
    Descriptors {
        /// Which block of the table.
        index: u32,
    },
    /// Room behind the descriptor table for its growth.
    ReservedDescriptors,
    /// A backup of the superblock or of descriptors, or room for the latter.
    Backup {
        /// The group that holds it.
        group: BlockGroup,
    },
    /// A group's block bitmap.
    BlockBitmap {
        /// The group that it serves.
        group: BlockGroup,
    },
    /// A group's inode bitmap.
    InodeBitmap {
        /// The group that it serves.
        group: BlockGroup,
    },
    /// A block of a group's inode table.
    InodeTable {
        /// The group that it serves.
        group: BlockGroup,
        /// Which block of the table.
        index: u32,
    },
    /// A block of the journal.
    Journal {
        /// Which block of the journal.
        index: u32,
    },
    /// A block of the orphan file.
    OrphanFile {
        /// Which block of the file.
        index: u32,
    },
    /// The block that whoever mounts the filesystem writes (`mmp`).
    MultipleMount,
    /// Anything else: files, directories, their maps and attributes, and free blocks.
    Data {
        /// The group that holds it.
        group: BlockGroup,
    },
}

/// What a run of blocks is; a [`Kind`] without numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    Boot,
    Superblock,
    Descriptors,
    ReservedDescriptors,
    Backup,
    BlockBitmap,
    InodeBitmap,
    InodeTable,
    Journal,
    OrphanFile,
    MultipleMount,
}

/// Neighbouring blocks that are the same structure, of one group or of groups that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) tag: Tag,
    /// The group that the first block serves, or its index in its structure.
    pub(super) first: u32,
}

/// Blocks that a range of the filesystem falls into: what they are, their first one, and how many.
pub type Piece = (Kind, FsBlock, u64);

/// The blocks that a kernel writes by itself, not for a user.
#[derive(Clone, Copy, Debug, Default)]
pub struct InternalFiles<'a> {
    /// Where the journal is.
    pub journal: &'a [Extent],
    /// Where the orphan file is.
    pub orphan_file: &'a [Extent],
    /// The block of multiple mount protection.
    pub mmp: Option<FsBlock>,
}

/// Where everything is in a filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    blocks_count: u64,
    first_data_block: u64,
    blocks_per_group: u64,
    /// The logarithm of `blocks_per_group`, if that is a power of two: it nearly always is, and shifting is faster.
    group_shift: Option<u32>,
    inode_table_blocks: u64,
    runs: Box<[Run]>,
    first_runs: Box<[u32]>,
    locations: LocationTable,
}

impl Layout {
    /// Reads the layout. `table` is the descriptor table, its blocks one after the other in the order of
    /// [`Superblock::descriptor_block`]. A large table need not be in memory at once: see [`LayoutBuilder`].
    ///
    /// # Errors
    /// As [`LayoutBuilder::add`] and [`LayoutBuilder::finish`].
    pub fn new(superblock: &Superblock, table: &[u8], files: InternalFiles<'_>) -> Result<Self> {
        let mut builder = LayoutBuilder::new(superblock);
        builder.add(table)?;
        builder.finish(files)
    }

    /// Puts together what a builder found; `runs` satisfy invariants 1 and 2.
    pub(super) fn of_runs(
        superblock: &Superblock,
        runs: Vec<Run>,
        locations: LocationTable,
    ) -> Result<Self> {
        let too_many = || Error::new(ErrorKind::Unsupported, "the filesystem has too many pieces");
        u32::try_from(runs.len()).map_err(|_| too_many())?;
        let mut first_runs = Vec::new();
        let mut next = 0;
        for group in 0..=superblock.group_count {
            let start = superblock.group_start(BlockGroup(group)).0;
            while runs.get(next).is_some_and(|run| run.end <= start) {
                next += 1;
            }
            first_runs.push(u32::try_from(next).map_err(|_| too_many())?);
        }
        let blocks_per_group = superblock.blocks_per_group;
        Ok(Self {
            blocks_count: superblock.blocks_count,
            first_data_block: u64::from(superblock.first_data_block),
            blocks_per_group: u64::from(blocks_per_group),
            group_shift: blocks_per_group
                .is_power_of_two()
                .then(|| blocks_per_group.trailing_zeros()),
            inode_table_blocks: u64::from(superblock.inode_table_blocks()),
            runs: runs.into_boxed_slice(),
            first_runs: first_runs.into_boxed_slice(),
            locations,
        })
    }

    /// Bytes of memory that the layout takes.
    #[must_use]
    pub fn memory(&self) -> usize {
        size_of_val(&*self.runs) + size_of_val(&*self.first_runs) + self.locations.memory()
    }

    /// Where the structures of `group` are; `None` if there is no such group.
    #[must_use]
    pub fn locations(&self, group: BlockGroup) -> Option<Locations> {
        self.locations.get(group)
    }

    /// What `block` is, and for how many blocks from it on the answer holds: up to the end of the group's data, or of
    /// one structure of one group, whose `index` rises by one with each block. `None` behind the filesystem's end.
    #[must_use]
    pub fn classify(&self, block: FsBlock) -> Option<(Kind, u64)> {
        if block.0 >= self.blocks_count {
            return None;
        }
        let next = self.first_run_ending_behind(block.0);
        match self.runs.get(next) {
            Some(run) if run.start <= block.0 => Some(self.kind_in(run, block.0)),
            run => {
                let group = self.group_of(block.0)?;
                let group_end = self
                    .first_data_block
                    .saturating_add((u64::from(group.0) + 1).saturating_mul(self.blocks_per_group));
                let end = run
                    .map_or(self.blocks_count, |run| run.start)
                    .min(group_end)
                    .min(self.blocks_count);
                Some((Kind::Data { group }, end - block.0))
            }
        }
    }

    /// The groups that hold `len` blocks from `start` on, if all of them are data; `None` if any is a structure
    /// or lies behind the filesystem's end, or there are none.
    #[must_use]
    pub fn data_groups(&self, start: FsBlock, len: u64) -> Option<RangeInclusive<BlockGroup>> {
        let end = start
            .0
            .checked_add(len)
            .filter(|end| *end <= self.blocks_count)?;
        let last = end.checked_sub(1).filter(|last| *last >= start.0)?;
        let next = self.first_run_ending_behind(start.0);
        if self.runs.get(next).is_some_and(|run| run.start < end) {
            return None;
        }
        Some(self.group_of(start.0)?..=self.group_of(last)?)
    }

    /// What the blocks of `range` are, in their order; what lies behind the filesystem's end is left out.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let left = range.end.checked_sub(at).filter(|left| *left > 0)?;
            let (kind, len) = self.classify(FsBlock(at))?;
            let piece = (kind, FsBlock(at), len.min(left));
            at += piece.2;
            Some(piece)
        })
    }

    /// The index of the first run that ends behind `block`: the one that holds it, or the next.
    fn first_run_ending_behind(&self, block: u64) -> usize {
        let bound = |group: u32| {
            let index = usize::try_from(group).ok();
            let first = index.and_then(|index| self.first_runs.get(index));
            first.map_or(self.runs.len(), |first| *first as usize)
        };
        // Invariant 3: a run that ends in the next group may have begun in this one. Before the first group lies the
        // boot block.
        let (from, next) = match self.group_of(block) {
            Some(group) => (bound(group.0), group.0 + 1),
            None => (0, 0),
        };
        let to = bound(next).saturating_add(1).min(self.runs.len());
        let candidates = self.runs.get(from..to).unwrap_or_default();
        from + candidates.partition_point(|run| run.end <= block)
    }

    fn group_of(&self, block: u64) -> Option<BlockGroup> {
        let within = block.checked_sub(self.first_data_block)?;
        let group = match self.group_shift {
            Some(shift) => within >> shift,
            None => within / self.blocks_per_group,
        };
        u32::try_from(group).ok().map(BlockGroup)
    }

    /// What `block` in `run` is, and for how many blocks.
    fn kind_in(&self, run: &Run, block: u64) -> (Kind, u64) {
        let within = block - run.start;
        let left = run.end - block;
        let index = run.first.saturating_add(saturate(within));
        let own_group = BlockGroup(run.first);
        match run.tag {
            Tag::Boot => (Kind::Boot, left),
            Tag::Superblock => (Kind::Superblock, left),
            Tag::Descriptors => (Kind::Descriptors { index }, left),
            Tag::ReservedDescriptors => (Kind::ReservedDescriptors, left),
            Tag::Backup => (Kind::Backup { group: own_group }, left),
            Tag::BlockBitmap => (
                Kind::BlockBitmap {
                    group: BlockGroup(index),
                },
                1,
            ),
            Tag::InodeBitmap => (
                Kind::InodeBitmap {
                    group: BlockGroup(index),
                },
                1,
            ),
            Tag::Journal => (Kind::Journal { index }, left),
            Tag::OrphanFile => (Kind::OrphanFile { index }, left),
            Tag::MultipleMount => (Kind::MultipleMount, left),
            Tag::InodeTable => {
                let group = run
                    .first
                    .saturating_add(saturate(within / self.inode_table_blocks));
                let index = within % self.inode_table_blocks;
                let kind = Kind::InodeTable {
                    group: BlockGroup(group),
                    index: saturate(index),
                };
                (kind, self.inode_table_blocks - index)
            }
        }
    }
}

/// A number that a run's construction keeps below 2^32.
fn saturate(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
