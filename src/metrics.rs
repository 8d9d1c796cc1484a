//! What happened, in numbers: counters that cost next to nothing to keep.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

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

/// [`QueueCounters`] at one moment, or nearly: each is read on its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct QueueTotals {
    /// Requests submitted straight from the queue's worker.
    pub fast: u64,
    /// Requests answered from memory alone.
    pub immediate: u64,
    /// Requests that ran as a task.
    pub slow: u64,
    /// Requests that ended with another status than OK.
    pub failed: u64,
    /// Times that a driver was told of used descriptors.
    pub notifications: u64,
    /// Times that a worker went to sleep.
    pub sleeps: u64,
}

impl QueueCounters {
    /// What they say now.
    #[must_use]
    pub fn totals(&self) -> QueueTotals {
        QueueTotals {
            fast: self.fast.get(),
            immediate: self.immediate.get(),
            slow: self.slow.get(),
            failed: self.failed.get(),
            notifications: self.notifications.get(),
            sleeps: self.sleeps.get(),
        }
    }
}

impl fmt::Display for QueueTotals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "requests: {} fast, {} immediate, {} slow, {} failed; {} notifications, {} sleeps",
            self.fast, self.immediate, self.slow, self.failed, self.notifications, self.sleeps
        )
    }
}
