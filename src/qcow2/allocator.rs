//! Which host clusters are free: the refcount table, refcount blocks, and the search for room (qcow2 specification,
//! "Refcounts").
//!
//! Everything here happens in memory. Where a refcount block has to be read first, or the refcount table has to
//! grow, the answer says so and the caller does it, with no lock held (`qcow2::room`).
//!
//! # Invariants
//!
//! 1. A cluster is handed out only if its refcount in memory is 0, and it is 1 before the lock is released. A cluster
//!    that was freed keeps its refcount until nothing durable and no I/O knows it (`qcow2::quarantine`), so it is
//!    not handed out before.
//! 2. No cluster below `next` has been seen free.
//! 3. A refcount block is dirty in the cache before the refcount table in memory points to it.
//! 4. No cluster from `untouched` on was ever written: the file ends before it.
//! 5. A cluster that holds metadata is never handed out, whatever a broken image's refcounts say.
//! 6. The file does not grow beyond its `nominal` length while clusters that the disk had are to become free
//!    (`awaited`): those are used again first, so that the commitment holds (`qcow2::commitment`).
//! 7. `packed_to` lies inside a cluster whose refcount is not 0, behind the compressed data in it.
//!
//! Lock order: `state`, then the block cache's.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::cluster_ranges::ClusterRanges;
use super::entry::decode_refcount_table_entry;
use super::geometry::{Geometry, to_usize};
use super::header::MAX_HOST_OFFSET;
use super::refcount;
use super::table_cache::TableCache;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::IoBuf;
use crate::units::{HostCluster, HostOffset};

/// Entries of the refcount table that are written together.
const SECTOR_ENTRIES: usize = 64;

/// Contiguous host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first.
    pub(super) first: HostCluster,
    /// How many.
    pub(super) count: u64,
    /// Whether they read as zeros, since the file ends before them.
    pub(super) untouched: bool,
}

/// The answer to a question that may need a refcount block in memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer<T> {
    /// The answer.
    Known(T),
    /// Load this slice of a refcount block, then ask again.
    Load(HostOffset),
    /// The refcount table ends here: grow it, then ask again.
    Grow,
}

/// A changed sector of the refcount table, copied at one moment.
#[derive(Debug)]
pub(super) struct CapturedSector {
    sector: usize,
    /// Where the bytes belong.
    pub(super) at: HostOffset,
    /// The bytes.
    pub(super) buf: IoBuf,
}

/// The refcounts of an image.
pub(super) struct Allocator {
    pub(super) geometry: Geometry,
    /// The refcount blocks.
    pub(super) blocks: TableCache,
    state: Mutex<State>,
    /// Clusters that every file comes to once all of the disk is allocated.
    nominal: u64,
    /// Clusters that the disk had for itself, and that are not free yet.
    awaited: AtomicU64,
}

/// The source of the error for room that there will be once clusters have become free.
#[derive(Debug, thiserror::Error)]
#[error("clusters that the disk no longer uses are not free yet")]
pub(super) struct AwaitsFreeing;

/// What changes, under one lock.
pub(super) struct State {
    table_at: HostOffset,
    pub(super) table: Vec<u64>,
    dirty_sectors: BTreeSet<usize>,
    next: u64,
    untouched: u64,
    /// Where compressed data may go on (`qcow2::packing`).
    pub(super) packed_to: Option<HostOffset>,
    /// Header, L1 tables, refcount table, snapshot table.
    fixed: ClusterRanges,
    /// Refcount blocks and L2 tables.
    tables: BTreeSet<u64>,
}

/// The fixed parts of an image when it is opened.
pub(super) struct Layout {
    /// Where the refcount table lies.
    pub(super) table_at: HostOffset,
    /// Its entries.
    pub(super) table: Vec<u64>,
    /// The file's length in bytes.
    pub(super) file_len: u64,
    /// Byte ranges of the header, of L1 tables and of the snapshot table.
    pub(super) fixed: Vec<Range<u64>>,
    /// The L2 tables, those of snapshots included.
    pub(super) l2_tables: Vec<HostOffset>,
    /// Clusters beyond which the file grows only if none is to become free.
    pub(super) nominal: u64,
}

