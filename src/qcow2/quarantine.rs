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
//! 2. Nor before all I/O has ended that may have looked up the old entry (`qcow2::grace`).
//! 3. Nor before the hole is punched: a late punch would destroy the new data.
//! 4. A cluster that others still refer to loses one reference, and no byte.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};

use super::engine::Qcow2;
use super::grace::Epoch;
use crate::units::HostCluster;

/// Freed clusters wait for a flush; so many of them start one.
const MAX_UNLINKED: usize = 32 << 10;

/// References that the disk has dropped, and the I/O that may still use them.
#[derive(Debug)]
pub(super) struct Retired {
    epoch: Epoch,
    references: Vec<HostCluster>,
}

impl Qcow2 {
    /// Notes references that memory has just dropped, *after* the entries have been changed.
    pub(super) fn unlink(&self, references: impl IntoIterator<Item = HostCluster>) {
        self.lock_unlinked().extend(references);
    }

    pub(super) fn lock_unlinked(&self) -> MutexGuard<'_, Vec<HostCluster>> {
        self.unlinked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether so many clusters wait for a flush that one is due.
    pub(super) fn has_much_unlinked(&self) -> bool {
        self.lock_unlinked().len() > MAX_UNLINKED
    }

    /// Notes references that the disk has durably dropped (invariant 1).
    pub(super) fn retire(&self, references: Vec<HostCluster>) {
        if references.is_empty() {
            return;
        }
        let epoch = self.grace.turn();
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        retired.push_back(Retired { epoch, references });
    }

    /// Frees what was retired and is no longer used; called with `flushing` held, so that no one else does.
    ///
    /// What cannot be freed is leaked, which harms nobody.
    pub(super) async fn free_retired(&self) {
        loop {
            let references = {
                let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
                // Invariant 2. Epochs end in their order: an earlier one may still know what a later one freed.
                match retired.front() {
                    Some(first) if first.epoch.has_ended() => retired.pop_front(),
                    _ => None,
                }
            };
            let Some(Retired { references, .. }) = references else {
                return;
            };
            let mut dropped: BTreeMap<HostCluster, u64> = BTreeMap::new();
            for cluster in references {
                *dropped.entry(cluster).or_default() += 1;
            }
            self.punch_unused(&dropped).await;
            for (cluster, count) in dropped {
                self.drop_references(cluster, count).await;
            }
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
