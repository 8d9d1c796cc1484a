//! Which block groups are a VM's own.

use crate::units::BlockGroup;

/// A set of block groups of one filesystem; asking it takes constant time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupSet {
    words: Box<[u64]>,
    group_count: u32,
}

impl GroupSet {
    /// No group of a filesystem of `group_count` groups.
    #[must_use]
    pub fn none(group_count: u32) -> Self {
        let words = (0..group_count.div_ceil(64)).map(|_| 0).collect();
        Self { words, group_count }
    }

    /// The given groups of a filesystem of `group_count`; those outside it are left out.
    #[must_use]
    pub fn of(group_count: u32, groups: impl IntoIterator<Item = BlockGroup>) -> Self {
        let mut set = Self::none(group_count);
        for group in groups {
            set.insert(group);
        }
        set
    }

    /// Every group that is not in this set.
    #[must_use]
    pub fn complement(&self) -> Self {
        let others = (0..self.group_count)
            .map(BlockGroup)
            .filter(|&group| !self.contains(group));
        Self::of(self.group_count, others)
    }

    /// Adds `group`, if it is one of the filesystem's.
    pub fn insert(&mut self, group: BlockGroup) {
        if group.0 < self.group_count
            && let Some(word) = self.words.get_mut((group.0 / 64) as usize)
        {
            *word |= 1 << (group.0 % 64);
        }
    }

    /// Whether `group` is in the set; no group outside the filesystem is.
    #[must_use]
    pub fn contains(&self, group: BlockGroup) -> bool {
        self.words
            .get((group.0 / 64) as usize)
            .is_some_and(|word| word & (1 << (group.0 % 64)) != 0)
    }

    /// How many groups there are in the set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// The groups in the set, in order. What is not in it costs next to nothing.
    pub fn iter(&self) -> impl Iterator<Item = BlockGroup> {
        (0..)
            .step_by(64)
            .zip(&self.words)
            .flat_map(|(first, word)| {
                let mut rest = *word;
                std::iter::from_fn(move || {
                    let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                    rest &= rest - 1;
                    Some(BlockGroup(first + bit))
                })
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_outside_the_filesystem_are_never_in_the_set() {
        let mut set = GroupSet::of(70, [BlockGroup(3), BlockGroup(69), BlockGroup(70)]);
        set.insert(BlockGroup(u32::MAX));
        assert_eq!(set.count(), 2);
        assert!(set.contains(BlockGroup(69)));
        assert!(!set.contains(BlockGroup(70)));
        assert!(!set.contains(BlockGroup(u32::MAX)));
    }

    #[test]
    fn a_set_and_its_complement_share_every_group_once() {
        let set = GroupSet::of(130, (8..16).chain(64..66).map(BlockGroup));
        let rest = set.complement();
        assert_eq!(set.count() + rest.count(), 130);
        assert!((0..130).all(|g| set.contains(BlockGroup(g)) != rest.contains(BlockGroup(g))));
        let listed: Vec<u32> = set.iter().map(|group| group.0).collect();
        assert_eq!(listed, [8, 9, 10, 11, 12, 13, 14, 15, 64, 65]);
    }
}
