//! A set of host clusters, kept as ranges: large tables take one of them.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges of host clusters that neither overlap nor touch.
#[derive(Debug, Default)]
pub(super) struct ClusterRanges {
    /// Ends by starts.
    ranges: BTreeMap<u64, u64>,
}

impl ClusterRanges {
    /// Adds every cluster of a range.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut merged = range;
        while let Some((start, end)) = self
            .last_up_to(merged.end)
            .filter(|(_, end)| *end >= merged.start)
        {
            self.ranges.remove(&start);
            merged = start.min(merged.start)..end.max(merged.end);
        }
        self.ranges.insert(merged.start, merged.end);
    }

    /// Takes every cluster of a range out.
    pub(super) fn remove(&mut self, range: Range<u64>) {
        while let Some((start, end)) = self.overlapping(&range) {
            self.ranges.remove(&start);
            if start < range.start {
                self.ranges.insert(start, range.start);
            }
            if end > range.end {
                self.ranges.insert(range.end, end);
            }
        }
    }

    /// Whether any cluster of a range is in the set.
    pub(super) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.overlapping(range).is_some()
    }

    fn overlapping(&self, range: &Range<u64>) -> Option<(u64, u64)> {
        let last = range.end.checked_sub(1).filter(|_| !range.is_empty())?;
        self.last_up_to(last).filter(|(_, end)| *end > range.start)
    }

    /// The last range that starts at `cluster` or before.
    fn last_up_to(&self, cluster: u64) -> Option<(u64, u64)> {
        let (start, end) = self.ranges.range(..=cluster).next_back()?;
        Some((*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(set: &ClusterRanges) -> Vec<Range<u64>> {
        set.ranges.iter().map(|(start, end)| *start..*end).collect()
    }

    #[test]
    fn ranges_that_overlap_or_touch_become_one() {
        let mut set = ClusterRanges::default();
        for range in [10..20, 30..40, 5..5, 50..60, 20..25, 0..1, 24..31] {
            set.insert(range);
        }
        assert_eq!(ranges(&set), [0..1, 10..40, 50..60]);
        set.insert(0..100);
        assert_eq!(ranges(&set), vec![0..100]);
    }

    #[test]
    fn what_is_taken_out_leaves_what_is_around_it() {
        let mut set = ClusterRanges::default();
        set.insert(10..40);
        set.insert(50..60);
        set.remove(20..30);
        set.remove(35..55);
        set.remove(0..0);
        assert_eq!(ranges(&set), [10..20, 30..35, 55..60]);
        for (range, expected) in [
            (0..10, false),
            (0..11, true),
            (19..20, true),
            (20..30, false),
            (20..31, true),
            (34..34, false),
            (60..99, false),
        ] {
            assert_eq!(set.overlaps(&range), expected, "{range:?}");
        }
    }
}
