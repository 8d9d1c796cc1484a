//! The walk through everything that refers to host clusters.
//!
//! # Invariants
//!
//! 1. The work is bounded by the file, whatever its tables say: L1 tables that overlap are refused, an L2 table is
//!    read once however many entries lead to it, and only where it is aligned and in the file.
//! 2. A reference counts as often as there are ways to it from an L1 table.

use super::super::header::MAX_L1_TABLE_BYTES;
use super::super::header_extension::ExtensionType;
use super::checker::{Checker, Voice};
use super::counts::{Counts, Use};
use super::entries::{L2Verdict, Target, judge_l1, judge_l2};
use super::snapshots::L1Place;
use crate::error::{Error, ErrorKind, Result};
use crate::units::HostOffset;

/// L2 tables that are gathered before they are read, so that one to which many entries lead is read once.
const BATCH: usize = 1 << 20;
/// Bytes of L2 tables in memory at a time.
const IN_FLIGHT: u64 = 4 << 20;

/// Which L1 table an L2 table is reached from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The disk's.
    Active,
    /// A snapshot's.
    Inactive,
}

/// An L2 table, and the ways to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct L2Reference {
    pub(super) at: HostOffset,
    pub(super) active: u64,
    pub(super) inactive: u64,
}

/// L2 tables that are still to be read.
#[derive(Default)]
pub(super) struct Batch {
    tables: Vec<L2Reference>,
}

impl Batch {
    pub(super) fn push(&mut self, at: HostOffset, owner: Owner, times: u64) {
        let (active, inactive) = match owner {
            Owner::Active => (times, 0),
            Owner::Inactive => (0, times),
        };
        self.tables.push(L2Reference {
            at,
            active,
            inactive,
        });
    }

    pub(super) fn is_full(&self) -> bool {
        self.tables.len() >= BATCH
    }

    /// Takes all tables out, each once, in the order of the file.
    pub(super) fn take(&mut self) -> Vec<L2Reference> {
        let mut tables = std::mem::take(&mut self.tables);
        tables.sort_unstable();
        tables.dedup_by(|next, first| {
            let same = next.at == first.at;
            if same {
                first.active += next.active;
                first.inactive += next.inactive;
            }
            same
        });
        tables
    }
}

/// An entry of an L2 table: the index, the descriptor, and the bitmap where there is one.
pub(super) type L2Words = (u64, u64, u64);