impl Allocator {
    /// The refcounts of an image with this layout.
    pub(super) fn new(geometry: Geometry, blocks: TableCache, layout: Layout) -> Self {
        let size = geometry.cluster_size();
        let clusters = |bytes: &Range<u64>| bytes.start / size..bytes.end.div_ceil(size);
        let mut fixed = ClusterRanges::default();
        layout
            .fixed
            .iter()
            .for_each(|bytes| fixed.insert(clusters(bytes)));
        let table_bytes = layout.table.len() as u64 * 8;
        fixed.insert(clusters(
            &(layout.table_at.0..layout.table_at.0 + table_bytes),
        ));
        let refcount_blocks = layout
            .table
            .iter()
            .filter_map(|word| decode_refcount_table_entry(&geometry, *word).ok().flatten());
        let tables = refcount_blocks
            .chain(layout.l2_tables)
            .map(|at| geometry.host_cluster(at).0)
            .collect();
        Self {
            geometry,
            blocks,
            state: Mutex::new(State {
                table_at: layout.table_at,
                table: layout.table,
                dirty_sectors: BTreeSet::new(),
                next: 0,
                untouched: layout.file_len.div_ceil(size),
                packed_to: None,
                fixed,
                tables,
            }),
            nominal: layout.nominal,
            awaited: AtomicU64::new(0),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up to `want` contiguous free clusters, at least one: the first free run.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where refcounts and metadata contradict each other; [`ErrorKind::NoSpace`] at the end of
    /// what the format can address, and from [`AwaitsFreeing`] where others have to become free first.
    pub(super) fn try_take(&self, want: u64) -> Result<Answer<Run>> {
        let mut state = self.lock();
        loop {
            let next = state.next;
            let bound = self.bound(&state);
            if next >= bound {
                return Err(Error::with_source(
                    ErrorKind::NoSpace,
                    "the image is as long as it is to become",
                    AwaitsFreeing,
                ));
            }
            if next >= MAX_HOST_OFFSET / self.geometry.cluster_size() {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    "the image has reached the largest file that the format can address",
                ));
            }
            let block_index = next / self.geometry.block_entries();
            let Some(word) = state.table.get(to_usize(block_index)).copied() else {
                return Ok(Answer::Grow);
            };
            let Some(block) = self.block_at(block_index, word)? else {
                self.start_block(&mut state, block_index)?;
                continue;
            };
            let (slice_at, within, clusters) = self.slice_of(block, next);
            let Some(slice) = self.blocks.cached(slice_at) else {
                return Ok(Answer::Load(slice_at));
            };
            let order = self.geometry.refcount_order();
            let end = clusters.end.min(bound);
            let free = slice
                .read(|bytes| first_free_run(bytes, within..end - clusters.start, want, order));
            let Some(free) = free else {
                state.next = end;
                continue;
            };
            let run = clusters.start + free.start..clusters.start + free.end;
            state.check_not_metadata(&run)?;
            let bytes = refcount::bytes_of(free.start, order).start
                ..refcount::bytes_of(free.end - 1, order).end;
            self.blocks.update(&slice, bytes, |bytes| {
                for index in free {
                    refcount::set(bytes, index, order, 1);
                }
            });
            state.next = run.end;
            let untouched = run.start >= state.untouched;
            state.untouched = state.untouched.max(run.end);
            return Ok(Answer::Known(Run {
                first: HostCluster(run.start),
                count: run.end - run.start,
                untouched,
            }));
        }
    }

    /// The first cluster that may not be taken now (invariant 6).
    fn bound(&self, state: &State) -> u64 {
        match self.awaited.load(Ordering::SeqCst) {
            0 => u64::MAX,
            _ => self.nominal.max(state.untouched),
        }
    }

    /// Says that the disk no longer has so many clusters of its own, or a task those that it took, before they are
    /// free.
    pub(super) fn await_freeing(&self, clusters: u64) {
        self.awaited.fetch_add(clusters, Ordering::SeqCst);
    }

    /// Says that so many of those are free now, or leaked.
    pub(super) fn end_awaiting(&self, clusters: u64) {
        self.awaited.fetch_sub(clusters, Ordering::SeqCst);
    }

    /// The refcount of a cluster.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a broken refcount table entry.
    pub(super) fn try_refcount(&self, cluster: HostCluster) -> Result<Answer<u64>> {
        let state = self.lock();
        self.with_refcount(&state, cluster, |slice, index| {
            slice.read(|bytes| refcount::get(bytes, index, self.geometry.refcount_order()))
        })
    }

