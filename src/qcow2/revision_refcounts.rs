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

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::cache_budget::{CacheBudget, CacheSize};
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

/// Clusters that the search for room looks at together.
const SEARCH_WINDOW: u64 = 256;
/// Clusters that everything else looks at together.
const WINDOW: u64 = 8192;

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
        let mut seen = HashSet::new();
        for (index, word) in words.iter().enumerate() {
            let word = u64::from_be_bytes(*word);
            let block = decode_refcount_table_entry(&geometry, word).map_err(|defect| {
                corrupt(&format!(
                    "refcount table entry {index} ({word:#x}) {}",
                    defect.describe()
                ))
            })?;
            // A block of its own for every entry, in the file: so much can be gone through.
            if block.is_some_and(|at| at.0 >= storage.len() || !seen.insert(at)) {
                return Err(corrupt(&format!(
                    "refcount table entry {index} ({word:#x}) points behind the file's end or where another one does"
                )));
            }
            in_force.push(block);
        }
        Ok(Self {
            geometry,
            blocks: TableCache::new(
                Arc::clone(&storage),
                geometry.cluster_size(),
                &CacheBudget::new(CacheSize::Covering),
                CACHE,
            ),
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
        self.check_counted(first.0..first.0 + count).await?;
        for block in self.in_force.iter().flatten() {
            let cluster = self.geometry.host_cluster(*block).0;
            self.check_counted(cluster..cluster + 1).await?;
        }
        Ok(())
    }

    /// Checks that clusters are counted in the revision in force.
    ///
    /// # Errors
    /// As [`NewRefcounts::check_own_clusters`].
    pub(super) async fn check_counted(&self, clusters: Range<u64>) -> Result<()> {
        for window in windows(clusters) {
            let counts = self.counts_in_force(window.clone()).await?;
            if let Some((cluster, _)) = window.zip(counts).find(|(_, count)| *count == 0) {
                return Err(uncounted(cluster));
            }
        }
        Ok(())
    }

    /// The refcounts of contiguous clusters in the new revision.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn counts(&self, clusters: Range<u64>) -> Result<Vec<u64>> {
        self.look_up(clusters, |index| self.block_at(index)).await
    }

    /// The refcounts of contiguous clusters in the revision in force.
    async fn counts_in_force(&self, clusters: Range<u64>) -> Result<Vec<u64>> {
        self.look_up(clusters, |index| self.in_force_at(index))
            .await
    }

    /// Counts one reference more to each of contiguous clusters.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there was none so far, [`ErrorKind::Unsupported`] if the refcount's width cannot say
    /// it; the storage's.
    pub(super) async fn add(&mut self, clusters: Range<u64>) -> Result<()> {
        let max = self.geometry.max_refcount();
        let bits = 1u32 << self.geometry.refcount_order();
        self.change(clusters, |cluster, count| match count {
            0 => Err(uncounted(cluster)),
            count if count >= max => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "cluster {cluster} has {count} references, and refcounts of {bits} bits cannot count one more: \
                     make a copy of the image with wider ones (the option refcount_bits)"
                ),
            )),
            count => Ok(count + 1),
        })
        .await
    }

    /// Counts one reference less to each of contiguous clusters.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there was none; the storage's.
    pub(super) async fn remove(&mut self, clusters: Range<u64>) -> Result<()> {
        self.change(clusters, |cluster, count| {
            count.checked_sub(1).ok_or_else(|| uncounted(cluster))
        })
        .await
    }

    /// Takes contiguous clusters, each with one reference.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] at the end of what the format can address; the storage's.
    pub(super) async fn take(&mut self, count: u64) -> Result<HostCluster> {
        let first = self.find_free(count).await?;
        self.change(first..first + count, |_, _| Ok(1)).await?;
        Ok(HostCluster(first))
    }

    /// Moves the blocks that lie behind `end` to the first free clusters.
    ///
    /// # Errors
    /// As [`NewRefcounts::take`].
    pub(super) async fn move_blocks_before(&mut self, end: HostOffset) -> Result<()> {
        for index in 0..self.in_force.len() as u64 {
            if self.in_force_at(index).is_some_and(|at| at >= end) {
                self.own_block(index).await?;
            }
        }
        Ok(())
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
                self.remove(cluster.0..cluster.0 + 1).await?;
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
            self.change(first.0..first.0 + clusters, |_, _| Ok(0))
                .await?;
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
            for window in windows(first..first + self.geometry.block_entries()) {
                // What cannot be read stays.
                let Ok((was, is)) = self.both(window.clone()).await else {
                    continue;
                };
                let mut run = 0..0;
                for (cluster, (was, is)) in window.zip(was.into_iter().zip(is)) {
                    let freed = was != 0 && is == 0;
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
        }
        for cluster in old_blocks {
            let range = cluster.0..cluster.0 + 1;
            if self
                .counts(range.clone())
                .await
                .is_ok_and(|counts| counts == [0])
            {
                self.punch(range).await;
            }
        }
    }

    /// The refcounts in force, and those of the new revision.
    async fn both(&self, clusters: Range<u64>) -> Result<(Vec<u64>, Vec<u64>)> {
        let was = self.counts_in_force(clusters.clone()).await?;
        Ok((was, self.counts(clusters).await?))
    }

    /// The cluster behind the last one in use.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn end_of_used(&self) -> Result<HostCluster> {
        let per_block = self.geometry.block_entries();
        for index in (0..self.entries()).rev() {
            if self.block_at(index).is_none() {
                continue;
            }
            let first = index * per_block;
            for window in windows(first..first + per_block).rev() {
                let counts = self.counts(window.clone()).await?;
                if let Some(last) = counts.iter().rposition(|count| *count != 0) {
                    return Ok(HostCluster(window.start + last as u64 + 1));
                }
            }
        }
        Ok(HostCluster(0))
    }

    /// Entries of the refcount table that are in use.
    fn entries(&self) -> u64 {
        let changed = self
            .changed
            .last_key_value()
            .map_or(0, |(index, _)| index + 1);
        changed.max(self.in_force.len() as u64)
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

    /// Changes the refcounts of contiguous clusters, from each to what `step` makes of it.
    async fn change(
        &mut self,
        clusters: Range<u64>,
        step: impl Fn(u64, u64) -> Result<u64>,
    ) -> Result<()> {
        let order = self.geometry.refcount_order();
        let mut at = clusters.start;
        while at < clusters.end {
            let block = self.own_block(at / self.geometry.block_entries()).await?;
            let (slice_at, part, within) = self.part_of(block, at..clusters.end);
            let slice = self.blocks.get(slice_at).await?;
            let bytes = refcount::bytes_of(within.start, order).start
                ..refcount::bytes_of(within.end - 1, order).end;
            at = part.end;
            self.blocks.update(&slice, bytes, |bytes| {
                part.zip(within).try_for_each(|(cluster, index)| {
                    let count = step(cluster, refcount::get(bytes, index, order))?;
                    refcount::set(bytes, index, order, count);
                    Ok::<_, Error>(())
                })
            })?;
            if self.blocks.needs_write_back() {
                self.write_blocks().await?;
            }
        }
        Ok(())
    }

    /// Where the block at `index` of the table lies that may be changed; a copy of the one in force, if need be. The
    /// copy's own place is counted, which may take further copies.
    async fn own_block(&mut self, index: u64) -> Result<HostOffset> {
        let order = self.geometry.refcount_order();
        let mut uncounted = Vec::new();
        let mut missing = Some(index).filter(|index| !self.changed.contains_key(index));
        loop {
            if let Some(index) = missing.take() {
                let place = self.find_free(1).await?;
                self.copy_block(index, self.geometry.host_start(HostCluster(place)))
                    .await?;
                uncounted.push(place);
            }
            let Some(place) = uncounted.last().copied() else {
                break;
            };
            let place_index = place / self.geometry.block_entries();
            let Some(block) = self.changed.get(&place_index).copied() else {
                missing = Some(place_index);
                continue;
            };
            uncounted.pop();
            let (slice_at, _, within) = self.part_of(block, place..place + 1);
            let slice = self.blocks.get(slice_at).await?;
            let bytes = refcount::bytes_of(within.start, order);
            self.blocks.update(&slice, bytes, |bytes| {
                refcount::set(bytes, within.start, order, 1);
            });
        }
        self.changed.get(&index).copied().ok_or_else(no_space)
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
    async fn find_free(&mut self, count: u64) -> Result<u64> {
        let limit = MAX_HOST_OFFSET / self.geometry.cluster_size();
        let mut first = self.next;
        let mut window = first..(first + SEARCH_WINDOW).min(limit);
        while !window.is_empty() {
            let (was, is) = self.both(window.clone()).await?;
            for (cluster, (was, is)) in window.clone().zip(was.into_iter().zip(is)) {
                if was != 0 || is != 0 {
                    first = cluster + 1;
                } else if cluster + 1 - first >= count {
                    self.next = cluster + 1;
                    return Ok(first);
                }
            }
            window = window.end..(window.end + SEARCH_WINDOW).min(limit);
        }
        Err(no_space())
    }

    async fn look_up(
        &self,
        clusters: Range<u64>,
        block_at: impl Fn(u64) -> Option<HostOffset>,
    ) -> Result<Vec<u64>> {
        let order = self.geometry.refcount_order();
        let per_block = self.geometry.block_entries();
        let mut counts = Vec::new();
        let mut at = clusters.start;
        while at < clusters.end {
            let Some(block) = block_at(at / per_block) else {
                let end = clusters.end.min((at / per_block + 1) * per_block);
                counts.extend((at..end).map(|_| 0));
                at = end;
                continue;
            };
            let (slice_at, part, within) = self.part_of(block, at..clusters.end);
            let slice = self.blocks.get(slice_at).await?;
            slice.read(|bytes| {
                counts.extend(within.map(|index| refcount::get(bytes, index, order)));
            });
            at = part.end;
        }
        Ok(counts)
    }

    /// The slice of `block` that holds the first of these clusters' refcounts, those that it holds too, and their
    /// indices in it.
    fn part_of(
        &self,
        block: HostOffset,
        clusters: Range<u64>,
    ) -> (HostOffset, Range<u64>, Range<u64>) {
        let first = HostCluster(clusters.start);
        let slice_size = self.blocks.slice_size();
        let (at, within, covered) = self.geometry.refcount_slice(slice_size, block, first);
        let part = clusters.start..clusters.end.min(covered.end);
        let len = part.end - part.start;
        (at, part, within..within + len)
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

/// A range of clusters in parts that may be looked at together.
fn windows(clusters: Range<u64>) -> impl DoubleEndedIterator<Item = Range<u64>> {
    let parts = (clusters.end - clusters.start).div_ceil(WINDOW);
    (0..parts).map(move |part| {
        let start = clusters.start + part * WINDOW;
        start..clusters.end.min(start + WINDOW)
    })
}

fn uncounted(cluster: u64) -> Error {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::create::{CreateOptions, create};
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    /// The refcounts of a new image whose bytes `change` has changed.
    fn refcounts(change: impl FnOnce(&mut [u8])) -> Result<NewRefcounts> {
        let storage = MemoryStorage::default();
        let options = CreateOptions {
            cluster_size: 512,
            ..CreateOptions::new(1 << 20)
        };
        block_on(create(&storage, &options)).unwrap();
        let mut bytes = storage.contents();
        change(&mut bytes);
        let storage = Arc::new(MemoryStorage::new(bytes));
        let header = block_on(Header::read(storage.as_ref())).unwrap();
        block_on(NewRefcounts::read(storage, &header))
    }

    #[test]
    fn a_reference_to_a_cluster_without_one_is_corrupt_both_ways() {
        let mut refcounts = refcounts(|_| ()).unwrap();
        let free = block_on(refcounts.find_free(1)).unwrap();
        for error in [
            block_on(refcounts.add(free..free + 1)).unwrap_err(),
            block_on(refcounts.remove(free..free + 1)).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn refcount_blocks_that_are_shared_or_behind_the_file_are_corrupt() {
        let table = |bytes: &[u8]| {
            let at = u64::from_be_bytes(bytes[48..56].try_into().unwrap());
            usize::try_from(at).unwrap()
        };
        let shared = refcounts(|bytes| {
            let at = table(bytes);
            bytes.copy_within(at..at + 8, at + 8);
        });
        let beyond = refcounts(|bytes| {
            let at = table(bytes);
            bytes[at + 8..at + 16].copy_from_slice(&(1u64 << 40).to_be_bytes());
        });
        for found in [shared, beyond] {
            let error = found.map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn a_refcount_table_that_would_pass_its_limit_is_no_space() {
        let mut refcounts = refcounts(|_| ()).unwrap();
        // 256 clusters for each of its entries.
        refcounts.next = MAX_REFCOUNT_TABLE_BYTES / 8 * 256;
        block_on(refcounts.take(1)).unwrap();
        let error = block_on(refcounts.write()).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
}
