//! What becomes of a freed host cluster until it may be used again.
//!
//! ```text
//! unlinked in memory ─ flush ─> unlinked on disk ─ grace ─> punched out of the file ─> refcount decremented: free
//! ```
//!
//! # Invariants
//!
//! 1. \[rule 4\] The refcount is decremented only after the entry that pointed to the cluster is durably gone. So
//!    the allocator, which goes by refcounts, cannot hand the cluster out before.
//! 2. Nor before all I/O has ended that may have looked up the old entry (`image::grace`).
//! 3. Nor before the hole is punched: a late punch would destroy the new data.
//! 4. A cluster that others still refer to loses one reference, and no byte.
//! 5. `Allocator::await_freeing` knows of every cluster in here that the disk had for itself, and so has to replace if
//!    it is written again. Where the file would grow beyond its nominal length, the change that needs it starts anew
//!    after they have become free ([`Qcow2::change`]).

use std::collections::{BTreeMap, VecDeque};
use std::sync::{MutexGuard, PoisonError};

use super::allocator::AwaitsFreeing;
use super::cow::references;
use super::engine::Qcow2;
use super::entry::L2Entry;
use super::geometry::Geometry;
use crate::error::{Error, Result};
use crate::image::grace::Epoch;
use crate::units::HostCluster;

/// Freed clusters wait for a flush; so many of them start one.
const MAX_UNLINKED: usize = 32 << 10;

/// References to host clusters that nothing in memory holds any more.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    /// One item for each reference.
    references: Vec<HostCluster>,
    /// How many of them were the only one to a cluster that the disk could write to.
    own: u64,
}

impl Dropped {
    /// References to clusters that belong to others too, or need no replacement.
    pub(super) fn shared(clusters: impl IntoIterator<Item = HostCluster>) -> Self {
        Self {
            references: clusters.into_iter().collect(),
            own: 0,
        }
    }

    /// The only references to clusters.
    pub(super) fn own(clusters: Vec<HostCluster>) -> Self {
        Self {
            own: clusters.len() as u64,
            references: clusters,
        }
    }

    /// Adds what an L2 entry refers to that is there no more.
    pub(super) fn add(&mut self, geometry: &Geometry, entry: &L2Entry) {
        let before = self.references.len();
        self.references.extend(references(geometry, entry));
        if matches!(entry, L2Entry::Plain(cluster) if cluster.own_host().is_some()) {
            self.own += (self.references.len() - before) as u64;
        }
    }

    fn append(&mut self, mut other: Self) {
        self.references.append(&mut other.references);
        self.own += other.own;
    }
}

/// References that the disk has dropped, and the I/O that may still use them.
#[derive(Debug)]
pub(super) struct Retired {
    epoch: Epoch,
    dropped: Dropped,
}

impl Qcow2 {
    /// Notes references that memory has just dropped, *after* the entries have been changed, and before the guest
    /// clusters are released.
    pub(super) fn unlink(&self, dropped: Dropped) {
        // Invariant 5: known before it can become free.
        self.allocator.await_freeing(dropped.own);
        self.lock_unlinked().append(dropped);
    }

    /// Takes all references that memory has dropped, for the disk to drop them.
    pub(super) fn take_unlinked(&self) -> Dropped {
        std::mem::take(&mut *self.lock_unlinked())
    }

    /// Puts back what the disk could not be made to drop.
    pub(super) fn put_unlinked_back(&self, dropped: Dropped) {
        self.lock_unlinked().append(dropped);
    }

    fn lock_unlinked(&self) -> MutexGuard<'_, Dropped> {
        self.unlinked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_retired(&self) -> MutexGuard<'_, VecDeque<Retired>> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether so many clusters wait for a flush that one is due.
    pub(super) fn has_much_unlinked(&self) -> bool {
        self.lock_unlinked().references.len() > MAX_UNLINKED
    }

    /// Notes references that the disk has durably dropped (invariant 1).
    pub(super) fn retire(&self, dropped: Dropped) {
        if dropped.references.is_empty() {
            return;
        }
        let epoch = self.grace.turn();
        self.lock_retired().push_back(Retired { epoch, dropped });
    }

