//! A metadata block as an array of records of one size, each of which belongs to a group.
//!
//! A view composes a shared block record by record when it is read, and takes it apart record by record when it is
//! written: one mechanism for descriptors, inodes, bitmaps and the superblock.

use std::ops::Range;

use super::layout::Kind;
use super::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use crate::units::{BlockGroup, InodeNumber};

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// The superblock: it belongs to no group.
    Superblock,
    /// The descriptor of the group.
    Descriptor,
    /// The group's block bitmap.
    BlockBitmap,
    /// The group's inode bitmap.
    InodeBitmap,
    /// An inode of the group.
    Inode(InodeNumber),
}

/// One record of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: RecordKind,
    /// The group that it belongs to; `None` for the superblock.
    pub group: Option<BlockGroup>,
    /// Where it is in its block.
    pub bytes: Range<usize>,
}

/// What the records of a block have in common.
#[derive(Clone, Copy, Debug)]
enum Row {
    Superblock,
    /// Descriptors, the first that of this group.
    Descriptors(u32),
    BlockBitmap(BlockGroup),
    InodeBitmap(BlockGroup),
    /// Inodes of this group, the first at this index in it.
    Inodes(BlockGroup, u32),
}

/// The records of one block, in their order. Bytes that are in none of them (before and behind the superblock,
/// behind the last group's descriptor) mean nothing.
#[derive(Clone, Copy, Debug)]
pub struct Records {
    row: Row,
    /// Where the first record begins.
    offset: usize,
    size: usize,
    count: usize,
    inodes_per_group: u32,
}

impl Records {
    /// The records of a block that is a `kind`; `None` for a block that is not made of records.
    #[must_use]
    pub fn of(superblock: &Superblock, kind: Kind) -> Option<Self> {
        let block_size = widen(superblock.block_size);
        let whole = |row| Self {
            row,
            offset: 0,
            size: block_size,
            count: 1,
            inodes_per_group: superblock.inodes_per_group,
        };
        match kind {
            Kind::Superblock => Some(Self {
                offset: superblock_offset(superblock),
                size: SUPERBLOCK_SIZE,
                ..whole(Row::Superblock)
            }),
            Kind::BlockBitmap { group } => Some(whole(Row::BlockBitmap(group))),
            Kind::InodeBitmap { group } => Some(whole(Row::InodeBitmap(group))),
            Kind::Descriptors { index } => {
                let per_block = superblock.descriptors_per_block();
                let first = index.checked_mul(per_block)?;
                let left = superblock.group_count.checked_sub(first)?;
                Some(Self {
                    size: usize::from(superblock.descriptor_size),
                    count: widen(left.min(per_block)),
                    ..whole(Row::Descriptors(first))
                })
            }
            Kind::InodeTable { group, index } => {
                let per_block = superblock.inodes_per_block();
                let first = index.checked_mul(per_block)?;
                let left = superblock.inodes_per_group.checked_sub(first)?;
                Some(Self {
                    size: usize::from(superblock.inode_size),
                    count: widen(left.min(per_block)),
                    ..whole(Row::Inodes(group, first))
                })
            }
            Kind::Boot
            | Kind::ReservedDescriptors
            | Kind::Backup { .. }
            | Kind::Journal { .. }
            | Kind::OrphanFile { .. }
            | Kind::MultipleMount
            | Kind::Data { .. } => None,
        }
    }

    /// How many records there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The record at `index`; `None` behind the last.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Record> {
        if index >= self.count {
            return None;
        }
        let start = self.offset + index * self.size;
        let index = u32::try_from(index).ok()?;
        let (kind, group) = match self.row {
            Row::Superblock => (RecordKind::Superblock, None),
            Row::Descriptors(first) => (RecordKind::Descriptor, Some(BlockGroup(first + index))),
            Row::BlockBitmap(group) => (RecordKind::BlockBitmap, Some(group)),
            Row::InodeBitmap(group) => (RecordKind::InodeBitmap, Some(group)),
            Row::Inodes(group, first) => {
                let number = u64::from(group.0) * u64::from(self.inodes_per_group)
                    + u64::from(first)
                    + u64::from(index)
                    + 1;
                let number = InodeNumber(u32::try_from(number).ok()?);
                (RecordKind::Inode(number), Some(group))
            }
        };
        Some(Record {
            kind,
            group,
            bytes: start..start + self.size,
        })
    }

    /// All records.
    pub fn iter(&self) -> impl Iterator<Item = Record> + use<> {
        self.overlapping(0..usize::MAX)
    }

    /// The records that share a byte with `bytes` of their block.
    pub fn overlapping(&self, bytes: Range<usize>) -> impl Iterator<Item = Record> + use<> {
        let first = bytes.start.saturating_sub(self.offset) / self.size;
        let end = bytes
            .end
            .saturating_sub(self.offset)
            .div_ceil(self.size)
            .min(self.count);
        let records = *self;
        (first..end).filter_map(move |index| records.get(index))
    }
}

/// Where the superblock is in its block.
fn superblock_offset(superblock: &Superblock) -> usize {
    let block_start = u64::from(superblock.first_data_block) * u64::from(superblock.block_size);
    usize::try_from(SUPERBLOCK_OFFSET - block_start.min(SUPERBLOCK_OFFSET)).unwrap_or(0)
}

/// A count or size of at most 64 Ki.
fn widen(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
