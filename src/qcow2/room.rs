//! Room in the host file: taking clusters, giving back what was taken in vain, growing the refcount table.
//!
//! # Invariants
//!
//! Numbers in brackets are those of the crash order in `qcow2::flush`.
//!
//! 1. Whoever takes clusters either links them or gives them back ([`Taken`]). Those of a task that is dropped while
//!    its I/O may still be under way go the way of unlinked ones: they are free once that I/O has ended.
//! 2. \[rule 7\] The refcount table grows by writing the new one with its blocks, a barrier, one header write, and a
//!    barrier; then only is the old one freed.

use super::allocator::{Answer, Growth, Run};
use super::engine::Qcow2;
use super::flush::write_all;
use super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::quarantine::Dropped;
use crate::error::Result;
use crate::sys::IoBuf;
use crate::units::HostCluster;

/// Clusters taken that nothing points to yet.
#[derive(Debug, Default)]
pub(super) struct Taken {
    runs: Vec<Run>,
}

impl Taken {
    /// Clusters of which a reference each was taken otherwise.
    pub(super) fn references(clusters: impl Iterator<Item = HostCluster>) -> Self {
        let run = |first| Run {
            first,
            count: 1,
            untouched: false,
        };
        Self {
            runs: clusters.map(run).collect(),
        }
    }

    /// The clusters, in the order in which they were taken, each with whether it reads as zeros since the file ends
    /// before it.
    pub(super) fn clusters(&self) -> impl Iterator<Item = (HostCluster, bool)> {
        self.runs.iter().flat_map(|run| {
            (0..run.count).map(|number| (HostCluster(run.first.0 + number), run.untouched))
        })
    }
}

/// Clusters that a task has taken. If it is dropped, they are given back when nothing uses them any more.
#[must_use]
pub(super) struct ReclaimIfDropped<'a> {
    image: &'a Qcow2,
    clusters: Vec<HostCluster>,
}

impl ReclaimIfDropped<'_> {
    /// The task has gone on, and knows itself what becomes of them.
    pub(super) fn settle(mut self) {
        self.clusters.clear();
    }
}

impl Drop for ReclaimIfDropped<'_> {
    fn drop(&mut self) {
        let clusters = std::mem::take(&mut self.clusters);
        self.image.unlink(Dropped::own(clusters));
    }
}

impl Qcow2 {
    /// Sees to it that clusters are given back if the calling task is dropped from here on.
    pub(super) fn reclaim_if_dropped(&self, taken: &Taken) -> ReclaimIfDropped<'_> {
        ReclaimIfDropped {
            image: self,
            clusters: taken.clusters().map(|(cluster, _)| cluster).collect(),
        }
    }

    /// Takes `count` clusters, as contiguous as there is room.
    ///
    /// # Errors
    /// The storage's, and the allocator's; nothing stays taken then.
    pub(super) async fn take_clusters(&self, count: u64) -> Result<Taken> {
        let mut taken = Taken::default();
        let mut missing = count;
        while missing > 0 {
            let unless_dropped = self.reclaim_if_dropped(&taken);
            let run = self.take_run(missing).await;
            unless_dropped.settle();
            match run {
                Ok(run) => {
                    missing -= run.count;
                    taken.runs.push(run);
                }
                Err(error) => {
                    self.give_back(taken).await;
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    async fn take_run(&self, want: u64) -> Result<Run> {
        loop {
            let answer = self.allocator.try_take(want);
            match self.judge(answer).await? {
                Answer::Known(run) => return Ok(run),
                Answer::Load(slice) => drop(self.allocator.blocks.get(slice).await?),
                Answer::Grow => self.grow_refcount_table().await?,
            }
        }
    }

    /// Gives clusters back that no L2 entry ever pointed to, and whose I/O has ended.
    pub(super) async fn give_back(&self, taken: Taken) {
        for (cluster, _) in taken.clusters() {
            if let Err(error) = self.release(cluster).await {
                log::warn!(
                    "{}: cluster {cluster} is leaked: {error}",
                    self.storage.name()
                );
            }
        }
    }

    /// Takes one reference to a cluster away.
    ///
    /// # Errors
    /// The storage's; [`crate::error::ErrorKind::Corrupt`] if there was none.
    pub(super) async fn release(&self, cluster: HostCluster) -> Result<()> {
        loop {
            let answer = self.allocator.try_release(cluster);
            match self.judge(answer).await? {
                Answer::Load(slice) => drop(self.allocator.blocks.get(slice).await?),
                Answer::Known(_) | Answer::Grow => return Ok(()),
            }
        }
    }

    /// The refcount of a cluster in use.
    ///
    /// # Errors
    /// The storage's; [`crate::error::ErrorKind::Corrupt`] for a broken refcount table entry.
    pub(super) async fn refcount(&self, cluster: HostCluster) -> Result<u64> {
        loop {
            let answer = self.allocator.try_refcount(cluster);
            match self.judge(answer).await? {
                Answer::Known(refcount) => return Ok(refcount),
                Answer::Load(slice) => drop(self.allocator.blocks.get(slice).await?),
                Answer::Grow => return Ok(0),
            }
        }
    }

    /// Grows the refcount table, unless someone else has done so by the time it is our turn.
    async fn grow_refcount_table(&self) -> Result<()> {
        let seen = self.allocator.table_len();
        // No flush may write blocks while we do: what we capture here must be durable before any L2 entry relies
        // on it.
        let _flushing = self.flushing.lock().await;
        if self.allocator.table_len() != seen {
            return Ok(());
        }
        self.check_not_poisoned()?;
        let growth = self.allocator.plan_growth(MAX_REFCOUNT_TABLE_BYTES)?;
        let unless_dropped = self.health.poison_if_dropped("growing the refcount table");
        let outcome = self.write_grown_table(&growth).await;
        unless_dropped.settle();
        match outcome {
            Ok(()) => {
                self.allocator.finish_growth(&growth);
                let old =
                    (0..growth.old.count).map(|number| HostCluster(growth.old.first.0 + number));
                self.unlink(Dropped::shared(old));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Invariant 2.
    async fn write_grown_table(&self, growth: &Growth) -> Result<()> {
        let blocks = self.allocator.blocks.capture();
        let prepared = async {
            write_all(
                self.storage.as_ref(),
                blocks.iter().map(|block| (block.at, &block.buf)),
            )
            .await?;
            let table = IoBuf::from_bytes(&growth.bytes);
            self.storage.writev(growth.table_at, table).await
        };
        if let Err(error) = prepared.await {
            // The old table is in force and intact.
            self.allocator.blocks.restore(&blocks);
            self.allocator.abandon_growth(growth);
            return Err(error);
        }
        self.allocator.blocks.written(&blocks);
        let switched = async {
            self.storage.flush().await?;
            let clusters = u32::try_from(growth.table_clusters).unwrap_or(u32::MAX);
            self.update_header(|header| {
                header.refcount_table_offset = growth.table_at;
                header.refcount_table_clusters = clusters;
            })
            .await?;
            self.storage.flush().await
        };
        let switched = switched.await;
        if let Err(error) = &switched {
            // Which of the two tables is in force is no longer known.
            self.health.poison(error);
        }
        switched
    }
}
