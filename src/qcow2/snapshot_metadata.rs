//! The clusters that hold the metadata of internal snapshots, so that a broken refcount never gives them to a guest.

use std::collections::BTreeSet;
use std::ops::Range;

use super::entry::L1Entry;
use super::geometry::Geometry;
use super::header::{Header, MAX_L1_TABLE_BYTES};
use super::snapshot_table::read_table;
use crate::error::Result;
use crate::storage::Storage;
use crate::units::HostOffset;

/// Bytes of snapshots' L1 tables that are looked through for L2 tables; tables beyond it have refcounts alone to
/// protect what they lead to. At 64 KiB clusters that is 1024 snapshots of a disk of 512 GiB.
const MAX_L1_BYTES: u64 = MAX_L1_TABLE_BYTES / 4;

/// Where the metadata of snapshots lies.
#[derive(Debug, Default)]
pub(super) struct SnapshotMetadata {
    /// Bytes of the snapshot table and of L1 tables.
    pub(super) ranges: Vec<Range<u64>>,
    /// L2 tables.
    pub(super) l2_tables: Vec<HostOffset>,
}

impl SnapshotMetadata {
    /// What the snapshot table leads to. An L1 table that cannot be one is left out: whoever applies its snapshot hears
    /// of it.
    ///
    /// # Errors
    /// Those of [`read_table`].
    pub(super) async fn read(
        storage: &dyn Storage,
        geometry: Geometry,
        header: &Header,
    ) -> Result<Self> {
        let (snapshots, len) = read_table(storage, header).await?;
        let at = header.snapshots_offset.0;
        let mut found = Self::default();
        found.ranges.push(at..at + len);
        let cluster_size = geometry.cluster_size();
        let sound = snapshots
            .iter()
            .filter_map(|snapshot| snapshot.l1_table(cluster_size).ok());
        // Several snapshots may not share a table, but broken ones do.
        let tables: BTreeSet<(HostOffset, u64)> = sound.collect();
        let mut left = MAX_L1_BYTES;
        for (at, len) in tables {
            found.ranges.push(at.0..at.0 + len);
            let Some(rest) = left.checked_sub(len) else {
                continue;
            };
            left = rest;
            let l1 = super::engine::read_table(storage, at, len).await?;
            let (words, _) = l1.as_chunks::<8>();
            let entries = words
                .iter()
                .filter_map(|word| L1Entry::decode(&geometry, u64::from_be_bytes(*word)).ok());
            found
                .l2_tables
                .extend(entries.filter_map(|entry| entry.table));
        }
        Ok(found)
    }
}