    /// Takes one reference to a cluster away; the answer is the refcount that is left. At 0 the cluster is free.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there was no reference, or for a broken refcount table entry.
    pub(super) fn try_release(&self, cluster: HostCluster) -> Result<Answer<u64>> {
        let mut state = self.lock();
        let order = self.geometry.refcount_order();
        let answer = self.with_refcount(&state, cluster, |slice, index| {
            self.blocks
                .update(slice, refcount::bytes_of(index, order), |bytes| {
                    let left = refcount::get(bytes, index, order).checked_sub(1)?;
                    refcount::set(bytes, index, order, left);
                    Some(left)
                })
        })?;
        match answer {
            Answer::Known(None) => Err(Error::new(
                ErrorKind::Corrupt,
                format!("cluster {cluster} is in use and has refcount 0"),
            )),
            Answer::Known(Some(left)) => {
                if left == 0 {
                    state.next = state.next.min(cluster.0);
                    state.tables.remove(&cluster.0);
                    self.end_packing(&mut state, cluster);
                }
                Ok(Answer::Known(left))
            }
            Answer::Load(at) => Ok(Answer::Load(at)),
            Answer::Grow => Ok(Answer::Grow),
        }
    }

    /// Says that a cluster now holds an L2 table.
    pub(super) fn add_table(&self, cluster: HostCluster) {
        self.lock().tables.insert(cluster.0);
    }

    /// Whether a cluster holds a refcount block or an L2 table.
    pub(super) fn is_table(&self, cluster: HostCluster) -> bool {
        self.lock().tables.contains(&cluster.0)
    }

    /// Whether any cluster of these runs, of which none is empty, holds metadata.
    pub(super) fn holds_metadata(&self, runs: &[Range<u64>]) -> bool {
        let state = self.lock();
        runs.iter()
            .any(|run| state.check_not_metadata(run).is_err())
    }

    /// The first of these clusters that holds metadata, which no guest data may overwrite.
    pub(super) fn first_metadata(
        &self,
        clusters: impl Iterator<Item = HostCluster>,
    ) -> Option<HostCluster> {
        let state = self.lock();
        clusters.into_iter().find(|cluster| {
            state
                .check_not_metadata(&(cluster.0..cluster.0 + 1))
                .is_err()
        })
    }

    /// Calls `act` with the slice that holds a cluster's refcount, and the index in it.
    pub(super) fn with_refcount<T>(
        &self,
        state: &State,
        cluster: HostCluster,
        act: impl FnOnce(&std::sync::Arc<super::table_cache::Slice>, u64) -> T,
    ) -> Result<Answer<T>> {
        let block_index = cluster.0 / self.geometry.block_entries();
        let word = usize::try_from(block_index)
            .ok()
            .and_then(|index| state.table.get(index));
        let block = self.block_at(block_index, word.copied().unwrap_or(0))?;
        let Some(block) = block else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("cluster {cluster} is in use and has no refcount block"),
            ));
        };
        let (slice_at, within, _) = self.slice_of(block, cluster.0);
        match self.blocks.cached(slice_at) {
            Some(slice) => Ok(Answer::Known(act(&slice, within))),
            None => Ok(Answer::Load(slice_at)),
        }
    }

    /// The refcount block that entry `index` of the refcount table, `word`, leads to.
    pub(super) fn block_at(&self, index: u64, word: u64) -> Result<Option<HostOffset>> {
        decode_refcount_table_entry(&self.geometry, word).map_err(|defect| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "refcount table entry {index} ({word:#x}) {}",
                    defect.describe()
                ),
            )
        })
    }

    /// Where the slice of `block` begins that holds the refcount of `cluster`, the cluster's index in it, and the
    /// clusters that it covers.
    pub(super) fn slice_of(
        &self,
        block: HostOffset,
        cluster: u64,
    ) -> (HostOffset, u64, Range<u64>) {
        self.geometry
            .refcount_slice(self.blocks.slice_size(), block, HostCluster(cluster))
    }

    /// Makes the refcount block for the clusters around `next`, in the very cluster `next`: it describes itself.
    fn start_block(&self, state: &mut State, block_index: u64) -> Result<()> {
        let cluster = state.next;
        state.check_not_metadata(&(cluster..cluster + 1))?;
        let at = self.geometry.host_start(HostCluster(cluster));
        self.insert_block(at, block_index, std::iter::once(cluster));
        // Invariant 3: the block is in the cache, dirty, before the table points to it.
        let index = to_usize(block_index);
        if let Some(word) = state.table.get_mut(index) {
            *word = at.0;
        }
        state.dirty_sectors.insert(index / SECTOR_ENTRIES);
        state.tables.insert(cluster);
        state.next = cluster + 1;
        state.untouched = state.untouched.max(cluster + 1);
        Ok(())
    }

    /// Puts a new refcount block into the cache, in which `used` clusters have refcount 1.
    fn insert_block(&self, at: HostOffset, block_index: u64, used: impl Iterator<Item = u64>) {
        let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
        let first = block_index * self.geometry.block_entries();
        for cluster in used {
            refcount::set(
                &mut bytes,
                cluster - first,
                self.geometry.refcount_order(),
                1,
            );
        }
        self.blocks.insert_fresh(at, &bytes);
    }
}

