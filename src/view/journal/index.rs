//! Which blocks of the filesystem have their last committed contents in the log.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::ext4::jbd2_log::{Transaction, is_at_or_after};
use crate::units::{FsBlock, LogBlock};

/// Bits of the filter: each stands for as many neighbouring blocks as it takes to cover the filesystem.
const FILTER_BITS: u64 = 1 << 20;

/// Where the contents of a block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Logged {
    /// The place in the log.
    pub(super) at: LogBlock,
    /// Whether the first four bytes there stand for the journal's magic number.
    pub(super) escaped: bool,
    /// The transaction that wrote them.
    pub(super) sequence: u32,
}

/// The index. Asking it about blocks that are not in the log, which nearly all are, takes a few loads and no lock.
///
/// # Invariants
///
/// 1. The filter's bit of every block in `entries` is set.
#[derive(Debug)]
pub(super) struct Index {
    entries: RwLock<HashMap<FsBlock, Logged>>,
    len: AtomicUsize,
    /// How many transactions have been taken in.
    commits: AtomicU64,
    filter: Box<[AtomicU64]>,
    /// Blocks for each bit of the filter, as a power of two.
    shift: u32,
}

impl Index {
    /// An empty index for a filesystem of `blocks_count` blocks.
    pub(super) fn new(blocks_count: u64) -> Self {
        let per_bit = blocks_count.div_ceil(FILTER_BITS).max(1);
        Self {
            entries: RwLock::default(),
            len: AtomicUsize::new(0),
            commits: AtomicU64::new(0),
            filter: (0..FILTER_BITS / 64).map(|_| AtomicU64::new(0)).collect(),
            shift: per_bit
                .checked_next_power_of_two()
                .map_or(63, u64::trailing_zeros),
        }
    }

    /// Takes in a committed transaction, the one after the last, of which only blocks in `follows` count.
    pub(super) fn commit(&self, transaction: &Transaction, follows: impl Fn(FsBlock) -> bool) {
        let mut entries = self.write();
        let followed = transaction.blocks.iter().filter(|one| follows(one.block));
        for logged in followed {
            self.set_bit(logged.block);
            entries.insert(
                logged.block,
                Logged {
                    at: logged.at,
                    escaped: logged.escaped,
                    sequence: transaction.sequence,
                },
            );
        }
        // A revocation voids what this very transaction holds, too: a kernel takes it back when it writes the block
        // anew.
        for block in &transaction.revoked {
            entries.remove(block);
        }
        self.len.store(entries.len(), Ordering::Release);
        self.commits.fetch_add(1, Ordering::AcqRel);
    }

    /// Forgets what transactions before `sequence` wrote: it has come to its place.
    pub(super) fn forget_before(&self, sequence: u32) {
        let mut entries = self.write();
        entries.retain(|_, logged| is_at_or_after(logged.sequence, sequence));
        self.len.store(entries.len(), Ordering::Release);
        self.set_filter(&entries);
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        let mut entries = self.write();
        entries.clear();
        entries.shrink_to_fit();
        self.len.store(0, Ordering::Release);
        self.set_filter(&entries);
    }

    /// How many transactions have been taken in: at least those of every block that was found before.
    pub(super) fn commits(&self) -> u64 {
        self.commits.load(Ordering::Acquire)
    }

    /// Where the last committed contents of a block are, if they are in the log.
    pub(super) fn get(&self, block: FsBlock) -> Option<Logged> {
        self.read().get(&block).copied()
    }

    /// The first of `blocks` that is in the log.
    pub(super) fn first_in(&self, blocks: Range<FsBlock>) -> Option<FsBlock> {
        if !self.may_hold(&blocks) {
            return None;
        }
        let entries = self.read();
        if (entries.len() as u64) < blocks.end.0.saturating_sub(blocks.start.0) {
            let inside = entries.keys().filter(|block| blocks.contains(block));
            return inside.min().copied();
        }
        (blocks.start.0..blocks.end.0)
            .map(FsBlock)
            .find(|block| entries.contains_key(block))
    }

