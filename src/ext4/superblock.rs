//! The superblock: 1024 bytes at byte 1024 of the filesystem, whatever its block size
//! (kernel documentation: "Super Block").
//!
//! # Invariants
//!
//! A [`Superblock`] that [`Superblock::parse`] returned satisfies:
//! 1. it has no feature that this program does not handle;
//! 2. block size, group sizes, inode size and descriptor size are within the format's bounds, and a group's inode
//!    table is smaller than the group;
//! 3. the number of groups follows from the number of blocks, is at most [`MAX_GROUPS`], and times the inodes of
//!    a group is the number of inodes;
//! 4. the filesystem's length in bytes fits 64 bits.

use super::bitmap;
use super::checksum::{Checksums, crc32c};
use super::features::{Feature, Features};
use super::fields::{bytes_at, le16, le32, put_le32, split32, u8_at};
use super::volatile;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FsBlock, InodeNumber};

/// Where the superblock lies, in bytes from the filesystem's start.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Bytes of a superblock.
pub const SUPERBLOCK_SIZE: usize = 1024;
/// Groups beyond this number are refused: memory for the layout grows with them. Groups of the usual size make
/// 2 PiB.
pub const MAX_GROUPS: u32 = 1 << 24;

const MAGIC: u16 = 0xef53;
const CHECKSUM: usize = 0x3fc;
const CHECKSUM_TYPE_CRC32C: u8 = 1;
/// `s_rev_level` of filesystems without the fields from `s_first_ino` on.
const REV_GOOD_OLD: u32 = 0;
/// `s_state`: cleanly unmounted.
const STATE_VALID: u16 = 0x1;
/// `s_state`: errors were found.
const STATE_ERRORS: u16 = 0x2;
const MIN_BLOCKS_PER_GROUP: u32 = 256;
/// The smallest descriptor, and the only size without `64bit`.
const DESCRIPTOR_SIZE: u16 = 32;

/// A filesystem's superblock, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// `s_inodes_count`.
    pub inodes_count: u32,
    /// `s_blocks_count`.
    pub blocks_count: u64,
    /// `s_r_blocks_count`: blocks that only the superuser may fill.
    pub reserved_blocks_count: u64,
    /// `s_free_blocks_count`: a hint while mounted.
    pub free_blocks_count: u64,
    /// `s_free_inodes_count`: a hint while mounted.
    pub free_inodes_count: u32,
    /// `s_first_data_block`: the block that holds the superblock, where group 0 begins.
    pub first_data_block: u32,
    /// Bytes of a block.
    pub block_size: u32,
    /// `s_blocks_per_group`.
    pub blocks_per_group: u32,
    /// `s_inodes_per_group`.
    pub inodes_per_group: u32,
    /// How many groups there are.
    pub group_count: u32,
    /// `s_state`.
    pub state: u16,
    /// `s_first_ino`: the first inode that is not reserved.
    pub first_inode: InodeNumber,
    /// `s_inode_size`: bytes of an inode record.
    pub inode_size: u16,
    /// `s_desc_size`: bytes of a group descriptor.
    pub descriptor_size: u16,
    /// `s_want_extra_isize`: what new inodes set aside for extra fields.
    pub want_extra_isize: u16,
    /// The three feature sets.
    pub features: Features,
    /// `s_uuid`.
    pub uuid: [u8; 16],
    /// `s_reserved_gdt_blocks`: blocks kept behind each copy of the descriptor table.
    pub reserved_gdt_blocks: u16,
    /// `s_journal_inum`; `None` without a journal.
    pub journal_inode: Option<InodeNumber>,
    /// `s_last_orphan`: head of the list of inodes to delete or truncate at mount.
    pub last_orphan: u32,
    /// `s_hash_seed`: for directory hashes.
    pub hash_seed: [u32; 4],
    /// `s_flags`.
    pub flags: u32,
    /// `s_first_meta_bg`: the first descriptor block that lies in the groups it describes.
    pub first_meta_bg: u32,
    /// `s_backup_bgs`: the groups with backups under `sparse_super2`; 0 for none.
    pub backup_groups: [u32; 2],
    /// `s_orphan_file_inum`; `None` without an orphan file.
    pub orphan_file_inode: Option<InodeNumber>,
    /// `s_mmp_block`: what every mounter writes; `None` without `mmp`.
    pub mmp_block: Option<FsBlock>,
    /// How metadata is protected.
    pub checksums: Checksums,
    /// The checksum of a block bitmap in which nothing is free; worked out once, every foreign descriptor has it.
    pub(super) full_block_bitmap_csum: u32,
    /// The same for inode bitmaps.
    pub(super) full_inode_bitmap_csum: u32,
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("superblock: {what}; e2fsck may repair it"),
    )
}

