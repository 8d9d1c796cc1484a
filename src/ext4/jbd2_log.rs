//! The journal's log: descriptor, revoke and commit blocks (kernel documentation: "Journal (jbd2)", "Descriptor
//! Block", "Revocation Block", "Commit Block"), read as a kernel reads them when it recovers.
//!
//! ```text
//! ├ descriptor: tags ┼ block ┼ block ┼ … ┼ descriptor ┼ … ┼ revoke ┼ commit ┤ next transaction …
//! ```
//!
//! A [`LogScan`] asks for the log's blocks one after the other and gives a [`Transaction`] back for each one whose
//! commit block it has seen. It does no I/O.
//!
//! # Invariants
//!
//! 1. A transaction is given back only when everything in it has been read and no checksum that the journal has is
//!    wrong: what a power cut or a writer that is not done has left half-written is no transaction.
//! 2. A scan ends at the first block that does not continue the log, and after one round through it at the latest.
//! 3. A transaction is no larger than the log, and what it revokes is bounded too.

use crc::{CRC_32_MPEG_2, Crc};

use super::checksum::crc32c;
use super::fields::{be16, be32, u8_at};
use super::jbd2::{
    COMPAT_CHECKSUM, INCOMPAT_64BIT, INCOMPAT_ASYNC_COMMIT, INCOMPAT_CSUM_V2, INCOMPAT_CSUM_V3,
    JournalSuperblock, MAGIC,
};
use crate::units::{FsBlock, LogBlock};

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;

const HEADER: usize = 12;
const REVOKE_HEADER: usize = 16;
/// Bytes of `t_checksum` at the end of descriptor and revoke blocks.
const TAIL: usize = 4;
const UUID: usize = 16;

/// The most blocks that a transaction may revoke, many times what a kernel ever does.
const MAX_REVOKED: usize = 1 << 22;

const FLAG_ESCAPE: u32 = 1;
const FLAG_SAME_UUID: u32 = 2;
const FLAG_LAST_TAG: u32 = 8;

const COMMIT_CHECKSUM_TYPE: usize = 12;
const COMMIT_CHECKSUM_SIZE: usize = 13;
const COMMIT_CHECKSUM: usize = 16;
const CRC32_TYPE: u8 = 1;
const CRC32_SIZE: u8 = 4;

/// The kernel's `crc32_be(~0, …)`, with which the oldest of the journal's checksums covers a whole transaction.
static CRC32_BE: Crc<u32> = Crc::<u32>::new(&CRC_32_MPEG_2);

/// What protects a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protection {
    None,
    /// `journal_checksum`: one CRC in the commit block, over descriptors and data.
    Transaction,
    /// `journal_checksum_v2`: a CRC-32C in every block, and 16 bits of one in every tag.
    V2,
    /// `journal_checksum_v3`: a CRC-32C in every block and in every tag.
    V3,
}

/// How a journal's log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogFormat {
    block_size: usize,
    first: u32,
    end: u32,
    is_64bit: bool,
    protection: Protection,
    commits_early: bool,
    seed: u32,
}

/// A block of the filesystem that a transaction holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoggedBlock {
    /// Which block it is.
    pub block: FsBlock,
    /// Where its bytes are in the log.
    pub at: LogBlock,
    /// Whether its first four bytes, which are the journal's magic number, are zeros in the log.
    pub escaped: bool,
}

/// A committed transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// Its number; they follow one another, and wrap around.
    pub sequence: u32,
    /// The blocks that it holds, in the order of the log.
    pub blocks: Vec<LoggedBlock>,
    /// The blocks whose contents in this transaction and in earlier ones are void.
    pub revoked: Vec<FsBlock>,
}

/// Whether a block of the log that begins with `header` is a commit block.
#[must_use]
pub fn is_commit(header: &[u8; 12]) -> bool {
    be32(header, 0) == MAGIC && be32(header, 4) == COMMIT
}

