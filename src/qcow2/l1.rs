//! The active L1 table: in memory as a whole, read without a lock (qcow2 specification, "Cluster mapping").
//!
//! # Invariants
//!
//! 1. A sector of the table is in the dirty set exactly while it has an entry that is neither on disk nor captured.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::entry::{Defect, L1Entry};
use super::geometry::Geometry;
use crate::sys::IoBuf;
use crate::units::HostOffset;

const ENTRY_SIZE: usize = 8;
/// Entries that are written together.
const SECTOR_ENTRIES: usize = 64;

/// The active L1 table.
#[derive(Debug)]
pub(super) struct L1Table {
    at: HostOffset,
    geometry: Geometry,
    words: Box<[AtomicU64]>,
    dirty_sectors: Mutex<BTreeSet<usize>>,
}

/// Changed sectors of the table, copied at one moment.
#[derive(Debug)]
pub(super) struct CapturedSector {
    sector: usize,
    /// Where the bytes belong.
    pub(super) at: HostOffset,
    /// The bytes.
    pub(super) buf: IoBuf,
}

impl L1Table {
    /// The table that lies at `at` with these bytes.
    pub(super) fn new(geometry: Geometry, at: HostOffset, bytes: &[u8]) -> Self {
        let (entries, _) = bytes.as_chunks::<ENTRY_SIZE>();
        Self {
            at,
            geometry,
            words: entries
                .iter()
                .map(|entry| AtomicU64::new(u64::from_be_bytes(*entry)))
                .collect(),
            dirty_sectors: Mutex::default(),
        }
    }

    /// The entry at `index`; an empty one behind the table's end.
    pub(super) fn get(&self, index: usize) -> Result<L1Entry, Defect> {
        let word = self
            .words
            .get(index)
            .map_or(0, |word| word.load(Ordering::Acquire));
        L1Entry::decode(&self.geometry, word)
    }

    /// Points the entry at `index` to an L2 table of its own.
    pub(super) fn set(&self, index: usize, table: HostOffset) {
        let entry = L1Entry {
            table: Some(table),
            copied: true,
        };
        if let Some(word) = self.words.get(index) {
            let mut dirty = self.lock_dirty();
            word.store(entry.encode(), Ordering::Release);
            dirty.insert(index / SECTOR_ENTRIES);
        }
    }

    /// Whether both lead to the same L2 tables, which are nobody's own. What one table has beyond the other is empty.
    pub(super) fn has_same_tables(&self, other: &Self) -> bool {
        let word = |table: &Self, index| {
            let word: Option<&AtomicU64> = table.words.get(index);
            word.map_or(0, |word| word.load(Ordering::Acquire))
        };
        (0..self.words.len().max(other.words.len()))
            .all(|index| word(self, index) == word(other, index))
    }

    /// All L2 tables that the entries point to.
    pub(super) fn tables(&self) -> impl Iterator<Item = HostOffset> {
        (0..self.words.len()).filter_map(|index| self.get(index).ok()?.table)
    }

    /// Copies every dirty sector; they are clean from then on unless [`L1Table::restore`] says otherwise.
    pub(super) fn capture(&self) -> Vec<CapturedSector> {
        let mut dirty = self.lock_dirty();
        let sectors = std::mem::take(&mut *dirty);
        sectors
            .into_iter()
            .map(|sector| {
                let bytes: Vec<u8> = self
                    .words
                    .iter()
                    .skip(sector * SECTOR_ENTRIES)
                    .take(SECTOR_ENTRIES)
                    .flat_map(|word| word.load(Ordering::Acquire).to_be_bytes())
                    .collect();
                CapturedSector {
                    sector,
                    at: HostOffset(self.at.0 + (sector * SECTOR_ENTRIES * ENTRY_SIZE) as u64),
                    buf: IoBuf::from_bytes(&bytes),
                }
            })
            .collect()
    }

    /// Says that captured sectors may not be on disk.
    pub(super) fn restore(&self, captured: &[CapturedSector]) {
        self.lock_dirty()
            .extend(captured.iter().map(|one| one.sector));
    }

    fn lock_dirty(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.dirty_sectors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::geometry::tests::geometry;
    use super::*;

    #[test]
    fn an_entry_that_breaks_a_rule_spoils_only_itself() {
        let bytes: Vec<u8> = [0u64, 0x1_0000, 0x1_0200]
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect();
        let table = L1Table::new(geometry(16, 4, false), HostOffset(0x3_0000), &bytes);
        assert_eq!(table.get(2), Err(Defect::Unaligned));
        assert_eq!(table.tables().collect::<Vec<_>>(), [HostOffset(0x1_0000)]);
    }

    #[test]
    fn only_sectors_with_changes_are_captured_and_never_bytes_behind_the_table() {
        let table = L1Table::new(geometry(16, 4, false), HostOffset(0x3_0000), &[0; 8 * 70]);
        assert!(table.capture().is_empty());
        table.set(65, HostOffset(0x5_0000));
        let captured = table.capture();
        assert_eq!(captured.len(), 1);
        assert_eq!(captured[0].at, HostOffset(0x3_0200));
        assert_eq!(captured[0].buf.len(), 6 * 8);
        assert!(table.capture().is_empty());
        table.restore(&captured);
        assert_eq!(table.capture().len(), 1);
        assert_eq!(table.get(70), Ok(L1Entry::default()));
    }
}