impl Superblock {
    /// Reads a superblock.
    ///
    /// # Errors
    /// - [`ErrorKind::Corrupt`] if `bytes` are no ext2, ext3 or ext4 superblock, or one that breaks an invariant;
    /// - [`ErrorKind::Unsupported`], naming them, if the filesystem has features that this program does not handle.
    pub fn parse(bytes: &[u8; SUPERBLOCK_SIZE]) -> Result<Self> {
        let s_magic = le16(bytes, 0x38);
        if s_magic != MAGIC {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "no ext4 filesystem here: magic number {s_magic:#06x} instead of {MAGIC:#06x}"
                ),
            ));
        }
        let features = Features {
            compat: le32(bytes, 0x5c),
            incompat: le32(bytes, 0x60),
            ro_compat: le32(bytes, 0x64),
        };
        if features.has(Feature::METADATA_CSUM) {
            verify_checksum(bytes)?;
        }
        refuse_unsupported(bytes, &features)?;
        let superblock = Self::from_fields(bytes, features)?;
        superblock.check_sizes(bytes)?;
        superblock.check_sums()?;
        Ok(superblock.with_full_checksums())
    }

    /// Takes the fields as they are; only what is needed to name a number is checked.
    fn from_fields(bytes: &[u8; SUPERBLOCK_SIZE], features: Features) -> Result<Self> {
        let s_log_block_size = le32(bytes, 0x18);
        if s_log_block_size > 6 {
            return Err(corrupt(format_args!(
                "block size 2^(10 + {s_log_block_size}) is beyond 64 KiB"
            )));
        }
        let s_rev_level = le32(bytes, 0x4c);
        let (s_first_ino, s_inode_size) = if s_rev_level == REV_GOOD_OLD {
            (11, 128)
        } else {
            (le32(bytes, 0x54), le16(bytes, 0x58))
        };
        let blocks_count = split32(bytes, 0x04, 0x150);
        let first_data_block = le32(bytes, 0x14);
        let blocks_per_group = le32(bytes, 0x20);
        Ok(Self {
            inodes_count: le32(bytes, 0x00),
            blocks_count,
            reserved_blocks_count: split32(bytes, 0x08, 0x154),
            free_blocks_count: split32(bytes, 0x0c, 0x158),
            free_inodes_count: le32(bytes, 0x10),
            first_data_block,
            block_size: 1024 << s_log_block_size,
            blocks_per_group,
            inodes_per_group: le32(bytes, 0x28),
            group_count: group_count(blocks_count, first_data_block, blocks_per_group)?,
            state: le16(bytes, 0x3a),
            first_inode: InodeNumber(s_first_ino),
            inode_size: s_inode_size,
            descriptor_size: if features.has(Feature::SIXTY_FOUR_BIT) {
                le16(bytes, 0xfe)
            } else {
                DESCRIPTOR_SIZE
            },
            want_extra_isize: le16(bytes, 0x15e),
            features,
            uuid: bytes_at(bytes, 0x68),
            reserved_gdt_blocks: if features.has(Feature::RESIZE_INODE) {
                le16(bytes, 0xce)
            } else {
                0
            },
            journal_inode: named_inode(bytes, 0xe0, features.has(Feature::HAS_JOURNAL)),
            last_orphan: le32(bytes, 0xe8),
            hash_seed: [0xec, 0xf0, 0xf4, 0xf8].map(|at| le32(bytes, at)),
            flags: le32(bytes, 0x160),
            first_meta_bg: le32(bytes, 0x104),
            backup_groups: [0x24c, 0x250].map(|at| le32(bytes, at)),
            orphan_file_inode: named_inode(bytes, 0x280, features.has(Feature::ORPHAN_FILE)),
            mmp_block: features
                .has(Feature::MMP)
                .then(|| FsBlock(split32(bytes, 0x168, 0x16c))),
            checksums: checksums(bytes, &features)?,
            full_block_bitmap_csum: 0,
            full_inode_bitmap_csum: 0,
        })
    }

    fn with_full_checksums(mut self) -> Self {
        self.full_block_bitmap_csum = bitmap::full_checksum(&self.checksums, self.blocks_per_group);
        self.full_inode_bitmap_csum = bitmap::full_checksum(&self.checksums, self.inodes_per_group);
        self
    }

    /// Invariant 2.
    fn check_sizes(&self, bytes: &[u8; SUPERBLOCK_SIZE]) -> Result<()> {
        let block_size = self.block_size;
        let s_log_cluster_size = le32(bytes, 0x1c);
        let s_clusters_per_group = le32(bytes, 0x24);
        if s_log_cluster_size != le32(bytes, 0x18) || s_clusters_per_group != self.blocks_per_group
        {
            return Err(corrupt(
                "clusters differ from blocks without the feature bigalloc",
            ));
        }
        let s_first_data_block = self.first_data_block;
        if s_first_data_block != u32::from(block_size == 1024) {
            return Err(corrupt(format_args!(
                "first data block {s_first_data_block} with blocks of {block_size} bytes"
            )));
        }
        let bits_per_block = block_size * 8;
        for (name, count, min) in [
            ("blocks", self.blocks_per_group, MIN_BLOCKS_PER_GROUP),
            ("inodes", self.inodes_per_group, 8),
        ] {
            if count < min || count > bits_per_block || !count.is_multiple_of(8) {
                return Err(corrupt(format_args!(
                    "{count} {name} per group, which is not a multiple of 8 from {min} to {bits_per_block}"
                )));
            }
        }
        let inode_size = u32::from(self.inode_size);
        if !inode_size.is_power_of_two() || !(128..=block_size).contains(&inode_size) {
            return Err(corrupt(format_args!("inode size {inode_size}")));
        }
        let descriptor_size = u32::from(self.descriptor_size);
        let min = if self.features.has(Feature::SIXTY_FOUR_BIT) {
            64
        } else {
            32
        };
        if !descriptor_size.is_power_of_two()
            || !(min..=block_size.min(1024)).contains(&descriptor_size)
        {
            return Err(corrupt(format_args!("descriptor size {descriptor_size}")));
        }
        let table_bytes = u64::from(self.inodes_per_group) * u64::from(inode_size);
        if !table_bytes.is_multiple_of(u64::from(block_size))
            || table_bytes / u64::from(block_size) >= u64::from(self.blocks_per_group)
        {
            return Err(corrupt(format_args!(
                "a table of {} inodes of {inode_size} bytes does not fill whole blocks of its group",
                self.inodes_per_group
            )));
        }
        Ok(())
    }

    /// Invariants 3 and 4, and that the inodes it names exist.
    fn check_sums(&self) -> Result<()> {
        let inodes = u64::from(self.group_count) * u64::from(self.inodes_per_group);
        if u64::from(self.inodes_count) != inodes {
            return Err(corrupt(format_args!(
                "{} inodes, but the groups have {inodes}",
                self.inodes_count
            )));
        }
        if self
            .blocks_count
            .checked_mul(u64::from(self.block_size))
            .is_none()
            || (!self.features.has(Feature::SIXTY_FOUR_BIT)
                && self.blocks_count > u64::from(u32::MAX))
        {
            return Err(corrupt(format_args!("{} blocks", self.blocks_count)));
        }
        for inode in [self.journal_inode, self.orphan_file_inode]
            .into_iter()
            .flatten()
        {
            if inode.0 > self.inodes_count {
                return Err(corrupt(format_args!(
                    "names inode {inode} of {}",
                    self.inodes_count
                )));
            }
        }
        Ok(())
    }

    /// Whether the filesystem was unmounted properly and no error is recorded: what is on the disk is all there is.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.state & STATE_VALID != 0
            && self.state & STATE_ERRORS == 0
            && self.last_orphan == 0
            && !self.features.has(Feature::NEEDS_RECOVERY)
            && !self.features.has(Feature::ORPHAN_PRESENT)
    }
}

