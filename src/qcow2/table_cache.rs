//! Tables of an image in memory: L2 tables in one cache, refcount blocks in another, both in slices.
//!
//! A slice is a part of a table small enough that a cold lookup reads little. Slices are found by host offset,
//! so that two L1 entries that share a table share its slices.
//!
//! # Invariants
//!
//! 1. One [`Slice`] per host offset: all users of a table change the same bytes. A slice leaves the cache only when
//!    no one else holds it, and it is neither dirty nor being written.
//! 2. A slice is in the dirty list exactly while it has bytes that are neither on disk nor captured.
//! 3. What [`TableCache::capture`] returns is a copy: later changes become part of the next capture, so a barrier
//!    between two captures orders them (`qcow2::flush` builds the crash order on this).
//! 4. A slice is *fresh* from [`TableCache::insert_fresh`] to its first capture: nothing durable points to it yet.
//!
//! Lock order: shard, then slice, then the dirty list. None is held across I/O.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::address_hash::AddressHasher;
use super::cache_budget::CacheBudget;
use super::geometry::to_usize;
use crate::error::Result;
use crate::storage::RangeLock;
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// The largest slice in bytes.
const MAX_SLICE: u64 = 16 << 10;
/// Dirty ranges are widened to multiples of this: what disks write at once.
const WRITE_UNIT: usize = 4096;
const SHARDS: usize = 32;

/// A part of a table.
#[derive(Debug)]
pub(super) struct Slice {
    at: HostOffset,
    state: RwLock<SliceState>,
    /// Used since eviction last came by.
    referenced: AtomicBool,
}

#[derive(Debug)]
struct SliceState {
    bytes: Box<[u8]>,
    /// Bytes that are neither on disk nor captured; empty if there are none.
    dirty: Range<usize>,
    fresh: bool,
    /// Whether a dirty entry makes data readable that was written without a barrier since.
    links_data: bool,
    being_written: bool,
}

impl Slice {
    fn new(at: HostOffset, bytes: Box<[u8]>) -> Self {
        Self {
            at,
            state: RwLock::new(SliceState {
                bytes,
                dirty: 0..0,
                fresh: false,
                links_data: false,
                being_written: false,
            }),
            referenced: AtomicBool::new(true),
        }
    }

    /// Looks at the bytes.
    pub(super) fn read<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        look(&self.read_state().bytes)
    }

    fn read_state(&self) -> RwLockReadGuard<'_, SliceState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, SliceState> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Changed bytes of a slice, copied at one moment.
#[derive(Debug)]
pub(super) struct Captured {
    slice: Arc<Slice>,
    range: Range<usize>,
    /// Where the bytes belong.
    pub(super) at: HostOffset,
    /// The bytes.
    pub(super) buf: IoBuf,
    /// Whether nothing durable points to the table yet.
    pub(super) fresh: bool,
    /// Whether the bytes make data readable that was written without a barrier since.
    pub(super) links_data: bool,
}

type Shard = RwLock<HashMap<u64, Arc<Slice>, BuildHasherDefault<AddressHasher>>>;

/// The slices of one kind of table of one image.
#[derive(Debug)]
pub(super) struct Slices {
    slice_size: u64,
    shards: Vec<Shard>,
    count: AtomicUsize,
    next_victim_shard: AtomicUsize,
}

/// A write-back cache of one kind of table, bounded by a budget that it may share with others.
pub(super) struct TableCache {
    storage: Arc<dyn Storage>,
    slices: Arc<Slices>,
    loading: RangeLock,
    dirty: Mutex<Vec<Arc<Slice>>>,
    budget: Arc<CacheBudget>,
    /// What it has asked the budget for, in bytes.
    wanted: u64,
}

