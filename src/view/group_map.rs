//! Who writes each block group, and how full it is: by the bitmaps as the groups' writers left them, not as others are
//! shown them.

use super::declaration::{Extent, Region, Sharing};
use super::grown::NAME;
use super::open::group_set;
use super::ownership::GroupSet;
use super::probe::{Probe, read_block};
use crate::error::Result;
use crate::ext4::bitmap;
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::layout::Kind;
use crate::image::Image;
use crate::units::{BlockGroup, FsBlock};

/// All block groups of a filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMap {
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks in a group.
    pub blocks_per_group: u32,
    /// The regions' names.
    pub regions: Vec<String>,
    /// The groups, from 0 on.
    pub groups: Vec<GroupUse>,
}

/// Whose a group is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The base's VM's.
    Base,
    /// The base's VM's so far, for nobody has anything in it: it could be reserved.
    Nobody,
    /// The region's of this index in [`GroupMap::regions`].
    Region(usize),
}

/// One group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupUse {
    /// Whose it is.
    pub owner: Owner,
    /// Whether the VM of the image that was looked at writes it.
    pub is_own: bool,
    /// Its blocks.
    pub blocks: Fill,
    /// Its inodes.
    pub inodes: Fill,
}

/// How many there are of something, and how many of them are in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill {
    /// All of them.
    pub total: u64,
    /// Those in use.
    pub used: u64,
}

impl Fill {
    fn of(total: u32, free: u32) -> Self {
        Self {
            total: u64::from(total),
            used: u64::from(total.saturating_sub(free)),
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            total: self.total.saturating_add(other.total),
            used: self.used.saturating_add(other.used),
        }
    }
}

/// The images that groups are looked at in.
pub(super) struct Looked<'a> {
    /// The base.
    pub(super) base: &'a dyn Image,
    /// The filesystem on it.
    pub(super) probe: &'a Probe,
    /// All regions that the base declares.
    pub(super) regions: &'a [Region],
    /// A child's overlay and its regions: it is the child's groups then that are the VM's own.
    pub(super) child: Option<(&'a dyn Image, &'a [Region])>,
}

impl GroupMap {
    /// Enters the region of this index in [`GroupMap::regions`] as the owner of `group`.
    fn set_owner(&mut self, group: BlockGroup, region: usize) {
        if let Some(group) = self.groups.get_mut(group.0 as usize) {
            group.owner = Owner::Region(region);
        }
    }
}

