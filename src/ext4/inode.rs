//! Inode records (kernel documentation: "Inode Table").
//!
//! Also what a VM reads as an inode that is not its own, [`foreign`]: the same inode, immutable and without access
//! times, so that the guest's own kernel refuses to change it.

use super::checksum::{Checksums, crc32c};
use super::fields::{bytes_at, le16, le32, low16, put_le16, put_le32, split16, split32};
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::InodeNumber;

/// The root directory's inode.
pub const ROOT: InodeNumber = InodeNumber(2);
/// The first inode number that is not reserved, in every filesystem that mke2fs makes.
const FIRST_ORDINARY: u32 = 11;

/// `i_flags`: nothing about the file may change.
pub const IMMUTABLE_FL: u32 = 0x10;
/// `i_flags`: access times are not kept.
pub const NOATIME_FL: u32 = 0x80;
/// `i_flags`: the directory has a hash tree.
pub const INDEX_FL: u32 = 0x1000;
/// `i_flags`: the file is encrypted, or the names in the directory are.
pub const ENCRYPT_FL: u32 = 0x800;
/// `i_flags`: `i_blocks` counts filesystem blocks, not sectors.
pub const HUGE_FILE_FL: u32 = 0x4_0000;
/// `i_flags`: `i_block` is the root of an extent tree.
pub const EXTENTS_FL: u32 = 0x8_0000;
/// `i_flags`: the data are in the inode itself.
pub const INLINE_DATA_FL: u32 = 0x1000_0000;
/// `i_flags`: names in the directory fold case.
pub const CASEFOLD_FL: u32 = 0x4000_0000;

/// Bytes of the fields that every inode has.
pub const GOOD_OLD_SIZE: usize = 128;
/// Where `i_block` is.
pub const BLOCK: usize = 0x28;
/// Bytes of `i_block`.
pub const BLOCK_LEN: usize = 60;

/// More links than any kernel makes: one more name is refused with `EMLINK`.
const LINK_MAX: u16 = 65000;

const LINKS_COUNT: usize = 0x1a;
const FLAGS: usize = 0x20;
const GENERATION: usize = 0x64;
const CHECKSUM_LO: usize = 0x7c;
const EXTRA_ISIZE: usize = 0x80;
const CHECKSUM_HI: usize = 0x82;
/// `i_extra_isize` from which on `i_checksum_hi` is there.
const CHECKSUM_HI_EXTRA: u16 = 4;

/// The type in an inode's `i_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a named pipe or a socket.
    Special,
    /// No type that there is.
    Unknown,
}

/// What this program needs of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// `i_mode`.
    pub mode: u16,
    /// `i_links_count`.
    pub links_count: u16,
    /// `i_size` in bytes.
    pub size: u64,
    /// `i_dtime`: when it was deleted, or its successor in the list of orphans.
    pub dtime: u32,
    /// `i_flags`.
    pub flags: u32,
    /// `i_generation`.
    pub generation: u32,
    /// `i_file_acl`: the block of extended attributes, or 0.
    pub file_acl: u64,
    /// `i_block`: the root of the extent tree or of the block map.
    pub block: [u8; BLOCK_LEN],
}

impl Inode {
    /// Reads an inode; `bytes` are its `s_inode_size` bytes.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        Self {
            mode: le16(bytes, 0x00),
            links_count: le16(bytes, LINKS_COUNT),
            size: split32(bytes, 0x04, 0x6c),
            dtime: le32(bytes, 0x14),
            flags: le32(bytes, FLAGS),
            generation: le32(bytes, GENERATION),
            file_acl: u64::from(le32(bytes, 0x68)) | (u64::from(le16(bytes, 0x76)) << 32),
            block: bytes_at(bytes, BLOCK),
        }
    }

    /// The type in `i_mode`.
    #[must_use]
    pub fn file_type(&self) -> FileType {
        file_type(self.mode)
    }

    /// Whether the record holds a file: a mode and a name.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.mode != 0 && self.links_count != 0
    }
}

fn file_type(i_mode: u16) -> FileType {
    match i_mode & 0xf000 {
        0x8000 => FileType::Regular,
        0x4000 => FileType::Directory,
        0xa000 => FileType::Symlink,
        0x1000 | 0x2000 | 0x6000 | 0xc000 => FileType::Special,
        _ => FileType::Unknown,
    }
}

