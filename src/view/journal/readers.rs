//! Children who read the base's blocks in their places, and the base that writes there what it has committed.
//!
//! A read and a write of the same block that are under way at the same time leave the reader with some of each. For
//! file data that is the guests' affair; metadata that are half old are damaged. Once the base has committed a
//! block, new reads find it in the log, so all that its checkpoint has to wait for is reads that began before: one
//! grace period for each commit, which is over long before, as a rule.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::image::InFlight;
use crate::image::grace::Grace;

/// The reads of places that are under way.
#[derive(Debug, Default)]
pub(super) struct Readers {
    grace: Grace,
    /// How many commits there were when a grace period began that is over.
    settled: AtomicU64,
}

impl Readers {
    /// A token to be held from before a look into the index until the read has ended.
    pub(super) fn enter(&self) -> InFlight {
        self.grace.enter()
    }

    /// Waits until no read is under way that looked into the index before the last of `commits` was there.
    pub(super) async fn settle(&self, commits: u64) {
        if self.settled.load(Ordering::Acquire) < commits {
            self.grace.all_ended().await;
            self.settled.fetch_max(commits, Ordering::AcqRel);
        }
    }
}
