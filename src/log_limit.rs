//! A bound for log lines that somebody outside can cause: a few at once, and then one from time to time.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 16;
/// The time after which one more may come.
const REFILL: Duration = Duration::from_secs(10);

/// The lines of one kind.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<Allowance>);

impl LogLimit {
    /// Takes one line out of the allowance: `None` if it is used up, otherwise how many were left out since the last.
    pub fn take(&self) -> Option<u64> {
        let mut allowance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        allowance.take(Instant::now())
    }
}

/// How many more lines may be logged now.
#[derive(Debug)]
struct Allowance {
    lines: u32,
    since: Option<Instant>,
    suppressed: u64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self {
            lines: BURST,
            since: None,
            suppressed: 0,
        }
    }
}

impl Allowance {
    fn take(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let periods = now.saturating_duration_since(since).as_millis() / REFILL.as_millis();
        if let Ok(periods) = u32::try_from(periods)
            && periods < BURST
        {
            self.lines = self.lines.saturating_add(periods).min(BURST);
            self.since = Some(since + REFILL * periods);
        } else {
            self.lines = BURST;
            self.since = Some(now);
        }
        if self.lines == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_in_bounded_lines_and_says_what_it_left_out() {
        let start = Instant::now();
        let mut allowance = Allowance::default();
        let logged = (0..1000)
            .filter(|_| allowance.take(start).is_some())
            .count();
        assert_eq!(logged, BURST as usize);
        assert_eq!(
            allowance.take(start + REFILL),
            Some(1000 - u64::from(BURST))
        );
        assert_eq!(allowance.take(start + REFILL), None);
        let later = start + REFILL * 1000;
        assert_eq!(allowance.take(later), Some(1));
        let logged = (0..1000)
            .filter(|_| allowance.take(later).is_some())
            .count();
        assert_eq!(logged, BURST as usize - 1);
    }
}