/// Whether transaction `a` is the same as `b` or a later one, numbers wrapping around.
#[must_use]
pub fn is_at_or_after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() >= 0
}

impl LogFormat {
    /// The format of the log behind `journal`, in a filesystem with blocks of `block_size` bytes.
    #[must_use]
    pub fn new(journal: &JournalSuperblock, block_size: u32) -> Self {
        let has = |feature: u32| journal.feature_incompat & feature != 0;
        let protection = if has(INCOMPAT_CSUM_V3) {
            Protection::V3
        } else if has(INCOMPAT_CSUM_V2) {
            Protection::V2
        } else if journal.feature_compat & COMPAT_CHECKSUM != 0 {
            Protection::Transaction
        } else {
            Protection::None
        };
        Self {
            block_size: usize::try_from(block_size).unwrap_or(usize::MAX),
            first: journal.first,
            end: journal.log_end,
            is_64bit: has(INCOMPAT_64BIT),
            protection,
            commits_early: has(INCOMPAT_ASYNC_COMMIT),
            seed: crc32c(u32::MAX, &journal.uuid),
        }
    }

    /// Whether commit blocks may be written before what they commit.
    #[must_use]
    pub fn commits_early(&self) -> bool {
        self.commits_early
    }

    /// Blocks of the log, the journal's superblock and what lies before the log left out.
    #[must_use]
    pub fn log_blocks(&self) -> u32 {
        self.end.saturating_sub(self.first)
    }

    /// The block `count` further on, around the end of the log.
    fn after(&self, at: LogBlock, count: u32) -> LogBlock {
        let within = u64::from(at.0.saturating_sub(self.first)) + u64::from(count);
        let wrapped = within % u64::from(self.log_blocks().max(1));
        LogBlock(
            self.first
                .saturating_add(u32::try_from(wrapped).unwrap_or(0)),
        )
    }

    fn protects_blocks(&self) -> bool {
        matches!(self.protection, Protection::V2 | Protection::V3)
    }

    /// Bytes of a tag without its UUID.
    fn tag_size(&self) -> usize {
        match self.protection {
            Protection::V3 => 16,
            Protection::V2 if self.is_64bit => 14,
            Protection::V2 => 10,
            _ if self.is_64bit => 12,
            _ => 8,
        }
    }

    /// Where the entries of a descriptor or revoke block end.
    fn entries_end(&self) -> usize {
        let tail = if self.protects_blocks() { TAIL } else { 0 };
        self.block_size.saturating_sub(tail)
    }

    /// The CRC of a block in which `field` is taken as zeros.
    fn block_checksum(&self, block: &[u8], field: usize) -> u32 {
        let head = crc32c(self.seed, block.get(..field).unwrap_or_default());
        let behind = block.get(field + TAIL..).unwrap_or_default();
        crc32c(crc32c(head, &[0; TAIL]), behind)
    }

    fn has_valid_tail(&self, block: &[u8]) -> bool {
        let tail = self.entries_end();
        !self.protects_blocks() || be32(block, tail) == self.block_checksum(block, tail)
    }

    /// The tags of a descriptor block. Its blocks follow it from `at` on.
    fn tags(&self, descriptor: &[u8], at: LogBlock) -> Vec<Tag> {
        let mut tags = Vec::new();
        let (size, end) = (self.tag_size(), self.entries_end());
        let mut offset = HEADER;
        let mut at = at;
        while offset + size <= end {
            let tag = self.tag(descriptor, offset, at);
            offset += size;
            if tag.flags & FLAG_SAME_UUID == 0 {
                offset += UUID;
            }
            let is_last = tag.flags & FLAG_LAST_TAG != 0;
            tags.push(tag);
            if is_last {
                break;
            }
            at = self.after(at, 1);
        }
        tags
    }

