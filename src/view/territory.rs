//! Who owns what of a disk: the one place that answers how a byte is treated for one VM.

use std::ops::Range;

use super::attribute_blocks::AttributeBlocks;
use super::compose::InodeChunk;
use super::ownership::GroupSet;
use super::probe::Probe;
use super::refusal::Structure;
use super::route::{Composed, Foreign, Piece, Stretch, Treatment};
use crate::ext4::extent::Extent;
use crate::ext4::group_descriptor::Locations;
use crate::ext4::layout::{Kind, Layout};
use crate::ext4::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use crate::ext4::volatile::Share;
use crate::units::{BlockGroup, FsBlock, GuestOffset};

/// Which of the VMs that share a disk this one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that owns the base, and everything that no region takes out of it.
    Base,
    /// One that owns regions.
    Child,
}

/// A partition that a region takes out of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its first byte.
    pub start: GuestOffset,
    /// The offset behind its last byte.
    pub end: GuestOffset,
    /// Whether it is this VM's.
    pub owner: Owner,
}

/// Whose something is, from one VM's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This VM's, in its own store.
    Own,
    /// This VM's, in the base.
    OwnInPlace,
    /// Another one's.
    Foreign,
}

/// What one VM owns of a disk.
#[derive(Debug)]
pub struct Territory {
    side: Side,
    filesystem: Option<Filesystem>,
    /// Sorted; none overlaps another or the filesystem.
    areas: Vec<Area>,
}

/// The shared filesystem, and what one VM owns of it.
#[derive(Debug)]
pub struct Filesystem {
    side: Side,
    probe: Probe,
    owned: GroupSet,
    /// Those of the owned groups that a child writes in the base.
    in_place: GroupSet,
    attributes: AttributeBlocks,
    /// The first block that the base's filesystem does not have. From there on a child has everything to itself.
    end_of_base: u64,
}

impl Territory {
    /// What a VM owns on a disk with these parts, none of which overlaps another.
    #[must_use]
    pub fn new(side: Side, filesystem: Option<Filesystem>, mut areas: Vec<Area>) -> Self {
        areas.sort_by_key(|area| area.start);
        Self {
            side,
            filesystem,
            areas,
        }
    }

    /// Which of the VMs it is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// The shared filesystem, if there is one.
    #[must_use]
    pub fn filesystem(&self) -> Option<&Filesystem> {
        self.filesystem.as_ref()
    }

    /// How the bytes from `at` on are treated in a request that ends at `end`.
    pub(super) fn stretch_at(&self, at: GuestOffset, end: GuestOffset) -> Stretch {
        let mut limit = end;
        if let Some(filesystem) = &self.filesystem {
            if filesystem.range().contains(&at) {
                return filesystem.stretch_at(at, end);
            }
            if at < filesystem.start() {
                limit = limit.min(filesystem.start());
            }
        }
        let next = self.areas.partition_point(|area| area.end <= at);
        let owner = match self.areas.get(next) {
            Some(area) if area.start <= at => {
                limit = limit.min(area.end);
                area.owner
            }
            Some(area) => {
                limit = limit.min(area.start);
                self.owner_of_the_rest()
            }
            None => self.owner_of_the_rest(),
        };
        let treatment = match owner {
            Owner::Own => Treatment::Through,
            Owner::OwnInPlace => Treatment::InPlace,
            Owner::Foreign => foreign(Structure::Disk, None),
        };
        Stretch {
            treatment,
            end: limit,
        }
    }

    /// How `foreign` bytes from `at` to `end` are read: as they are in the base, but for extended attributes.
    pub(super) fn readable(&self, at: GuestOffset, foreign: Foreign, end: GuestOffset) -> Stretch {
        let treatment = Treatment::Foreign(foreign);
        let (Some(filesystem), Some(group)) = (&self.filesystem, foreign.group) else {
            return Stretch { treatment, end };
        };
        let block = filesystem.block_at(at);
        let behind = filesystem
            .block_at(GuestOffset(end.0.saturating_sub(1)))
            .0
            .saturating_add(1);
        match filesystem.attributes.first_in(block..FsBlock(behind)) {
            Some(first) if first == block => Stretch {
                treatment: Treatment::Composed(Composed::Attributes(group)),
                end: end.min(filesystem.offset_of(FsBlock(block.0 + 1))),
            },
            Some(first) => Stretch {
                treatment,
                end: filesystem.offset_of(first),
            },
            None => Stretch { treatment, end },
        }
    }

    /// What no region takes is the base's.
    fn owner_of_the_rest(&self) -> Owner {
        match self.side {
            Side::Base => Owner::Own,
            Side::Child => Owner::Foreign,
        }
    }
}

fn foreign(structure: Structure, group: Option<BlockGroup>) -> Treatment {
    Treatment::Foreign(Foreign { structure, group })
}

impl Filesystem {
    /// The filesystem in `probe`, of which the VM owns the groups `owned`, those `in_place` in the base.
    #[must_use]
    pub fn new(side: Side, probe: Probe, owned: GroupSet, in_place: GroupSet) -> Self {
        Self {
            side,
            end_of_base: probe
                .growth()
                .map_or(u64::MAX, |growth| growth.first_block().0),
            probe,
            owned,
            in_place,
            attributes: AttributeBlocks::default(),
        }
    }

