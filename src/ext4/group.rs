//! One block group to be judged or changed: its descriptor and its two bitmaps, kept true to each other.
//!
//! # Invariants
//!
//! 1. The bitmaps are what is true: where a flag said that they were never written, they have been worked out from
//!    the layout, and the flag is gone once something is allocated.
//! 2. The descriptor's free counts are those of the bitmaps.

use super::bitmap;
use super::group_descriptor::{self, BLOCK_UNINIT, GroupDescriptor, INODE_UNINIT};
use super::layout::{Kind, Layout};
use super::superblock::Superblock;
use super::volatile::FreeCounts;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockGroup, FsBlock, InodeNumber};

/// What is in use in a group that should be unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InUse {
    /// A block that is part of no structure that a fresh filesystem has there.
    Block(FsBlock),
    /// An inode.
    Inode(InodeNumber),
}

/// Whether an inode that is allocated is to be a directory: descriptors count those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InodeUse {
    /// A directory.
    Directory,
    /// Anything else.
    Other,
}

/// A group's bytes to be written back, their checksums set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupBytes {
    /// The descriptor, `s_desc_size` bytes.
    pub descriptor: Vec<u8>,
    /// The block of the block bitmap.
    pub block_bitmap: Vec<u8>,
    /// The block of the inode bitmap.
    pub inode_bitmap: Vec<u8>,
}

/// A block group with its bitmaps.
#[derive(Debug)]
pub struct Group<'a> {
    superblock: &'a Superblock,
    group: BlockGroup,
    /// The first block of the group.
    start: u64,
    /// How many blocks the group has.
    blocks: u32,
    descriptor: GroupDescriptor,
    bytes: GroupBytes,
    /// The block bitmap as it is with nothing but the structures in it.
    structures: Vec<u8>,
}

impl<'a> Group<'a> {
    /// Takes the bytes of a group as they are on disk.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the group, if a checksum or a free count is wrong, or a structure of the group
    /// is marked as free; [`ErrorKind::OutOfBounds`] if there is no such group or the bytes are not as many as they
    /// should be.
    pub fn new(
        superblock: &'a Superblock,
        layout: &Layout,
        group: BlockGroup,
        bytes: GroupBytes,
    ) -> Result<Self> {
        let block_size = usize::try_from(superblock.block_size).ok();
        let sizes_are_right = bytes.descriptor.len() == usize::from(superblock.descriptor_size)
            && Some(bytes.block_bitmap.len()) == block_size
            && Some(bytes.inode_bitmap.len()) == block_size;
        let range = superblock.group_blocks(group);
        let blocks = u32::try_from(range.end - range.start).unwrap_or(0);
        if !sizes_are_right || blocks == 0 {
            return Err(Error::new(
                ErrorKind::OutOfBounds,
                format!("these bytes do not make the descriptor and the bitmaps of group {group}"),
            ));
        }
        group_descriptor::verify(&superblock.checksums, group, &bytes.descriptor)?;
        let mut this = Self {
            superblock,
            group,
            start: range.start,
            blocks,
            descriptor: GroupDescriptor::parse(&bytes.descriptor),
            structures: structures(superblock, layout, group, blocks),
            bytes,
        };
        this.initialise();
        this.verify_bitmaps()?;
        this.verify_counts()?;
        Ok(this)
    }

    /// The group's number.
    #[must_use]
    pub fn number(&self) -> BlockGroup {
        self.group
    }

    /// Free blocks and inodes.
    #[must_use]
    pub fn free(&self) -> FreeCounts {
        self.descriptor.free()
    }

    /// The first thing in use besides the structures of the filesystem; `None` if the group holds nothing of anyone.
    #[must_use]
    pub fn first_in_use(&self) -> Option<InUse> {
        self.first_in_use_besides(&[])
    }

