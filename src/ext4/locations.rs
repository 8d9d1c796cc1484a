//! Where the bitmaps and the inode table of each group are, told briefly.
//!
//! mke2fs puts the structures of groups side by side (`flex_bg`), or each at the same place in its own group. Groups
//! that follow each other in one of these ways are one span. Anything else is a span of its own: long, but right.

use super::group_descriptor::Locations;
use crate::units::{BlockGroup, FsBlock};

/// How the structures of a span's groups follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Each behind those of the group before.
    Packed,
    /// Each a group's length further on.
    Apart,
}

/// Groups whose structures follow each other regularly, up to the next span's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    first: u32,
    step: Step,
    /// Where those of the first group are.
    at: Locations,
}

/// The locations of all groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LocationTable {
    blocks_per_group: u32,
    inode_table_blocks: u32,
    group_count: u32,
    spans: Vec<Span>,
}

impl LocationTable {
    /// Those of no group yet.
    pub(super) fn new(blocks_per_group: u32, inode_table_blocks: u32) -> Self {
        Self {
            blocks_per_group,
            inode_table_blocks,
            group_count: 0,
            spans: Vec::new(),
        }
    }

    /// Adds those of the next group.
    pub(super) fn push(&mut self, at: Locations) {
        let group = self.group_count;
        self.group_count += 1;
        if let Some(last) = self.spans.last().copied() {
            // A span of one group goes on in either way.
            let steps = match group - last.first {
                1 => &[Step::Packed, Step::Apart][..],
                _ => std::slice::from_ref(&last.step),
            };
            for step in steps.iter().copied() {
                let span = Span { step, ..last };
                if self.within(&span, group) == at {
                    self.spans.pop();
                    self.spans.push(span);
                    return;
                }
            }
        }
        self.spans.push(Span {
            first: group,
            step: Step::Packed,
            at,
        });
    }

    /// Those of `group`; `None` if there is no such group.
    pub(super) fn get(&self, group: BlockGroup) -> Option<Locations> {
        if group.0 >= self.group_count {
            return None;
        }
        let behind = self.spans.partition_point(|span| span.first <= group.0);
        let span = self.spans.get(behind.checked_sub(1)?)?;
        Some(self.within(span, group.0))
    }

    /// Bytes of memory in use.
    pub(super) fn memory(&self) -> usize {
        self.spans.capacity() * size_of::<Span>()
    }

    /// Where those of `group` are if it is in `span`.
    fn within(&self, span: &Span, group: u32) -> Locations {
        let distance = u64::from(group - span.first);
        let on = |start: FsBlock, len: u32| {
            let len = match span.step {
                Step::Packed => len,
                Step::Apart => self.blocks_per_group,
            };
            FsBlock(start.0.saturating_add(distance * u64::from(len)))
        };
        Locations {
            block_bitmap: on(span.at.block_bitmap, 1),
            inode_bitmap: on(span.at.inode_bitmap, 1),
            inode_table: on(span.at.inode_table, self.inode_table_blocks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(block_bitmap: u64, inode_bitmap: u64, inode_table: u64) -> Locations {
        Locations {
            block_bitmap: FsBlock(block_bitmap),
            inode_bitmap: FsBlock(inode_bitmap),
            inode_table: FsBlock(inode_table),
        }
    }

    /// The table of `all`, held to be right; how many spans it takes.
    fn spans(all: &[Locations]) -> usize {
        let mut table = LocationTable::new(1000, 10);
        for at in all {
            table.push(*at);
        }
        for (group, at) in (0..).map(BlockGroup).zip(all) {
            assert_eq!(table.get(group), Some(*at));
        }
        assert_eq!(table.get(BlockGroup(table.group_count)), None);
        table.spans.len()
    }

    #[test]
    fn what_is_regular_is_one_span() {
        let packed: Vec<_> = (0..16).map(|i| at(20 + i, 40 + i, 60 + i * 10)).collect();
        assert_eq!(spans(&packed), 1);
        let apart: Vec<_> = (0..16)
            .map(|i| at(20 + i * 1000, 21 + i * 1000, 22 + i * 1000))
            .collect();
        assert_eq!(spans(&apart), 1);
        let both: Vec<_> = packed.into_iter().chain(apart).collect();
        assert_eq!(spans(&both), 2);
    }

    #[test]
    fn what_is_irregular_is_right_all_the_same() {
        let mut all: Vec<_> = (0..16).map(|i| at(20 + i, 40 + i, 60 + i * 10)).collect();
        all[7].inode_table = FsBlock(5000);
        assert_eq!(spans(&all), 3);
        let scattered: Vec<_> = (0..9)
            .map(|i| at(i * i, 100 - i, u64::MAX - i * i))
            .collect();
        assert_eq!(spans(&scattered), 9);
    }

    #[test]
    fn no_group_has_no_locations() {
        assert_eq!(spans(&[]), 0);
    }
}
