//! How far a long job has come: counted by whoever does the work, drawn by whoever watches.

use std::sync::atomic::{AtomicU64, Ordering};

/// The work of one job, in a unit of the job's choice (bytes, mostly). Counting costs one atomic addition, so a
/// job counts whether anyone watches or not.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    done: AtomicU64,
}

impl Progress {
    /// Says that there is this much work beside what was expected before.
    pub fn expect(&self, more: u64) {
        self.total.fetch_add(more, Ordering::Relaxed);
    }

    /// Says that this much of it has been done.
    pub fn advance(&self, by: u64) {
        self.done.fetch_add(by, Ordering::Relaxed);
    }

    /// What has been done, never more than the total.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed).min(self.total())
    }

    /// All work that is expected so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_does_more_than_it_expected_is_not_more_than_done() {
        let progress = Progress::default();
        progress.expect(10);
        progress.advance(4);
        assert_eq!((progress.done(), progress.total()), (4, 10));
        progress.advance(8);
        assert_eq!((progress.done(), progress.total()), (10, 10));
    }
}