/// The first run of refcounts that are 0, at most `want` long.
fn first_free_run(bytes: &[u8], within: Range<u64>, want: u64, order: u32) -> Option<Range<u64>> {
    let is_free = |index: &u64| refcount::get(bytes, *index, order) == 0;
    let end = within.end;
    let start = within.into_iter().find(is_free)?;
    let count = (start..end.min(start.saturating_add(want)))
        .take_while(is_free)
        .count();
    Some(start..start + count as u64)
}

impl State {
    /// Invariant 5.
    fn check_not_metadata(&self, run: &Range<u64>) -> Result<()> {
        let fixed = self.fixed.overlaps(run);
        if fixed || self.tables.range(run.clone()).next().is_some() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "clusters {} to {} hold metadata and have refcount 0",
                    run.start,
                    run.end - 1
                ),
            ));
        }
        Ok(())
    }
}

/// A larger refcount table, laid out behind everything that the present one covers:
/// `[refcount blocks][refcount table]`.
#[derive(Debug)]
pub(super) struct Growth {
    /// The old table's clusters, free once the header points to the new one.
    pub(super) old: Run,
    /// Where the new table lies.
    pub(super) table_at: HostOffset,
    /// Clusters of the new table.
    pub(super) table_clusters: u64,
    /// Its bytes as of now.
    pub(super) bytes: Vec<u8>,
    blocks: Vec<HostOffset>,
}

/// How many refcount blocks, and how many clusters of its own, a larger table needs; the blocks cover themselves and
/// the table.
///
/// # Errors
/// [`ErrorKind::NoSpace`] at the limit of `max_bytes`.
pub(super) fn size_growth(
    geometry: &Geometry,
    old_entries: u64,
    max_bytes: u64,
) -> Result<(u64, u64)> {
    let cluster_size = geometry.cluster_size();
    let old_clusters = old_entries * 8 / cluster_size;
    let mut table_clusters = old_clusters + old_clusters.div_ceil(2);
    let mut blocks = 1;
    loop {
        if blocks + table_clusters > blocks * geometry.block_entries() {
            blocks += 1;
        } else if (old_entries + blocks) * 8 > table_clusters * cluster_size {
            table_clusters += 1;
        } else {
            break;
        }
    }
    if table_clusters * cluster_size > max_bytes {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "the refcount table has reached its limit of {max_bytes} bytes: use larger clusters"
            ),
        ));
    }
    Ok((blocks, table_clusters))
}

/// Writing back and growing the refcount table.
impl Allocator {
    /// Whether the refcount table or a block of it is not on disk as it is here.
    pub(super) fn is_dirty(&self) -> bool {
        !self.lock().dirty_sectors.is_empty() || self.blocks.is_dirty()
    }

    /// Copies every dirty sector of the refcount table; they are clean from then on unless
    /// [`Allocator::restore_table`] says otherwise.
    pub(super) fn capture_table(&self) -> Vec<CapturedSector> {
        let mut state = self.lock();
        let sectors = std::mem::take(&mut state.dirty_sectors);
        sectors
            .into_iter()
            .map(|sector| {
                let words = state
                    .table
                    .iter()
                    .skip(sector * SECTOR_ENTRIES)
                    .take(SECTOR_ENTRIES);
                let bytes: Vec<u8> = words.flat_map(|word| word.to_be_bytes()).collect();
                CapturedSector {
                    sector,
                    at: HostOffset(state.table_at.0 + (sector * SECTOR_ENTRIES * 8) as u64),
                    buf: IoBuf::from_bytes(&bytes),
                }
            })
            .collect()
    }

    /// Says that captured sectors may not be on disk.
    pub(super) fn restore_table(&self, captured: &[CapturedSector]) {
        self.lock()
            .dirty_sectors
            .extend(captured.iter().map(|one| one.sector));
    }

    /// How many entries the refcount table has: it tells whether someone else has grown it.
    pub(super) fn table_len(&self) -> usize {
        self.lock().table.len()
    }

