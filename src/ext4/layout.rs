//! What every block of a filesystem is, and which group it serves.
//!
//! With `flex_bg` the bitmaps and inode tables of many groups lie together in the first of them, so where a block
//! lies does not say whose it is. The layout is read once, from the base at a trusted moment, and never
//! changes; everything else about a group may.
//!
//! # Invariants
//!
//! 1. `runs` are in the order of their blocks, do not overlap, lie inside the filesystem, and are as long as possible.
//! 2. Every structure of every group is in exactly one run; what is in none is data of the group that holds it.

use std::ops::{Range, RangeInclusive};

use super::extent::Extent;
use super::features::Feature;
use super::group_descriptor::{self, GroupDescriptor, Locations};
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
    /// Anything else: files, directories, their maps and attributes, and free blocks.
    Data {
        /// The group that holds it.
        group: BlockGroup,
    },
}

/// What a run of blocks is; a [`Kind`] without numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tag {
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
}

/// Neighbouring blocks that are the same structure, of one group or of groups that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: u64,
    end: u64,
    tag: Tag,
    /// The group that the first block serves, or its index in its structure.
    first: u32,
}

/// Blocks that a range of the filesystem falls into: what they are, their first one, and how many.
pub type Piece = (Kind, FsBlock, u64);

/// The files that a kernel writes by itself, not for a user.
#[derive(Clone, Copy, Debug, Default)]
pub struct InternalFiles<'a> {
    /// Where the journal is.
    pub journal: &'a [Extent],
    /// Where the orphan file is.
    pub orphan_file: &'a [Extent],
}

/// Where everything is in a filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    blocks_count: u64,
    first_data_block: u64,
    blocks_per_group: u64,
    inode_table_blocks: u64,
    runs: Box<[Run]>,
    locations: Box<[Locations]>,
}

impl Layout {
    /// Reads the layout. `table` is the descriptor table, its blocks one after the other in the order of
    /// [`Superblock::descriptor_block`].
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the group and the value, if a descriptor's checksum is wrong, or structures
    /// overlap or leave the filesystem; [`ErrorKind::OutOfBounds`] if `table` is too short.
    pub fn new(superblock: &Superblock, table: &[u8], files: InternalFiles<'_>) -> Result<Self> {
        let locations = read_locations(superblock, table)?;
        let inode_table_blocks = superblock.inode_table_blocks();
        let mut runs = Vec::with_capacity(locations.len().saturating_mul(3));
        add_heads(superblock, &mut runs)?;
        for (group, at) in superblock.groups().zip(&locations) {
            for (tag, start, len) in [
                (Tag::BlockBitmap, at.block_bitmap, 1),
                (Tag::InodeBitmap, at.inode_bitmap, 1),
                (Tag::InodeTable, at.inode_table, inode_table_blocks),
            ] {
                runs.push(run_of_group(superblock, group, tag, start, len)?);
            }
        }
        for (tag, extents) in [
            (Tag::Journal, files.journal),
            (Tag::OrphanFile, files.orphan_file),
        ] {
            for extent in extents {
                runs.push(run_of_file(superblock, tag, extent)?);
            }
        }
        runs.sort_unstable_by_key(|run| run.start);
        refuse_overlaps(&runs)?;
        Ok(Self {
            blocks_count: superblock.blocks_count,
            first_data_block: u64::from(superblock.first_data_block),
            blocks_per_group: u64::from(superblock.blocks_per_group),
            inode_table_blocks: u64::from(inode_table_blocks),
            runs: merge(runs, u64::from(inode_table_blocks)),
            locations: locations.into_boxed_slice(),
        })
    }

    /// Where the structures of `group` are; `None` if there is no such group.
    #[must_use]
    pub fn locations(&self, group: BlockGroup) -> Option<Locations> {
        self.locations.get(usize::try_from(group.0).ok()?).copied()
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
        self.runs.partition_point(|run| run.end <= block)
    }