/// An inode that a superblock names at `at`; `None` without the feature that gives the field its meaning.
fn named_inode(bytes: &[u8], at: usize, present: bool) -> Option<InodeNumber> {
    present.then(|| InodeNumber(le32(bytes, at)))
}

/// How many groups `blocks_count` blocks make.
fn group_count(blocks_count: u64, first_data_block: u32, blocks_per_group: u32) -> Result<u32> {
    let blocks = blocks_count
        .checked_sub(u64::from(first_data_block))
        .filter(|blocks| *blocks > 0)
        .ok_or_else(|| {
            corrupt(format_args!(
                "{blocks_count} blocks, the first is {first_data_block}"
            ))
        })?;
    if blocks_per_group == 0 {
        return Err(corrupt("0 blocks per group"));
    }
    let groups = blocks.div_ceil(u64::from(blocks_per_group));
    u32::try_from(groups)
        .ok()
        .filter(|groups| *groups <= MAX_GROUPS)
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the filesystem has {groups} block groups; at most {MAX_GROUPS} are supported"
                ),
            )
        })
}

fn checksums(bytes: &[u8; SUPERBLOCK_SIZE], features: &Features) -> Result<Checksums> {
    let uuid: [u8; 16] = bytes_at(bytes, 0x68);
    if features.has(Feature::METADATA_CSUM) {
        let s_checksum_type = u8_at(bytes, 0x175);
        if s_checksum_type != CHECKSUM_TYPE_CRC32C {
            return Err(corrupt(format_args!("checksum type {s_checksum_type}")));
        }
        let seed = if features.has(Feature::CSUM_SEED) {
            le32(bytes, 0x270)
        } else {
            crc32c(u32::MAX, &uuid)
        };
        return Ok(Checksums::Crc32c { seed });
    }
    Ok(if features.has(Feature::GDT_CSUM) {
        Checksums::DescriptorCrc16 { uuid }
    } else {
        Checksums::None
    })
}