impl TableCache {
    /// An empty cache of tables of `table_size` bytes, for which `budget` has room for about `wanted` bytes more.
    pub(super) fn new(
        storage: Arc<dyn Storage>,
        table_size: u64,
        budget: &Arc<CacheBudget>,
        wanted: u64,
    ) -> Self {
        let slice_size = table_size.min(MAX_SLICE);
        let slices = Arc::new(Slices {
            slice_size,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            count: AtomicUsize::new(0),
            next_victim_shard: AtomicUsize::new(0),
        });
        let wanted = wanted.max(2 * SHARDS as u64 * slice_size);
        budget.join(&slices, wanted);
        Self {
            storage,
            slices,
            loading: RangeLock::default(),
            dirty: Mutex::default(),
            budget: Arc::clone(budget),
            wanted,
        }
    }

    /// Bounds the cache, and those that share its budget, to about `bytes`, and to no less than two slices, from the
    /// next load on.
    pub(super) fn set_limit(&self, bytes: u64) {
        self.budget.set_limit(bytes.max(2 * self.slice_size()));
    }

    /// The bound that the cache keeps, perhaps with others.
    pub(super) fn budget(&self) -> &Arc<CacheBudget> {
        &self.budget
    }

    /// Bytes of a slice.
    pub(super) fn slice_size(&self) -> u64 {
        self.slices.slice_size
    }

    /// Where the slice that holds the table byte at `at` begins. (Tables are aligned to their size, slices divide
    /// it.)
    pub(super) fn slice_start(&self, at: HostOffset) -> HostOffset {
        HostOffset(at.0 - at.0 % self.slice_size())
    }

    /// Looks at the slice that begins at `at`, if it is in memory; no I/O, no allocation.
    pub(super) fn peek<R>(&self, at: HostOffset, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let shard = self
            .shard(at)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let slice = shard.get(&at.0)?;
        slice.touch();
        Some(slice.read(look))
    }

    /// The slice that begins at `at`, if it is in memory.
    pub(super) fn cached(&self, at: HostOffset) -> Option<Arc<Slice>> {
        let shard = self
            .shard(at)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let slice = shard.get(&at.0)?;
        slice.touch();
        Some(Arc::clone(slice))
    }