    fn tag(&self, descriptor: &[u8], offset: usize, at: LogBlock) -> Tag {
        let low = be32(descriptor, offset);
        let high = if self.is_64bit {
            be32(descriptor, offset + 8)
        } else {
            0
        };
        let (flags, checksum) = match self.protection {
            Protection::V3 => (
                be32(descriptor, offset + 4),
                Some(TagChecksum::Whole(be32(descriptor, offset + 12))),
            ),
            Protection::V2 => (
                u32::from(be16(descriptor, offset + 6)),
                Some(TagChecksum::Low(be16(descriptor, offset + 4))),
            ),
            _ => (u32::from(be16(descriptor, offset + 6)), None),
        };
        Tag {
            flags,
            checksum,
            logged: LoggedBlock {
                block: FsBlock(u64::from(high) << 32 | u64::from(low)),
                at,
                escaped: flags & FLAG_ESCAPE != 0,
            },
        }
    }

    /// The blocks that a revoke block names; `None` if its count cannot be.
    fn revoked(&self, block: &[u8]) -> Option<impl Iterator<Item = FsBlock>> {
        let r_count = usize::try_from(be32(block, HEADER)).ok()?;
        if r_count > self.entries_end() {
            return None;
        }
        let size = if self.is_64bit { 8 } else { 4 };
        let entries = block.get(REVOKE_HEADER..r_count).unwrap_or_default();
        Some(entries.chunks_exact(size).map(|entry| {
            FsBlock(
                entry
                    .iter()
                    .fold(0, |number, byte| number << 8 | u64::from(*byte)),
            )
        }))
    }
}

/// What protects the block of one tag.
#[derive(Clone, Copy, Debug)]
enum TagChecksum {
    Whole(u32),
    Low(u16),
}

#[derive(Clone, Copy, Debug)]
struct Tag {
    flags: u32,
    checksum: Option<TagChecksum>,
    logged: LoggedBlock,
}

/// A walk through the committed transactions of a log.
pub struct LogScan {
    format: LogFormat,
    /// Where the transaction after the last committed one begins.
    head: LogBlock,
    /// The transaction expected there.
    sequence: u32,
    /// The block wanted next; `None` when the scan has ended.
    next: Option<LogBlock>,
    /// Blocks read since the scan began.
    read: u32,
    transaction: Transaction,
    /// The blocks of the last descriptor that are still to come, last first.
    awaited: Vec<Tag>,
    /// The CRC of the transaction so far, where one covers it whole.
    whole: crc::Digest<'static, u32>,
}

impl LogScan {
    /// A scan that expects transaction `sequence` at `start`.
    #[must_use]
    pub fn new(format: LogFormat, start: LogBlock, sequence: u32) -> Self {
        let is_in_log = (format.first..format.end).contains(&start.0);
        Self {
            format,
            head: start,
            sequence,
            next: is_in_log.then_some(start),
            read: 0,
            transaction: Transaction {
                sequence,
                ..Transaction::default()
            },
            awaited: Vec::new(),
            whole: CRC32_BE.digest(),
        }
    }

    /// Where the transaction after the last committed one begins, and its number.
    #[must_use]
    pub fn head(&self) -> (LogBlock, u32) {
        (self.head, self.sequence)
    }

    /// The block to hand to [`LogScan::supply`] next; `None` when the end of what is committed has been reached.
    #[must_use]
    pub fn next_block(&self) -> Option<LogBlock> {
        self.next
    }

