//! The commitment of an image: the most that its file can come to, whatever the guest writes and in whatever order
//! (qcow2 specification, "Cluster mapping", "Refcounts").
//!
//! Whoever allocates otherwise than invariant 3 says, as stock tools do where a request needs contiguous clusters, may
//! leave gaps in the file.
//!
//! ```text
//! demand = guest clusters that cannot be written in place  +  L2 tables that are missing or shared
//!          +  persistent bitmaps, every bit of them stored
//! length = where the last of `demand` first-fit allocations ends, refcount blocks and larger refcount tables that
//!          have to be made on the way included
//! ```
//!
//! # Invariants
//!
//! 1. A guest cluster is written in place if its L2 entry has COPIED and a host cluster, and a table if its L1 entry
//!    has; everything else needs a new cluster, once.
//! 2. Nothing is counted on to become free: not the room of compressed or shared clusters that were overwritten, for
//!    it is free only after a flush, nor that of refcount tables that grew, nor that of bitmaps, for who stores them
//!    anew does so before the old ones go. Clusters that are leaked or hold snapshots stay.
//! 3. Room is taken where the allocator takes it: the first free cluster, a missing refcount block in the first
//!    cluster that it describes, a larger refcount table behind all that the old one covers.
//! 4. What the disk has dropped is not free before a flush, and what replaces it could take the file further. So the
//!    file does not grow beyond [`nominal_clusters`], which no commitment is less than, while there is any such cluster
//!    (`qcow2::quarantine`). With none, every allocation is one of those in `demand`, and finds its place.
//! 5. What is read is bounded by the file's length, whatever the tables say.

use super::allocator::size_growth;
use super::bitmap::BitmapDirectory;
use super::create::{CreateOptions, plan_empty, refcount_clusters};
use super::engine::read_table;
use super::entry::{L1Entry, L2Entry, decode_refcount_table_entry};
use super::features::IncompatibleFeatures;
use super::geometry::{Geometry, to_usize};
use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use super::mapping::entry_at;
use super::refcount;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::units::HostOffset;

/// The most that an image's file can come to, in bytes, if no further snapshot is made.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if the refcounts cannot be relied on, or the tables contradict the file's length; the
/// storage's.
pub async fn committed_length(storage: &dyn Storage, header: &Header) -> Result<u64> {
    require_refcounts(header)?;
    let geometry = Geometry::new(header);
    let own = Own::count(storage, header, &geometry).await?;
    let bitmaps = BitmapDirectory::read(storage, header).await?;
    let bitmaps = bitmaps.map_or(0, |found| {
        found.full_length(header.size, header.cluster_size())
    });
    let mut filling = Filling {
        geometry,
        demand: demand(header, &own) + bitmaps / header.cluster_size(),
        end: storage.len().div_ceil(geometry.cluster_size()),
    };
    filling.fill_present(storage, header).await?;
    Ok(filling.length())
}

/// The most that the file of a new image can come to, in bytes.
///
/// # Errors
/// As [`super::create::create`].
pub fn committed_length_of_new(options: &CreateOptions) -> Result<u64> {
    let empty = plan_empty(options)?;
    let geometry = Geometry::new(&empty.header);
    let mut filling = Filling {
        geometry,
        demand: demand(&empty.header, &Own::default()),
        end: empty.clusters,
    };
    let covered = empty.refcount_blocks * geometry.block_entries();
    filling.take_run(empty.clusters, covered - empty.clusters);
    let entries = filling.table_entries(u64::from(empty.header.refcount_table_clusters));
    filling.fill_new_blocks(empty.refcount_blocks, entries);
    filling.fill_grown(entries);
    Ok(filling.length())
}

/// The length of a new image's file once everything is allocated, if its refcount table is as long as that takes from
/// the start: what stock tools call fully allocated. [`committed_length_of_new`] counts what growing it leaves behind.
///
/// # Errors
/// As [`super::create::create`].
pub fn full_length(options: &CreateOptions) -> Result<u64> {
    let header = plan_empty(options)?.header;
    Ok(full_clusters(&header) * header.cluster_size())
}