    /// As [`Group::first_in_use`], but what is `expected` does not count.
    #[must_use]
    pub fn first_in_use_besides(&self, expected: &[InUse]) -> Option<InUse> {
        let mut blocks = self.structures.clone();
        let mut inodes = vec![0; self.bytes.inode_bitmap.len()];
        for thing in expected {
            match *thing {
                InUse::Block(block) => {
                    if let Some(index) = block.0.checked_sub(self.start)
                        && let Ok(index) = u32::try_from(index)
                    {
                        bitmap::set(&mut blocks, index);
                    }
                }
                InUse::Inode(inode) => {
                    if let Some((group, index)) = self.superblock.locate_inode(inode)
                        && group == self.group
                    {
                        bitmap::set(&mut inodes, index);
                    }
                }
            }
        }
        let inodes_per_group = self.superblock.inodes_per_group;
        let block = bitmap::first_set_beyond(&self.bytes.block_bitmap, &blocks, self.blocks)
            .map(|index| InUse::Block(FsBlock(self.start + u64::from(index))));
        block.or_else(|| {
            bitmap::first_set_beyond(&self.bytes.inode_bitmap, &inodes, inodes_per_group)
                .map(|index| InUse::Inode(self.superblock.inode_number(self.group, index)))
        })
    }

    /// Takes a free block; `None` if there is none.
    pub fn allocate_block(&mut self) -> Option<FsBlock> {
        let index = bitmap::first_free(&self.bytes.block_bitmap, 0..self.blocks)?;
        bitmap::set(&mut self.bytes.block_bitmap, index);
        self.descriptor.free_blocks_count -= 1;
        self.descriptor.flags &= !BLOCK_UNINIT;
        Some(FsBlock(self.start + u64::from(index)))
    }

    /// Takes a free inode that is not reserved; `None` if there is none.
    pub fn allocate_inode(&mut self, purpose: InodeUse) -> Option<InodeNumber> {
        let inodes = self.superblock.inodes_per_group;
        let number = |index| self.superblock.inode_number(self.group, index);
        let first = (0..inodes).find(|index| number(*index) >= self.superblock.first_inode)?;
        let index = bitmap::first_free(&self.bytes.inode_bitmap, first..inodes)?;
        let inode = number(index);
        bitmap::set(&mut self.bytes.inode_bitmap, index);
        self.descriptor.free_inodes_count -= 1;
        self.descriptor.used_dirs_count += u32::from(purpose == InodeUse::Directory);
        if self.superblock.checksums.covers_descriptors() {
            let behind = inodes - index - 1;
            let unused = if self.descriptor.flags & INODE_UNINIT != 0 {
                inodes
            } else {
                self.descriptor.itable_unused
            };
            self.descriptor.itable_unused = unused.min(behind);
            // A kernel, too, writes both bitmaps of a group in which it first allocates an inode.
            self.descriptor.flags &= !(INODE_UNINIT | BLOCK_UNINIT);
        }
        Some(inode)
    }

    /// Whether another inode in the same block of the inode table is in use. If none is, the block may never have
    /// been written: it is to be filled with zeros before the inode is put into it.
    #[must_use]
    pub fn has_neighbour_in_table(&self, inode: InodeNumber) -> bool {
        let Some((_, index)) = self.superblock.locate_inode(inode) else {
            return false;
        };
        let per_block = self.superblock.inodes_per_block();
        let first = index - index % per_block;
        (first..first + per_block)
            .any(|other| other != index && bitmap::is_set(&self.bytes.inode_bitmap, other))
    }

    /// The group's bytes, checksums set. Without an allocation in between they are those that came in, but for bitmaps
    /// that had never been written.
    #[must_use]
    pub fn into_bytes(mut self) -> GroupBytes {
        let checksums = &self.superblock.checksums;
        let blocks = self.superblock.blocks_per_group;
        let inodes = self.superblock.inodes_per_group;
        if self.descriptor.flags & BLOCK_UNINIT == 0
            && let Some(sum) = bitmap::checksum_of(checksums, &self.bytes.block_bitmap, blocks)
        {
            self.descriptor.block_bitmap_csum = sum;
        }
        if self.descriptor.flags & INODE_UNINIT == 0
            && let Some(sum) = bitmap::checksum_of(checksums, &self.bytes.inode_bitmap, inodes)
        {
            self.descriptor.inode_bitmap_csum = sum;
        }
        self.descriptor.write_to(&mut self.bytes.descriptor);
        group_descriptor::seal(checksums, self.group, &mut self.bytes.descriptor);
        self.bytes
    }

