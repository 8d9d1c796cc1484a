//! Mending entries of L1 and L2 tables that break a rule of the format.
//!
//! # Invariants
//!
//! 1. A table is written only where nothing else refers to its clusters: what an L1 entry leads to by mistake may be
//!    somebody's data. An L2 table that is something else, too, is copied first, behind the end of the file.
//! 2. A copy is durable before an entry points to it.
//! 3. Tables lie within the file before anything is appended to it: copies would become entries of a table that
//!    reaches beyond its end.
//! 4. What leads behind the end of the file durably leads nowhere before anything is appended, as far as it can be
//!    written in place: else it would lead to that.
//! 5. Every write replaces entries one by one, each within a sector, and none then refers to more than before: after
//!    a power cut the same repair goes on where it stopped.

use std::collections::HashMap;

use super::super::entry::OFFSET;
use super::super::geometry::to_usize;
use super::checker::{Checker, Voice};
use super::counts::Counts;
use super::entries::{judge_l1, judge_l2};
use super::lost::CutOff;
use super::report::Severity;
use super::snapshots::L1Place;
use super::walk::{Batch, Owner};
use crate::error::Result;
use crate::units::{HostCluster, HostOffset};

/// What is mended (invariant 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// What leads behind the end of the file is made to lead nowhere, and nothing is appended.
    InPlace,
    /// Everything.
    Appending,
}

/// What a pass over all tables has done so far.
struct Round {
    pass: Pass,
    is_changed: bool,
    /// Copies of L2 tables, by where the tables lie.
    copies: HashMap<u64, u64>,
    /// Entries of L1 tables to be written when the copies are durable: where, and what.
    entries: Vec<(HostOffset, u64)>,
}