fn full_clusters(header: &Header) -> u64 {
    let tables = header.l1_entries_for(header.size);
    let l1_clusters = (tables * 8).div_ceil(header.cluster_size());
    let others = 1 + l1_clusters + tables + guest_clusters(header);
    let (blocks, table_clusters) = refcount_clusters(header, others);
    others + blocks + table_clusters
}

/// Clusters that the file comes to at least once everything is allocated: no commitment is less (invariant 4). Without
/// a bound for an image with snapshots, which commits to nothing.
pub(super) fn nominal_clusters(header: &Header) -> u64 {
    match header.nb_snapshots {
        0 => full_clusters(header),
        _ => u64::MAX,
    }
}

fn require_refcounts(header: &Header) -> Result<()> {
    let unreliable = [
        (
            IncompatibleFeatures::DIRTY,
            "the refcounts are out of date (the dirty bit is set)",
        ),
        (
            IncompatibleFeatures::CORRUPT,
            "the image is marked as corrupt",
        ),
    ];
    match unreliable
        .iter()
        .find(|(feature, _)| header.incompatible_features.contains(*feature))
    {
        Some((_, why)) => Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{why}, so what is free is not known before a repair: `seethrough check -r all IMAGE`"
            ),
        )),
        None => Ok(()),
    }
}

/// Clusters that will have to be taken (invariant 1).
fn demand(header: &Header, own: &Own) -> u64 {
    let external = header
        .incompatible_features
        .contains(IncompatibleFeatures::EXTERNAL_DATA_FILE);
    let data = match external {
        true => 0,
        false => guest_clusters(header).saturating_sub(own.clusters),
    };
    data + header
        .l1_entries_for(header.size)
        .saturating_sub(own.tables)
}

fn guest_clusters(header: &Header) -> u64 {
    header.size.div_ceil(header.cluster_size())
}

/// What the active tables own alone, and write in place.
#[derive(Debug, Default, PartialEq, Eq)]
struct Own {
    tables: u64,
    clusters: u64,
}

impl Own {
    async fn count(storage: &dyn Storage, header: &Header, geometry: &Geometry) -> Result<Self> {
        let mut own = Self::default();
        let per_table = header.l2_entries();
        let in_use = header.l1_entries_for(header.size);
        let l1 = read_table(storage, header.l1_table_offset, in_use * 8).await?;
        let (words, _) = l1.as_chunks::<8>();
        let mut budget = ReadBudget::new(storage, geometry, "L1 table", "L2 tables");
        for (index, word) in (0..).zip(words) {
            let entry = L1Entry::decode(geometry, u64::from_be_bytes(*word)).unwrap_or_default();
            own.tables += u64::from(entry.copied);
            let Some(table) = entry.table else { continue };
            budget.spend_one()?;
            let entries = per_table.min(guest_clusters(header) - index * per_table);
            let bytes = entries * geometry.l2_entry_size();
            let table = read_table(storage, table, bytes).await?;
            own.clusters += own_clusters(geometry, &table);
        }
        Ok(own)
    }
}

fn own_clusters(geometry: &Geometry, table: &[u8]) -> u64 {
    let is_own = |at: &usize| {
        let entry = entry_at(geometry, table, *at);
        matches!(entry, Some(Ok(L2Entry::Plain(cluster))) if cluster.own_host().is_some())
    };
    let entries = (0..table.len()).step_by(to_usize(geometry.l2_entry_size()));
    entries.filter(is_own).count() as u64
}

/// Holds reading of tables to as many as the file has room for (invariant 5).
struct ReadBudget {
    left: u64,
    what: (&'static str, &'static str),
}

impl ReadBudget {
    fn new(
        storage: &dyn Storage,
        geometry: &Geometry,
        table: &'static str,
        names: &'static str,
    ) -> Self {
        Self {
            left: storage.len().div_ceil(geometry.cluster_size()),
            what: (table, names),
        }
    }

