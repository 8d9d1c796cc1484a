//! How often a guest can have its view moved: moving makes the base's VM wait, and a guest could ask for it all the
//! time.

use std::time::{Duration, Instant};

/// For each time that moving takes, so many are free of it.
const REST: u32 = 9;

/// The longest that a guest waits for its superblock.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// When the view may be moved next. Until then a guest that asks for it waits.
#[derive(Debug, Default)]
pub(super) struct Pace {
    next: Option<Instant>,
}

impl Pace {
    /// How long to wait, `now`.
    pub(super) fn time_left(&self, now: Instant) -> Duration {
        let left = self.next.map(|next| next.saturating_duration_since(now));
        left.unwrap_or_default().min(MAX_WAIT)
    }

    /// The view has been moved, from `began` to `now`.
    pub(super) fn ended(&mut self, began: Instant, now: Instant) {
        let rest = now.saturating_duration_since(began).saturating_mul(REST);
        self.next = now.checked_add(rest.min(MAX_WAIT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_takes_a_tenth_of_the_time_at_most_and_nobody_waits_for_ever() {
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.time_left(start), Duration::ZERO);
        let took = Duration::from_millis(20);
        pace.ended(start, start + took);
        assert_eq!(pace.time_left(start + took), took * REST);
        assert_eq!(pace.time_left(start + took * 10), Duration::ZERO);
        pace.ended(start, start + MAX_WAIT * 10);
        assert_eq!(pace.time_left(start), MAX_WAIT);
    }
}