    /// Whether any of `blocks` may be in the log; if not, none is.
    fn may_hold(&self, blocks: &Range<FsBlock>) -> bool {
        if self.len.load(Ordering::Acquire) == 0 || blocks.is_empty() {
            return false;
        }
        let bits = blocks.start.0 >> self.shift..=(blocks.end.0 - 1) >> self.shift;
        let words = *bits.start() / 64..=*bits.end() / 64;
        words.into_iter().any(|word| {
            let wanted_from = bits.start().saturating_sub(word * 64);
            let wanted_to = bits.end().saturating_sub(word * 64).min(63);
            let mask = (u64::MAX << wanted_from) & (u64::MAX >> (63 - wanted_to));
            let set = usize::try_from(word)
                .ok()
                .and_then(|word| self.filter.get(word))
                .map_or(u64::MAX, |word| word.load(Ordering::Acquire));
            set & mask != 0
        })
    }

    fn set_bit(&self, block: FsBlock) {
        let bit = block.0 >> self.shift;
        let word = usize::try_from(bit / 64)
            .ok()
            .and_then(|word| self.filter.get(word));
        if let Some(word) = word {
            word.fetch_or(1 << (bit % 64), Ordering::AcqRel);
        }
    }

    /// Clears the bits of blocks that are gone. `entries` is locked, so that none is added meanwhile.
    fn set_filter(&self, entries: &HashMap<FsBlock, Logged>) {
        let mut words = vec![0u64; self.filter.len()];
        for block in entries.keys() {
            let bit = block.0 >> self.shift;
            let word = usize::try_from(bit / 64)
                .ok()
                .and_then(|word| words.get_mut(word));
            if let Some(word) = word {
                *word |= 1 << (bit % 64);
            }
        }
        for (word, value) in self.filter.iter().zip(words) {
            word.store(value, Ordering::Release);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<FsBlock, Logged>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<FsBlock, Logged>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext4::jbd2_log::LoggedBlock;

    fn transaction(sequence: u32, blocks: &[(u64, u32)], revoked: &[u64]) -> Transaction {
        let logged = |&(block, at): &(u64, u32)| LoggedBlock {
            block: FsBlock(block),
            at: LogBlock(at),
            escaped: false,
        };
        Transaction {
            sequence,
            blocks: blocks.iter().map(logged).collect(),
            revoked: revoked.iter().copied().map(FsBlock).collect(),
        }
    }

    fn first_in(index: &Index, range: Range<u64>) -> Option<u64> {
        let found = index.first_in(FsBlock(range.start)..FsBlock(range.end));
        found.map(|block| block.0)
    }

    #[test]
    fn the_last_transaction_counts_until_it_is_revoked_or_has_come_to_its_place() {
        let index = Index::new(1000);
        let any = |_| true;
        index.commit(&transaction(7, &[(5, 1), (9, 2)], &[]), any);
        index.commit(&transaction(8, &[(5, 4)], &[9, 77]), any);
        assert_eq!(index.get(FsBlock(5)).map(|one| one.at), Some(LogBlock(4)));
        assert_eq!(index.get(FsBlock(9)), None);
        index.commit(&transaction(9, &[(9, 6), (11, 7)], &[11]), any);
        assert_eq!(index.get(FsBlock(9)).map(|one| one.at), Some(LogBlock(6)));
        assert_eq!(index.get(FsBlock(11)), None);
        index.forget_before(9);
        assert_eq!(index.get(FsBlock(5)), None);
        assert_eq!(first_in(&index, 0..1000), Some(9));
        index.clear();
        assert_eq!(first_in(&index, 0..1000), None);
    }

    #[test]
    fn transaction_numbers_wrap_around() {
        let index = Index::new(1000);
        index.commit(&transaction(u32::MAX, &[(1, 1)], &[]), |_| true);
        index.commit(&transaction(0, &[(2, 2)], &[]), |_| true);
        index.forget_before(0);
        assert_eq!(first_in(&index, 0..1000), Some(2));
    }

    #[test]
    fn the_first_block_of_a_range_is_found_however_coarse_the_filter_is() {
        for blocks_count in [10_000, 1 << 33] {
            let index = Index::new(blocks_count);
            let blocks = [(63, 1), (64, 2), (5000, 3), (9_999, 4)];
            index.commit(&transaction(1, &blocks, &[]), |block| block.0 != 64);
            for range in [0..10_000, 0..64, 60..65, 64..5001, 65..9999, 5001..10_000] {
                let expected = [63, 5000, 9999]
                    .into_iter()
                    .find(|block| range.contains(block));
                assert_eq!(first_in(&index, range.clone()), expected, "{range:?}");
            }
            assert_eq!(first_in(&index, 64..65), None);
            assert_eq!(first_in(&index, 7..7), None);
            assert_eq!(first_in(&index, 10_000..u64::MAX), None);
        }
    }
}