    /// Makes a change, given as often as it takes: where it needs room that clusters in here are to give, it starts
    /// anew after they have. `change` has given back what it took when it fails, and nothing of it is under way then.
    ///
    /// # Errors
    /// Those of the change, and of a flush.
    pub(super) async fn with_room<F>(&self, change: impl Fn() -> F) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        loop {
            match change().await {
                // What others discard meanwhile can make it wait again. They have then got on.
                Err(error) if awaits_freeing(&error) => self.free_dropped().await?,
                outcome => return outcome,
            }
        }
    }

    /// Frees all that was dropped before the call. The caller holds no lock, and no token of `grace`: it would wait
    /// for itself.
    ///
    /// # Errors
    /// As [`Qcow2::flush_all`].
    async fn free_dropped(&self) -> Result<()> {
        self.flush_all().await?;
        self.grace.all_ended().await;
        let _flushing = self.flushing.lock().await;
        self.check_not_poisoned()?;
        let unless_dropped = self.health.poison_if_dropped("freeing clusters");
        self.free_retired().await;
        unless_dropped.settle();
        Ok(())
    }

    /// Frees what was retired and is no longer used; called with `flushing` held, so that no one else does.
    ///
    /// What cannot be freed is leaked, which harms nobody.
    pub(super) async fn free_retired(&self) {
        loop {
            let retired = {
                let mut retired = self.lock_retired();
                // Invariant 2. Epochs end in their order: an earlier one may still know what a later one freed.
                match retired.front() {
                    Some(first) if first.epoch.has_ended() => retired.pop_front(),
                    _ => None,
                }
            };
            let Some(Retired { dropped, .. }) = retired else {
                return;
            };
            let mut counted: BTreeMap<HostCluster, u64> = BTreeMap::new();
            for cluster in dropped.references {
                *counted.entry(cluster).or_default() += 1;
            }
            self.punch_unused(&counted).await;
            for (cluster, count) in counted {
                self.drop_references(cluster, count).await;
            }
            self.allocator.end_awaiting(dropped.own);
        }
    }

    async fn drop_references(&self, cluster: HostCluster, count: u64) {
        for _ in 0..count {
            if let Err(error) = self.release(cluster).await {
                log::warn!(
                    "{}: cluster {cluster} is leaked: {error}",
                    self.storage.name()
                );
                return;
            }
        }
    }

    /// Gives the room of clusters back that lose their last reference (invariant 3), contiguous ones at once.
    async fn punch_unused(&self, dropped: &BTreeMap<HostCluster, u64>) {
        let mut run: Option<(HostCluster, u64)> = None;
        for (cluster, count) in dropped {
            // Else compressed data could be put there after the look at the refcount, and be punched out.
            self.allocator.stop_packing(*cluster);
            // Invariant 4. A refcount that cannot be read keeps its cluster.
            if self.refcount(*cluster).await.unwrap_or(u64::MAX) > *count {
                continue;
            }
            if self.allocator.is_table(*cluster) {
                self.l2.forget(
                    self.geometry.host_start(*cluster),
                    self.geometry.cluster_size(),
                );
            }
            run = match run {
                Some((first, len)) if first.checked_add(len) == Some(*cluster) => {
                    Some((first, len + 1))
                }
                other => {
                    self.punch(other).await;
                    Some((*cluster, 1))
                }
            };
        }
        self.punch(run).await;
    }

    async fn punch(&self, run: Option<(HostCluster, u64)>) {
        let Some((first, count)) = run else { return };
        let at = self.geometry.host_start(first);
        // A hint: a filesystem that cannot punch holes only keeps the room.
        if let Err(error) = self
            .storage
            .discard(at, count * self.geometry.cluster_size())
            .await
        {
            log::debug!(
                "{}: cannot punch out cluster {first}: {error}",
                self.storage.name()
            );
        }
    }
}

/// Whether this is about room that there will be once clusters have become free.
fn awaits_freeing(error: &Error) -> bool {
    let mut causes =
        std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.any(<dyn std::error::Error>::is::<AwaitsFreeing>)
}
