//! The refcounts of a new revision of an image's metadata (`qcow2::revision`): those in force, with changes.
//!
//! A refcount block is copied to a new place when it first changes, with the refcount of that place, and without the
//! one of its old place. Blocks without changes are part of both revisions.
//!
//! # Invariants
//!
//! 1. A cluster is handed out only if its refcount is 0 in the revision in force and in the new one, and only once:
//!    the search never turns back.
//! 2. Only blocks that the revision in force does not know are ever written.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::entry::decode_refcount_table_entry;
use super::flush::write_all;
use super::geometry::{Geometry, to_usize};
use super::header::{Header, MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_BYTES};
use super::refcount;
use super::table_cache::TableCache;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::{HostCluster, HostOffset};

/// Bytes of refcount blocks kept in memory.
const CACHE: u64 = 16 << 20;

/// Refcounts that are not in force yet.
pub(super) struct NewRefcounts {
    geometry: Geometry,
    storage: Arc<dyn Storage>,
    /// Slices of the blocks of both revisions.
    blocks: TableCache,
    /// Where the blocks in force lie.
    in_force: Vec<Option<HostOffset>>,
    table_in_force: (HostCluster, u64),
    /// Where new blocks lie, by the same index.
    changed: BTreeMap<u64, HostOffset>,
    /// No cluster below is handed out any more.
    next: u64,
    /// Clusters that only the revision in force needs.
    leaving: Vec<HostCluster>,
}

/// A refcount table that has been written.
pub(super) struct PlacedTable {
    /// Where it lies.
    pub(super) at: HostOffset,
    /// How many clusters it takes.
    pub(super) clusters: u32,
}

impl NewRefcounts {
    /// The refcounts that `header` leads to.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a table with a broken entry; the storage's.
    pub(super) async fn read(storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let geometry = Geometry::new(header);
        let clusters = u64::from(header.refcount_table_clusters);
        let table = IoBuf::zeroed(to_usize(clusters * geometry.cluster_size()));
        storage
            .readv(header.refcount_table_offset, table.clone())
            .await?;
        let table = table.to_vec();
        let (words, _) = table.as_chunks::<8>();
        let mut in_force = Vec::with_capacity(words.len());
        for (index, word) in words.iter().enumerate() {
            let word = u64::from_be_bytes(*word);
            let block = decode_refcount_table_entry(&geometry, word).map_err(|defect| {
                corrupt(&format!(
                    "refcount table entry {index} ({word:#x}) {}",
                    defect.describe()
                ))
            })?;
            in_force.push(block);
        }
        Ok(Self {
            geometry,
            blocks: TableCache::new(Arc::clone(&storage), geometry.cluster_size(), CACHE),
            storage,
            in_force,
            table_in_force: (
                geometry.host_cluster(header.refcount_table_offset),
                clusters,
            ),
            changed: BTreeMap::new(),
            next: 0,
            leaving: Vec::new(),
        })
    }

    /// Checks that the table and the blocks in force are counted, so that nothing is put in their place.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if one is not; the storage's.
    pub(super) async fn check_own_clusters(&self) -> Result<()> {
        let (first, count) = self.table_in_force;
        self.check_counted(first, count).await?;
        for block in self.in_force.iter().flatten() {
            self.check_counted(self.geometry.host_cluster(*block), 1)
                .await?;
        }
        Ok(())
    }

    /// Checks that clusters with metadata are counted in the revision in force.
    ///
    /// # Errors
    /// As [`NewRefcounts::check_own_clusters`].
    pub(super) async fn check_counted(&self, first: HostCluster, count: u64) -> Result<()> {
        for cluster in (first.0..first.0 + count).map(HostCluster) {
            if self.was(cluster).await? == 0 {
                return Err(corrupt(&format!(
                    "cluster {cluster} holds metadata and has refcount 0"
                )));
            }
        }
        Ok(())
    }

