//! Directory blocks (kernel documentation: "Directory Entries", "Linear Directories").
//!
//! A block is filled to its end with entries, each as long as its `rec_len` says; one without an inode is free. Under
//! `metadata_csum` a last entry of twelve bytes, without a name, holds the checksum. Blocks of the index of a
//! hashed directory look like blocks with free entries only, so that a linear search passes over them.

use super::checksum::crc32c;
use super::features::Feature;
use super::fields::{le16, le32, put_bytes, put_le16, put_le32, u8_at};
use super::inode::FileType;
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::InodeNumber;

/// The longest name, in bytes.
pub const MAX_NAME: usize = 255;

/// Bytes of an entry before its name.
const HEADER: usize = 8;
/// Bytes of the entry that holds the checksum.
const TAIL: usize = 12;
/// `det_reserved_ft` of that entry.
const TAIL_FILE_TYPE: u8 = 0xde;
/// From this block size on a `rec_len` of 16 bits cannot say that an entry fills the block.
const LARGE_BLOCK: usize = 65536;

/// A name that a directory entry can have: 1 to 255 bytes, neither `.` nor `..`, without slashes and zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a [u8]);

impl<'a> Name<'a> {
    /// Checks a name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if no file can have it.
    pub fn new(name: &'a [u8]) -> Result<Self> {
        let possible = (1..=MAX_NAME).contains(&name.len())
            && !name.iter().any(|byte| [b'/', 0].contains(byte))
            && ![&b"."[..], b".."].contains(&name);
        if possible {
            return Ok(Self(name));
        }
        Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("no file can be named {:?}", String::from_utf8_lossy(name)),
        ))
    }

    /// The name's bytes.
    #[must_use]
    pub fn as_bytes(self) -> &'a [u8] {
        self.0
    }
}

/// One entry of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Where it begins in its block.
    pub at: usize,
    /// Bytes up to the next entry.
    pub rec_len: usize,
    /// The file; `None` if the entry is free.
    pub inode: Option<InodeNumber>,
    /// `file_type`; without meaning where the feature `filetype` is missing.
    pub file_type: u8,
    /// The file's name.
    pub name: &'a [u8],
}

/// Whose directory a block is: its checksum covers that.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// The directory's inode.
    pub inode: InodeNumber,
    /// Its `i_generation`.
    pub generation: u32,
}

/// What became of an entry to be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is in the block.
    Yes,
    /// The block has no room for it and is unchanged.
    NoRoom,
}

/// The entries of a block, free ones and the one with the checksum included.
///
/// The iterator ends after an error: [`ErrorKind::Corrupt`] for an entry that leaves the block or is shorter than
/// its name.
pub fn entries(block: &[u8]) -> impl Iterator<Item = Result<Entry<'_>>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= block.len() {
            return None;
        }
        let entry = entry_at(block, at);
        at = entry
            .as_ref()
            .map_or(block.len(), |entry| entry.at + entry.rec_len);
        Some(entry)
    })
}

fn entry_at(block: &[u8], at: usize) -> Result<Entry<'_>> {
    let name_len = usize::from(u8_at(block, at + 6));
    let rec_len = rec_len_from_disk(le16(block, at + 4), block.len());
    let sound =
        rec_len >= HEADER + name_len && rec_len.is_multiple_of(4) && at + rec_len <= block.len();
    if !sound {
        return Err(corrupt(format_args!(
            "an entry of {rec_len} bytes at byte {at}"
        )));
    }
    let inode = le32(block, at);
    Ok(Entry {
        at,
        rec_len,
        inode: (inode != 0).then_some(InodeNumber(inode)),
        file_type: u8_at(block, at + 7),
        name: &block[at + HEADER..at + HEADER + name_len],
    })
}

fn rec_len_from_disk(rec_len: u16, block_size: usize) -> usize {
    if block_size < LARGE_BLOCK {
        return usize::from(rec_len);
    }
    match rec_len {
        0 | u16::MAX => block_size,
        _ => usize::from(rec_len & !3) | (usize::from(rec_len & 3) << 16),
    }
}

fn rec_len_to_disk(rec_len: usize) -> u16 {
    // Only the length of a whole block of 64 KiB does not fit.
    u16::try_from(rec_len).unwrap_or(u16::MAX)
}

/// The file named `name` in a block.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if an entry before it breaks the rules.
pub fn find(block: &[u8], name: Name<'_>) -> Result<Option<InodeNumber>> {
    for entry in entries(block) {
        let entry = entry?;
        if entry.inode.is_some() && entry.name == name.as_bytes() {
            return Ok(entry.inode);
        }
    }
    Ok(None)
}

