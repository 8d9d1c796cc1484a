//! Blocks of extended attributes that do not fit their inode (kernel documentation: "Extended Attributes").
//!
//! Files with the same attributes share a block, which counts them in `h_refcount`: a kernel that has read one file's
//! block lets a new file with equal attributes use it too, and writes the block. A VM must not do that to a block that
//! is not its own, so it reads the count at its largest, at which a kernel shares no more.

use super::checksum::{Checksums, crc32c};
use super::fields::{le32, put_le32};
use crate::units::FsBlock;

const MAGIC: u32 = 0xea02_0000;
const REFCOUNT: usize = 0x04;
const CHECKSUM: usize = 0x10;
/// `EXT4_XATTR_REFCOUNT_MAX`: with so many files a block is shared no further.
const REFCOUNT_MAX: u32 = 1024;

/// Turns the attribute block `block` into what a VM reads that does not own it: shared to the full.
///
/// Bytes that are no attribute block, or one whose checksum is wrong, stay as they are.
pub fn foreign(checksums: &Checksums, block: FsBlock, bytes: &mut [u8]) {
    let h_refcount = le32(bytes, REFCOUNT);
    if le32(bytes, 0) != MAGIC || h_refcount >= REFCOUNT_MAX || !is_intact(checksums, block, bytes)
    {
        return;
    }
    put_le32(bytes, REFCOUNT, REFCOUNT_MAX);
    if let Some(checksum) = checksum_of(checksums, block, bytes) {
        put_le32(bytes, CHECKSUM, checksum);
    }
}

/// Whether the checksum of an attribute block is right, or such blocks carry none.
#[must_use]
pub fn is_intact(checksums: &Checksums, block: FsBlock, bytes: &[u8]) -> bool {
    checksum_of(checksums, block, bytes).is_none_or(|computed| computed == le32(bytes, CHECKSUM))
}

fn checksum_of(checksums: &Checksums, block: FsBlock, bytes: &[u8]) -> Option<u32> {
    let (head, rest) = bytes.split_at_checked(CHECKSUM)?;
    let csum = crc32c(checksums.seed()?, &block.0.to_le_bytes());
    let csum = crc32c(crc32c(csum, head), &[0; 4]);
    Some(crc32c(csum, rest.get(4..)?))
}