    /// Takes note that a foreign inode has its extended attributes in `block`.
    pub(super) fn note_attributes(&self, block: FsBlock) {
        if let Some((Kind::Data { group }, _)) = self.layout().classify(block)
            && !self.owns(group)
        {
            self.attributes.note(block);
        }
    }

    pub(super) fn side(&self) -> Side {
        self.side
    }

    /// The superblock as it was when the view was opened: only what never changes is taken from it.
    pub(super) fn superblock(&self) -> &Superblock {
        self.probe.superblock()
    }

    /// Whether `other`, found on the same disk at another time, has everything where this one has it, and written in
    /// the same way.
    pub(super) fn has_layout_of(&self, other: &Self) -> bool {
        let kind = |superblock: &Superblock| {
            (
                superblock.uuid,
                superblock.block_size,
                superblock.inode_size,
                superblock.inodes_per_group,
                superblock.descriptor_size,
                superblock.checksums,
            )
        };
        self.layout() == other.layout()
            && self.journal() == other.journal()
            && kind(self.superblock()) == kind(other.superblock())
    }

    /// Whether a block holds nothing but what the VM alone owns, and everything it holds means the same to all.
    pub(super) fn is_private(&self, block: FsBlock) -> bool {
        match self.layout().classify(block) {
            Some((
                Kind::Data { group }
                | Kind::BlockBitmap { group }
                | Kind::InodeBitmap { group }
                | Kind::InodeTable { group, .. },
                _,
            )) => self.owns(group),
            _ => false,
        }
    }

    /// Where the journal's blocks are.
    pub(super) fn journal(&self) -> &[Extent] {
        self.probe.journal()
    }

    /// The block with the superblock of the VM's own journal.
    pub(super) fn journal_start(&self) -> Option<FsBlock> {
        self.journal().first().map(|extent| extent.start)
    }

    /// How many blocks the journal has.
    pub(super) fn journal_blocks(&self) -> u32 {
        self.probe.journal_blocks()
    }

    /// What was found on the base when the view was opened.
    pub(super) fn probe(&self) -> &Probe {
        &self.probe
    }

    fn layout(&self) -> &Layout {
        self.probe.layout()
    }

    pub(super) fn owns(&self, group: BlockGroup) -> bool {
        self.owned.contains(group)
    }

    /// Whether a group is one of the VM's own that are stored in the base.
    pub(super) fn is_in_place(&self, group: BlockGroup) -> bool {
        self.in_place.contains(group)
    }

    /// Whether block `index` of the descriptor table holds descriptors that the VM writes in the base.
    pub(super) fn describes_in_place(&self, index: u32) -> bool {
        self.groups_of_descriptor_block(index)
            .any(|group| self.is_in_place(group))
    }

    /// Whether block `index` of the descriptor table describes none of the base's groups.
    pub(super) fn describes_new_groups_alone(&self, index: u32) -> bool {
        let mut groups = self.groups_of_descriptor_block(index);
        groups.all(|group| group.0 >= self.probe.base_group_count())
    }

    pub(super) fn locations(&self, group: BlockGroup) -> Option<Locations> {
        self.layout().locations(group)
    }

    pub(super) fn block_size(&self) -> usize {
        usize::try_from(self.superblock().block_size).unwrap_or(usize::MAX)
    }

    fn start(&self) -> GuestOffset {
        self.probe.place().start
    }

    /// The base's superblock at that moment: what a child reads as the structure of its filesystem.
    pub(super) fn structure(&self) -> &[u8; SUPERBLOCK_SIZE] {
        self.probe.superblock_bytes()
    }

    fn block_len(&self) -> u64 {
        u64::from(self.superblock().block_size)
    }

    /// The VM's share of all blocks.
    pub(super) fn share(&self) -> Share {
        let superblock = self.superblock();
        let owned = self.owned.iter().map(|group| {
            let blocks = superblock.group_blocks(group);
            blocks.end - blocks.start
        });
        Share {
            owned_blocks: owned.sum(),
            all_blocks: superblock.blocks_count,
        }
    }

    /// The bytes of the disk that the filesystem fills.
    pub(super) fn range(&self) -> Range<GuestOffset> {
        let end = self.start().0.saturating_add(self.superblock().len_bytes());
        self.start()..GuestOffset(end)
    }

    /// The block that holds the disk's byte `at`, which lies in the filesystem.
    pub(super) fn block_at(&self, at: GuestOffset) -> FsBlock {
        FsBlock(at.0.saturating_sub(self.start().0) / self.block_len())
    }

    /// The disk offset of a block's first byte.
    pub(super) fn offset_of(&self, block: FsBlock) -> GuestOffset {
        let within = block.0.saturating_mul(self.block_len());
        GuestOffset(self.start().0.saturating_add(within))
    }