    /// Takes the bytes of the block that was asked for; gives a transaction back when they complete one.
    pub fn supply(&mut self, bytes: &[u8]) -> Option<Transaction> {
        let at = self.next.take()?;
        let follows = self.format.after(at, 1);
        self.read = self.read.saturating_add(1);
        let is_whole = bytes.len() == self.format.block_size;
        let goes_on = is_whole && self.read <= self.format.log_blocks();
        if !goes_on {
            return None;
        }
        if let Some(tag) = self.awaited.pop() {
            if self.is_valid_data(&tag, bytes) {
                self.whole.update(bytes);
                self.transaction.blocks.push(tag.logged);
                self.next = Some(follows);
            }
            return None;
        }
        if be32(bytes, 0) != MAGIC || be32(bytes, 8) != self.sequence {
            return None;
        }
        match be32(bytes, 4) {
            DESCRIPTOR if self.format.has_valid_tail(bytes) => {
                self.whole.update(bytes);
                self.awaited = self.format.tags(bytes, follows);
                self.awaited.reverse();
            }
            REVOKE if self.format.has_valid_tail(bytes) => {
                let revoked = self.format.revoked(bytes)?;
                self.transaction.revoked.extend(revoked);
                if self.transaction.revoked.len() > MAX_REVOKED {
                    return None;
                }
            }
            COMMIT if self.is_valid_commit(bytes) => {
                self.next = Some(follows);
                return Some(self.commit(follows));
            }
            _ => return None,
        }
        self.next = Some(follows);
        None
    }

    fn is_valid_data(&self, tag: &Tag, bytes: &[u8]) -> bool {
        let Some(expected) = tag.checksum else {
            return true;
        };
        let found = crc32c(
            crc32c(self.format.seed, &self.sequence.to_be_bytes()),
            bytes,
        );
        match expected {
            TagChecksum::Whole(checksum) => checksum == found,
            TagChecksum::Low(checksum) => u32::from(checksum) == found & 0xffff,
        }
    }

    fn is_valid_commit(&self, bytes: &[u8]) -> bool {
        let found = be32(bytes, COMMIT_CHECKSUM);
        match self.format.protection {
            Protection::None => true,
            Protection::V2 | Protection::V3 => {
                found == self.format.block_checksum(bytes, COMMIT_CHECKSUM)
            }
            Protection::Transaction => {
                let h_chksum_type = u8_at(bytes, COMMIT_CHECKSUM_TYPE);
                let h_chksum_size = u8_at(bytes, COMMIT_CHECKSUM_SIZE);
                match (h_chksum_type, h_chksum_size) {
                    (CRC32_TYPE, CRC32_SIZE) => found == self.whole.clone().finalize(),
                    // Commit blocks from before the feature was set carry none.
                    (0, 0) => found == 0,
                    _ => false,
                }
            }
        }
    }