/// Checks the checksum of a block of entries. Not for blocks of an index: see [`super::htree`].
///
/// # Errors
/// [`ErrorKind::Corrupt`] if it is wrong or missing.
pub fn verify(superblock: &Superblock, owner: Owner, block: &[u8]) -> Result<()> {
    let Some(computed) = checksum_of(superblock, owner, block) else {
        return Ok(());
    };
    if has_tail(block) && le32(block, block.len() - 4) == computed {
        return Ok(());
    }
    Err(corrupt(format_args!(
        "the checksum of a block of inode {} is wrong",
        owner.inode
    )))
}

/// Adds an entry for `inode` to a block of entries, and seals it.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if the block breaks the rules; it is unchanged then.
pub fn add(
    superblock: &Superblock,
    owner: Owner,
    block: &mut [u8],
    name: Name<'_>,
    inode: InodeNumber,
    file_type: FileType,
) -> Result<Added> {
    let needed = entry_len(name.as_bytes());
    let has_checksum = checksum_of(superblock, owner, block).is_some();
    verify(superblock, owner, block)?;
    let mut found = None;
    for entry in entries(block) {
        let entry = entry?;
        if has_checksum && entry.at + TAIL == block.len() {
            break;
        }
        let used = if entry.inode.is_some() {
            entry_len(entry.name)
        } else {
            0
        };
        if found.is_none() && entry.rec_len >= used + needed {
            found = Some((entry.at, used, entry.rec_len));
        }
    }
    let Some((at, used, rec_len)) = found else {
        return Ok(Added::NoRoom);
    };
    if used > 0 {
        put_le16(block, at + 4, rec_len_to_disk(used));
    }
    let file_type = if superblock.features.has(Feature::FILETYPE) {
        type_byte(file_type)
    } else {
        0
    };
    put_entry(
        block,
        at + used,
        rec_len - used,
        inode,
        name.as_bytes(),
        file_type,
    );
    seal(superblock, owner, block);
    Ok(Added::Yes)
}

/// Fills `block` as the first block of the new directory `owner` in `parent`: with `.` and `..` alone.
pub fn put_new(superblock: &Superblock, owner: Owner, parent: InodeNumber, block: &mut [u8]) {
    block.fill(0);
    let file_type = if superblock.features.has(Feature::FILETYPE) {
        type_byte(FileType::Directory)
    } else {
        0
    };
    let has_checksum = checksum_of(superblock, owner, block).is_some();
    let end = block.len() - if has_checksum { TAIL } else { 0 };
    let first = entry_len(b".");
    put_entry(block, 0, first, owner.inode, b".", file_type);
    put_entry(block, first, end - first, parent, b"..", file_type);
    if has_checksum {
        put_le16(block, end + 4, rec_len_to_disk(TAIL));
        put_bytes(block, end + 7, &[TAIL_FILE_TYPE]);
    }
    seal(superblock, owner, block);
}

fn put_entry(
    block: &mut [u8],
    at: usize,
    rec_len: usize,
    inode: InodeNumber,
    name: &[u8],
    file_type: u8,
) {
    put_le32(block, at, inode.0);
    put_le16(block, at + 4, rec_len_to_disk(rec_len));
    let name_len = u8::try_from(name.len()).expect("a name has at most 255 bytes");
    put_bytes(block, at + 6, &[name_len, file_type]);
    put_bytes(block, at + HEADER, name);
}

/// The room that an entry with this name needs.
fn entry_len(name: &[u8]) -> usize {
    (HEADER + name.len()).next_multiple_of(4)
}

fn type_byte(file_type: FileType) -> u8 {
    match file_type {
        FileType::Regular => 1,
        FileType::Directory => 2,
        FileType::Symlink => 7,
        FileType::Special | FileType::Unknown => 0,
    }
}

/// Whether the block ends with an entry for a checksum.
fn has_tail(block: &[u8]) -> bool {
    block.len().checked_sub(TAIL).is_some_and(|at| {
        le32(block, at) == 0
            && usize::from(le16(block, at + 4)) == TAIL
            && u8_at(block, at + 6) == 0
            && u8_at(block, at + 7) == TAIL_FILE_TYPE
    })
}

/// The checksum that a block of entries should carry; `None` where they carry none.
fn checksum_of(superblock: &Superblock, owner: Owner, block: &[u8]) -> Option<u32> {
    let seed = superblock
        .checksums
        .inode_seed(owner.inode, owner.generation)?;
    Some(crc32c(seed, &block[..block.len().checked_sub(TAIL)?]))
}

fn seal(superblock: &Superblock, owner: Owner, block: &mut [u8]) {
    if let Some(checksum) = checksum_of(superblock, owner, block) {
        let at = block.len() - 4;
        put_le32(block, at, checksum);
    }
}

pub(super) fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("directory: {what}; e2fsck may repair it"),
    )
}
