//! Group descriptors (kernel documentation: "Block Group Descriptors").
//!
//! Without `64bit` a descriptor has 32 bytes, with it 64 or more; the upper halves of numbers are then in the second
//! 32. A descriptor that is not this VM's reads as [`full`]: nothing free, nothing lazily initialised.

use super::checksum::{Checksums, crc16, crc32c};
use super::fields::{le16, put_le16, put_split16, put_split32, split16, split32};
use super::superblock::Superblock;
use super::volatile::FreeCounts;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockGroup, FsBlock};

/// `bg_flags`: the group's inode bitmap and table were never written; no inode is in use.
pub const INODE_UNINIT: u16 = 0x1;
/// `bg_flags`: the block bitmap was never written; only the group's own metadata is in use.
pub const BLOCK_UNINIT: u16 = 0x2;
/// `bg_flags`: the whole inode table has been written.
pub const INODE_ZEROED: u16 = 0x4;

const FLAGS: usize = 0x12;
const CHECKSUM: usize = 0x1e;
const CHECKSUM_END: usize = 0x20;

/// Where a group's bitmaps and inode table are: the part of a descriptor that never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locations {
    /// `bg_block_bitmap`.
    pub block_bitmap: FsBlock,
    /// `bg_inode_bitmap`.
    pub inode_bitmap: FsBlock,
    /// `bg_inode_table`: its first block.
    pub inode_table: FsBlock,
}

/// A group descriptor's numbers, the halves put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupDescriptor {
    /// Where the group's bitmaps and inode table are.
    pub locations: Locations,
    /// `bg_free_blocks_count`.
    pub free_blocks_count: u32,
    /// `bg_free_inodes_count`.
    pub free_inodes_count: u32,
    /// `bg_used_dirs_count`.
    pub used_dirs_count: u32,
    /// `bg_flags`.
    pub flags: u16,
    /// `bg_block_bitmap_csum`; only the lower 16 bits in a 32-byte descriptor.
    pub block_bitmap_csum: u32,
    /// `bg_inode_bitmap_csum`, in the same way.
    pub inode_bitmap_csum: u32,
    /// `bg_itable_unused`: inodes at the table's end that were never used.
    pub itable_unused: u32,
    /// `bg_checksum`.
    pub checksum: u16,
}

impl GroupDescriptor {
    /// Reads a descriptor; `bytes` are its `s_desc_size` bytes. Its checksum and its numbers are not judged here:
    /// see [`verify`] and [`super::layout::Layout`].
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            locations: Locations {
                block_bitmap: FsBlock(split32(bytes, 0x00, 0x20)),
                inode_bitmap: FsBlock(split32(bytes, 0x04, 0x24)),
                inode_table: FsBlock(split32(bytes, 0x08, 0x28)),
            },
            free_blocks_count: split16(bytes, 0x0c, 0x2c),
            free_inodes_count: split16(bytes, 0x0e, 0x2e),
            used_dirs_count: split16(bytes, 0x10, 0x30),
            flags: le16(bytes, FLAGS),
            block_bitmap_csum: split16(bytes, 0x18, 0x38),
            inode_bitmap_csum: split16(bytes, 0x1a, 0x3a),
            itable_unused: split16(bytes, 0x1c, 0x32),
            checksum: le16(bytes, CHECKSUM),
        }
    }

    /// Puts the numbers into a descriptor's `bytes`, leaving what has no field here as it was. The checksum is
    /// written as it stands: [`seal`] comes last.
    pub fn write_to(&self, bytes: &mut [u8]) {
        put_split32(bytes, 0x00, 0x20, self.locations.block_bitmap.0);
        put_split32(bytes, 0x04, 0x24, self.locations.inode_bitmap.0);
        put_split32(bytes, 0x08, 0x28, self.locations.inode_table.0);
        put_split16(bytes, 0x0c, 0x2c, self.free_blocks_count);
        put_split16(bytes, 0x0e, 0x2e, self.free_inodes_count);
        put_split16(bytes, 0x10, 0x30, self.used_dirs_count);
        put_le16(bytes, FLAGS, self.flags);
        put_split16(bytes, 0x18, 0x38, self.block_bitmap_csum);
        put_split16(bytes, 0x1a, 0x3a, self.inode_bitmap_csum);
        put_split16(bytes, 0x1c, 0x32, self.itable_unused);
        put_le16(bytes, CHECKSUM, self.checksum);
    }

    /// The group's free blocks and inodes.
    #[must_use]
    pub fn free(&self) -> FreeCounts {
        FreeCounts {
            blocks: u64::from(self.free_blocks_count),
            inodes: self.free_inodes_count,
        }
    }

    /// Whether the block bitmap on disk means nothing: the group holds its metadata and no more. The flag counts
    /// only where descriptors are protected.
    #[must_use]
    pub fn block_bitmap_is_uninitialised(&self, checksums: &Checksums) -> bool {
        checksums.covers_descriptors() && self.flags & BLOCK_UNINIT != 0
    }

    /// Whether the inode bitmap on disk means nothing: no inode of the group is in use.
    #[must_use]
    pub fn inode_bitmap_is_uninitialised(&self, checksums: &Checksums) -> bool {
        checksums.covers_descriptors() && self.flags & INODE_UNINIT != 0
    }
}

