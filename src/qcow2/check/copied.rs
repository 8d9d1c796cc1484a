//! The COPIED flags of the active tables: set exactly where the refcount is 1 (qcow2 specification, "Cluster
//! mapping"). In the tables of snapshots they say nothing.

use super::super::entry::{COMPRESSED, COPIED, OFFSET};
use super::checker::Checker;
use super::counts::Counts;
use super::entries::judge_l1;
use super::walk::{Batch, L2Reference, Owner};
use crate::error::Result;
use crate::units::{HostCluster, HostOffset};

/// Whether flags are set right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FixFlags {
    No,
    /// Those alone that are missing where one reference is left, which is what freeing leaks leads to, and only in
    /// tables that are nothing else: the rest of the image may be corrupt, and stays as it is.
    Sole,
    All,
}

impl Checker<'_> {
    /// Compares the flags with the refcounts, which [`Checker::compare`] has noted.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn check_copied(&mut self, counts: &Counts, fix: FixFlags) -> Result<()> {
        let mut batch = Batch::default();
        let entries = u64::from(self.header.l1_size);
        for piece in self.pieces(self.header.l1_table_offset, entries) {
            for (index, word) in self.words(&piece).await? {
                let at = HostOffset(piece.at.0 + (index - piece.first) * 8);
                self.check_l1_flag(counts, at, word, fix).await?;
                if let Some(table) = judge_l1(&self.bounds, word).table {
                    batch.push(table, Owner::Active, 1);
                }
                if batch.is_full() {
                    self.check_l2_batch(counts, &mut batch, fix).await?;
                }
            }
        }
        self.check_l2_batch(counts, &mut batch, fix).await
    }

    /// Whether the flag of an entry that points to `offset` is right; `None` if this window cannot tell.
    fn expected_flag(&self, counts: &Counts, offset: u64) -> Option<bool> {
        let cluster = HostCluster(offset / self.header.cluster_size());
        counts.covers(cluster).then(|| counts.is_sole(cluster))
    }

    /// Whether the flag of an entry in cluster `own` that points to `offset` is set to what is expected.
    fn is_fixed(
        &self,
        counts: &Counts,
        own: HostCluster,
        offset: u64,
        expected: bool,
        fix: FixFlags,
    ) -> bool {
        let has_one = |cluster| counts.covers(cluster) && counts.get(cluster) == 1;
        let target = self.bounds.geometry.host_cluster(HostOffset(offset));
        match fix {
            FixFlags::No => false,
            FixFlags::Sole => expected && has_one(target) && has_one(own),
            FixFlags::All => true,
        }
    }

    async fn check_l1_flag(
        &mut self,
        counts: &Counts,
        at: HostOffset,
        word: u64,
        fix: FixFlags,
    ) -> Result<()> {
        let table = word & OFFSET;
        if table == 0 {
            return Ok(());
        }
        let Some(expected) = self.expected_flag(counts, table) else {
            return Ok(());
        };
        if expected == (word & COPIED != 0) {
            return Ok(());
        }
        self.corruption(1, || {
            format!("L1 entry {word:#x}: its COPIED flag contradicts the refcount of its table")
        });
        let own = self.bounds.geometry.host_cluster(at);
        if self.is_fixed(counts, own, table, expected, fix) {
            self.write(at, &with_flag(word, expected).to_be_bytes())
                .await?;
        }
        Ok(())
    }

    async fn check_l2_batch(
        &mut self,
        counts: &Counts,
        batch: &mut Batch,
        fix: FixFlags,
    ) -> Result<()> {
        let tables = batch.take();
        self.progress.expect(tables.len() as u64);
        for group in tables.chunks(self.tables_in_flight()) {
            let contents = self.read_l2_tables(group).await?;
            for (table, bytes) in group.iter().zip(contents) {
                self.check_l2_flags(counts, table, bytes, fix).await?;
            }
            self.progress.advance(group.len() as u64);
        }
        Ok(())
    }

    async fn check_l2_flags(
        &mut self,
        counts: &Counts,
        table: &L2Reference,
        mut bytes: Vec<u8>,
        fix: FixFlags,
    ) -> Result<()> {
        let wrong: Vec<(u64, u64, bool)> = self
            .l2_entries(&bytes)
            .filter_map(|(index, descriptor, _)| {
                let expected = self.expected_data_flag(counts, descriptor)?;
                (expected != (descriptor & COPIED != 0)).then_some((index, descriptor, expected))
            })
            .collect();
        let own = self.bounds.geometry.host_cluster(table.at);
        let mut is_changed = false;
        for (index, descriptor, expected) in &wrong {
            self.corruption(table.active, || {
                format!(
                    "L2 entry {index} ({descriptor:#x}) of the table at {:#x}: its COPIED flag contradicts the \
                     refcount of its cluster",
                    table.at
                )
            });
            if !self.is_fixed(counts, own, descriptor & OFFSET, *expected, fix) {
                continue;
            }
            is_changed = true;
            let at = usize::try_from(index * self.header.l2_entry_size()).ok();
            if let Some(entry) = at.and_then(|at| bytes.get_mut(at..at + 8)) {
                entry.copy_from_slice(&with_flag(*descriptor, *expected).to_be_bytes());
            }
        }
        if is_changed {
            self.write(table.at, &bytes).await?;
        }
        Ok(())
    }

    /// The flag that an L2 entry should have, if it should have one in this window.
    fn expected_data_flag(&self, counts: &Counts, descriptor: u64) -> Option<bool> {
        let offset = descriptor & OFFSET;
        if descriptor & COMPRESSED != 0 {
            return None;
        }
        if self.bounds.has_data_file {
            let has_place = offset != 0 || descriptor & COPIED != 0;
            return has_place.then_some(true);
        }
        if offset == 0 {
            return None;
        }
        self.expected_flag(counts, offset)
    }
}

fn with_flag(word: u64, is_copied: bool) -> u64 {
    if is_copied {
        word | COPIED
    } else {
        word & !COPIED
    }
}