    /// Where the block that holds the superblock starts.
    pub(super) fn superblock_block_offset(&self) -> GuestOffset {
        self.offset_of(FsBlock(u64::from(self.superblock().first_data_block)))
    }

    /// Where a piece lies in the one block that it is a part of.
    pub(super) fn within_block(&self, piece: &Piece) -> Range<usize> {
        let start = self.offset_of(self.block_at(piece.at));
        piece.within(start)
    }

    /// The groups whose descriptors are in block `index` of the table, in their order.
    pub(super) fn groups_of_descriptor_block(
        &self,
        index: u32,
    ) -> impl Iterator<Item = BlockGroup> + use<> {
        let superblock = self.superblock();
        let first = index.saturating_mul(superblock.descriptors_per_block());
        let last = first
            .saturating_add(superblock.descriptors_per_block())
            .min(superblock.group_count);
        (first..last).map(BlockGroup)
    }

    /// The part of an inode table from `at` up to `end`, but no more than about `max` bytes of it, in whole blocks.
    pub(super) fn inode_chunk(&self, at: GuestOffset, end: GuestOffset, max: u64) -> InodeChunk {
        let first = self.block_at(at);
        let start = self.offset_of(first);
        let wanted_end = end.min(GuestOffset(start.0.saturating_add(max)));
        let len = (wanted_end.0 - start.0).next_multiple_of(self.block_len());
        let skip = piece_index(at.0 - start.0);
        let first_index = match self.layout().classify(first) {
            Some((Kind::InodeTable { index, .. }, _)) => {
                index.saturating_mul(self.superblock().inodes_per_block())
            }
            _ => 0,
        };
        InodeChunk {
            at: start,
            len: piece_index(len),
            first_index,
            wanted: skip..piece_index(wanted_end.0 - start.0),
        }
    }

    fn stretch_at(&self, at: GuestOffset, request_end: GuestOffset) -> Stretch {
        let block = self.block_at(at);
        let Some((kind, blocks)) = self.layout().classify(block) else {
            return Stretch {
                treatment: foreign(Structure::Disk, None),
                end: self.range().end,
            };
        };
        let mut end = self.offset_of(FsBlock(block.0.saturating_add(blocks)));
        if block.0 < self.end_of_base {
            end = end.min(self.offset_of(FsBlock(self.end_of_base)));
        }
        let treatment = match kind {
            Kind::Backup { .. } | Kind::Data { .. } if block.0 >= self.end_of_base => {
                Treatment::Through
            }
            Kind::Superblock => self.superblock_treatment(at, end.min(request_end)),
            Kind::Descriptors { index } => {
                end = self.offset_of(FsBlock(block.0 + 1));
                Treatment::Composed(Composed::Descriptors(index))
            }
            Kind::BlockBitmap { group } => self.unless_owned(group, Composed::BlockBitmap(group)),
            Kind::InodeBitmap { group } => self.unless_owned(group, Composed::InodeBitmap(group)),
            Kind::InodeTable { group, .. } => self.unless_owned(group, Composed::Inodes(group)),
            Kind::Journal { .. } if self.side == Side::Base => Treatment::Journal,
            Kind::Journal { .. } | Kind::OrphanFile { .. } | Kind::MultipleMount => {
                Treatment::Through
            }
            Kind::Boot => self.unless_child(Structure::Superblock, None),
            Kind::ReservedDescriptors => self.unless_child(Structure::Backup, Some(BlockGroup(0))),
            Kind::Backup { group } => self.unless_child(Structure::Backup, Some(group)),
            Kind::Data { group } if self.owns(group) => self.own(group),
            Kind::Data { group } => foreign(Structure::Data, Some(group)),
        };
        Stretch { treatment, end }
    }

    /// What is the base's, whoever owns the group it lies in.
    fn unless_child(&self, structure: Structure, group: Option<BlockGroup>) -> Treatment {
        match self.side {
            Side::Base => Treatment::Through,
            Side::Child => foreign(structure, group),
        }
    }

    fn unless_owned(&self, group: BlockGroup, composed: Composed) -> Treatment {
        if self.owns(group) {
            self.own(group)
        } else {
            Treatment::Composed(composed)
        }
    }

    /// How what serves an owned group is treated.
    fn own(&self, group: BlockGroup) -> Treatment {
        if self.is_in_place(group) {
            Treatment::InPlace
        } else {
            Treatment::Through
        }
    }

    /// A child's kernel writes the whole block of the superblock, boot sectors and all. Whoever writes
    /// the boot sectors alone means them, and they are the base's.
    fn superblock_treatment(&self, at: GuestOffset, end: GuestOffset) -> Treatment {
        let start = self.start().0.saturating_add(SUPERBLOCK_OFFSET);
        let touched = at.0 < start.saturating_add(SUPERBLOCK_SIZE as u64) && end.0 > start;
        if touched || self.side == Side::Base {
            Treatment::Composed(Composed::Superblock)
        } else {
            foreign(Structure::Superblock, Some(BlockGroup(0)))
        }
    }
}

/// A length that the caller has bounded to a chunk.
fn piece_index(len: u64) -> usize {
    usize::try_from(len).expect("a chunk fits in memory")
}