/// The checksum that descriptor `bytes` of `group` should carry; `None` where descriptors carry none.
#[must_use]
pub fn checksum_of(checksums: &Checksums, group: BlockGroup, bytes: &[u8]) -> Option<u16> {
    let (head, tail) = bytes.split_at_checked(CHECKSUM)?;
    let tail = tail.get(CHECKSUM_END - CHECKSUM..)?;
    let bg = group.0.to_le_bytes();
    match checksums {
        Checksums::None => None,
        Checksums::DescriptorCrc16 { uuid } => Some(crc16(&[uuid, &bg, head, tail])),
        Checksums::Crc32c { seed } => {
            let csum = crc32c(crc32c(*seed, &bg), head);
            Some(super::fields::low16(crc32c(crc32c(csum, &[0, 0]), tail)))
        }
    }
}

/// Sets the checksum of a changed descriptor.
pub fn seal(checksums: &Checksums, group: BlockGroup, bytes: &mut [u8]) {
    if let Some(checksum) = checksum_of(checksums, group, bytes) {
        put_le16(bytes, CHECKSUM, checksum);
    }
}

/// Checks the checksum of a descriptor.
///
/// # Errors
/// [`ErrorKind::Corrupt`], naming the group, if it is wrong.
pub fn verify(checksums: &Checksums, group: BlockGroup, bytes: &[u8]) -> Result<()> {
    let bg_checksum = le16(bytes, CHECKSUM);
    match checksum_of(checksums, group, bytes) {
        Some(computed) if computed != bg_checksum => Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "descriptor of group {group}: checksum {bg_checksum:#06x}, computed {computed:#06x}; \
                 e2fsck may repair it"
            ),
        )),
        _ => Ok(()),
    }
}

/// Whether `bytes` can be the descriptor of `group`, whose structures are at `locations`: its checksum is right, and it
/// counts no more than there is. What others read of a group must not depend on the good will of the VM that owns it.
#[must_use]
pub fn is_sound(
    superblock: &Superblock,
    group: BlockGroup,
    locations: Locations,
    bytes: &[u8],
) -> bool {
    let descriptor = GroupDescriptor::parse(bytes);
    let blocks = superblock.group_blocks(group);
    let inodes = superblock.inodes_per_group;
    verify(&superblock.checksums, group, bytes).is_ok()
        && descriptor.locations == locations
        && u64::from(descriptor.free_blocks_count) <= blocks.end - blocks.start
        && descriptor.free_inodes_count <= inodes
        && descriptor.used_dirs_count <= inodes
        && descriptor.itable_unused <= inodes
        && descriptor.flags & !(INODE_UNINIT | BLOCK_UNINIT | INODE_ZEROED) == 0
}