    fn commit(&mut self, follows: LogBlock) -> Transaction {
        self.head = follows;
        self.sequence = self.sequence.wrapping_add(1);
        self.whole = CRC32_BE.digest();
        let next = Transaction {
            sequence: self.sequence,
            ..Transaction::default()
        };
        std::mem::replace(&mut self.transaction, next)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation, reason = "test data is small")]

    use super::*;
    use crate::ext4::fields::{put_be32, put_bytes};

    const SIZE: usize = 1024;
    const FIRST: u32 = 1;
    const MAXLEN: u32 = 12;
    const UUID: [u8; 16] = [7; 16];

    /// (`s_feature_compat`, `s_feature_incompat`) of every way to protect a log, with 64-bit tags and without.
    const FEATURES: &[(u32, u32)] = &[
        (0, 0),
        (0, INCOMPAT_64BIT),
        (COMPAT_CHECKSUM, 0),
        (0, INCOMPAT_CSUM_V2),
        (0, INCOMPAT_CSUM_V2 | INCOMPAT_64BIT),
        (0, INCOMPAT_CSUM_V3),
        (0, INCOMPAT_CSUM_V3 | INCOMPAT_64BIT),
    ];

    fn format((feature_compat, feature_incompat): (u32, u32)) -> LogFormat {
        let journal = JournalSuperblock {
            maxlen: MAXLEN,
            log_end: MAXLEN,
            first: FIRST,
            sequence: 0,
            start: 0,
            errno: 0,
            feature_compat,
            feature_incompat,
            uuid: UUID,
        };
        LogFormat::new(&journal, 1024)
    }

    /// A log as a kernel writes it.
    struct Log {
        format: LogFormat,
        blocks: Vec<Vec<u8>>,
        at: LogBlock,
        whole: crc::Digest<'static, u32>,
    }

    impl Log {
        fn new(format: LogFormat, at: u32) -> Self {
            Self {
                format,
                blocks: vec![vec![0; SIZE]; MAXLEN as usize],
                at: LogBlock(at),
                whole: CRC32_BE.digest(),
            }
        }

        fn push(&mut self, block: Vec<u8>) {
            self.blocks[self.at.0 as usize] = block;
            self.at = self.format.after(self.at, 1);
        }

        fn block(kind: u32, sequence: u32) -> Vec<u8> {
            let mut block = vec![0; SIZE];
            put_be32(&mut block, 0, MAGIC);
            put_be32(&mut block, 4, kind);
            put_be32(&mut block, 8, sequence);
            block
        }

        fn seal(&self, block: &mut [u8], field: usize) {
            if self.format.protects_blocks() {
                let checksum = self.format.block_checksum(block, field);
                put_be32(block, field, checksum);
            }
        }

        fn data(&mut self, sequence: u32, blocks: &[(u64, u8)]) {
            let mut descriptor = Self::block(DESCRIPTOR, sequence);
            let mut offset = HEADER;
            for (index, (block, fill)) in blocks.iter().enumerate() {
                let checksum = crc32c(
                    crc32c(self.format.seed, &sequence.to_be_bytes()),
                    &[*fill; SIZE],
                );
                let mut flags = if index == 0 { 0 } else { FLAG_SAME_UUID };
                if index + 1 == blocks.len() {
                    flags |= FLAG_LAST_TAG;
                }
                put_be32(&mut descriptor, offset, (block & 0xffff_ffff) as u32);
                if self.format.is_64bit {
                    put_be32(&mut descriptor, offset + 8, (block >> 32) as u32);
                }
                if self.format.protection == Protection::V3 {
                    put_be32(&mut descriptor, offset + 4, flags);
                    put_be32(&mut descriptor, offset + 12, checksum);
                } else {
                    put_bytes(
                        &mut descriptor,
                        offset + 4,
                        &(checksum as u16).to_be_bytes(),
                    );
                    put_bytes(&mut descriptor, offset + 6, &(flags as u16).to_be_bytes());
                }
                offset += self.format.tag_size() + if index == 0 { 16 } else { 0 };
            }
            self.seal(&mut descriptor, SIZE - TAIL);
            self.whole.update(&descriptor);
            self.push(descriptor);
            for (_, fill) in blocks {
                self.whole.update(&[*fill; SIZE]);
                self.push(vec![*fill; SIZE]);
            }
        }

        fn revoke(&mut self, sequence: u32, blocks: &[u64]) {
            let mut revoke = Self::block(REVOKE, sequence);
            let size = if self.format.is_64bit { 8 } else { 4 };
            let mut offset = REVOKE_HEADER;
            for block in blocks {
                revoke[offset..offset + size].copy_from_slice(&block.to_be_bytes()[8 - size..]);
                offset += size;
            }
            put_be32(&mut revoke, HEADER, offset as u32);
            self.seal(&mut revoke, SIZE - TAIL);
            self.push(revoke);
        }

        fn commit(&mut self, sequence: u32) {
            let mut commit = Self::block(COMMIT, sequence);
            if self.format.protection == Protection::Transaction {
                commit[COMMIT_CHECKSUM_TYPE] = CRC32_TYPE;
                commit[COMMIT_CHECKSUM_SIZE] = CRC32_SIZE;
                let whole = std::mem::replace(&mut self.whole, CRC32_BE.digest());
                put_be32(&mut commit, COMMIT_CHECKSUM, whole.finalize());
            }
            self.seal(&mut commit, COMMIT_CHECKSUM);
            self.push(commit);
        }

        fn scan(&self, start: u32, sequence: u32) -> (Vec<Transaction>, LogScan) {
            let mut scan = LogScan::new(self.format, LogBlock(start), sequence);
            let mut found = Vec::new();
            while let Some(at) = scan.next_block() {
                found.extend(scan.supply(&self.blocks[at.0 as usize]));
            }
            (found, scan)
        }
    }

    /// Two transactions from block 6 on; the second goes around the end.
    fn two_transactions(features: (u32, u32)) -> Log {
        let mut log = Log::new(format(features), 6);
        log.data(u32::MAX, &[(100, 1), (5, 2)]);
        log.commit(u32::MAX);
        log.revoke(0, &[100, 7]);
        log.data(0, &[(9, 3)]);
        log.commit(0);
        log
    }

    #[test]
    fn transactions_are_read_around_the_end_of_the_log_and_of_their_numbers() {
        for features in FEATURES {
            let log = two_transactions(*features);
            let (found, scan) = log.scan(6, u32::MAX);
            let places = |transaction: &Transaction| {
                let place = |one: &LoggedBlock| (one.block.0, one.at.0);
                transaction.blocks.iter().map(place).collect::<Vec<_>>()
            };
            assert_eq!(found.len(), 2, "{features:?}");
            assert_eq!(places(&found[0]), [(100, 7), (5, 8)], "{features:?}");
            assert_eq!(places(&found[1]), [(9, 1)], "{features:?}");
            assert_eq!(found[1].revoked, [FsBlock(100), FsBlock(7)]);
            assert_eq!((found[0].sequence, found[1].sequence), (u32::MAX, 0));
            assert_eq!(scan.head(), (LogBlock(3), 1));
        }
    }

    #[test]
    fn whatever_a_checksum_covers_ends_the_log_when_it_is_wrong() {
        for features in &FEATURES[2..] {
            for damaged in [6, 7, 8, 9] {
                let mut log = two_transactions(*features);
                log.blocks[damaged][600] ^= 1;
                let is_covered = log.format.protects_blocks() || damaged != 9;
                let (found, scan) = log.scan(6, u32::MAX);
                assert_eq!(
                    found.is_empty(),
                    is_covered,
                    "{features:?}: block {damaged}"
                );
                assert_eq!(scan.head().1 == u32::MAX, is_covered);
            }
        }
        let mut log = two_transactions(FEATURES[6]);
        log.blocks[10][600] ^= 1;
        assert_eq!(log.scan(6, u32::MAX).0.len(), 1, "a revoke block");
    }

    #[test]
    fn a_log_ends_where_a_block_does_not_continue_it() {
        let log = two_transactions(FEATURES[0]);
        assert!(log.scan(6, 3).0.is_empty(), "another number");
        assert!(log.scan(7, u32::MAX).0.is_empty(), "another place");
        for outside in [0, MAXLEN, u32::MAX] {
            assert!(log.scan(outside, u32::MAX).0.is_empty());
        }
        let mut unfinished = Log::new(format(FEATURES[0]), 1);
        unfinished.data(1, &[(1, 1)]);
        assert!(unfinished.scan(1, 1).0.is_empty(), "no commit block");
        let mut scan = LogScan::new(log.format, LogBlock(6), u32::MAX);
        assert_eq!(scan.supply(&[0; 512]), None);
        assert_eq!(scan.next_block(), None, "a block that was cut short");
    }

    #[test]
    fn a_log_that_never_ends_is_read_once() {
        let mut log = Log::new(format(FEATURES[0]), 1);
        for _ in FIRST..MAXLEN {
            log.revoke(5, &[1]);
        }
        let mut scan = LogScan::new(log.format, LogBlock(1), 5);
        let mut read = 0;
        while let Some(at) = scan.next_block() {
            assert_eq!(scan.supply(&log.blocks[at.0 as usize]), None);
            read += 1;
        }
        assert_eq!(read, MAXLEN);
    }

    #[test]
    fn a_revoke_block_that_counts_beyond_its_end_is_no_part_of_the_log() {
        let mut log = Log::new(format(FEATURES[0]), 1);
        log.revoke(5, &[1]);
        put_be32(&mut log.blocks[1], HEADER, 1025);
        log.commit(5);
        assert!(log.scan(1, 5).0.is_empty());
    }
}