    /// Invariant 1.
    fn initialise(&mut self) {
        let checksums = &self.superblock.checksums;
        if self.descriptor.block_bitmap_is_uninitialised(checksums) {
            self.bytes.block_bitmap.clone_from(&self.structures);
        }
        if self.descriptor.inode_bitmap_is_uninitialised(checksums) {
            let items = self.superblock.inodes_per_group;
            let padding = items..self.superblock.block_size * 8;
            self.bytes.inode_bitmap.fill(0);
            bitmap::set_range(&mut self.bytes.inode_bitmap, padding);
        }
    }

    fn verify_bitmaps(&self) -> Result<()> {
        let checksums = &self.superblock.checksums;
        let mask = if self.superblock.descriptor_size < 64 {
            0xffff
        } else {
            u32::MAX
        };
        let (descriptor, bytes) = (&self.descriptor, &self.bytes);
        let checked = [
            (
                "block",
                descriptor.block_bitmap_is_uninitialised(checksums),
                bitmap::checksum_of(
                    checksums,
                    &bytes.block_bitmap,
                    self.superblock.blocks_per_group,
                ),
                descriptor.block_bitmap_csum,
            ),
            (
                "inode",
                descriptor.inode_bitmap_is_uninitialised(checksums),
                bitmap::checksum_of(
                    checksums,
                    &bytes.inode_bitmap,
                    self.superblock.inodes_per_group,
                ),
                descriptor.inode_bitmap_csum,
            ),
        ];
        for (name, uninitialised, computed, stored) in checked {
            if !uninitialised && computed.is_some_and(|computed| computed & mask != stored) {
                return Err(
                    self.corrupt(format_args!("the checksum of its {name} bitmap is wrong"))
                );
            }
        }
        match bitmap::first_set_beyond(&self.structures, &bytes.block_bitmap, self.blocks) {
            None => Ok(()),
            Some(index) => Err(self.corrupt(format_args!(
                "block {} of the filesystem's own is marked as free",
                self.start + u64::from(index)
            ))),
        }
    }

    /// Invariant 2.
    fn verify_counts(&self) -> Result<()> {
        let inodes = self.superblock.inodes_per_group;
        for (name, counted, stored) in [
            (
                "blocks",
                bitmap::count_free(&self.bytes.block_bitmap, self.blocks),
                self.descriptor.free_blocks_count,
            ),
            (
                "inodes",
                bitmap::count_free(&self.bytes.inode_bitmap, inodes),
                self.descriptor.free_inodes_count,
            ),
        ] {
            if counted != stored {
                return Err(self.corrupt(format_args!(
                    "{stored} free {name}, but {counted} in its bitmap"
                )));
            }
        }
        Ok(())
    }

    fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!("group {}: {what}; e2fsck may repair it", self.group),
        )
    }
}

/// The block bitmap of a group that holds nothing but structures of the filesystem, of whichever groups.
fn structures(superblock: &Superblock, layout: &Layout, group: BlockGroup, blocks: u32) -> Vec<u8> {
    let mut bits = vec![0; usize::try_from(superblock.block_size).unwrap_or(0)];
    let range = superblock.group_blocks(group);
    for (kind, start, len) in layout.pieces(range.clone()) {
        if matches!(kind, Kind::Data { .. }) {
            continue;
        }
        let index = |block: u64| u32::try_from(block - range.start).unwrap_or(blocks);
        bitmap::set_range(&mut bits, index(start.0)..index(start.0 + len));
    }
    bitmap::set_range(&mut bits, blocks..superblock.block_size * 8);
    bits
}