    /// The slice that begins at `at`, loaded if need be; callers that want the same one share the load.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn get(&self, at: HostOffset) -> Result<Arc<Slice>> {
        self.get_vetted(at, |_| ()).await
    }

    /// As [`TableCache::get`]; bytes that come from disk are shown to `vet` before anyone else sees them.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn get_vetted(
        &self,
        at: HostOffset,
        vet: impl FnOnce(&[u8]),
    ) -> Result<Arc<Slice>> {
        if let Some(slice) = self.cached(at) {
            return Ok(slice);
        }
        let _loading = self.loading.lock(at.0..at.0 + 1).await;
        if let Some(slice) = self.cached(at) {
            return Ok(slice);
        }
        let buf = IoBuf::to_be_filled(to_usize(self.slice_size()));
        self.storage.readv(at, buf.clone()).await?;
        let bytes = buf.to_vec().into_boxed_slice();
        vet(&bytes);
        let slice = Arc::new(Slice::new(at, bytes));
        self.insert(Arc::clone(&slice));
        self.evict();
        Ok(slice)
    }

    /// Puts a new table, with `bytes` as its contents, at `at`: dirty and fresh.
    pub(super) fn insert_fresh(&self, at: HostOffset, bytes: &[u8]) {
        let mut start = at;
        for part in bytes.chunks(to_usize(self.slice_size())) {
            let slice = Arc::new(Slice::new(start, part.into()));
            {
                let mut state = slice.write_state();
                state.dirty = 0..part.len();
                state.fresh = true;
            }
            self.insert(Arc::clone(&slice));
            self.push_dirty(slice);
            start = HostOffset(start.0 + part.len() as u64);
        }
        self.evict();
    }

    /// Changes `range` of a slice's bytes.
    pub(super) fn update<R>(
        &self,
        slice: &Arc<Slice>,
        range: Range<usize>,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let mut state = slice.write_state();
        let result = change(&mut state.bytes);
        self.make_dirty(slice, &mut state, range);
        result
    }

    /// Changes `range` of a slice's bytes such that they make data readable that was written just now.
    pub(super) fn update_links(
        &self,
        slice: &Arc<Slice>,
        range: Range<usize>,
        change: impl FnOnce(&mut [u8]),
    ) {
        let mut state = slice.write_state();
        change(&mut state.bytes);
        state.links_data = true;
        self.make_dirty(slice, &mut state, range);
    }

    fn make_dirty(&self, slice: &Arc<Slice>, state: &mut SliceState, range: Range<usize>) {
        if state.dirty.is_empty() {
            state.dirty = range;
            self.push_dirty(Arc::clone(slice));
        } else {
            state.dirty = state.dirty.start.min(range.start)..state.dirty.end.max(range.end);
        }
    }

    /// Copies everything dirty, which is clean from then on unless [`TableCache::restore`] says otherwise.
    pub(super) fn capture(&self) -> Vec<Captured> {
        let dirty = std::mem::take(&mut *self.lock_dirty());
        self.budget.cleaned(self.bytes_of(dirty.len()));
        dirty
            .into_iter()
            .map(|slice| {
                let mut state = slice.write_state();
                let start = state.dirty.start / WRITE_UNIT * WRITE_UNIT;
                let end = state
                    .dirty
                    .end
                    .next_multiple_of(WRITE_UNIT)
                    .min(state.bytes.len());
                let buf = IoBuf::from_bytes(state.bytes.get(start..end).unwrap_or_default());
                state.dirty = 0..0;
                state.being_written = true;
                let fresh = std::mem::take(&mut state.fresh);
                let links_data = std::mem::take(&mut state.links_data);
                drop(state);
                Captured {
                    at: HostOffset(slice.at.0 + start as u64),
                    range: start..end,
                    slice,
                    buf,
                    fresh,
                    links_data,
                }
            })
            .collect()
    }

    /// Says that captured bytes are on disk.
    pub(super) fn written(&self, captured: &[Captured]) {
        for one in captured {
            one.slice.write_state().being_written = false;
        }
        self.evict();
    }

    /// Says that captured bytes may not be on disk: memory stays the only place that has them.
    pub(super) fn restore(&self, captured: &[Captured]) {
        for one in captured {
            self.update(&one.slice, one.range.clone(), |_| ());
            let mut state = one.slice.write_state();
            state.fresh |= one.fresh;
            state.links_data |= one.links_data;
            state.being_written = false;
        }
    }

    /// Whether anything is dirty.
    pub(super) fn is_dirty(&self) -> bool {
        !self.lock_dirty().is_empty()
    }

    /// Whether so much is dirty that eviction finds too little: time to write back.
    pub(super) fn needs_write_back(&self) -> bool {
        let dirty = self.lock_dirty().len();
        dirty > 0 && self.budget.needs_write_back(self.bytes_of(dirty))
    }

    fn push_dirty(&self, slice: Arc<Slice>) {
        // Before anyone can find it there and count it off again.
        self.budget.made_dirty(self.slice_size());
        self.lock_dirty().push(slice);
    }

    fn bytes_of(&self, slices: usize) -> u64 {
        slices as u64 * self.slice_size()
    }

    /// Forgets a table that is one no longer, and whatever was to be written of it. Its slices are in no one's
    /// hands.
    pub(super) fn forget(&self, table: HostOffset, table_size: u64) {
        for at in (table.0..table.0 + table_size).step_by(to_usize(self.slice_size())) {
            let mut shard = self
                .shard(HostOffset(at))
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let Some(slice) = shard.remove(&at) else {
                continue;
            };
            self.slices.count.fetch_sub(1, Ordering::Relaxed);
            self.budget.gave_back(self.slice_size());
            slice.write_state().dirty = 0..0;
            let mut dirty = self.lock_dirty();
            let before = dirty.len();
            dirty.retain(|dirty| !Arc::ptr_eq(dirty, &slice));
            self.budget.cleaned(self.bytes_of(before - dirty.len()));
        }
    }

    fn insert(&self, slice: Arc<Slice>) {
        let mut shard = self
            .shard(slice.at)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if shard.insert(slice.at.0, slice).is_none() {
            self.slices.count.fetch_add(1, Ordering::Relaxed);
            self.budget.took(self.slice_size());
        }
    }

    /// Brings the memory that is used down to the limit as far as invariant 1 lets it.
    fn evict(&self) {
        self.budget.evict(2 * SHARDS);
    }

    fn shard(&self, at: HostOffset) -> &Shard {
        self.slices.shard(at)
    }

    fn lock_dirty(&self) -> MutexGuard<'_, Vec<Arc<Slice>>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TableCache {
    fn drop(&mut self) {
        let dirty = self.lock_dirty().len();
        // Whoever is about to evict finds no slice left, so that none is counted twice.
        let used = self.slices.clear();
        self.budget
            .leave(self.wanted, self.bytes_of(used), self.bytes_of(dirty));
    }
}

