//! Blocks of the orphan file (kernel documentation: "Orphan file"): numbers of inodes to delete or truncate, and at the
//! end of each block a magic number and a checksum.
//!
//! Every VM has an orphan file of its own in the blocks of the base's: it begins with nothing but [`put_empty`] blocks.

use super::checksum::{Checksums, crc32c};
use super::fields::{le32, put_le32};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FsBlock, InodeNumber};

const MAGIC: u32 = 0x0b10_ca04;
/// Bytes of `ob_magic` and `ob_checksum` at a block's end.
const TAIL: usize = 8;

/// Fills `bytes`, one block, with an orphan file's block without entries. `number` and `i_generation` are the orphan
/// file's, `block` is where the block lies: its checksum covers them.
pub fn put_empty(
    checksums: &Checksums,
    number: InodeNumber,
    i_generation: u32,
    block: FsBlock,
    bytes: &mut [u8],
) {
    bytes.fill(0);
    let Some(tail) = bytes.len().checked_sub(TAIL) else {
        return;
    };
    put_le32(bytes, tail, MAGIC);
    if let Some(checksum) = checksum_of(checksums, number, i_generation, block, &bytes[..tail]) {
        put_le32(bytes, tail + 4, checksum);
    }
}

/// Whether a block of the orphan file holds no entry.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if it is no block of an orphan file.
pub fn is_empty(bytes: &[u8]) -> Result<bool> {
    let tail = bytes.len().saturating_sub(TAIL);
    let ob_magic = le32(bytes, tail);
    if ob_magic != MAGIC {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("orphan file: magic number {ob_magic:#010x} of a block; e2fsck may repair it"),
        ));
    }
    Ok(bytes[..tail].iter().all(|byte| *byte == 0))
}

fn checksum_of(
    checksums: &Checksums,
    number: InodeNumber,
    i_generation: u32,
    block: FsBlock,
    entries: &[u8],
) -> Option<u32> {
    let seed = checksums.inode_seed(number, i_generation)?;
    Some(crc32c(crc32c(seed, &block.0.to_le_bytes()), entries))
}
