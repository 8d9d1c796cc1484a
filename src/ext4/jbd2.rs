//! The journal's superblock (kernel documentation: "Journal (jbd2)", "Super Block"): the first 1024 bytes of the
//! journal's first block. Unlike the rest of ext4 it is big-endian.
//!
//! Every VM has a journal of its own in the blocks of the base's: it begins as [`clean`].

use super::checksum::crc32c;
use super::fields::{be32, bytes_at, le16, le32, put_be32};
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};

/// Bytes of a journal superblock.
pub const JOURNAL_SUPERBLOCK_SIZE: usize = 1024;

pub(super) const MAGIC: u32 = 0xc03b_3998;
const BLOCKTYPE_V1: u32 = 3;
const BLOCKTYPE_V2: u32 = 4;

const SEQUENCE: usize = 0x18;
const START: usize = 0x1c;
const ERRNO: usize = 0x20;
const FEATURE_INCOMPAT: usize = 0x28;
const NUM_FC_BLKS: usize = 0x54;
const HEAD: usize = 0x58;
const CHECKSUM: usize = 0xfc;

pub(super) const COMPAT_CHECKSUM: u32 = 0x1;
pub(super) const INCOMPAT_64BIT: u32 = 0x2;
pub(super) const INCOMPAT_ASYNC_COMMIT: u32 = 0x4;
pub(super) const INCOMPAT_CSUM_V2: u32 = 0x8;
pub(super) const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// `JBD2_DEFAULT_FAST_COMMIT_BLOCKS`: what a `s_num_fc_blks` of 0 means.
const DEFAULT_FC_BLOCKS: u32 = 256;
/// `JBD2_MIN_JOURNAL_BLOCKS`: a log that would be shorter keeps its blocks from fast commits.
const MIN_LOG_BLOCKS: u32 = 1024;
/// Names of `s_feature_incompat`, from the lowest bit, and whether this program handles the feature.
const INCOMPAT: &[(&str, bool)] = &[
    ("journal_incompat_revoke", true),
    ("journal_64bit", true),
    ("journal_async_commit", true),
    ("journal_checksum_v2", true),
    ("journal_checksum_v3", true),
    ("fast_commit", true),
];

/// A journal's superblock, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalSuperblock {
    /// `s_maxlen`: blocks of the journal.
    pub maxlen: u32,
    /// Where the log ends; what lies behind it is for fast commits.
    pub log_end: u32,
    /// `s_first`: the first block of the log.
    pub first: u32,
    /// `s_sequence`: the first transaction expected in the log.
    pub sequence: u32,
    /// `s_start`: where the log begins; 0 if there is nothing to replay.
    pub start: u32,
    /// `s_errno`: the error that aborted the journal, or 0.
    pub errno: u32,
    /// `s_feature_compat`.
    pub feature_compat: u32,
    /// `s_feature_incompat`.
    pub feature_incompat: u32,
    /// `s_uuid`: what the checksums of the log start from.
    pub uuid: [u8; 16],
}

impl JournalSuperblock {
    /// Reads the superblock of the journal of the filesystem `superblock`; `journal_blocks` is the length of the
    /// journal's file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if `bytes` are no journal superblock or their numbers cannot be,
    /// [`ErrorKind::Unsupported`], naming them, if the journal has features that this program does not handle.
    pub fn parse(
        superblock: &Superblock,
        journal_blocks: u32,
        bytes: &[u8; JOURNAL_SUPERBLOCK_SIZE],
    ) -> Result<Self> {
        let h_magic = be32(bytes, 0x00);
        let h_blocktype = be32(bytes, 0x04);
        if h_magic != MAGIC || ![BLOCKTYPE_V1, BLOCKTYPE_V2].contains(&h_blocktype) {
            return Err(corrupt(format_args!(
                "magic number {h_magic:#010x}, block type {h_blocktype}"
            )));
        }
        let has_features = h_blocktype == BLOCKTYPE_V2;
        let feature = |at: usize| if has_features { be32(bytes, at) } else { 0 };
        let maxlen = be32(bytes, 0x10);
        let feature_incompat = feature(FEATURE_INCOMPAT);
        let journal = Self {
            maxlen,
            log_end: match feature_incompat & INCOMPAT_FAST_COMMIT {
                0 => maxlen,
                _ => log_end(maxlen, be32(bytes, NUM_FC_BLKS)),
            },
            first: be32(bytes, 0x14),
            sequence: be32(bytes, SEQUENCE),
            start: be32(bytes, START),
            errno: be32(bytes, ERRNO),
            feature_compat: feature(0x24),
            feature_incompat,
            uuid: bytes_at(bytes, 0x30),
        };
        if let Some(computed) = checksum_of(bytes) {
            let s_checksum = be32(bytes, CHECKSUM);
            if computed != s_checksum {
                return Err(corrupt(format_args!(
                    "checksum {s_checksum:#010x}, computed {computed:#010x}"
                )));
            }
        }
        journal.refuse_unsupported()?;
        journal.check_sizes(superblock, journal_blocks, be32(bytes, 0x0c))?;
        Ok(journal)
    }