impl Slices {
    pub(super) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// Takes the slices of the next shard away that were not used since its last turn, as far as invariant 1 of this
    /// module lets it; the bytes that this frees. A clock: those in use get another chance.
    pub(super) fn evict_in_one_shard(&self) -> u64 {
        let turn = self.next_victim_shard.fetch_add(1, Ordering::Relaxed);
        let Some(shard) = self.shards.get(turn % SHARDS) else {
            return 0;
        };
        let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
        let before = shard.len();
        shard.retain(|_, slice| !slice.is_evictable());
        let evicted = before - shard.len();
        self.count.fetch_sub(evicted, Ordering::Relaxed);
        evicted as u64 * self.slice_size
    }

    /// Takes all slices away; how many they were.
    fn clear(&self) -> usize {
        let mut cleared = 0;
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            cleared += shard.len();
            self.count.fetch_sub(shard.len(), Ordering::Relaxed);
            shard.clear();
        }
        cleared
    }

    fn shard(&self, at: HostOffset) -> &Shard {
        let number = at.0 / self.slice_size;
        // Tables are often a power of two apart: mix the bits before taking some.
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let index = to_usize(mixed) % SHARDS;
        self.shards.get(index).expect("the index is below SHARDS")
    }
}

impl Slice {
    fn touch(&self) {
        if !self.referenced.load(Ordering::Relaxed) {
            self.referenced.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the slice may leave the cache now; called with its shard locked, so that no one can take hold of it
    /// meanwhile.
    fn is_evictable(self: &Arc<Self>) -> bool {
        if self.referenced.swap(false, Ordering::Relaxed) || Arc::strong_count(self) > 1 {
            return false;
        }
        let state = self.read_state();
        state.dirty.is_empty() && !state.being_written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::cache_budget::CacheSize;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    fn cache(limit: u64) -> (Arc<MemoryStorage>, TableCache) {
        let bytes = (0..1u32 << 20)
            .map(|i| (i / 512).to_be_bytes()[3])
            .collect();
        let storage = Arc::new(MemoryStorage::new(bytes));
        let budget = CacheBudget::new(CacheSize::Covering);
        let cache = TableCache::new(
            Arc::clone(&storage) as Arc<dyn Storage>,
            512,
            &budget,
            limit,
        );
        (storage, cache)
    }

    #[test]
    fn a_cold_slice_is_loaded_and_then_found_in_memory() {
        let (_, cache) = cache(0);
        let at = HostOffset(512 * 7);
        assert!(cache.peek(at, |_| ()).is_none());
        assert_eq!(block_on(cache.get(at)).unwrap().read(|bytes| bytes[0]), 7);
        assert_eq!(cache.peek(at, |bytes| bytes[511]), Some(7));
    }

    #[test]
    fn a_capture_does_not_see_later_changes_and_they_are_captured_next() {
        let (_, cache) = cache(0);
        let slice = block_on(cache.get(HostOffset(0))).unwrap();
        cache.update(&slice, 8..16, |bytes| bytes[8] = 1);
        let first = cache.capture();
        cache.update(&slice, 8..16, |bytes| bytes[8] = 2);
        assert_eq!(first[0].buf.to_vec()[8], 1);
        cache.written(&first);
        assert_eq!(cache.capture()[0].buf.to_vec()[8], 2);
        assert!(!cache.is_dirty());
    }

    #[test]
    fn a_table_is_fresh_until_it_is_captured() {
        let (_, cache) = cache(0);
        cache.insert_fresh(HostOffset(1024), &[9; 512]);
        assert!(cache.capture()[0].fresh);
        let slice = cache.cached(HostOffset(1024)).unwrap();
        cache.update(&slice, 0..8, |_| ());
        assert!(!cache.capture()[0].fresh);
    }

    #[test]
    fn eviction_spares_what_is_dirty_held_or_being_written() {
        let (_, cache) = cache(0);
        let dirty = HostOffset(0);
        cache.update(&block_on(cache.get(dirty)).unwrap(), 0..8, |_| ());
        let held = block_on(cache.get(HostOffset(512))).unwrap();
        let writing = HostOffset(1024);
        let captured = {
            let other = std::mem::take(&mut *cache.lock_dirty());
            cache.update(&block_on(cache.get(writing)).unwrap(), 0..8, |_| ());
            let captured = cache.capture();
            *cache.lock_dirty() = other;
            captured
        };
        for number in 3..1000 {
            block_on(cache.get(HostOffset(512 * number))).unwrap();
        }
        assert!(cache.slices.count.load(Ordering::Relaxed) < 4 * SHARDS);
        for at in [dirty, held.at, writing] {
            assert!(cache.cached(at).is_some(), "{at:#x}");
        }
        drop(captured);
    }

    #[test]
    fn what_could_not_be_written_is_dirty_again() {
        let (_, cache) = cache(0);
        let slice = block_on(cache.get(HostOffset(0))).unwrap();
        cache.update(&slice, 8..16, |bytes| bytes[8] = 1);
        let captured = cache.capture();
        cache.restore(&captured);
        assert_eq!(cache.capture()[0].buf.to_vec()[8], 1);
    }

    fn sharing(budget: &Arc<CacheBudget>) -> TableCache {
        let storage = Arc::new(MemoryStorage::new(vec![0; 1 << 20]));
        TableCache::new(storage, 512, budget, 0)
    }

    #[test]
    fn what_an_idle_image_holds_makes_room_for_a_busy_one() {
        let budget = CacheBudget::new(CacheSize::Bytes(200 * 512));
        let (idle, busy) = (sharing(&budget), sharing(&budget));
        for number in 0..200 {
            block_on(idle.get(HostOffset(512 * number))).unwrap();
        }
        for number in 0..1000 {
            block_on(busy.get(HostOffset(512 * number))).unwrap();
        }
        assert!(idle.slices.count.load(Ordering::Relaxed) < 100);
        assert!(budget.used() <= 300 * 512, "{} bytes", budget.used());
        drop(busy);
        let left = idle.slices.count.load(Ordering::Relaxed) as u64 * 512;
        assert_eq!(budget.used(), left);
        drop(idle);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn an_image_writes_back_when_half_of_the_memory_is_dirty_and_it_has_its_share_of_that() {
        let budget = CacheBudget::new(CacheSize::Bytes(100 * 512));
        let (one, other) = (sharing(&budget), sharing(&budget));
        let dirty = |cache: &TableCache, count: u64| {
            for number in 0..count {
                let slice = block_on(cache.get(HostOffset(512 * number))).unwrap();
                cache.update(&slice, 0..8, |_| ());
            }
        };
        dirty(&one, 45);
        dirty(&other, 5);
        assert!(!one.needs_write_back() && !other.needs_write_back());
        dirty(&other, 6);
        assert!(one.needs_write_back() && !other.needs_write_back());
        one.written(&one.capture());
        assert!(!one.needs_write_back());
    }

    #[test]
    fn by_default_the_memory_covers_all_images_up_to_a_bound() {
        let budget = CacheBudget::new(CacheSize::Covering);
        let storage = || Arc::new(MemoryStorage::new(Vec::new()));
        let small = TableCache::new(storage(), 65536, &budget, 5 << 20);
        assert_eq!(budget.limit(), 5 << 20);
        let large = TableCache::new(storage(), 65536, &budget, 1 << 30);
        assert_eq!(budget.limit(), 256 << 20);
        drop(large);
        assert_eq!(budget.limit(), 5 << 20);
        drop(small);
    }
}
