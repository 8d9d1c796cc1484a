//! What happened, in numbers: counters that cost next to nothing to keep.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows. Reading it says nothing about the order of other events.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The number so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the queues of one VM did, since the daemon started.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Requests submitted straight from the queue's worker.
    pub fast: Counter,
    /// Requests answered from memory alone.
    pub immediate: Counter,
    /// Requests that ran as a task.
    pub slow: Counter,
    /// Requests that ended with another status than OK, malformed ones included.
    pub failed: Counter,
    /// Times that a driver was told of used descriptors.
    pub notifications: Counter,
    /// Times that a worker went to sleep.
    pub sleeps: Counter,
}

impl fmt::Display for QueueCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "requests: {} fast, {} immediate, {} slow, {} failed; {} notifications, {} sleeps",
            self.fast.get(),
            self.immediate.get(),
            self.slow.get(),
            self.failed.get(),
            self.notifications.get(),
            self.sleeps.get()
        )
    }
}