    fn group_of(&self, block: u64) -> Option<BlockGroup> {
        let within = block.checked_sub(self.first_data_block)?;
        u32::try_from(within / self.blocks_per_group)
            .ok()
            .map(BlockGroup)
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

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{what}; e2fsck may repair it"))
}

fn read_locations(superblock: &Superblock, table: &[u8]) -> Result<Vec<Locations>> {
    let size = usize::from(superblock.descriptor_size);
    let mut locations = Vec::with_capacity(table.len() / size);
    for (group, bytes) in superblock.groups().zip(table.chunks_exact(size)) {
        group_descriptor::verify(&superblock.checksums, group, bytes)?;
        locations.push(GroupDescriptor::parse(bytes).locations);
    }
    if u32::try_from(locations.len()).ok() != Some(superblock.group_count) {
        return Err(Error::new(
            ErrorKind::OutOfBounds,
            format!(
                "{} bytes do not hold the descriptors of {} groups",
                table.len(),
                superblock.group_count
            ),
        ));
    }
    Ok(locations)
}

/// Superblock, descriptor table and their copies.
fn add_heads(superblock: &Superblock, runs: &mut Vec<Run>) -> Result<()> {
    let first = u64::from(superblock.first_data_block);
    let mut add = |tag: Tag, start: u64, len: u64, first: u32| {
        if len > 0 {
            runs.push(Run {
                start,
                end: start.saturating_add(len),
                tag,
                first,
            });
        }
    };
    add(Tag::Boot, 0, first, 0);
    for group in superblock.groups() {
        let head = superblock.group_head(group);
        let blocks = superblock.group_blocks(group);
        if head.len() > blocks.end - blocks.start {
            return Err(corrupt(format_args!(
                "group {group} begins with {} blocks of backups, but has only {}",
                head.len(),
                blocks.end - blocks.start
            )));
        }
        let mut at = blocks.start;
        if head.superblock {
            let tag = if group.0 == 0 {
                Tag::Superblock
            } else {
                Tag::Backup
            };
            add(tag, at, 1, group.0);
            at += 1;
        }
        let descriptors = u64::from(head.descriptor_blocks);
        match primary_descriptors(superblock, group, at) {
            Some(index) => add(Tag::Descriptors, at, descriptors, index),
            None => add(Tag::Backup, at, descriptors, group.0),
        }
        let tag = if group.0 == 0 {
            Tag::ReservedDescriptors
        } else {
            Tag::Backup
        };
        add(
            tag,
            at + descriptors,
            u64::from(head.reserved_blocks),
            group.0,
        );
    }
    Ok(())
}

/// Which block of the descriptor table the copy at `block` in `group` begins with, if it is the one in use.
fn primary_descriptors(superblock: &Superblock, group: BlockGroup, block: u64) -> Option<u32> {
    if group.0 == 0 {
        return (superblock.descriptor_block(0).0 == block).then_some(0);
    }
    // Outside group 0 only meta_bg puts a block of the table in use: in the first group that it describes.
    let index = group.0 / superblock.descriptors_per_block();
    (superblock.features.has(Feature::META_BG) && superblock.descriptor_block(index).0 == block)
        .then_some(index)
}

/// A bitmap or inode table of `group`, if it may lie where it is said to lie.
fn run_of_group(
    superblock: &Superblock,
    group: BlockGroup,
    tag: Tag,
    start: FsBlock,
    len: u32,
) -> Result<Run> {
    let allowed = if superblock.features.has(Feature::FLEX_BG) {
        u64::from(superblock.first_data_block)..superblock.blocks_count
    } else {
        superblock.group_blocks(group)
    };
    let end = start
        .0
        .checked_add(u64::from(len))
        .filter(|end| start.0 >= allowed.start && *end <= allowed.end)
        .ok_or_else(|| {
            corrupt(format_args!(
                "group {group}: {} at block {start}, outside blocks {} to {}",
                tag.name(),
                allowed.start,
                allowed.end
            ))
        })?;
    Ok(Run {
        start: start.0,
        end,
        tag,
        first: group.0,
    })
}

fn run_of_file(superblock: &Superblock, tag: Tag, extent: &Extent) -> Result<Run> {
    let end = extent
        .start
        .0
        .checked_add(u64::from(extent.len))
        .filter(|end| *end <= superblock.blocks_count && extent.len > 0)
        .ok_or_else(|| {
            corrupt(format_args!(
                "{}: {} blocks at {}, outside the filesystem",
                tag.name(),
                extent.len,
                extent.start
            ))
        })?;
    Ok(Run {
        start: extent.start.0,
        end,
        tag,
        first: extent.logical,
    })
}

fn refuse_overlaps(runs: &[Run]) -> Result<()> {
    for pair in runs.windows(2) {
        let [before, after] = pair else { continue };
        if after.start < before.end {
            return Err(corrupt(format_args!(
                "block {} is both {} and {}",
                after.start,
                before.describe(),
                after.describe()
            )));
        }
    }
    Ok(())
}

/// Invariant 1: as long as possible.
fn merge(runs: Vec<Run>, inode_table_blocks: u64) -> Box<[Run]> {
    let mut merged: Vec<Run> = Vec::new();
    for run in runs {
        if let Some(last) = merged.last_mut() {
            let len = last.end - last.start;
            let next = match run.tag {
                Tag::InodeTable => Some(len / inode_table_blocks),
                Tag::BlockBitmap | Tag::InodeBitmap | Tag::Descriptors => Some(len),
                Tag::Journal | Tag::OrphanFile => Some(len),
                Tag::Backup => Some(0),
                Tag::Boot | Tag::Superblock | Tag::ReservedDescriptors => None,
            };
            let follows = last.tag == run.tag
                && last.end == run.start
                && next.is_some_and(|next| u64::from(last.first) + next == u64::from(run.first));
            if follows {
                last.end = run.end;
                continue;
            }
        }
        merged.push(run);
    }
    merged.into_boxed_slice()
}

impl Tag {
    fn name(self) -> &'static str {
        match self {
            Self::Boot => "the boot block",
            Self::Superblock => "the superblock",
            Self::Descriptors => "the descriptor table",
            Self::ReservedDescriptors => "room for descriptors",
            Self::Backup => "the backups",
            Self::BlockBitmap => "the block bitmap",
            Self::InodeBitmap => "the inode bitmap",
            Self::InodeTable => "the inode table",
            Self::Journal => "the journal",
            Self::OrphanFile => "the orphan file",
        }
    }
}

impl Run {
    /// For a message: what the run's first block is.
    fn describe(&self) -> String {
        let name = self.tag.name();
        match self.tag {
            Tag::Backup | Tag::BlockBitmap | Tag::InodeBitmap | Tag::InodeTable => {
                format!("{name} of group {}", self.first)
            }
            _ => name.to_owned(),
        }
    }
}