impl Checker<'_> {
    /// Counts all references, and tells what is wrong on the way.
    ///
    /// # Errors
    /// The storage's; [`ErrorKind::Corrupt`] for L1 tables that overlap beyond measure.
    pub(super) async fn walk(&mut self, counts: &mut Counts) -> Result<()> {
        self.walk_references(counts).await?;
        let table_bytes =
            u64::from(self.header.refcount_table_clusters) * self.header.cluster_size();
        let range = (self.header.refcount_table_offset, table_bytes);
        self.refer(counts, range, 1, Use::Other, "refcount table");
        self.walk_refcount_table(counts).await
    }

    /// As [`Checker::walk`], without the refcount table and its blocks.
    ///
    /// # Errors
    /// As [`Checker::walk`].
    pub(super) async fn walk_references(&mut self, counts: &mut Counts) -> Result<()> {
        let header_bytes = (HostOffset(0), self.header.cluster_size());
        self.refer(counts, header_bytes, 1, Use::Other, "header");
        let snapshots = self.read_snapshots().await?;
        let range = (self.header.snapshots_offset, snapshots.len);
        self.refer(counts, range, 1, Use::Other, "snapshot table");
        self.walk_l1_tables(counts, &snapshots.tables).await?;
        self.walk_encryption_header(counts);
        self.walk_bitmaps(counts).await
    }

    /// The disk's L1 table.
    pub(super) fn active_l1(&self) -> L1Place {
        L1Place {
            at: self.header.l1_table_offset,
            entries: self.header.l1_size.into(),
            times: 1,
        }
    }

    async fn walk_l1_tables(&mut self, counts: &mut Counts, inactive: &[L1Place]) -> Result<()> {
        let mut batch = Batch::default();
        let active = self.active_l1();
        self.check_l1_sizes(inactive)?;
        self.walk_l1(counts, active, Owner::Active, &mut batch)
            .await?;
        for table in inactive {
            self.walk_l1(counts, *table, Owner::Inactive, &mut batch)
                .await?;
        }
        self.walk_batch(counts, &mut batch).await
    }

    /// Invariant 1: tables that do not overlap are no larger than the file, all together.
    fn check_l1_sizes(&self, inactive: &[L1Place]) -> Result<()> {
        let bytes = inactive
            .iter()
            .fold(0u64, |sum, table| sum.saturating_add(table.entries * 8));
        if bytes > self.bounds.file_len.saturating_add(MAX_L1_TABLE_BYTES) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the L1 tables of the snapshots overlap: copy the disk with `seethrough convert`",
            ));
        }
        Ok(())
    }

    async fn walk_l1(
        &mut self,
        counts: &mut Counts,
        table: L1Place,
        owner: Owner,
        batch: &mut Batch,
    ) -> Result<()> {
        let times = table.times;
        let range = (table.at, table.entries * 8);
        self.refer(counts, range, times, Use::Other, "L1 table");
        for piece in self.pieces(table.at, table.entries) {
            for (index, word) in self.words(&piece).await? {
                if word == 0 {
                    continue;
                }
                let verdict = judge_l1(&self.bounds, word);
                for fault in &verdict.faults {
                    self.walk_corruption(times, || {
                        let at = table.at;
                        let what = fault.describe();
                        format!("L1 entry {index} ({word:#x}) of the table at {at:#x} {what}")
                    });
                }
                if let Some(at) = verdict.refers_to {
                    let range = (at, self.header.cluster_size());
                    self.refer(counts, range, times, Use::L2Table, "L2 table");
                }
                if let Some(at) = verdict.table {
                    batch.push(at, owner, times);
                }
                if batch.is_full() {
                    self.walk_batch(counts, batch).await?;
                }
            }
        }
        Ok(())
    }

    async fn walk_batch(&mut self, counts: &mut Counts, batch: &mut Batch) -> Result<()> {
        let tables = batch.take();
        self.progress.expect(tables.len() as u64);
        for group in tables.chunks(self.tables_in_flight()) {
            let contents = self.read_l2_tables(group).await?;
            for (table, bytes) in group.iter().zip(&contents) {
                self.walk_l2(counts, table, bytes);
            }
            self.progress.advance(group.len() as u64);
        }
        Ok(())
    }

    /// L2 tables that are read together.
    pub(super) fn tables_in_flight(&self) -> usize {
        let tables = (IN_FLIGHT / self.header.cluster_size()).max(2);
        usize::try_from(tables).unwrap_or(2)
    }

    /// Reads L2 tables at the same time.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn read_l2_tables(&self, tables: &[L2Reference]) -> Result<Vec<Vec<u8>>> {
        let offsets: Vec<HostOffset> = tables.iter().map(|table| table.at).collect();
        self.read_clusters(&offsets).await
    }

    /// The entries of an L2 table that are not empty.
    pub(super) fn l2_entries<'b>(&self, bytes: &'b [u8]) -> Box<dyn Iterator<Item = L2Words> + 'b> {
        let word = |bytes: &[u8; 8]| u64::from_be_bytes(*bytes);
        let (words, _) = bytes.as_chunks::<8>();
        if self.bounds.geometry.has_extended_l2() {
            let (pairs, _) = words.as_chunks::<2>();
            let entries = (0..).zip(pairs);
            Box::new(
                entries
                    .map(move |(index, [first, second])| (index, word(first), word(second)))
                    .filter(|(_, descriptor, bitmap)| *descriptor != 0 || *bitmap != 0),
            )
        } else {
            Box::new(
                (0..)
                    .zip(words)
                    .map(move |(index, first)| (index, word(first), 0))
                    .filter(|(_, descriptor, _)| *descriptor != 0),
            )
        }
    }

    fn walk_l2(&mut self, counts: &mut Counts, table: &L2Reference, bytes: &[u8]) {
        let times = table.active + table.inactive;
        let mut behind_last = None;
        for (index, descriptor, bitmap) in self.l2_entries(bytes) {
            let verdict = judge_l2(&self.bounds, descriptor, bitmap);
            for fault in &verdict.faults {
                self.walk_corruption(times, || {
                    let (at, what) = (table.at, fault.describe());
                    format!("L2 entry {index} ({descriptor:#x}) of the table at {at:#x} {what}")
                });
            }
            self.count_target(counts, &verdict, times);
            if self.voice == Voice::Aloud {
                self.count_fragment(verdict.target, table.active, &mut behind_last);
            }
        }
    }

    fn count_target(&mut self, counts: &mut Counts, verdict: &L2Verdict, times: u64) {
        if !verdict.is_counted {
            return;
        }
        match verdict.target {
            Target::Nothing => {}
            Target::Cluster(at) => {
                let range = (at, self.header.cluster_size());
                self.refer(counts, range, times, Use::Other, "data cluster");
            }
            Target::Compressed(at, len) => {
                self.refer(counts, (at, len), times, Use::Other, "compressed cluster");
            }
        }
    }

    /// Counts a guest cluster of the disk, and whether it follows the one before it in the table.
    fn count_fragment(&mut self, target: Target, times: u64, behind_last: &mut Option<HostOffset>) {
        match target {
            Target::Nothing => {}
            Target::Compressed(..) => {
                self.report.allocated_clusters += times;
                self.report.compressed_clusters += times;
                // They begin and end within sectors that have to be read for their neighbours, too.
                self.report.fragmented_clusters += times;
            }
            Target::Cluster(at) => {
                self.report.allocated_clusters += times;
                if behind_last.is_some_and(|end| end != at) {
                    self.report.fragmented_clusters += times;
                }
                *behind_last = at.checked_add(self.header.cluster_size());
            }
        }
    }

    /// Counts the area of the LUKS header.
    fn walk_encryption_header(&mut self, counts: &mut Counts) {
        let Some(data) = self.header.extension(ExtensionType::FULL_DISK_ENCRYPTION) else {
            return;
        };
        let word = |at: usize| Some(u64::from_be_bytes(*data.get(at..)?.first_chunk()?));
        if let (Some(at), Some(len)) = (word(0), word(8)) {
            let range = (HostOffset(at), len);
            self.refer(counts, range, 1, Use::Other, "encryption header");
        }
    }
}
