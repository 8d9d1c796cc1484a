//! The memory that the metadata caches of several images may take together: L2 tables and refcount blocks of a base and
//! all its children, each file's tables in it once.
//!
//! # Invariants
//!
//! 1. `used` is what the slices of all members take. Beyond the limit members give slices up in turn, whoever asks
//!    for more: what an idle image holds goes to a busy one.
//! 2. A member that is gone takes nothing, and wants nothing.
//!
//! Lock order: `members`, and under it nothing. A member's shards are locked after it is released.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::table_cache::Slices;

/// The most that caches take together unless told otherwise.
const MAX_BY_DEFAULT: u64 = 256 << 20;

/// How large caches may become together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheSize {
    /// As large as covers the images, each within a bound, and all of them within another one.
    #[default]
    Covering,
    /// As large as all metadata that is used.
    Full,
    /// About so many bytes.
    Bytes(u64),
}

/// A bound for caches that share it.
#[derive(Debug)]
pub struct CacheBudget {
    size: CacheSize,
    /// What members have said that they want.
    wanted: AtomicU64,
    /// The bound in bytes.
    limit: AtomicU64,
    used: AtomicU64,
    dirty: AtomicU64,
    members: Mutex<Vec<Weak<Slices>>>,
    turn: AtomicUsize,
}

impl CacheBudget {
    /// A budget that nobody uses yet.
    #[must_use]
    pub fn new(size: CacheSize) -> Arc<Self> {
        Arc::new(Self {
            size,
            wanted: AtomicU64::new(0),
            limit: AtomicU64::new(match size {
                CacheSize::Covering => 0,
                CacheSize::Full => u64::MAX,
                CacheSize::Bytes(bytes) => bytes,
            }),
            used: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            members: Mutex::default(),
            turn: AtomicUsize::new(0),
        })
    }

    /// Bytes that the members take now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The bound in bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn join(&self, slices: &Arc<Slices>, wanted: u64) {
        let mut members = self.members();
        members.retain(|member| member.strong_count() > 0);
        members.push(Arc::downgrade(slices));
        self.wanted.fetch_add(wanted, Ordering::Relaxed);
        self.follow_wanted();
    }

    /// Invariant 2.
    pub(super) fn leave(&self, wanted: u64, used: u64, dirty: u64) {
        let _members = self.members();
        self.used.fetch_sub(used, Ordering::Relaxed);
        self.dirty.fetch_sub(dirty, Ordering::Relaxed);
        self.wanted.fetch_sub(wanted, Ordering::Relaxed);
        self.follow_wanted();
    }

    /// Called with `members` locked.
    fn follow_wanted(&self) {
        if self.size == CacheSize::Covering {
            let wanted = self.wanted.load(Ordering::Relaxed);
            self.limit
                .store(wanted.min(MAX_BY_DEFAULT), Ordering::Relaxed);
        }
    }

    pub(super) fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn took(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn gave_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn made_dirty(&self, bytes: u64) {
        self.dirty.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn cleaned(&self, bytes: u64) {
        self.dirty.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether a member with so many dirty bytes has to write back, for others to find room: half of the memory is
    /// dirty, and this member has its share of that.
    pub(super) fn needs_write_back(&self, own_dirty: u64) -> bool {
        let half = self.limit() / 2;
        self.dirty.load(Ordering::Relaxed) > half
            && own_dirty > half / self.members().len().max(1) as u64
    }

    /// Brings the memory down to the limit as far as `attempts` go (invariant 1).
    pub(super) fn evict(&self, attempts: usize) {
        for _ in 0..attempts {
            if self.used() <= self.limit() {
                return;
            }
            let Some(member) = self.next_member() else {
                return;
            };
            let freed = member.evict_in_one_shard();
            self.gave_back(freed);
        }
    }

    /// The next member that holds anything.
    fn next_member(&self) -> Option<Arc<Slices>> {
        let members = self.members();
        let start = self.turn.fetch_add(1, Ordering::Relaxed);
        (0..members.len())
            .filter_map(|further| {
                let index = start.wrapping_add(further) % members.len();
                members.get(index)?.upgrade()
            })
            .find(|member| !member.is_empty())
    }

    fn members(&self) -> MutexGuard<'_, Vec<Weak<Slices>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
