//! A list of block groups.
//!
//! # Invariants
//!
//! 1. A [`GroupList`] is sorted, and no two of its ranges overlap or touch.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::units::BlockGroup;

/// Block groups as people write them: `8-15` or `3,8-15`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupList {
    /// First and last group of every range (invariant 1).
    ranges: Vec<(BlockGroup, BlockGroup)>,
}

impl GroupList {
    /// First and last group of every range, in order.
    #[must_use]
    pub fn ranges(&self) -> &[(BlockGroup, BlockGroup)] {
        &self.ranges
    }

    /// The highest group.
    #[must_use]
    pub fn last(&self) -> Option<BlockGroup> {
        self.ranges.last().map(|&(_, last)| last)
    }

    /// How many groups there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ranges
            .iter()
            .map(|(first, last)| u64::from(last.0 - first.0) + 1)
            .sum()
    }

    /// Every group, in order. Check [`GroupList::last`] against the filesystem first: a list from an image may
    /// name four thousand million.
    pub fn iter(&self) -> impl Iterator<Item = BlockGroup> {
        self.ranges
            .iter()
            .flat_map(|(first, last)| (first.0..=last.0).map(BlockGroup))
    }

    /// Whether `group` is in the list.
    #[must_use]
    pub fn contains(&self, group: BlockGroup) -> bool {
        self.ranges
            .iter()
            .any(|&(first, last)| first <= group && group <= last)
    }

    /// Whether every group of `other` is in the list, which takes no longer for a long range than for a short one.
    #[must_use]
    pub fn includes(&self, other: &Self) -> bool {
        other.ranges.iter().all(|&(first, last)| {
            self.ranges
                .iter()
                .any(|&(start, end)| start <= first && last <= end)
        })
    }

    /// The lowest group that is in both lists.
    #[must_use]
    pub fn first_in_common(&self, other: &Self) -> Option<BlockGroup> {
        self.ranges
            .iter()
            .flat_map(|a| {
                other
                    .ranges
                    .iter()
                    .map(move |b| (a.0.max(b.0), a.1.min(b.1)))
            })
            .filter(|(first, last)| first <= last)
            .map(|(first, _)| first)
            .min()
    }
}

impl FromIterator<BlockGroup> for GroupList {
    fn from_iter<I: IntoIterator<Item = BlockGroup>>(groups: I) -> Self {
        let mut groups: Vec<BlockGroup> = groups.into_iter().collect();
        groups.sort_unstable();
        groups.dedup();
        let mut ranges: Vec<(BlockGroup, BlockGroup)> = Vec::new();
        for group in groups {
            match ranges.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(group) => *last = group,
                _ => ranges.push((group, group)),
            }
        }
        Self { ranges }
    }
}

impl FromStr for GroupList {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "\"{}\" is no list of block groups; write one like 8-15 or 3,8-15",
                    text.escape_debug()
                ),
            )
        };
        let number = |digits: &str| digits.parse().map(BlockGroup).map_err(|_| wrong());
        let mut ranges = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(wrong());
            }
            ranges.push((first, last));
        }
        ranges.sort_unstable();
        let mut merged: Vec<(BlockGroup, BlockGroup)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= *end => return Err(wrong()),
                Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
                _ => merged.push((first, last)),
            }
        }
        Ok(Self { ranges: merged })
    }
}

impl TryFrom<String> for GroupList {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<GroupList> for String {
    fn from(list: GroupList) -> Self {
        list.to_string()
    }
}

impl fmt::Display for GroupList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_lists_are_normalised_and_printed_as_people_write_them() {
        let list: GroupList = "20,8-11,12-15".parse().unwrap();
        assert_eq!(list.to_string(), "8-15,20");
        assert_eq!(list.count(), 9);
        assert!(list.contains(BlockGroup(12)) && !list.contains(BlockGroup(16)));
        assert_eq!(
            [1, 2, 5]
                .map(BlockGroup)
                .into_iter()
                .collect::<GroupList>()
                .to_string(),
            "1-2,5"
        );
        for wrong in ["", "a", "5-3", "1-", "-1", "1,,2", "1-3,2", "4294967296"] {
            assert!(wrong.parse::<GroupList>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_first_group_in_common_is_found_whatever_the_order_of_ranges() {
        let list = |text: &str| text.parse::<GroupList>().unwrap();
        assert_eq!(list("1-3,9").first_in_common(&list("4-8")), None);
        assert_eq!(
            list("1-3,9").first_in_common(&list("0,3-9")),
            Some(BlockGroup(3))
        );
    }
}
