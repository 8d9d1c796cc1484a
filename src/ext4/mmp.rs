//! The block of multiple mount protection (kernel documentation: "Multiple Mount Protection"): whoever has the
//! filesystem mounted writes a new number there every few seconds.
//!
//! Every VM has one of its own in the place of the base's: it begins as [`clean`], and guards the VM's disk
//! against being mounted twice.

use super::checksum::{Checksums, crc32c};
use super::fields::{le32, put_le32};
use crate::error::{Error, ErrorKind, Result};

/// Bytes of the structure at the block's beginning.
const SIZE: usize = 1024;
const MAGIC: u32 = 0x004d_4d50;
/// `EXT4_MMP_SEQ_CLEAN`: nobody has the filesystem mounted.
const SEQ_CLEAN: u32 = 0xff4d_4d50;
const SEQ: usize = 0x04;
/// `mmp_time`, `mmp_nodename` and `mmp_bdevname`: who wrote it last, and when.
const WRITER: std::ops::Range<usize> = 0x08..0x70;
const CHECKSUM: usize = SIZE - 4;

/// Turns `block`, as anybody wrote it, into that of a filesystem which nobody has mounted.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if it is no such block.
pub fn clean(checksums: &Checksums, block: &mut [u8]) -> Result<()> {
    let mmp_magic = le32(block, 0);
    if block.len() < SIZE || mmp_magic != MAGIC {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "multiple mount protection: magic number {mmp_magic:#010x}; e2fsck may repair it"
            ),
        ));
    }
    put_le32(block, SEQ, SEQ_CLEAN);
    block[WRITER].fill(0);
    if let Some(seed) = checksums.seed() {
        let checksum = crc32c(seed, &block[..CHECKSUM]);
        put_le32(block, CHECKSUM, checksum);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_block_has_no_writer_and_keeps_its_interval() {
        let mut block = [7; 2048];
        put_le32(&mut block, 0, MAGIC);
        clean(&Checksums::Crc32c { seed: 5 }, &mut block).unwrap();
        assert_eq!(le32(&block, SEQ), SEQ_CLEAN);
        assert_eq!(block[WRITER], [0; 0x68]);
        assert_eq!(block[0x70..0x72], [7; 2]);
        assert_eq!(le32(&block, CHECKSUM), crc32c(5, &block[..CHECKSUM]));
        assert_eq!(block[SIZE..], [7; 1024]);
    }

    #[test]
    fn what_is_no_such_block_is_refused() {
        for mut block in [vec![0; 1024], MAGIC.to_le_bytes().to_vec()] {
            let error = clean(&Checksums::None, &mut block).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }
}