/// Writes into `bytes` (all `s_desc_size` of them) what a VM reads as the descriptor of a group that is not its own:
/// full, with nothing left to initialise.
///
/// It depends on where the group's structures are and on nothing that changes, so that what an unmodified kernel
/// writes back is what it read.
pub fn full(superblock: &Superblock, group: BlockGroup, locations: Locations, bytes: &mut [u8]) {
    let checksums = &superblock.checksums;
    bytes.fill(0);
    let descriptor = GroupDescriptor {
        locations,
        free_blocks_count: 0,
        free_inodes_count: 0,
        used_dirs_count: 0,
        // Even where nothing else uses the flags: a kernel sets this one on descriptors that lack it.
        flags: INODE_ZEROED,
        block_bitmap_csum: superblock.full_block_bitmap_csum,
        inode_bitmap_csum: superblock.full_inode_bitmap_csum,
        itable_unused: 0,
        checksum: 0,
    };
    descriptor.write_to(bytes);
    seal(checksums, group, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEDED: Checksums = Checksums::Crc32c { seed: 0x1357_9bdf };

    fn sample() -> GroupDescriptor {
        GroupDescriptor {
            locations: Locations {
                block_bitmap: FsBlock(0x1_0000_0002),
                inode_bitmap: FsBlock(0x2_0000_0003),
                inode_table: FsBlock(0x3_0000_0004),
            },
            free_blocks_count: 0x1_0005,
            free_inodes_count: 0x2_0006,
            used_dirs_count: 0x3_0007,
            flags: INODE_ZEROED,
            block_bitmap_csum: 0x1234_5678,
            inode_bitmap_csum: 0x9abc_def0,
            itable_unused: 0x4_0008,
            checksum: 0xbeef,
        }
    }

    #[test]
    fn a_long_descriptor_keeps_both_halves() {
        let mut bytes = [0; 64];
        sample().write_to(&mut bytes);
        assert_eq!(GroupDescriptor::parse(&bytes), sample());
    }

    #[test]
    fn a_short_descriptor_has_lower_halves_only() {
        let mut bytes = [0; 32];
        sample().write_to(&mut bytes);
        let parsed = GroupDescriptor::parse(&bytes);
        assert_eq!(parsed.locations.block_bitmap, FsBlock(2));
        assert_eq!(parsed.free_inodes_count, 6);
        assert_eq!(parsed.block_bitmap_csum, 0x5678);
    }

    #[test]
    fn every_byte_and_the_group_are_under_the_checksum() {
        for checksums in [SEEDED, Checksums::DescriptorCrc16 { uuid: [9; 16] }] {
            for size in [32, 64, 128] {
                let mut bytes: Vec<u8> = (0..size).collect();
                seal(&checksums, BlockGroup(5), &mut bytes);
                verify(&checksums, BlockGroup(5), &bytes).unwrap();
                assert!(verify(&checksums, BlockGroup(6), &bytes).is_err());
                for at in 0..bytes.len() {
                    bytes[at] ^= 0x10;
                    let error = verify(&checksums, BlockGroup(5), &bytes).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {at}");
                    bytes[at] ^= 0x10;
                }
            }
        }
    }

    #[test]
    fn without_checksums_nothing_is_verified_or_written() {
        let mut bytes = [7; 32];
        seal(&Checksums::None, BlockGroup(0), &mut bytes);
        assert_eq!(bytes, [7; 32]);
        verify(&Checksums::None, BlockGroup(0), &bytes).unwrap();
    }

    #[test]
    fn uninit_flags_count_only_where_descriptors_are_protected() {
        let descriptor = GroupDescriptor {
            flags: BLOCK_UNINIT | INODE_UNINIT,
            ..sample()
        };
        assert!(descriptor.block_bitmap_is_uninitialised(&SEEDED));
        assert!(descriptor.inode_bitmap_is_uninitialised(&SEEDED));
        assert!(!descriptor.block_bitmap_is_uninitialised(&Checksums::None));
        assert!(!descriptor.inode_bitmap_is_uninitialised(&Checksums::None));
    }
}