/// Whether the record has room for the upper half of its checksum.
fn has_checksum_hi(bytes: &[u8]) -> bool {
    bytes.len() > GOOD_OLD_SIZE && le16(bytes, EXTRA_ISIZE) >= CHECKSUM_HI_EXTRA
}

/// The checksum that the record of `inode` should carry (only the lower 16 bits if it has no room for more); `None`
/// where inodes carry none.
#[must_use]
pub fn checksum_of(checksums: &Checksums, inode: InodeNumber, bytes: &[u8]) -> Option<u32> {
    let seed = checksums.inode_seed(inode, le32(bytes, GENERATION))?;
    let (head, rest) = bytes.split_at_checked(CHECKSUM_LO)?;
    let csum = crc32c(crc32c(seed, head), &[0, 0]);
    let rest = rest.get(2..)?;
    if !has_checksum_hi(bytes) {
        return Some(u32::from(low16(crc32c(csum, rest))));
    }
    let (middle, tail) = rest.split_at_checked(CHECKSUM_HI - CHECKSUM_LO - 2)?;
    let csum = crc32c(crc32c(csum, middle), &[0, 0]);
    Some(crc32c(csum, tail.get(2..)?))
}

/// The checksum that the record carries.
fn checksum_in(bytes: &[u8]) -> u32 {
    if has_checksum_hi(bytes) {
        split16(bytes, CHECKSUM_LO, CHECKSUM_HI)
    } else {
        u32::from(le16(bytes, CHECKSUM_LO))
    }
}

/// Sets the checksum of a changed inode.
pub fn seal(checksums: &Checksums, inode: InodeNumber, bytes: &mut [u8]) {
    if let Some(checksum) = checksum_of(checksums, inode, bytes) {
        put_le16(bytes, CHECKSUM_LO, low16(checksum));
        if has_checksum_hi(bytes) {
            put_le16(bytes, CHECKSUM_HI, low16(checksum >> 16));
        }
    }
}

/// Whether the checksum of an inode is right, or inodes carry none.
#[must_use]
pub fn is_intact(checksums: &Checksums, inode: InodeNumber, bytes: &[u8]) -> bool {
    checksum_of(checksums, inode, bytes).is_none_or(|computed| computed == checksum_in(bytes))
}

/// Checks the checksum of an inode.
///
/// # Errors
/// [`ErrorKind::Corrupt`], naming the inode, if it is wrong.
pub fn verify(checksums: &Checksums, inode: InodeNumber, bytes: &[u8]) -> Result<()> {
    if is_intact(checksums, inode, bytes) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!("inode {inode}: its checksum is wrong; e2fsck may repair it"),
    ))
}

/// Turns the record of `inode` into what a VM reads that does not own it: immutable and without access times.
///
/// - A symbolic link is only marked as without access times: kernels take an immutable one for corruption. Its
///   directory protects it from being removed or replaced, and a link count at its bound from getting another name
///   (`link` fails with `EMLINK`), which would leave an entry in one VM's directory for an inode of another's.
/// - The reserved inodes but the root, and records not in use, stay as they are.
/// - So does a record whose checksum is wrong: sealing it again would hide the damage from the guest.
pub fn foreign(superblock: &Superblock, inode: InodeNumber, bytes: &mut [u8]) {
    if inode.0 < FIRST_ORDINARY && inode != ROOT {
        return;
    }
    let i_mode = le16(bytes, 0x00);
    let i_links_count = le16(bytes, LINKS_COUNT);
    if i_mode == 0 || i_links_count == 0 {
        return;
    }
    let (flags, links) = match file_type(i_mode) {
        FileType::Symlink => (NOATIME_FL, LINK_MAX),
        _ => (IMMUTABLE_FL | NOATIME_FL, i_links_count),
    };
    let i_flags = le32(bytes, FLAGS);
    let is_served_so = i_flags & flags == flags && links == i_links_count;
    if is_served_so || !is_intact(&superblock.checksums, inode, bytes) {
        return;
    }
    put_le32(bytes, FLAGS, i_flags | flags);
    put_le16(bytes, LINKS_COUNT, links);
    seal(&superblock.checksums, inode, bytes);
}