    /// The refcount in the new revision.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn get(&self, cluster: HostCluster) -> Result<u64> {
        self.look_up(self.block(cluster), cluster).await
    }

    /// Counts one reference more.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there was none so far, [`ErrorKind::Unsupported`] if the refcount's width cannot say
    /// it; the storage's.
    pub(super) async fn add(&mut self, cluster: HostCluster) -> Result<()> {
        let count = self.get(cluster).await?;
        if count == 0 {
            return Err(uncounted(cluster));
        }
        if count >= self.geometry.max_refcount() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "cluster {cluster} has {count} references, and refcounts of {} bits cannot count one more: make a \
                     copy of the image with wider ones (the option refcount_bits)",
                    1u32 << self.geometry.refcount_order()
                ),
            ));
        }
        self.set(cluster, count + 1).await
    }

    /// Counts one reference less.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there was none; the storage's.
    pub(super) async fn drop_one(&mut self, cluster: HostCluster) -> Result<()> {
        match self.get(cluster).await?.checked_sub(1) {
            Some(left) => self.set(cluster, left).await,
            None => Err(uncounted(cluster)),
        }
    }

    /// Takes contiguous clusters, each with one reference.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] at the end of what the format can address; the storage's.
    pub(super) async fn take(&mut self, count: u64) -> Result<HostCluster> {
        let first = self.find_free(count).await?;
        for cluster in first.0..first.0 + count {
            self.set(HostCluster(cluster), 1).await?;
        }
        Ok(first)
    }

    /// Writes the new revision's blocks and table. Nothing may change afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if the table has reached its limit; the storage's.
    pub(super) async fn write(&mut self) -> Result<PlacedTable> {
        let (first, clusters) = self.place_table().await?;
        self.write_blocks().await?;
        let len = clusters * self.geometry.cluster_size();
        let entries = (0..len / 8).map(|index| self.block_at(index).map_or(0, |at| at.0));
        let bytes: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
        let at = self.geometry.host_start(first);
        self.storage.writev(at, IoBuf::from_bytes(&bytes)).await?;
        Ok(PlacedTable {
            at,
            clusters: u32::try_from(clusters).unwrap_or(u32::MAX),
        })
    }

    /// Finds room for the table, and lets go of what only the revision in force needs: both may change further
    /// blocks, whose old places leave in turn.
    async fn place_table(&mut self) -> Result<(HostCluster, u64)> {
        let (old_first, old_count) = self.table_in_force;
        self.leaving
            .extend((old_first.0..old_first.0 + old_count).map(HostCluster));
        let (mut first, mut clusters) = (HostCluster(0), 0);
        loop {
            while let Some(cluster) = self.leaving.pop() {
                self.drop_one(cluster).await?;
            }
            let last_changed = self
                .changed
                .last_key_value()
                .map_or(0, |(index, _)| index + 1);
            let entries = last_changed.max(self.in_force.len() as u64);
            let needed = (entries * 8).div_ceil(self.geometry.cluster_size());
            if needed <= clusters {
                return Ok((first, clusters));
            }
            if needed * self.geometry.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
                return Err(no_space());
            }
            for cluster in first.0..first.0 + clusters {
                self.set(HostCluster(cluster), 0).await?;
            }
            first = self.take(needed).await?;
            clusters = needed;
        }
    }

    /// Punches the clusters out of the file that only the old revision needed. A hint: a failure costs room alone.
    pub(super) async fn punch_freed(&self) {
        // They say what was in use: they go last.
        let old_blocks: BTreeSet<HostCluster> = self
            .changed
            .keys()
            .filter_map(|index| Some(self.geometry.host_cluster(self.in_force_at(*index)?)))
            .collect();
        for index in self.changed.keys() {
            let first = index * self.geometry.block_entries();
            let mut run = 0..0;
            for cluster in first..first + self.geometry.block_entries() {
                let freed = self.is_freed(HostCluster(cluster)).await;
                if !freed || old_blocks.contains(&HostCluster(cluster)) {
                    continue;
                }
                if run.end != cluster {
                    self.punch(run).await;
                    run = cluster..cluster;
                }
                run.end = cluster + 1;
            }
            self.punch(run).await;
        }
        for cluster in old_blocks {
            if self.get(cluster).await.is_ok_and(|count| count == 0) {
                self.punch(cluster.0..cluster.0 + 1).await;
            }
        }
    }

    /// The cluster behind the last one in use.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn end_of_used(&self) -> Result<HostCluster> {
        let per_block = self.geometry.block_entries();
        let mut end = self.entries() * per_block;
        while end > 0 {
            if self.block(HostCluster(end - 1)).is_none() {
                end -= per_block;
            } else if self.get(HostCluster(end - 1)).await? == 0 {
                end -= 1;
            } else {
                break;
            }
        }
        Ok(HostCluster(end))
    }

    /// Entries of the refcount table that are in use.
    fn entries(&self) -> u64 {
        let changed = self
            .changed
            .last_key_value()
            .map_or(0, |(index, _)| index + 1);
        changed.max(self.in_force.len() as u64)
    }

    /// Whether a cluster is in use in the revision in force alone; one whose refcount cannot be read stays.
    async fn is_freed(&self, cluster: HostCluster) -> bool {
        let was_used = self.was(cluster).await.is_ok_and(|count| count != 0);
        was_used && self.get(cluster).await.is_ok_and(|count| count == 0)
    }

    async fn punch(&self, run: Range<u64>) {
        if run.is_empty() {
            return;
        }
        let size = self.geometry.cluster_size();
        let at = HostOffset(run.start * size);
        if let Err(error) = self.storage.discard(at, (run.end - run.start) * size).await {
            log::debug!(
                "{}: cannot punch out cluster {}: {error}",
                self.storage.name(),
                run.start
            );
        }
    }

    /// The refcount in the revision in force.
    async fn was(&self, cluster: HostCluster) -> Result<u64> {
        let index = cluster.0 / self.geometry.block_entries();
        self.look_up(self.in_force_at(index), cluster).await
    }

    async fn set(&mut self, cluster: HostCluster, refcount: u64) -> Result<()> {
        let mut pending = vec![(cluster, refcount)];
        while let Some((cluster, refcount)) = pending.pop() {
            let index = cluster.0 / self.geometry.block_entries();
            match self.changed.get(&index).copied() {
                Some(block) => self.store(block, cluster, refcount).await?,
                None => {
                    let place = self.find_free(1).await?;
                    self.copy_block(index, self.geometry.host_start(place))
                        .await?;
                    pending.push((cluster, refcount));
                    pending.push((place, 1));
                }
            }
        }
        Ok(())
    }

    async fn store(&self, block: HostOffset, cluster: HostCluster, refcount: u64) -> Result<()> {
        let order = self.geometry.refcount_order();
        let (slice_at, within) = self.place_of(block, cluster);
        let slice = self.blocks.get(slice_at).await?;
        self.blocks
            .update(&slice, refcount::bytes_of(within, order), |bytes| {
                refcount::set(bytes, within, order, refcount);
            });
        if self.blocks.needs_write_back() {
            self.write_blocks().await?;
        }
        Ok(())
    }

    /// Starts a new block at `place` with what the one in force holds.
    async fn copy_block(&mut self, index: u64, place: HostOffset) -> Result<()> {
        let copy = IoBuf::zeroed(to_usize(self.geometry.cluster_size()));
        if let Some(old) = self.in_force_at(index) {
            self.storage.readv(old, copy.clone()).await?;
            self.leaving.push(self.geometry.host_cluster(old));
        }
        self.blocks.insert_fresh(place, &copy.to_vec());
        self.changed.insert(index, place);
        Ok(())
    }

    async fn write_blocks(&self) -> Result<()> {
        let dirty = self.blocks.capture();
        let writes = dirty.iter().map(|block| (block.at, &block.buf));
        let written = write_all(self.storage.as_ref(), writes).await;
        self.blocks.written(&dirty);
        written
    }

    /// The first `count` free clusters in a row, which the search never meets again.
    async fn find_free(&mut self, count: u64) -> Result<HostCluster> {
        let mut first = self.next;
        let mut end = first;
        while end - first < count {
            if end >= MAX_HOST_OFFSET / self.geometry.cluster_size() {
                return Err(no_space());
            }
            let cluster = HostCluster(end);
            let free = self.get(cluster).await? == 0 && self.was(cluster).await? == 0;
            end += 1;
            if !free {
                first = end;
            }
        }
        self.next = end;
        Ok(HostCluster(first))
    }

    async fn look_up(&self, block: Option<HostOffset>, cluster: HostCluster) -> Result<u64> {
        let Some(block) = block else { return Ok(0) };
        let (slice_at, within) = self.place_of(block, cluster);
        let slice = self.blocks.get(slice_at).await?;
        Ok(slice.read(|bytes| refcount::get(bytes, within, self.geometry.refcount_order())))
    }

    /// The slice of `block` that holds a cluster's refcount, and the index in it.
    fn place_of(&self, block: HostOffset, cluster: HostCluster) -> (HostOffset, u64) {
        let slice_size = self.blocks.slice_size();
        let (at, within, _) = self.geometry.refcount_slice(slice_size, block, cluster);
        (at, within)
    }

    fn block(&self, cluster: HostCluster) -> Option<HostOffset> {
        self.block_at(cluster.0 / self.geometry.block_entries())
    }

    fn block_at(&self, index: u64) -> Option<HostOffset> {
        let changed = self.changed.get(&index).copied();
        changed.or_else(|| self.in_force_at(index))
    }

    fn in_force_at(&self, index: u64) -> Option<HostOffset> {
        let index = usize::try_from(index).ok()?;
        *self.in_force.get(index)?
    }
}

fn uncounted(cluster: HostCluster) -> Error {
    corrupt(&format!("cluster {cluster} is in use and has refcount 0"))
}

/// An error for metadata that contradicts itself, with the remedy.
pub(super) fn corrupt(what: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("{what}: repair the image with `seethrough check -r all`"),
    )
}

fn no_space() -> Error {
    Error::new(
        ErrorKind::NoSpace,
        "the image has reached the largest file that its refcount table can cover",
    )
}
