//! L2 tables in place of lost ones: what they led to reads as zeros, and not as a backing image has it.
//!
//! # Invariants
//!
//! 1. One table stands in for as many as its refcount can count, so that what a broken L1 table makes of the file is
//!    bounded.
//! 2. A version 2 image has no zero flag, and one without a backing image needs none: there the entry becomes empty.
//! 3. An L1 table that is cut off is marked before the file grows: an entry that leads nowhere, where the first one is
//!    missing. Empty entries behind a mark are lost ones. It goes with the table, when a copy with all entries comes
//!    into force, by one write of the header. So whenever the power goes, what is lost is still seen to be lost.

use std::collections::HashMap;

use super::super::entry::{OFFSET, READS_ZERO};
use super::super::geometry::to_usize;
use super::super::snapshot_table::read_snapshots;
use super::checker::Checker;
use super::entries::judge_l1;
use super::report::Severity;
use super::snapshots::L1Place;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HostOffset, SECTOR_SIZE};

/// The most tables that stand in for lost ones.
const MOST: u64 = 1024;
/// An L1 entry that leads nowhere, since no file is that long: a mark (invariant 3).
const NOWHERE: u64 = OFFSET;
/// As that, and no mark.
const LOST: u64 = 1 << 55;
/// The most bytes of L1 tables that are cut off.
const MOST_CUT_OFF: u64 = 256 << 20;

/// The table that stands in for lost ones.
#[derive(Debug, Default)]
pub(super) struct StandIn {
    /// Where it lies, once there is one.
    at: Option<HostOffset>,
    /// Entries that lead to it.
    references: u64,
    /// Tables so far, with this one.
    tables: u64,
}

/// An L1 table whose end is lost.
#[derive(Clone, Copy, Debug)]
pub(super) struct CutOff {
    table: L1Place,
    /// The index of the first entry that is lost.
    lost_from: u64,
}

impl CutOff {
    /// Where the table should end.
    pub(super) fn end(&self) -> u64 {
        self.table.at.0.saturating_add(self.table.entries * 8)
    }
}