    /// Whether there is nothing to replay.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == 0
    }

    /// The block of the journal where fast commits begin that would have to be replayed, if there can be any: kernels
    /// leave one out behind the log.
    #[must_use]
    pub fn fast_commits(&self) -> Option<u32> {
        let possible = !self.is_empty() && self.feature_incompat & INCOMPAT_FAST_COMMIT != 0;
        let first = self.log_end.saturating_add(1);
        (possible && first < self.maxlen).then_some(first)
    }

    /// Whether `block`, the first one of the fast commits, begins one of a transaction that is not older than the log.
    #[must_use]
    pub fn is_fast_commit(&self, block: &[u8]) -> bool {
        /// `EXT4_FC_TAG_HEAD`; unlike the log, fast commits are little-endian.
        const TAG_HEAD: u16 = 0x9;
        const TID: usize = 8;
        le16(block, 0) == TAG_HEAD && le32(block, TID).wrapping_sub(self.sequence) < 1 << 31
    }

    fn check_sizes(
        &self,
        superblock: &Superblock,
        journal_blocks: u32,
        s_blocksize: u32,
    ) -> Result<()> {
        if s_blocksize != superblock.block_size {
            return Err(corrupt(format_args!(
                "block size {s_blocksize}, the filesystem's is {}",
                superblock.block_size
            )));
        }
        let s_maxlen = self.maxlen;
        if s_maxlen > journal_blocks {
            return Err(corrupt(format_args!(
                "length {s_maxlen}, but its file has {journal_blocks} blocks"
            )));
        }
        let log = self.first.max(1)..self.log_end;
        if !log.contains(&self.first) || (self.start != 0 && !log.contains(&self.start)) {
            return Err(corrupt(format_args!(
                "the log begins at block {} of {} to {}",
                self.start, self.first, self.log_end
            )));
        }
        Ok(())
    }

    fn refuse_unsupported(&self) -> Result<()> {
        for bit in (0..u32::BITS).filter(|bit| self.feature_incompat >> bit & 1 != 0) {
            let known = usize::try_from(bit).ok().and_then(|bit| INCOMPAT.get(bit));
            let name = match known {
                Some((_, true)) => continue,
                Some((name, false)) => (*name).to_owned(),
                None => format!("FEATURE_I{bit}"),
            };
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the journal has the feature {name}, which is not handled"),
            ));
        }
        Ok(())
    }
}

/// Where the log of a journal of `s_maxlen` blocks with fast commits ends.
fn log_end(s_maxlen: u32, s_num_fc_blks: u32) -> u32 {
    let fast = match s_num_fc_blks {
        0 => DEFAULT_FC_BLOCKS,
        blocks => blocks,
    };
    match s_maxlen.checked_sub(fast) {
        Some(end) if end >= MIN_LOG_BLOCKS => end,
        _ => s_maxlen,
    }
}

/// The superblock of an empty journal with the sizes and features of `journal`: nothing to replay, no error, and no
/// fast commits, which no VM is shown.
#[must_use]
pub fn clean(journal: &[u8; JOURNAL_SUPERBLOCK_SIZE]) -> [u8; JOURNAL_SUPERBLOCK_SIZE] {
    let mut bytes = *journal;
    // The log is all zeros, so that any first transaction number will do; a fresh journal's is 1.
    put_be32(&mut bytes, SEQUENCE, 1);
    put_be32(&mut bytes, START, 0);
    put_be32(&mut bytes, ERRNO, 0);
    put_be32(&mut bytes, HEAD, 0);
    if be32(&bytes, 0x04) == BLOCKTYPE_V2 {
        let features = be32(&bytes, FEATURE_INCOMPAT) & !INCOMPAT_FAST_COMMIT;
        put_be32(&mut bytes, FEATURE_INCOMPAT, features);
    }
    if let Some(checksum) = checksum_of(&bytes) {
        put_be32(&mut bytes, CHECKSUM, checksum);
    }
    bytes
}

/// Puts the journal's magic number back where a block of the log has zeros in its stead.
pub fn unescape(block: &mut [u8]) {
    put_be32(block, 0, MAGIC);
}

/// The checksum that a journal superblock should carry; `None` if the journal has none.
fn checksum_of(bytes: &[u8; JOURNAL_SUPERBLOCK_SIZE]) -> Option<u32> {
    let protected = be32(bytes, 0x04) == BLOCKTYPE_V2
        && be32(bytes, FEATURE_INCOMPAT) & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0;
    protected.then(|| {
        let head = crc32c(u32::MAX, &bytes[..CHECKSUM]);
        crc32c(crc32c(head, &[0; 4]), &bytes[CHECKSUM + 4..])
    })
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("journal superblock: {what}; e2fsck may repair it"),
    )
}