/// Invariant 1.
fn refuse_unsupported(bytes: &[u8; SUPERBLOCK_SIZE], features: &Features) -> Result<()> {
    let mut refused = features.unsupported();
    let s_journal_inum = le32(bytes, 0xe0);
    if features.has(Feature::HAS_JOURNAL) && s_journal_inum == 0 {
        refused.push(
            "external journal (take the journal in: tune2fs -O ^has_journal, then tune2fs -j)"
                .to_owned(),
        );
    }
    if features.has(Feature::EA_INODE) && !volatile::has_room_for_options(bytes) {
        refused.push(
            "ea_inode with so many default mount options that there is no room for nombcache (shorten them with \
             tune2fs -E mount_opts=…)"
                .to_owned(),
        );
    }
    if refused.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "the filesystem has what a view of it cannot keep apart: {}",
            refused.join(", ")
        ),
    ))
}

/// The checksum that `bytes` should carry under `metadata_csum`.
fn checksum_of(bytes: &[u8; SUPERBLOCK_SIZE]) -> u32 {
    crc32c(u32::MAX, &bytes[..CHECKSUM])
}

fn verify_checksum(bytes: &[u8; SUPERBLOCK_SIZE]) -> Result<()> {
    let s_checksum = le32(bytes, CHECKSUM);
    let computed = checksum_of(bytes);
    if s_checksum == computed {
        return Ok(());
    }
    Err(corrupt(format_args!(
        "checksum {s_checksum:#010x}, computed {computed:#010x}"
    )))
}

/// Sets the checksum of a changed superblock, if its filesystem has checksums.
pub fn seal(bytes: &mut [u8; SUPERBLOCK_SIZE]) {
    if le32(bytes, 0x64) & Feature::METADATA_CSUM.bit() != 0 {
        let computed = checksum_of(bytes);
        put_le32(bytes, CHECKSUM, computed);
    }
}