    /// Lays out a table of at least half as many clusters more, and puts the refcount blocks for it into the cache.
    /// Nothing else knows of it before [`Allocator::finish_growth`].
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] at the limit of `max_bytes`.
    pub(super) fn plan_growth(&self, max_bytes: u64) -> Result<Growth> {
        let mut state = self.lock();
        let per_block = self.geometry.block_entries();
        let cluster_size = self.geometry.cluster_size();
        let old_entries = state.table.len() as u64;
        let old_clusters = old_entries * 8 / cluster_size;
        let start = old_entries * per_block;
        let (blocks, table_clusters) = size_growth(&self.geometry, old_entries, max_bytes)?;
        // The copy in `bytes` has all of them; what changes from now on is dirty again.
        state.dirty_sectors.clear();
        let (old_at, mut words) = (state.table_at, state.table.clone());
        drop(state);
        let used = start..start + blocks + table_clusters;
        let first_index = old_entries;
        let mut placed = Vec::new();
        for number in 0..blocks {
            let at = self.geometry.host_start(HostCluster(start + number));
            let covered =
                (first_index + number) * per_block..(first_index + number + 1) * per_block;
            let in_use = used.start.max(covered.start)..used.end.min(covered.end);
            self.insert_block(at, first_index + number, in_use);
            words.push(at.0);
            placed.push(at);
        }
        words.resize(to_usize(table_clusters * cluster_size / 8), 0);
        Ok(Growth {
            old: Run {
                first: self.geometry.host_cluster(old_at),
                count: old_clusters,
                untouched: false,
            },
            table_at: self.geometry.host_start(HostCluster(start + blocks)),
            table_clusters,
            bytes: words.iter().flat_map(|word| word.to_be_bytes()).collect(),
            blocks: placed,
        })
    }

    /// Goes back to the old table after the new one could not be written.
    pub(super) fn abandon_growth(&self, growth: &Growth) {
        for at in &growth.blocks {
            self.blocks.forget(*at, self.geometry.cluster_size());
        }
        let mut state = self.lock();
        let sectors = state.table.len().div_ceil(SECTOR_ENTRIES);
        state.dirty_sectors.extend(0..sectors);
    }

    /// Uses the larger table, to which the header points by now.
    pub(super) fn finish_growth(&self, growth: &Growth) {
        let mut state = self.lock();
        state.table.extend(growth.blocks.iter().map(|at| at.0));
        state.table.resize(growth.bytes.len() / 8, 0);
        state.table_at = growth.table_at;
        let old = growth.old.first.0..growth.old.first.0 + growth.old.count;
        state.fixed.remove(old);
        let new = self.geometry.host_cluster(growth.table_at).0;
        state.fixed.insert(new..new + growth.table_clusters);
        state.untouched = state.untouched.max(new + growth.table_clusters);
        for at in &growth.blocks {
            state.tables.insert(self.geometry.host_cluster(*at).0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Qcow2;
    use super::super::create::{CreateOptions, create};
    use super::super::geometry::tests::geometry;
    use super::super::header::MAX_REFCOUNT_TABLE_BYTES;
    use super::*;
    use crate::image::{Access, Image};
    use crate::storage::{MemoryStorage, Storage};
    use crate::sys::block_on;
    use crate::units::GuestOffset;

    #[test]
    fn a_refcount_table_grows_to_its_limit_and_no_further() {
        let geometry = geometry(16, 4, false);
        let grow = |bytes: u64| size_growth(&geometry, bytes / 8, MAX_REFCOUNT_TABLE_BYTES);
        assert_eq!(grow(5 << 20).unwrap(), (1, 120));
        let error = grow(MAX_REFCOUNT_TABLE_BYTES).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }

    /// A disk with clusters of 2 MiB and one L2 table, all of whose file is in use up to `end`, for all it knows.
    fn disk_in_use_up_to(end: u64) -> Qcow2 {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::default());
        let options = CreateOptions {
            cluster_size: 2 << 20,
            ..CreateOptions::new(64 << 20)
        };
        block_on(create(storage.as_ref(), &options)).unwrap();
        let disk = block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap();
        block_on(disk.write(GuestOffset(0), IoBuf::zeroed(512))).unwrap();
        block_on(disk.flush()).unwrap();
        disk.allocator.lock().next = disk.geometry.host_cluster(HostOffset(end)).0;
        disk
    }

    #[test]
    fn no_cluster_lies_behind_what_56_bits_can_say() {
        let disk = disk_in_use_up_to(MAX_HOST_OFFSET);
        let error = disk.allocator.try_take(1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(error.to_string().contains("largest file"), "{error}");
    }

    #[test]
    fn no_compressed_data_lies_behind_what_its_entry_can_say() {
        let disk = disk_in_use_up_to(1 << 49);
        let compressed = IoBuf::zeroed(512);
        let written = block_on(disk.write_compressed(GuestOffset(2 << 20), compressed));
        let error = written.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(error.to_string().contains("smaller clusters"), "{error}");
    }
}
