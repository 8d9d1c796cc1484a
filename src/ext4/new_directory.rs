//! A new directory: its inode, and the link that its parent counts. Its first block is
//! [`super::directory::put_new`].

use super::features::Feature;
use super::fields::{le16, low32, put_le16, put_le32};
use super::inode::{self, BLOCK, EXTENTS_FL, GOOD_OLD_SIZE};
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FsBlock, InodeNumber};

/// The most links that an inode counts.
const LINK_MAX: u16 = 65000;
const MODE_DIRECTORY: u16 = 0x4000;
const LINKS_COUNT: usize = 0x1a;
const CTIME: usize = 0x0c;
const MTIME: usize = 0x10;
const EXTRA_ISIZE: usize = 0x80;
/// Where the fields of an inode end that this program writes, from `i_extra_isize` on.
const KNOWN_EXTRA: u16 = 32;

/// A point in time, as inodes keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: u64,
    /// Nanoseconds of that second, below a thousand million.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// Writes the time into a field, and what does not fit there into its `_extra` field if the inode has it.
    fn put(self, bytes: &mut [u8], at: usize, extra_at: usize) {
        let seconds = low32(self.seconds);
        put_le32(bytes, at, seconds);
        // The field is signed; two bits of the extra field say how often 2^32 is to be added to it.
        let signed = i64::from(seconds.cast_signed());
        let epochs = (self.seconds.cast_signed().wrapping_sub(signed) >> 32) & 0x3;
        let epochs = u32::try_from(epochs).expect("two bits");
        if has_field(bytes, extra_at) {
            put_le32(bytes, extra_at, epochs | (self.nanoseconds << 2));
        }
    }
}

/// Whether `i_extra_isize` says that the inode has the 32-bit field at `at`.
fn has_field(bytes: &[u8], at: usize) -> bool {
    bytes.len() > GOOD_OLD_SIZE && at + 4 <= GOOD_OLD_SIZE + usize::from(le16(bytes, EXTRA_ISIZE))
}

/// What a new directory is to be.
#[derive(Clone, Copy, Debug)]
pub struct NewDirectory {
    /// Its inode.
    pub inode: InodeNumber,
    /// Its one block.
    pub block: FsBlock,
    /// The lower twelve bits of `i_mode`: who may do what.
    pub permissions: u16,
    /// `i_generation`: any number, best a random one.
    pub generation: u32,
    /// When it is made.
    pub time: Timestamp,
}

/// The record of a new, empty directory of the superuser.
///
/// # Errors
/// [`ErrorKind::OutOfBounds`] if the block's number does not fit the filesystem's kind of map.
pub fn inode_record(superblock: &Superblock, new: &NewDirectory) -> Result<Vec<u8>> {
    const EXTENT_MAGIC: u16 = 0xf30a;
    let mut bytes = vec![0; usize::from(superblock.inode_size)];
    put_le16(
        &mut bytes,
        0x00,
        MODE_DIRECTORY | (new.permissions & 0x0fff),
    );
    put_le32(&mut bytes, 0x04, superblock.block_size);
    put_le16(&mut bytes, LINKS_COUNT, 2);
    put_le32(&mut bytes, 0x1c, superblock.block_size / 512);
    put_le32(&mut bytes, 0x64, new.generation);
    if bytes.len() > GOOD_OLD_SIZE {
        let room = superblock.inode_size - 128;
        let i_extra_isize = superblock.want_extra_isize.max(KNOWN_EXTRA).min(room) & !3;
        put_le16(&mut bytes, EXTRA_ISIZE, i_extra_isize);
    }
    for (at, extra_at) in [(0x08, 0x8c), (CTIME, 0x84), (MTIME, 0x88)] {
        new.time.put(&mut bytes, at, extra_at);
    }
    if has_field(&bytes, 0x90) {
        new.time.put(&mut bytes, 0x90, 0x94);
    }
    let (block_lo, block_hi) = (low32(new.block.0), new.block.0 >> 32);
    if superblock.features.has(Feature::EXTENTS) {
        let start_hi = u16::try_from(block_hi).map_err(|_| beyond(new.block))?;
        put_le32(&mut bytes, 0x20, EXTENTS_FL);
        for (at, value) in [(0, EXTENT_MAGIC), (2, 1), (4, 4), (16, 1), (18, start_hi)] {
            put_le16(&mut bytes, BLOCK + at, value);
        }
        put_le32(&mut bytes, BLOCK + 20, block_lo);
    } else if block_hi == 0 {
        put_le32(&mut bytes, BLOCK, block_lo);
    } else {
        return Err(beyond(new.block));
    }
    inode::seal(&superblock.checksums, new.inode, &mut bytes);
    Ok(bytes)
}

fn beyond(block: FsBlock) -> Error {
    Error::new(
        ErrorKind::OutOfBounds,
        format!("block {block} lies beyond what a file of this filesystem can reach"),
    )
}

/// Counts one more subdirectory in the inode `bytes` of the directory `parent`, changed at `time`.
///
/// # Errors
/// [`ErrorKind::NoSpace`] if it cannot have more; `bytes` are unchanged then.
pub fn add_subdirectory(
    superblock: &Superblock,
    parent: InodeNumber,
    bytes: &mut [u8],
    time: Timestamp,
) -> Result<()> {
    let i_links_count = le16(bytes, LINKS_COUNT);
    // A directory with more subdirectories than can be counted says 1.
    let links = match i_links_count {
        1 => 1,
        _ if i_links_count < LINK_MAX - 1 => i_links_count + 1,
        _ => {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "directory inode {parent} has {i_links_count} links; take another directory"
                ),
            ));
        }
    };
    put_le16(bytes, LINKS_COUNT, links);
    time.put(bytes, CTIME, 0x84);
    time.put(bytes, MTIME, 0x88);
    inode::seal(&superblock.checksums, parent, bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::fields::le32;
    use super::*;

    fn stored(seconds: u64) -> (u32, u32) {
        let mut bytes = [0; 160];
        put_le16(&mut bytes, EXTRA_ISIZE, 32);
        Timestamp {
            seconds,
            nanoseconds: 5,
        }
        .put(&mut bytes, CTIME, 0x84);
        (le32(&bytes, CTIME), le32(&bytes, 0x84))
    }

    #[test]
    fn times_beyond_2038_go_into_the_extra_bits() {
        assert_eq!(stored(0x7fff_ffff), (0x7fff_ffff, 5 << 2));
        assert_eq!(stored(0x8000_0000), (0x8000_0000, 5 << 2 | 1));
        assert_eq!(stored(0x1_0000_0000), (0, 5 << 2 | 1));
        assert_eq!(stored(0x3_7fff_ffff), (0x7fff_ffff, 5 << 2 | 3));
    }

    #[test]
    fn an_inode_without_extra_fields_takes_whole_seconds() {
        let mut bytes = [0; 128];
        Timestamp {
            seconds: 9,
            nanoseconds: 5,
        }
        .put(&mut bytes, CTIME, 0x84);
        assert_eq!(le32(&bytes, CTIME), 9);
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 1);
    }
}
