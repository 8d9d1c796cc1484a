//! Latencies, counted in buckets whose width is at most 1/64 of what they hold.

use std::time::Duration;

/// Buckets for each power of two.
const FINE: u64 = 64;
const FINE_BITS: u32 = FINE.ilog2();
/// Enough for the nanoseconds of an hour.
const BUCKETS: usize = 64 * 38;

/// How many requests took how long.
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Histogram {
    pub(crate) fn new() -> Self {
        Self {
            counts: vec![0; BUCKETS],
            total: 0,
        }
    }

    pub(crate) fn add(&mut self, latency: Duration) {
        let index = index_of(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        self.counts[index.min(BUCKETS - 1)] += 1;
        self.total += 1;
    }

    /// The latency that a share of `per_mille` of all requests did not exceed, in microseconds.
    pub(crate) fn percentile_us(&self, per_mille: u64) -> f64 {
        let rank = (self.total * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return upper_bound(index) as f64 / 1000.0;
            }
        }
        0.0
    }
}

/// Values below [`FINE`] have a bucket each; of what is larger, the leading bits choose it.
fn index_of(nanos: u64) -> usize {
    let shift = nanos.max(1).ilog2().saturating_sub(FINE_BITS);
    let index = u64::from(shift) * FINE + (nanos >> shift);
    usize::try_from(index).unwrap_or(BUCKETS)
}

/// The largest value in a bucket.
fn upper_bound(index: usize) -> u64 {
    let index = index as u64;
    let shift = (index / FINE).saturating_sub(1);
    ((index - shift * FINE + 1) << shift) - 1
}
