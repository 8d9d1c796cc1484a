//! What block groups hold, as the base stores them: whether they can be reserved, and whether reserved ones are
//! still untouched.

use super::declaration::GroupList;
use super::probe::{Descriptors, Probe, read_block, read_descriptor};
use crate::error::Result;
use crate::ext4::group::{Group, GroupBytes, InUse};
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::layout::Kind;
use crate::ext4::volatile::FreeCounts;
use crate::image::Image;
use crate::units::{BlockGroup, FsBlock, InodeNumber};

/// A region's directory: the only things of the base's making in the region's groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Occupants {
    /// The directory's inode.
    pub(super) inode: InodeNumber,
    /// The directory's block.
    pub(super) block: FsBlock,
}

impl Probe {
    /// Reads a group's descriptor and bitmaps.
    pub(super) async fn group(&self, disk: &dyn Image, group: BlockGroup) -> Result<Group<'_>> {
        let (place, superblock) = (self.place(), self.superblock());
        let descriptor = read_descriptor(disk, place, superblock, group).await?;
        let locations = GroupDescriptor::parse(&descriptor).locations;
        let bytes = GroupBytes {
            descriptor,
            block_bitmap: read_block(disk, place, superblock, locations.block_bitmap).await?,
            inode_bitmap: read_block(disk, place, superblock, locations.inode_bitmap).await?,
        };
        Group::new(superblock, self.layout(), group, bytes)
    }

    /// Those of `groups` that hold anything but the filesystem's structures and `occupants`.
    pub(super) async fn groups_in_use(
        &self,
        disk: &dyn Image,
        groups: &GroupList,
        occupants: Option<Occupants>,
    ) -> Result<GroupList> {
        let expected = occupants
            .map(|occupants| [InUse::Block(occupants.block), InUse::Inode(occupants.inode)]);
        let expected = expected.as_ref().map_or(&[][..], |expected| expected);
        let mut in_use = Vec::new();
        for number in groups.iter() {
            let group = self.group(disk, number).await?;
            if self.holds_internal_file(number) || group.first_in_use_besides(expected).is_some() {
                in_use.push(number);
            }
        }
        Ok(in_use.into_iter().collect())
    }

    /// The free blocks of a group that could be reserved; `None` for one that holds anything.
    pub(super) async fn room_in(
        &self,
        disk: &dyn Image,
        number: BlockGroup,
    ) -> Result<Option<u64>> {
        let group = self.group(disk, number).await?;
        let holds_anything = self.holds_internal_file(number) || group.first_in_use().is_some();
        Ok((!holds_anything).then(|| group.free().blocks))
    }

    /// Whether blocks that each VM has for itself lie in `group`: they are structures, but not of the group's.
    fn holds_internal_file(&self, group: BlockGroup) -> bool {
        let blocks = self.superblock().group_blocks(group);
        self.layout().pieces(blocks).any(|(kind, _, _)| {
            matches!(
                kind,
                Kind::Journal { .. } | Kind::OrphanFile { .. } | Kind::MultipleMount
            )
        })
    }

    /// What is free in `groups`, as their descriptors tell.
    pub(super) async fn count_free(
        &self,
        disk: &dyn Image,
        groups: impl IntoIterator<Item = BlockGroup>,
    ) -> Result<FreeCounts> {
        let mut free = FreeCounts::default();
        let mut descriptors = Descriptors::of(disk, self.place(), self.superblock());
        for group in groups {
            let counts = GroupDescriptor::parse(descriptors.get(group).await?).free();
            free = [free, counts].into_iter().sum();
        }
        Ok(free)
    }

    /// What is free in all groups, reading each block of the descriptor table once.
    pub(super) async fn count_all_free(&self, disk: &dyn Image) -> Result<FreeCounts> {
        let (place, superblock) = (self.place(), self.superblock());
        let mut free = FreeCounts::default();
        let mut rest = superblock.group_count;
        for index in 0..superblock.descriptor_blocks() {
            let block = read_block(disk, place, superblock, superblock.descriptor_block(index));
            let block = block.await?;
            let here = rest.min(superblock.descriptors_per_block());
            rest -= here;
            let records = block.chunks_exact(usize::from(superblock.descriptor_size));
            let counts = records.map(|bytes| GroupDescriptor::parse(bytes).free());
            free = [free]
                .into_iter()
                .chain(counts.take(usize::try_from(here).unwrap_or(usize::MAX)))
                .sum();
        }
        Ok(free)
    }
}