impl Checker<'_> {
    /// Has tables end within the file that begin there (invariant 3): the disk's L1 table loses entries that the disk
    /// does not need; for others the file grows. What an L1 table has lost at its end reads as zeros.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn fit_tables(&mut self) -> Result<bool> {
        let is_shorter = self.shorten_l1().await?;
        let refcounts = (
            self.header.refcount_table_offset,
            u64::from(self.header.refcount_table_clusters) * self.header.cluster_size(),
        );
        let silent = std::mem::replace(&mut self.voice, Voice::Silent);
        let snapshots = self.read_snapshots().await?;
        self.voice = silent;
        let l1_tables = [self.active_l1()].into_iter().chain(snapshots.tables);
        let cut_off = self.find_cut_off(l1_tables.collect()).await?;
        let others = [refcounts, (self.header.snapshots_offset, snapshots.len)]
            .into_iter()
            .filter(|(at, len)| at.0 < self.bounds.file_len && !self.bounds.holds(at.0, *len))
            .filter_map(|(at, len)| at.0.checked_add(len));
        let end = cut_off.iter().map(CutOff::end).chain(others).max();
        let is_changed = is_shorter || end.is_some();
        self.mark_cut_off(&cut_off).await?;
        if let Some(end) = end.filter(|end| *end > self.storage.len()) {
            self.tell(
                Severity::Repair,
                format!("tables reach beyond the end of the file: it grows to {end} bytes"),
            );
            self.storage.set_len(end).await?;
        }
        self.bounds.file_len = self.storage.len();
        self.complete_cut_off(&cut_off).await?;
        Ok(is_changed)
    }

    async fn shorten_l1(&mut self) -> Result<bool> {
        let (at, entries) = (self.header.l1_table_offset, self.header.l1_size);
        let needed = self.header.l1_entries_for(self.header.virtual_size());
        let Ok(needed) = u32::try_from(needed) else {
            return Ok(false);
        };
        if self.bounds.holds(at.0, u64::from(entries) * 8) || needed >= entries {
            return Ok(false);
        }
        self.tell(
            Severity::Repair,
            format!("the L1 table at {at:#x} reaches beyond the end of the file: cut to {needed} entries"),
        );
        self.header.l1_size = needed;
        self.write_header().await?;
        Ok(true)
    }

    /// Copies the disk's L1 table to a place of its own if it is something else, too.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn move_active_l1(&mut self, counts: &Counts) -> Result<bool> {
        let at = self.header.l1_table_offset;
        let len = u64::from(self.header.l1_size) * 8;
        let mut clusters = self.clusters_of(at, len).map(HostCluster);
        let is_shared = |cluster| counts.covers(cluster) && counts.get(cluster) > 1;
        if !self.bounds.holds(at.0, len) || !clusters.any(is_shared) {
            return Ok(false);
        }
        let bytes = self.read(at, len).await?;
        let mended = self.mended_l1(at, &bytes).await?;
        let copy = self.append(&mended).await?;
        self.storage.flush().await?;
        self.header.l1_table_offset = copy;
        self.write_header().await?;
        let text = format!("the L1 table at {at:#x} is something else, too: copied to {copy:#x}");
        self.tell(Severity::Repair, text);
        Ok(true)
    }

    /// The L1 table at `at` with all its entries mended. (A copy of one that led behind the end of the file would lead
    /// to what is appended next.)
    ///
    /// # Errors
    /// As [`Checker::mended_l1_word`].
    pub(super) async fn mended_l1(&mut self, at: HostOffset, table: &[u8]) -> Result<Vec<u8>> {
        let (words, _) = table.as_chunks::<8>();
        let mut mended = Vec::with_capacity(table.len());
        for (index, word) in (0..).zip(words) {
            let word = u64::from_be_bytes(*word);
            mended.extend(self.mended_l1_word(at, index, word).await?.to_be_bytes());
        }
        Ok(mended)
    }

    /// Mends all entries that a window's counts tell enough about; the answer is whether anything has changed.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn mend_tables(&mut self, counts: &Counts, pass: Pass) -> Result<bool> {
        let mut round = Round {
            pass,
            is_changed: false,
            copies: HashMap::new(),
            entries: Vec::new(),
        };
        let active = self.active_l1();
        self.mend_l1(counts, active, &mut round).await?;
        let snapshots = self.read_snapshots().await?;
        for table in snapshots.tables {
            self.mend_l1(counts, table, &mut round).await?;
        }
        Ok(round.is_changed)
    }

    async fn mend_l1(&mut self, counts: &Counts, table: L1Place, round: &mut Round) -> Result<()> {
        for piece in self.pieces(table.at, table.entries) {
            let mut batch = Batch::default();
            for (index, word) in self.words(&piece).await? {
                let at = HostOffset(piece.at.0 + (index - piece.first) * 8);
                let own = self.bounds.geometry.host_cluster(at);
                if word == 0 {
                    continue;
                }
                // Invariant 1.
                let is_own = counts.covers(own) && counts.get(own) == table.times;
                let verdict = judge_l1(&self.bounds, word);
                if is_own {
                    let mended = match round.pass {
                        Pass::InPlace => self.unlinked_l1_word(word),
                        Pass::Appending => self.mended_l1_word(table.at, index, word).await?,
                    };
                    if mended != word {
                        round.entries.push((at, mended));
                    }
                }
                if let Some(l2) = verdict.table {
                    let can_copy = is_own && round.pass == Pass::Appending;
                    let entry = can_copy.then_some((at, verdict.mended));
                    self.place_l2(counts, entry, l2, round, &mut batch).await?;
                }
            }
            self.mend_l2_tables(&mut batch, round).await?;
            self.write_l1_entries(round).await?;
        }
        Ok(())
    }

    /// Has an L2 table mended where it is, or copies it if it is something else, too, and the L1 entry may be written.
    async fn place_l2(
        &mut self,
        counts: &Counts,
        l1_entry: Option<(HostOffset, u64)>,
        l2: HostOffset,
        round: &mut Round,
        batch: &mut Batch,
    ) -> Result<()> {
        let cluster = self.bounds.geometry.host_cluster(l2);
        if !counts.covers(cluster) {
            return Ok(());
        }
        if !counts.has_other_use(cluster) {
            batch.push(l2, Owner::Active, 1);
            return Ok(());
        }
        let Some((at, word)) = l1_entry else {
            return Ok(());
        };
        let copy = match round.copies.get(&l2.0) {
            Some(copy) => *copy,
            None => {
                let bytes = self.read(l2, self.header.cluster_size()).await?;
                let (bytes, _) = self.mended_l2(l2, bytes);
                let copy = self.append(&bytes).await?.0;
                self.tell(
                    Severity::Repair,
                    format!("the L2 table at {l2:#x} is something else, too: copied to {copy:#x}"),
                );
                round.copies.insert(l2.0, copy);
                copy
            }
        };
        round.entries.retain(|(place, _)| *place != at);
        round.entries.push((at, word & !OFFSET | copy));
        Ok(())
    }

    async fn write_l1_entries(&mut self, round: &mut Round) -> Result<()> {
        if round.entries.is_empty() {
            return Ok(());
        }
        // Invariant 2.
        self.storage.flush().await?;
        for (at, word) in std::mem::take(&mut round.entries) {
            self.write(at, &word.to_be_bytes()).await?;
        }
        round.is_changed = true;
        Ok(())
    }

    async fn mend_l2_tables(&mut self, batch: &mut Batch, round: &mut Round) -> Result<()> {
        let tables = batch.take();
        for group in tables.chunks(self.tables_in_flight()) {
            let contents = self.read_l2_tables(group).await?;
            for (table, bytes) in group.iter().zip(contents) {
                let (bytes, is_changed) = self.mended_l2(table.at, bytes);
                if is_changed {
                    self.write(table.at, &bytes).await?;
                    round.is_changed = true;
                }
            }
        }
        Ok(())
    }

    /// An L2 table with all its entries mended, and whether that changes it.
    fn mended_l2(&mut self, at: HostOffset, mut bytes: Vec<u8>) -> (Vec<u8>, bool) {
        let mut changed = Vec::new();
        for (index, descriptor, bitmap) in self.l2_entries(&bytes) {
            let verdict = judge_l2(&self.bounds, descriptor, bitmap);
            if verdict.mended != (descriptor, bitmap) {
                changed.push((index, verdict));
            }
        }
        let size = to_usize(self.header.l2_entry_size());
        for (index, verdict) in &changed {
            let faults: Vec<&str> = verdict.faults.iter().map(|f| f.describe()).collect();
            let text = format!(
                "L2 entry {index} of the table at {at:#x} {}",
                faults.join(", ")
            );
            self.tell(Severity::Repair, text);
            let (descriptor, bitmap) = verdict.mended;
            let words = [descriptor.to_be_bytes(), bitmap.to_be_bytes()].concat();
            let start = to_usize(*index) * size;
            if let Some(entry) = bytes.get_mut(start..start + size) {
                entry.copy_from_slice(words.get(..size).unwrap_or_default());
            }
        }
        (bytes, !changed.is_empty())
    }

    /// Writes bytes into new clusters behind the end of the file. Nothing refers to them yet.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn append(&mut self, bytes: &[u8]) -> Result<HostOffset> {
        let size = self.header.cluster_size();
        let end = self.storage.len().div_ceil(size);
        let at = self.bounds.geometry.host_start(HostCluster(end));
        let mut whole = bytes.to_vec();
        whole.resize(to_usize((bytes.len() as u64).next_multiple_of(size)), 0);
        self.write(at, &whole).await?;
        Ok(at)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::super::{Repair, check, repair};
    use crate::image::{Access, Image};
    use crate::progress::Progress;
    use crate::qcow2::Qcow2;
    use crate::qcow2::create::{CreateOptions, create};
    use crate::storage::{CrashStorage, Delays, Lost, MemoryStorage, Storage};
    use crate::sys::{IoBuf, block_on};
    use crate::units::{GuestOffset, HostOffset};

    pub(in crate::qcow2::check) fn open(storage: &Arc<MemoryStorage>, access: Access) -> Qcow2 {
        let storage = Arc::clone(storage) as Arc<dyn Storage>;
        block_on(Qcow2::open(storage, None, access)).unwrap()
    }

    /// An image of 8 MiB that begins with so many sevens.
    pub(in crate::qcow2::check) fn image_with(data: usize) -> Arc<MemoryStorage> {
        let options = CreateOptions {
            cluster_size: 4096,
            ..CreateOptions::new(8 << 20)
        };
        image_of(&options, data)
    }

    /// As [`image_with`], with other options.
    pub(in crate::qcow2::check) fn image_of(
        options: &CreateOptions,
        data: usize,
    ) -> Arc<MemoryStorage> {
        let storage = Arc::new(MemoryStorage::default());
        block_on(create(storage.as_ref(), options)).unwrap();
        let disk = open(&storage, Access::ReadWrite);
        let data = IoBuf::from_bytes(&vec![7; data]);
        block_on(disk.write(GuestOffset(0), data)).unwrap();
        block_on(disk.flush()).unwrap();
        drop(disk);
        storage
    }

    #[test]
    fn what_a_repair_appends_is_no_part_of_a_table_that_leaves_the_file() {
        let storage = image_with(1 << 20);
        // An L1 table of 2 MiB, almost all of it data and what lies behind the end of the file.
        let size = IoBuf::from_bytes(&(1u32 << 18).to_be_bytes());
        block_on(storage.writev(HostOffset(36), size)).unwrap();
        let progress = Progress::default();
        let found = block_on(check(storage.as_ref(), &mut |_| {}, &progress)).unwrap();
        assert!(found.corruptions > 0);
        let work = block_on(repair(
            storage.as_ref(),
            Repair::All,
            &mut |_| {},
            &progress,
        ));
        assert!(work.unwrap().after.is_clean());
        // As many entries as the disk needs.
        assert_eq!(storage.contents()[36..40], 4u32.to_be_bytes());
        let buf = IoBuf::zeroed(1 << 20);
        block_on(open(&storage, Access::ReadOnly).read(GuestOffset(0), buf.clone())).unwrap();
        assert!(buf.to_vec().iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_copy_of_an_l1_table_does_not_lead_to_what_is_appended() {
        const COPIED: u64 = 1 << 63;
        let storage = image_with(64 << 10);
        let bytes = storage.contents();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let l1 = word(40);
        let l2 = word(usize::try_from(l1).unwrap()) & !COPIED;
        let put = |at: u64, word: u64| {
            let word = IoBuf::from_bytes(&word.to_be_bytes());
            block_on(storage.writev(HostOffset(at), word)).unwrap();
        };
        // An entry that leads right behind the end of the file, and an L1 table that is data, too.
        put(l1 + 8, bytes.len() as u64 | COPIED);
        put(l2 + 20 * 8, l1 | COPIED);
        let repaired = block_on(repair(
            storage.as_ref(),
            Repair::All,
            &mut |_| {},
            &Progress::default(),
        ));
        assert!(repaired.unwrap().after.is_clean());
        let read = |at: u64, len: usize| {
            let buf = IoBuf::zeroed(len);
            block_on(open(&storage, Access::ReadOnly).read(GuestOffset(at), buf.clone())).unwrap();
            buf.to_vec()
        };
        assert!(read(0, 64 << 10).iter().all(|byte| *byte == 7));
        assert!(read(2 << 20, 64 << 10).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_copy_of_an_l2_table_is_durable_before_it_is_in_force() {
        const COPIED: u64 = 1 << 63;
        let storage = image_with(64 << 10);
        let bytes = storage.contents();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let l2 = word(usize::try_from(word(40)).unwrap()) & !COPIED;
        // An entry for which the table itself is data.
        let entry = IoBuf::from_bytes(&(l2 | COPIED).to_be_bytes());
        block_on(storage.writev(HostOffset(l2 + 100 * 8), entry)).unwrap();
        let storage = CrashStorage::new(storage.contents(), Delays::none());
        let all = |storage: &dyn Storage| {
            let progress = Progress::default();
            block_on(repair(storage, Repair::All, &mut |_| {}, &progress)).unwrap()
        };
        assert!(all(&storage).after.is_clean());
        for cut in storage.moments() {
            for seed in 0..8 {
                let left = storage.after_power_cut(cut, Lost::Some { seed });
                let left = Arc::new(MemoryStorage::new(left));
                assert!(all(left.as_ref()).after.is_clean());
                let buf = IoBuf::zeroed(64 << 10);
                let disk = open(&left, Access::ReadOnly);
                block_on(disk.read(GuestOffset(0), buf.clone())).unwrap();
                assert!(buf.to_vec().iter().all(|byte| *byte == 7), "{cut:?} {seed}");
            }
        }
    }
}