    fn spend_one(&mut self) -> Result<()> {
        let (table, names) = self.what;
        self.left = self.left.checked_sub(1).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the {table} points to more {names} than the file has clusters: run `seethrough check IMAGE`"
                ),
            )
        })?;
        Ok(())
    }
}

/// First-fit allocation of `demand` clusters (invariant 3).
struct Filling {
    geometry: Geometry,
    demand: u64,
    /// Clusters of the file.
    end: u64,
}

impl Filling {
    fn length(&self) -> u64 {
        self.end.saturating_mul(self.geometry.cluster_size())
    }

    fn table_entries(&self, table_clusters: u64) -> u64 {
        table_clusters * self.geometry.cluster_size() / 8
    }

    /// Fills what the image's refcount table covers, then what it grows to.
    async fn fill_present(&mut self, storage: &dyn Storage, header: &Header) -> Result<()> {
        let geometry = self.geometry;
        let entries = self.table_entries(u64::from(header.refcount_table_clusters));
        let table = read_table(storage, header.refcount_table_offset, entries * 8).await?;
        let (words, _) = table.as_chunks::<8>();
        let mut budget = ReadBudget::new(storage, &geometry, "refcount table", "refcount blocks");
        for (index, word) in (0..).zip(words) {
            if self.demand == 0 {
                return Ok(());
            }
            let block = decode_refcount_table_entry(&geometry, u64::from_be_bytes(*word));
            let block = block.map_err(|defect| {
                Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "refcount table entry {index} {}: run `seethrough check IMAGE`",
                        defect.describe()
                    ),
                )
            })?;
            match block {
                Some(at) => {
                    budget.spend_one()?;
                    self.fill_block(storage, index, at).await?;
                }
                None => self.fill_new_blocks(index, index + 1),
            }
        }
        self.fill_grown(entries);
        Ok(())
    }

    /// Takes the free clusters that a refcount block describes.
    async fn fill_block(
        &mut self,
        storage: &dyn Storage,
        index: u64,
        at: HostOffset,
    ) -> Result<()> {
        let block = read_table(storage, at, self.geometry.cluster_size()).await?;
        let first = index * self.geometry.block_entries();
        for number in 0..self.geometry.block_entries() {
            if self.demand == 0 {
                break;
            }
            if refcount::get(&block, number, self.geometry.refcount_order()) == 0 {
                self.take_run(first + number, 1);
            }
        }
        Ok(())
    }

    /// Takes clusters where there is no refcount block yet, for table entries from `first` up to `end`, and from there
    /// on with larger tables.
    fn fill_new_blocks(&mut self, first: u64, end: u64) {
        let per_block = self.geometry.block_entries();
        for index in first..end {
            if self.demand == 0 {
                return;
            }
            // The block itself comes first.
            self.take_run(index * per_block + 1, per_block - 1);
        }
    }

    /// Takes clusters that only larger refcount tables cover; at the format's limit there is no more room.
    fn fill_grown(&mut self, mut entries: u64) {
        let per_block = self.geometry.block_entries();
        while self.demand > 0 {
            let Ok((blocks, table_clusters)) =
                size_growth(&self.geometry, entries, MAX_REFCOUNT_TABLE_BYTES)
            else {
                return;
            };
            let first = entries * per_block;
            let used = blocks + table_clusters;
            self.end = self.end.max(first + used);
            self.take_run(first + used, blocks * per_block - used);
            let grown = self.table_entries(table_clusters);
            self.fill_new_blocks(entries + blocks, grown);
            entries = grown;
        }
    }

    /// Takes as many of `count` free clusters as are needed.
    fn take_run(&mut self, first: u64, count: u64) {
        let taken = count.min(self.demand);
        if taken > 0 {
            self.demand -= taken;
            self.end = self.end.max(first + taken);
        }
    }
}