impl Looked<'_> {
    /// All groups.
    ///
    /// # Errors
    /// If the regions do not fit the filesystem, and what reading the images returns.
    pub(super) async fn map(&self) -> Result<GroupMap> {
        let superblock = self.probe.superblock();
        let reserved = group_set(self.probe, self.regions)?;
        let (own, in_overlay) = match self.child {
            Some((_, regions)) => {
                let is_private = |region: &&Region| region.sharing == Sharing::Private;
                let private: Vec<Region> = regions.iter().filter(is_private).cloned().collect();
                let own = self.probe.groups_of_child(regions)?;
                (own, self.probe.groups_of_child(&private)?)
            }
            None => (
                reserved.complement(),
                GroupSet::none(superblock.group_count),
            ),
        };
        let own = Own { own, in_overlay };
        let mut map = GroupMap {
            block_size: superblock.block_size,
            blocks_per_group: superblock.blocks_per_group,
            regions: self.regions.iter().map(|r| r.name.clone()).collect(),
            groups: Vec::new(),
        };
        for index in 0..superblock.descriptor_blocks() {
            self.add_descriptor_block(index, &own, &mut map).await?;
        }
        for (index, region) in self.regions.iter().enumerate() {
            let Extent::Groups { list, .. } = &region.extent else {
                continue;
            };
            for group in list.iter() {
                map.set_owner(group, index);
            }
        }
        if let Some(growth) = self.probe.growth() {
            map.regions.push(NAME.to_owned());
            for group in growth.groups() {
                map.set_owner(group, map.regions.len() - 1);
            }
        }
        Ok(map)
    }

    /// Adds the groups whose descriptors are in block `index` of the table.
    async fn add_descriptor_block(&self, index: u32, own: &Own, map: &mut GroupMap) -> Result<()> {
        let superblock = self.probe.superblock();
        let first = index.saturating_mul(superblock.descriptors_per_block());
        let of_child = match self.child {
            Some((overlay, _)) => Some((overlay, self.descriptors(overlay, index).await?)),
            None => None,
        };
        let of_base = match &of_child {
            // The base may end before.
            Some((_, table)) if first >= self.probe.base_group_count() => table.clone(),
            _ => self.descriptors(self.base, index).await?,
        };
        let size = usize::from(superblock.descriptor_size);
        let groups = (first..superblock.group_count).map(BlockGroup);
        for (within, group) in (0..of_base.len() / size).zip(groups) {
            let is_own = own.own.contains(group);
            let (disk, table, stored) = match &of_child {
                Some((overlay, table)) if own.in_overlay.contains(group) => {
                    (*overlay, table, StoredIn::Overlay)
                }
                _ => (self.base, &of_base, StoredIn::Base),
            };
            let descriptor = GroupDescriptor::parse(&table[within * size..(within + 1) * size]);
            let (blocks, inodes) = self.fill(disk, stored, group, descriptor).await?;
            let is_unused = inodes.used == 0 && blocks.used == self.structures(group).own;
            map.groups.push(GroupUse {
                owner: if is_unused {
                    Owner::Nobody
                } else {
                    Owner::Base
                },
                is_own,
                blocks,
                inodes,
            });
        }
        Ok(())
    }

    async fn descriptors(&self, disk: &dyn Image, index: u32) -> Result<Vec<u8>> {
        let superblock = self.probe.superblock();
        let block = superblock.descriptor_block(index);
        read_block(disk, self.probe.place(), superblock, block).await
    }

    /// How full a group is by its bitmaps, or by its layout where `descriptor` says that they were never written. Where
    /// they are is the base's to say.
    async fn fill(
        &self,
        disk: &dyn Image,
        stored: StoredIn,
        group: BlockGroup,
        descriptor: GroupDescriptor,
    ) -> Result<(Fill, Fill)> {
        let (superblock, place) = (self.probe.superblock(), self.probe.place());
        let locations = self.probe.layout().locations(group);
        let locations = locations.unwrap_or(descriptor.locations);
        let range = superblock.group_blocks(group);
        let blocks = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        let read = async |block: FsBlock| read_block(disk, place, superblock, block).await;
        let blocks = if descriptor.block_bitmap_is_uninitialised(&superblock.checksums) {
            Fill {
                total: u64::from(blocks),
                used: self.structures(group).all,
            }
        } else {
            let mut bits = read(locations.block_bitmap).await?;
            if let (Some(growth), StoredIn::Base) = (self.probe.growth(), stored)
                && growth.last_group().0 == group
            {
                growth.lengthen_block_bitmap(&mut bits);
            }
            Fill::of(blocks, bitmap::count_free(&bits, blocks))
        };
        let all = superblock.inodes_per_group;
        let inodes = if descriptor.inode_bitmap_is_uninitialised(&superblock.checksums) {
            Fill::of(all, all)
        } else {
            let bits = read(locations.inode_bitmap).await?;
            Fill::of(all, bitmap::count_free(&bits, all))
        };
        Ok((blocks, inodes))
    }

    /// The blocks of structures that lie in a group.
    fn structures(&self, group: BlockGroup) -> Structures {
        let range = self.probe.superblock().group_blocks(group);
        let mut found = Structures { all: 0, own: 0 };
        for (kind, _, len) in self.probe.layout().pieces(range) {
            match kind {
                Kind::Data { .. } => {}
                Kind::Journal { .. } | Kind::OrphanFile { .. } | Kind::MultipleMount => {
                    found.all += len;
                }
                _ => {
                    found.all += len;
                    found.own += len;
                }
            }
        }
        found
    }
}

/// The VM's own groups.
struct Own {
    /// All of them.
    own: GroupSet,
    /// Those that a child has in its overlay, not in the base.
    in_overlay: GroupSet,
}

/// Where a group's bitmaps were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StoredIn {
    Base,
    Overlay,
}

/// Blocks of structures.
struct Structures {
    /// With those of the internal files, which no region may hold.
    all: u64,
    /// Without them.
    own: u64,
}