impl Checker<'_> {
    /// What an entry of the L1 table at `table` becomes; `index` is its number there.
    ///
    /// # Errors
    /// The storage's, and those of [`Checker::stand_in`].
    pub(super) async fn mended_l1_word(
        &mut self,
        table: HostOffset,
        index: u64,
        word: u64,
    ) -> Result<u64> {
        let verdict = judge_l1(&self.bounds, word);
        let is_lost = verdict.faults.iter().any(|fault| fault.loses_table());
        let mended = if is_lost {
            self.stand_in().await?
        } else {
            verdict.mended
        };
        if mended != word {
            let outcome = if is_lost {
                format!(
                    "what it led to is lost, and reads as {}",
                    self.lost_reads_as()
                )
            } else {
                "its reserved bits are cleared".to_owned()
            };
            self.tell(
                Severity::Repair,
                format!("L1 entry {index} of the table at {table:#x}: {outcome}"),
            );
        }
        Ok(mended)
    }

    /// What an L1 entry becomes before anything is appended: one whose table is lost leads nowhere.
    pub(super) fn unlinked_l1_word(&self, word: u64) -> u64 {
        let verdict = judge_l1(&self.bounds, word);
        let is_lost = verdict.faults.iter().any(|fault| fault.loses_table());
        if is_lost && word != NOWHERE {
            LOST
        } else {
            word
        }
    }

    /// The L1 tables among these that begin within the file and end behind it, further than an incomplete cluster
    /// explains; and those with a mark.
    ///
    /// # Errors
    /// The storage's; [`ErrorKind::Unsupported`] if they are too large to be copied.
    pub(super) async fn find_cut_off(&self, tables: Vec<L1Place>) -> Result<Vec<CutOff>> {
        let mut found = Vec::new();
        for table in tables {
            let is_beyond = !self.bounds.holds(table.at.0, table.entries * 8);
            let left = self
                .bounds
                .file_len
                .checked_sub(table.at.0)
                .filter(|left| *left > 0);
            let lost_from = match (self.find_mark(table).await?, left) {
                (Some(mark), _) => mark,
                (None, Some(left)) if is_beyond => left.div_ceil(8),
                _ => continue,
            };
            found.push(CutOff { table, lost_from });
        }
        let bytes: u64 = found.iter().map(|cut_off| cut_off.table.entries * 8).sum();
        if bytes > MOST_CUT_OFF {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "too many L1 tables are cut off by the end of the file: copy the disk with `seethrough convert`",
            ));
        }
        Ok(found)
    }

    /// The index of the first entry of an L1 table that is a mark.
    async fn find_mark(&self, table: L1Place) -> Result<Option<u64>> {
        if self.has_stand_ins() {
            for piece in self.pieces(table.at, table.entries) {
                let words = self.words(&piece).await?;
                if let Some((index, _)) = words.into_iter().find(|(_, word)| *word == NOWHERE) {
                    return Ok(Some(index));
                }
            }
        }
        Ok(None)
    }

    /// Marks where the file cuts L1 tables off, before it grows (invariant 3).
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn mark_cut_off(&self, tables: &[CutOff]) -> Result<()> {
        let end = tables.iter().map(CutOff::end).max().unwrap_or(0);
        let from = self.bounds.file_len.next_multiple_of(8);
        if from >= end || !self.has_stand_ins() {
            return Ok(());
        }
        // Within one sector: all of it is there after a power cut, or nothing.
        let to = (from + 1).next_multiple_of(SECTOR_SIZE).min(end);
        let words = NOWHERE.to_be_bytes().repeat(to_usize((to - from) / 8));
        self.write(HostOffset(from), &words).await?;
        self.storage.flush().await
    }

    /// Puts copies of L1 tables in force in which lost entries lead to stand-ins. The file has grown.
    ///
    /// # Errors
    /// The storage's, and those of [`Checker::stand_in`].
    pub(super) async fn complete_cut_off(&mut self, tables: &[CutOff]) -> Result<()> {
        let reads_as = self.lost_reads_as();
        for CutOff { table, lost_from } in tables {
            let (at, last) = (table.at, table.entries.saturating_sub(1));
            self.tell(
                Severity::Repair,
                format!(
                    "L1 entries {lost_from} to {last} of the table at {at:#x}: the end of the file has cut them off, \
                     and what they led to is lost, and reads as {reads_as}"
                ),
            );
        }
        if tables.is_empty() || !self.has_stand_ins() {
            return Ok(());
        }
        let mut copies = HashMap::new();
        for cut_off in tables {
            let complete = self.completed(cut_off).await?;
            let L1Place { at, entries, .. } = cut_off.table;
            copies.insert((at, entries), self.append(&complete).await?);
        }
        self.storage.flush().await?;
        let active = self.active_l1();
        if let Some(copy) = copies.get(&(active.at, active.entries)) {
            self.header.l1_table_offset = *copy;
            self.write_header().await?;
        }
        let Ok(mut snapshots) = read_snapshots(self.storage, &self.header).await else {
            return Ok(());
        };
        let mut is_changed = false;
        for snapshot in &mut snapshots {
            let place = (snapshot.l1_table_offset, u64::from(snapshot.l1_size));
            if let Some(copy) = copies.get(&place) {
                snapshot.l1_table_offset = *copy;
                is_changed = true;
            }
        }
        if is_changed {
            self.replace_snapshots(&mut snapshots).await?;
        }
        Ok(())
    }

    /// The bytes of an L1 table with all its entries mended.
    async fn completed(&mut self, cut_off: &CutOff) -> Result<Vec<u8>> {
        let CutOff {
            table: L1Place { at, entries, .. },
            lost_from,
        } = *cut_off;
        let bytes = self.read(at, entries * 8).await?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut complete = Vec::with_capacity(bytes.len());
        for (index, word) in (0..).zip(words) {
            let is_lost = index >= lost_from && matches!(u64::from_be_bytes(*word), 0 | NOWHERE);
            let word = if is_lost {
                self.stand_in().await?
            } else {
                self.mended_l1_word(at, index, u64::from_be_bytes(*word))
                    .await?
            };
            complete.extend(word.to_be_bytes());
        }
        Ok(complete)
    }

    /// What lost data reads as.
    fn lost_reads_as(&self) -> &'static str {
        if self.header.backing_file.is_some() && !self.bounds.geometry.has_zero_flag() {
            "the backing image, for want of zero clusters in version 2"
        } else {
            "zeros"
        }
    }

    /// Invariant 2.
    fn has_stand_ins(&self) -> bool {
        self.header.backing_file.is_some() && self.bounds.geometry.has_zero_flag()
    }

    /// The L1 entry in place of one that is lost. The table that it leads to is not durable yet.
    ///
    /// # Errors
    /// The storage's; [`ErrorKind::Unsupported`] if that would take too many tables.
    async fn stand_in(&mut self) -> Result<u64> {
        if !self.has_stand_ins() {
            return Ok(0);
        }
        let at = match self.stand_in.at {
            Some(at) if self.stand_in.references < self.refcount_max() => at,
            _ => self.append_stand_in().await?,
        };
        self.stand_in.references += 1;
        Ok(at.0)
    }

    async fn append_stand_in(&mut self) -> Result<HostOffset> {
        if self.stand_in.tables == MOST {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "more L2 tables are lost than refcounts of this width can replace: copy the disk with `seethrough \
                 convert`",
            ));
        }
        let entry = if self.bounds.geometry.has_extended_l2() {
            let zero = u64::from(self.bounds.geometry.full_mask()) << 32;
            [0u64.to_be_bytes(), zero.to_be_bytes()].concat()
        } else {
            READS_ZERO.to_be_bytes().to_vec()
        };
        let entries = self.header.l2_entries();
        let table = entry.repeat(to_usize(entries));
        let at = self.append(&table).await?;
        self.stand_in = StandIn {
            at: Some(at),
            references: 0,
            tables: self.stand_in.tables + 1,
        };
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::mend::tests::{image_of, image_with, open};
    use super::super::{Repair, Repaired, repair};
    use super::*;
    use crate::image::{Access, Image};
    use crate::progress::Progress;
    use crate::qcow2::Qcow2;
    use crate::qcow2::create::{BackingReference, CreateOptions};
    use crate::storage::{CrashStorage, Delays, Lost, MemoryStorage, Storage};
    use crate::sys::{IoBuf, block_on};
    use crate::units::GuestOffset;

    const COPIED: u64 = 1 << 63;

    fn overlay(cluster_size: u64, size: u64) -> Arc<MemoryStorage> {
        let options = CreateOptions {
            cluster_size,
            backing: Some(BackingReference {
                file: "base".into(),
                format: "qcow2".to_owned(),
            }),
            ..CreateOptions::new(size)
        };
        image_of(&options, 64 << 10)
    }

    /// An overlay whose L1 table is cut off behind so many bytes.
    fn cut_off(cluster_size: u64, size: u64, left: usize) -> Arc<MemoryStorage> {
        let storage = overlay(cluster_size, size);
        let (at, end) = (
            word(&storage, 40),
            storage.len().next_multiple_of(cluster_size),
        );
        let l1 = storage.contents()[usize::try_from(at).unwrap()..][..left].to_vec();
        put(&storage, end, &l1);
        put(&storage, 40, &end.to_be_bytes());
        storage
    }

    fn word(storage: &MemoryStorage, at: u64) -> u64 {
        let bytes = storage.contents();
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn put(storage: &MemoryStorage, at: u64, bytes: &[u8]) {
        block_on(storage.writev(HostOffset(at), IoBuf::from_bytes(bytes))).unwrap();
    }

    fn work(storage: &MemoryStorage, what: Repair) -> (Repaired, String) {
        let mut lines = String::new();
        let mut listener = |finding| lines.push_str(&format!("{finding}\n"));
        let progress = Progress::default();
        let work = block_on(repair(storage, what, &mut listener, &progress));
        (work.unwrap(), lines)
    }

    /// A backing image full of sevens.
    fn sevens(size: u64) -> Arc<Qcow2> {
        let storage = image_of(&CreateOptions::new(size), usize::try_from(size).unwrap());
        Arc::new(open(&storage, Access::ReadOnly))
    }

    /// What the disk reads at these places over a backing image.
    fn read<const N: usize>(
        storage: &Arc<MemoryStorage>,
        backing: &Arc<Qcow2>,
        places: [u64; N],
    ) -> [u8; N] {
        let storage = Arc::clone(storage) as Arc<dyn Storage>;
        let backing = Arc::clone(backing) as Arc<dyn Image>;
        let disk = block_on(Qcow2::open(storage, Some(backing), Access::ReadOnly)).unwrap();
        places.map(|at| {
            let buf = IoBuf::zeroed(512);
            block_on(disk.read(GuestOffset(at), buf.clone())).unwrap();
            buf.to_vec()[0]
        })
    }

    #[test]
    fn what_a_lost_table_led_to_reads_as_zeros_and_not_as_the_backing_image() {
        let storage = overlay(4096, 8 << 20);
        let l1 = word(&storage, 40);
        for (entry, lost) in [(1, COPIED | 1 << 40), (3, COPIED | 0x1200)] {
            put(&storage, l1 + entry * 8, &lost.to_be_bytes());
        }
        let (repaired, lines) = work(&storage, Repair::All);
        assert!(repaired.after.is_clean(), "{lines}");
        assert!(lines.contains("L1 entry 3"), "{lines}");
        let found = read(&storage, &sevens(8 << 20), [0, 2 << 20, 4 << 20, 6 << 20]);
        assert_eq!(found, [7, 0, 7, 0]);
    }

    #[test]
    fn what_an_l1_table_has_lost_at_its_end_reads_as_zeros() {
        // 64 of 256 entries are left, for 32 KiB each.
        let storage = cut_off(512, 8 << 20, 512);
        let (repaired, lines) = work(&storage, Repair::All);
        assert!(repaired.after.is_clean(), "{lines}");
        assert!(lines.contains("L1 entries 64 to 255"), "{lines}");
        let places = [0, 1 << 20, 2 << 20, (8 << 20) - 512];
        let found = read(&storage, &sevens(8 << 20), places);
        assert_eq!(found, [7, 7, 0, 0]);
    }

    #[test]
    fn a_power_cut_while_a_table_grows_leaves_what_is_lost_to_read_as_zeros() {
        const SIZE: u64 = 24 << 20;
        let backing = sevens(SIZE);
        // 8 of 192 entries are left, for 128 KiB each, and more than a cluster is missing.
        let storage = cut_off(1024, SIZE, 64);
        let crash = CrashStorage::new(storage.contents(), Delays::none());
        let progress = Progress::default();
        block_on(repair(&crash, Repair::All, &mut |_| {}, &progress)).unwrap();
        for cut in crash.moments() {
            for seed in 0..16 {
                let left = crash.after_power_cut(cut, Lost::Some { seed });
                let left = Arc::new(MemoryStorage::new(left));
                let (repaired, lines) = work(&left, Repair::All);
                assert!(repaired.after.is_clean(), "{cut:?} {seed}: {lines}");
                let places = [0, 512 << 10, 1 << 20, 10 << 20, 20 << 20, SIZE - 512];
                let found = read(&left, &backing, places);
                assert_eq!(found, [7, 7, 0, 0, 0, 0], "{cut:?} {seed}: {lines}");
            }
        }
    }

    #[test]
    fn a_long_table_that_is_cut_off_takes_few_barriers() {
        // 8 of 65,536 entries are left.
        let storage = cut_off(512, 2 << 30, 64);
        let crash = CrashStorage::new(storage.contents(), Delays::none());
        let progress = Progress::default();
        let repaired = block_on(repair(&crash, Repair::All, &mut |_| {}, &progress)).unwrap();
        assert!(repaired.after.is_clean());
        assert!(crash.moments().count() < 400, "{}", crash.moments().count());
    }

    #[test]
    fn a_snapshot_s_table_that_is_cut_off_reads_as_zeros_too() {
        let storage = overlay(512, 8 << 20);
        let disk = open(&storage, Access::ReadWrite);
        let disk =
            block_on(disk.create_snapshot("one".as_ref(), std::time::SystemTime::UNIX_EPOCH))
                .unwrap();
        block_on(disk.close()).unwrap();
        drop(disk);
        let end = storage.len().next_multiple_of(512);
        let snapshot = word(&storage, 64);
        let l1 = usize::try_from(word(&storage, snapshot)).unwrap();
        let left = storage.contents()[l1..][..512].to_vec();
        put(&storage, end, &left);
        put(&storage, snapshot, &end.to_be_bytes());
        let (repaired, lines) = work(&storage, Repair::All);
        assert!(repaired.after.is_clean(), "{lines}");
        let disk = open(&storage, Access::ReadWrite);
        let disk = block_on(disk.apply_snapshot("one".as_ref())).unwrap();
        block_on(disk.close()).unwrap();
        drop(disk);
        let places = [0, 1 << 20, 2 << 20, (8 << 20) - 512];
        let found = read(&storage, &sevens(8 << 20), places);
        assert_eq!(found, [7, 7, 0, 0]);
    }

    #[test]
    fn leaks_stay_where_a_broken_entry_may_have_led_to_them() {
        let storage = image_with(64 << 10);
        let l2 = word(&storage, word(&storage, 40)) & !COPIED;
        let entry = word(&storage, l2);
        put(&storage, l2, &(COPIED | 1 << 40).to_be_bytes());
        let (repaired, lines) = work(&storage, Repair::Leaks);
        assert_eq!(
            (repaired.before.leaks, repaired.after.leaks),
            (1, 1),
            "{lines}"
        );
        assert!(lines.contains("clusters are not freed"), "{lines}");
        // Whoever knows where it led can still mend it by hand.
        put(&storage, l2, &entry.to_be_bytes());
        let (repaired, lines) = work(&storage, Repair::Leaks);
        assert!(repaired.before.is_clean(), "{lines}");
    }

    #[test]
    fn leaks_are_freed_beside_refcounts_that_are_too_low() {
        let storage = image_with(64 << 10);
        let l2 = word(&storage, word(&storage, 40)) & !COPIED;
        let data = (word(&storage, l2) & !COPIED) / 4096;
        put(&storage, l2 + 8, &[0; 8]);
        let block = word(&storage, word(&storage, 48));
        put(&storage, block + 2 * data, &[0, 0]);
        let (repaired, lines) = work(&storage, Repair::Leaks);
        assert_eq!(
            (repaired.before.leaks, repaired.after.leaks),
            (1, 0),
            "{lines}"
        );
        // The entry without a reference keeps its flag: the others are nobody's business.
        assert!(repaired.after.corruptions > 0, "{lines}");
        assert_eq!(word(&storage, l2) & COPIED, COPIED, "{lines}");
    }

    /// What freeing leaks leaves of the first entry of the first L2 table, which lacks its flag, if another entry holds
    /// what `other` makes of the table's place and the first entry's.
    fn flag_after_freeing_leaks(other: impl FnOnce(u64, u64) -> u64) -> u64 {
        let storage = image_with(64 << 10);
        let l2 = word(&storage, word(&storage, 40)) & !COPIED;
        let data = word(&storage, l2) & !COPIED;
        put(&storage, l2, &data.to_be_bytes());
        put(&storage, l2 + 8, &other(l2, data).to_be_bytes());
        let (repaired, lines) = work(&storage, Repair::Leaks);
        assert_eq!(
            (repaired.before.leaks, repaired.after.leaks),
            (1, 0),
            "{lines}"
        );
        word(&storage, l2) & COPIED
    }

    #[test]
    fn freeing_leaks_sets_flags_only_in_tables_and_of_clusters_that_are_nothing_else() {
        // Nothing but a leak and a flag is wrong: it is set.
        assert_eq!(flag_after_freeing_leaks(|_, _| 0), COPIED);
        // A second reference that the refcount does not know of.
        assert_eq!(flag_after_freeing_leaks(|_, data| data), 0);
        // The table is somebody's data.
        assert_eq!(flag_after_freeing_leaks(|l2, _| l2), 0);
    }
}
