//! How long a worker looks for more before it sleeps.
//!
//! Going to sleep and being woken costs both sides more than a request does. A worker that has just had work
//! therefore looks on for a moment; how long follows from what the last looks brought. An idle worker never
//! polls: sleeping long means that looking on would have been in vain.

use std::time::{Duration, Instant};

/// The longest look.
const MAX: Duration = Duration::from_micros(50);
/// The shortest look that is worth it.
const MIN: Duration = Duration::from_micros(4);

/// The present patience, and since when there was nothing to do.
#[derive(Debug)]
pub(super) struct Polling {
    budget: Duration,
    idle_since: Option<Instant>,
}

/// What to do when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// Look again.
    Look,
    /// Sleep until woken.
    Sleep,
}

impl Polling {
    pub(super) fn new() -> Self {
        Self {
            budget: MAX,
            idle_since: None,
        }
    }

    /// There was work.
    pub(super) fn worked(&mut self) {
        self.idle_since = None;
    }

    /// There was none at `now`.
    pub(super) fn found_nothing(&mut self, now: Instant) -> Advice {
        let since = *self.idle_since.get_or_insert(now);
        if now.saturating_duration_since(since) < self.budget {
            Advice::Look
        } else {
            Advice::Sleep
        }
    }

    /// The worker has slept for `time`: work that came within the longest look would have been worth it.
    pub(super) fn slept(&mut self, time: Duration) {
        self.budget = if time < MAX {
            (self.budget * 2).clamp(MIN, MAX)
        } else if self.budget > MIN {
            self.budget / 2
        } else {
            Duration::ZERO
        };
        self.idle_since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(1);

    #[test]
    fn looks_on_for_its_budget_and_then_sleeps() {
        let mut polling = Polling::new();
        let start = Instant::now();
        assert_eq!(polling.found_nothing(start), Advice::Look);
        assert_eq!(polling.found_nothing(start + MAX - MIN), Advice::Look);
        assert_eq!(polling.found_nothing(start + MAX), Advice::Sleep);
    }

    #[test]
    fn work_starts_the_budget_anew() {
        let mut polling = Polling::new();
        let start = Instant::now();
        assert_eq!(polling.found_nothing(start), Advice::Look);
        polling.worked();
        assert_eq!(polling.found_nothing(start + MAX), Advice::Look);
    }

    #[test]
    fn long_sleeps_end_polling_and_short_ones_bring_it_back() {
        let mut polling = Polling::new();
        let now = Instant::now();
        for _ in 0..8 {
            polling.slept(LONG);
        }
        assert_eq!(polling.found_nothing(now), Advice::Sleep, "idle");
        polling.slept(MIN);
        assert_eq!(polling.found_nothing(now), Advice::Look, "busy again");
        for _ in 0..8 {
            polling.slept(MIN);
        }
        assert_eq!(polling.budget, MAX);
    }
}
