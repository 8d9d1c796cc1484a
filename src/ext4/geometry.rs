//! What follows from a superblock alone: where groups, descriptors and backups lie
//! (kernel documentation: "Block Groups", "Meta Block Groups", "Layout").

use std::ops::Range;

use super::features::Feature;
use super::superblock::Superblock;
use crate::units::{BlockGroup, FsBlock, InodeNumber};

/// The copies that begin a group: of the superblock, of the descriptor table, and the room for its growth. Each is a
/// number of blocks, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupHead {
    /// Whether the group begins with a superblock, the primary one included.
    pub superblock: bool,
    /// Descriptor blocks.
    pub descriptor_blocks: u32,
    /// Blocks kept for more descriptors.
    pub reserved_blocks: u32,
}

impl GroupHead {
    /// Blocks in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        u64::from(self.superblock)
            + u64::from(self.descriptor_blocks)
            + u64::from(self.reserved_blocks)
    }

    /// Whether the group begins with none of them.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Superblock {
    /// The filesystem's length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.blocks_count.saturating_mul(u64::from(self.block_size))
    }

    /// The groups, in their order.
    pub fn groups(&self) -> impl Iterator<Item = BlockGroup> + use<> {
        (0..self.group_count).map(BlockGroup)
    }

    /// The first block of `group`.
    #[must_use]
    pub fn group_start(&self, group: BlockGroup) -> FsBlock {
        FsBlock(
            u64::from(self.first_data_block)
                + u64::from(group.0) * u64::from(self.blocks_per_group),
        )
    }

    /// The blocks of `group`; the last group may be shorter than the others, and a group behind it is empty.
    #[must_use]
    pub fn group_blocks(&self, group: BlockGroup) -> Range<u64> {
        let start = self.group_start(group).0.min(self.blocks_count);
        let end = start.saturating_add(u64::from(self.blocks_per_group));
        start..end.min(self.blocks_count)
    }

    /// The group that holds `block`; `None` before the first group and behind the last.
    #[must_use]
    pub fn group_of(&self, block: FsBlock) -> Option<BlockGroup> {
        if block.0 >= self.blocks_count {
            return None;
        }
        let within = block.0.checked_sub(u64::from(self.first_data_block))?;
        u32::try_from(within / u64::from(self.blocks_per_group))
            .ok()
            .map(BlockGroup)
    }

    /// The group that `inode` belongs to and its index there; `None` if there is no such inode.
    #[must_use]
    pub fn locate_inode(&self, inode: InodeNumber) -> Option<(BlockGroup, u32)> {
        if inode.0 > self.inodes_count {
            return None;
        }
        let index = inode.0.checked_sub(1)?;
        Some((
            BlockGroup(index / self.inodes_per_group),
            index % self.inodes_per_group,
        ))
    }

    /// The number of the inode at `index` in `group`.
    #[must_use]
    pub fn inode_number(&self, group: BlockGroup, index: u32) -> InodeNumber {
        InodeNumber(
            group
                .0
                .saturating_mul(self.inodes_per_group)
                .saturating_add(index)
                .saturating_add(1),
        )
    }

    /// Inode records in a block.
    #[must_use]
    pub fn inodes_per_block(&self) -> u32 {
        self.block_size / u32::from(self.inode_size)
    }

    /// Blocks of a group's inode table.
    #[must_use]
    pub fn inode_table_blocks(&self) -> u32 {
        self.inodes_per_group / self.inodes_per_block()
    }

    /// Group descriptors in a block.
    #[must_use]
    pub fn descriptors_per_block(&self) -> u32 {
        self.block_size / u32::from(self.descriptor_size)
    }

    /// Blocks of the descriptor table.
    #[must_use]
    pub fn descriptor_blocks(&self) -> u32 {
        self.group_count.div_ceil(self.descriptors_per_block())
    }

    /// How many blocks of the descriptor table lie together behind the superblock; the rest, under `meta_bg`, lie in
    /// the groups that they describe.
    pub(super) fn descriptor_blocks_at_start(&self) -> u32 {
        if self.features.has(Feature::META_BG) {
            self.first_meta_bg.min(self.descriptor_blocks())
        } else {
            self.descriptor_blocks()
        }
    }

    /// Where block `index` of the descriptor table lies; of several copies, the one that a kernel reads and writes.
    #[must_use]
    pub fn descriptor_block(&self, index: u32) -> FsBlock {
        if index < self.descriptor_blocks_at_start() {
            return FsBlock(u64::from(self.first_data_block) + 1 + u64::from(index));
        }
        let group = BlockGroup(index.saturating_mul(self.descriptors_per_block()));
        FsBlock(self.group_start(group).0 + u64::from(self.has_superblock(group)))
    }

    /// Whether `group` begins with a copy of the superblock (or with the superblock itself).
    #[must_use]
    pub fn has_superblock(&self, group: BlockGroup) -> bool {
        let group = group.0;
        if group == 0 {
            return true;
        }
        if self.features.has(Feature::SPARSE_SUPER2) {
            return self.backup_groups.contains(&group);
        }
        if group == 1 || !self.features.has(Feature::SPARSE_SUPER) {
            return true;
        }
        [3, 5, 7].into_iter().any(|base| is_power_of(base, group))
    }

    /// Which blocks of the descriptor table `group` begins with, as copies or in use.
    #[must_use]
    pub fn copied_descriptor_blocks(&self, group: BlockGroup) -> Range<u32> {
        let count = self.group_head(group).descriptor_blocks;
        let meta_group = group.0 / self.descriptors_per_block();
        if self.features.has(Feature::META_BG) && meta_group >= self.first_meta_bg {
            meta_group..meta_group.saturating_add(count)
        } else {
            0..count
        }
    }

    /// What `group` begins with.
    #[must_use]
    pub fn group_head(&self, group: BlockGroup) -> GroupHead {
        let superblock = self.has_superblock(group);
        let per_block = self.descriptors_per_block();
        let meta_group = group.0 / per_block;
        if self.features.has(Feature::META_BG) && meta_group >= self.first_meta_bg {
            // The first, second and last group of each meta group hold a copy of its one descriptor block.
            let holds = [0, 1, per_block - 1].contains(&(group.0 % per_block));
            return GroupHead {
                superblock,
                descriptor_blocks: u32::from(holds),
                reserved_blocks: 0,
            };
        }
        if !superblock {
            return GroupHead::default();
        }
        GroupHead {
            superblock,
            descriptor_blocks: self.descriptor_blocks_at_start(),
            reserved_blocks: u32::from(self.reserved_gdt_blocks),
        }
    }
}

impl Superblock {
    /// `s_overhead_clusters`: the blocks that no file can have, as a kernel counts them when it mounts a filesystem
    /// whose superblock does not say. The journal has `journal_blocks`.
    #[must_use]
    pub fn overhead(&self, journal_blocks: u32) -> u64 {
        let tables = u64::from(self.inode_table_blocks()) + 2;
        let groups = self
            .groups()
            .map(|group| self.group_head(group).len() + tables);
        u64::from(self.first_data_block) + groups.sum::<u64>() + u64::from(journal_blocks)
    }
}

/// Whether `value` is a power of `base`, which is above 1.
fn is_power_of(base: u32, value: u32) -> bool {
    let mut rest = value;
    while rest > 1 && rest.is_multiple_of(base) {
        rest /= base;
    }
    rest == 1
}

#[cfg(test)]
mod tests {
    use super::is_power_of;

    #[test]
    fn backups_lie_in_powers_of_three_five_and_seven() {
        let holders: Vec<u32> = (2..130)
            .filter(|group| [3, 5, 7].iter().any(|base| is_power_of(*base, *group)))
            .collect();
        assert_eq!(holders, [3, 5, 7, 9, 25, 27, 49, 81, 125]);
        assert!(!is_power_of(3, 0));
    }
}
