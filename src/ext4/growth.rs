//! A filesystem made longer by whole block groups: where everything is in it, and what the new groups begin with.
//!
//! It all follows from the superblock and the number of groups, so two who know these agree without asking the disk.
//! The new groups lie behind the old ones, each as long as a group can be. Nothing of the old groups moves. Their
//! descriptors lie behind the others, for which there has to be room:
//!
//! | the descriptor table | room |
//! |---|---|
//! | its last block is not full | there |
//! | `resize_inode` | in the blocks that it keeps behind the table, each of which becomes a block of the table |
//! | `meta_bg`, or nothing kept and no `resize_inode` | in the new groups: the filesystem is `meta_bg` from there on |
//!
//! With `flex_bg` bitmaps and inode tables of the new groups of one flex group lie together, as many as fit, in the
//! first of these groups; without it each lies in its own.

use std::ops::Range;

use super::bitmap;
use super::checksum::crc32c;
use super::features::Feature;
use super::fields::{le32, put_le16, put_le32, put_split32, u8_at};
use super::group::GroupBytes;
use super::group_descriptor::{
    self, BLOCK_UNINIT, GroupDescriptor, INODE_UNINIT, INODE_ZEROED, Locations,
};
use super::superblock::{SUPERBLOCK_SIZE, Superblock, seal};
use super::volatile::{self, FreeCounts};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockGroup, FsBlock};

const LOG_GROUPS_PER_FLEX: usize = 0x174;
const BLOCK_GROUP_NUMBER: usize = 0x5a;

/// A filesystem before and after it was made longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Growth {
    before: Superblock,
    after: Superblock,
    /// The bytes of `after`.
    bytes: [u8; SUPERBLOCK_SIZE],
    /// In the order of their groups.
    packs: Vec<Pack>,
}

/// New groups whose bitmaps and inode tables lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pack {
    /// The group that holds them, which is the first that they serve.
    first: u32,
    count: u32,
}

/// What a new group begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewGroup {
    /// Where its structures are.
    pub locations: Locations,
    /// Its descriptor.
    pub descriptor: Vec<u8>,
    /// Its block bitmap; `None` if that need not be written.
    pub block_bitmap: Option<Vec<u8>>,
    /// Its inode bitmap; `None` if that need not be written.
    pub inode_bitmap: Option<Vec<u8>>,
}

impl Growth {
    /// The filesystem `before`, whose superblock is `bytes`, with `groups` more.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], saying why and what to do, if the filesystem has no room for so many.
    pub fn plan(bytes: &[u8; SUPERBLOCK_SIZE], before: &Superblock, groups: u32) -> Result<Self> {
        let mut grown = *bytes;
        put_counts(before, groups, &mut grown)?;
        put_table(before, groups, &mut grown)?;
        seal(&mut grown);
        let after = Superblock::parse(&grown)?;
        let packs = packs(before, &after, bytes)?;
        Ok(Self {
            before: before.clone(),
            after,
            bytes: grown,
            packs,
        })
    }

    /// The filesystem as it was.
    #[must_use]
    pub fn before(&self) -> &Superblock {
        &self.before
    }

    /// The longer one.
    #[must_use]
    pub fn after(&self) -> &Superblock {
        &self.after
    }

    /// The bytes of the longer one's superblock, its volatile fields as they were.
    #[must_use]
    pub fn bytes(&self) -> &[u8; SUPERBLOCK_SIZE] {
        &self.bytes
    }

    /// The first block behind the filesystem as it was.
    #[must_use]
    pub fn first_block(&self) -> FsBlock {
        FsBlock(self.before.blocks_count)
    }

    /// The new groups.
    pub fn groups(&self) -> impl Iterator<Item = BlockGroup> + use<> {
        (self.before.group_count..self.after.group_count).map(BlockGroup)
    }

    /// Whether `group` is new.
    #[must_use]
    pub fn is_new(&self, group: BlockGroup) -> bool {
        (self.before.group_count..self.after.group_count).contains(&group.0)
    }

    /// Tells this plan from others: of everything that says where the new groups' structures are and how they are
    /// written.
    #[must_use]
    pub fn fingerprint(&self) -> u32 {
        let after = &self.after;
        let mut sum = [
            after.block_size,
            after.blocks_per_group,
            after.inodes_per_group,
            u32::from(after.inode_size),
            u32::from(after.descriptor_size),
            u32::from(after.reserved_gdt_blocks),
            after.first_meta_bg,
            after.checksums.seed().unwrap_or(0),
            u32::from(after.checksums.covers_descriptors()),
        ]
        .iter()
        .fold(u32::MAX, |sum, number| crc32c(sum, &number.to_le_bytes()));
        for word in [0x5c, 0x60, 0x64] {
            // Bits that a kernel sets by itself say nothing about where things are.
            let layout = le32(&self.bytes, word) & layout_features(word);
            sum = crc32c(sum, &layout.to_le_bytes());
        }
        for group in self.groups() {
            if let Some(at) = self.locations(group) {
                for block in [at.block_bitmap, at.inode_bitmap, at.inode_table] {
                    sum = crc32c(sum, &block.0.to_le_bytes());
                }
            }
        }
        sum
    }

    /// How many blocks the last of the old groups gains, in all, and had before: it may have been shorter than a group
    /// can be.
    #[must_use]
    pub fn last_group(&self) -> (BlockGroup, Range<u32>) {
        let last = BlockGroup(self.before.group_count.saturating_sub(1));
        let len = |superblock: &Superblock| {
            let blocks = superblock.group_blocks(last);
            u32::try_from(blocks.end - blocks.start).unwrap_or(0)
        };
        (last, len(&self.before)..len(&self.after))
    }

    /// Makes the last of the old groups, which `bytes` are of, as long as it is now.
    pub fn lengthen_last_group(&self, bytes: &mut GroupBytes) {
        self.lengthen_block_bitmap(&mut bytes.block_bitmap);
        self.lengthen_descriptor(&mut bytes.descriptor, &bytes.block_bitmap);
    }

    /// Frees in the block bitmap of the last of the old groups what that has gained.
    pub fn lengthen_block_bitmap(&self, bitmap: &mut [u8]) {
        for index in self.last_group().1 {
            bitmap::clear(bitmap, index);
        }
    }

    /// Counts in the descriptor of the last of the old groups what that has gained; `bitmap` is its block bitmap, with
    /// that in it.
    pub fn lengthen_descriptor(&self, bytes: &mut [u8], bitmap: &[u8]) {
        let (group, gained) = self.last_group();
        let checksums = &self.after.checksums;
        let mut descriptor = GroupDescriptor::parse(bytes);
        let gained = u32::try_from(gained.len()).unwrap_or(0);
        descriptor.free_blocks_count = descriptor.free_blocks_count.saturating_add(gained);
        if !descriptor.block_bitmap_is_uninitialised(checksums)
            && let Some(sum) = bitmap::checksum_of(checksums, bitmap, self.after.blocks_per_group)
        {
            descriptor.block_bitmap_csum = sum;
        }
        descriptor.write_to(bytes);
        group_descriptor::seal(checksums, group, bytes);
    }

    /// Where the structures of a new group are; `None` if it is not one.
    #[must_use]
    pub fn locations(&self, group: BlockGroup) -> Option<Locations> {
        let pack = self.pack_of(group)?;
        let start = self.first_block_of_tables(pack);
        let count = u64::from(pack.count);
        let index = u64::from(group.0 - pack.first);
        let table = u64::from(self.after.inode_table_blocks());
        Some(Locations {
            block_bitmap: FsBlock(start + index),
            inode_bitmap: FsBlock(start + count + index),
            inode_table: FsBlock(start + 2 * count + index * table),
        })
    }

    /// The blocks of inode tables of new groups, all of which begin as zeros.
    pub fn inode_tables(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let table = u64::from(self.after.inode_table_blocks());
        self.packs.iter().map(move |pack| {
            let start = self.first_block_of_tables(pack) + 2 * u64::from(pack.count);
            start..start + u64::from(pack.count) * table
        })
    }

    fn pack_of(&self, group: BlockGroup) -> Option<&Pack> {
        let behind = self.packs.partition_point(|pack| pack.first <= group.0);
        let pack = self.packs.get(behind.checked_sub(1)?)?;
        (group.0 - pack.first < pack.count).then_some(pack)
    }

    fn first_block_of_tables(&self, pack: &Pack) -> u64 {
        let first = BlockGroup(pack.first);
        self.after.group_start(first).0 + self.after.group_head(first).len()
    }

    /// What a new group begins with; `None` if it is not one.
    #[must_use]
    pub fn new_group(&self, group: BlockGroup) -> Option<NewGroup> {
        let after = &self.after;
        let locations = self.locations(group)?;
        let pack = self.pack_of(group).filter(|pack| pack.first == group.0);
        let tables = pack.map_or(0, |pack| pack_blocks(after, pack.count));
        let used = u32::try_from(after.group_head(group).len() + tables).unwrap_or(u32::MAX);
        let may_be_uninitialised = after.checksums.covers_descriptors();
        // Whoever reads a bitmap that was never written takes the group's own structures for granted, but no others'.
        let is_last = group.0 + 1 == after.group_count;
        let has_block_bitmap = !may_be_uninitialised || pack.is_some() || is_last;
        let inodes = after.inodes_per_group;
        let mut descriptor = GroupDescriptor {
            locations,
            free_blocks_count: after.blocks_per_group.saturating_sub(used),
            free_inodes_count: inodes,
            used_dirs_count: 0,
            flags: 0,
            block_bitmap_csum: 0,
            inode_bitmap_csum: 0,
            itable_unused: 0,
            checksum: 0,
        };
        if may_be_uninitialised {
            descriptor.itable_unused = inodes;
            descriptor.flags = INODE_UNINIT | INODE_ZEROED;
            if !has_block_bitmap {
                descriptor.flags |= BLOCK_UNINIT;
            }
        }
        let block_bitmap =
            has_block_bitmap.then(|| self.fresh_bitmap(used, after.blocks_per_group));
        let inode_bitmap = (!may_be_uninitialised).then(|| self.fresh_bitmap(0, inodes));
        if let Some(bitmap) = &block_bitmap {
            let sum = bitmap::checksum_of(&after.checksums, bitmap, after.blocks_per_group);
            descriptor.block_bitmap_csum = sum.unwrap_or(0);
        }
        let mut bytes = vec![0; usize::from(after.descriptor_size)];
        descriptor.write_to(&mut bytes);
        group_descriptor::seal(&after.checksums, group, &mut bytes);
        Some(NewGroup {
            locations,
            descriptor: bytes,
            block_bitmap,
            inode_bitmap,
        })
    }

    /// A bitmap of `items`, of which the first `used` are in use.
    fn fresh_bitmap(&self, used: u32, items: u32) -> Vec<u8> {
        let bits = self.after.block_size * 8;
        let mut bytes = vec![0; usize::try_from(self.after.block_size).unwrap_or(0)];
        bitmap::set_range(&mut bytes, 0..used.min(items));
        bitmap::set_range(&mut bytes, items..bits);
        bytes
    }

    /// What all new groups have free.
    #[must_use]
    pub fn free(&self) -> FreeCounts {
        self.groups()
            .filter_map(|group| self.new_group(group))
            .map(|new| GroupDescriptor::parse(&new.descriptor).free())
            .sum()
    }

    /// The copy of `superblock` that `group` begins with.
    #[must_use]
    pub fn backup_of(
        superblock: &[u8; SUPERBLOCK_SIZE],
        group: BlockGroup,
    ) -> [u8; SUPERBLOCK_SIZE] {
        let mut copy = *superblock;
        // Wraps, as it does for kernels.
        let [low, high, _, _] = group.0.to_le_bytes();
        put_le16(
            &mut copy,
            BLOCK_GROUP_NUMBER,
            u16::from_le_bytes([low, high]),
        );
        volatile::put_clean(&mut copy);
        copy
    }
}

/// The feature bits of one word that say where things are.
fn layout_features(word: usize) -> u32 {
    let bits = |features: &[Feature]| features.iter().fold(0, |all, feature| all | feature.bit());
    match word {
        0x5c => bits(&[Feature::RESIZE_INODE, Feature::SPARSE_SUPER2]),
        0x60 => bits(&[Feature::META_BG, Feature::FLEX_BG, Feature::SIXTY_FOUR_BIT]),
        _ => bits(&[
            Feature::SPARSE_SUPER,
            Feature::METADATA_CSUM,
            Feature::GDT_CSUM,
        ]),
    }
}

/// Blocks of the bitmaps and inode tables of so many groups.
fn pack_blocks(superblock: &Superblock, groups: u32) -> u64 {
    u64::from(groups) * (2 + u64::from(superblock.inode_table_blocks()))
}

/// Which of the new groups have their structures together.
fn packs(
    before: &Superblock,
    after: &Superblock,
    bytes: &[u8; SUPERBLOCK_SIZE],
) -> Result<Vec<Pack>> {
    let flex = if after.features.has(Feature::FLEX_BG) {
        // Beyond all groups it makes no difference.
        1u64 << u32::from(u8_at(bytes, LOG_GROUPS_PER_FLEX)).min(31)
    } else {
        1
    };
    let mut packs = Vec::new();
    let mut first = before.group_count;
    while first < after.group_count {
        let flex_end = (u64::from(first) / flex + 1) * flex;
        let flex_end = u32::try_from(flex_end).unwrap_or(u32::MAX);
        let wanted = flex_end.min(after.group_count) - first;
        let head = after.group_head(BlockGroup(first)).len();
        let room = u64::from(after.blocks_per_group).saturating_sub(head);
        let fits = room / pack_blocks(after, 1).max(1);
        let count = wanted.min(u32::try_from(fits).unwrap_or(u32::MAX));
        if count == 0 {
            return Err(no_room(format!(
                "group {first} would begin with {head} blocks of copies, which leave no room for its own structures"
            )));
        }
        packs.push(Pack { first, count });
        first += count;
    }
    Ok(packs)
}

/// How many blocks and inodes there are, and how many blocks are kept for the superuser: the same share as before.
fn put_counts(before: &Superblock, groups: u32, bytes: &mut [u8; SUPERBLOCK_SIZE]) -> Result<()> {
    let all = u64::from(before.group_count) + u64::from(groups);
    let blocks = all
        .checked_mul(u64::from(before.blocks_per_group))
        .and_then(|blocks| blocks.checked_add(u64::from(before.first_data_block)));
    let most = if before.features.has(Feature::SIXTY_FOUR_BIT) {
        u64::MAX / u64::from(before.block_size)
    } else {
        u64::from(u32::MAX)
    };
    let blocks = blocks.filter(|blocks| *blocks <= most).ok_or_else(|| {
        no_room("it would have more blocks than it can number: make it with -O 64bit")
    })?;
    let inodes = all * u64::from(before.inodes_per_group);
    let inodes = u32::try_from(inodes).map_err(|_| {
        no_room(format!(
            "it would have {inodes} inodes, more than an ext4 filesystem can: take less, or make it with fewer inodes"
        ))
    })?;
    let kept = u128::from(before.reserved_blocks_count) * u128::from(blocks)
        / u128::from(before.blocks_count.max(1));
    put_le32(bytes, 0x00, inodes);
    put_split32(bytes, 0x04, 0x150, blocks);
    put_split32(bytes, 0x08, 0x154, u64::try_from(kept).unwrap_or(0));
    Ok(())
}

/// Makes room for the descriptors.
fn put_table(before: &Superblock, groups: u32, bytes: &mut [u8; SUPERBLOCK_SIZE]) -> Result<()> {
    let per_block = before.descriptors_per_block();
    let all = before.group_count.saturating_add(groups);
    let is_meta_bg = before.features.has(Feature::META_BG);
    let limit = if is_meta_bg {
        before.first_meta_bg
    } else {
        u32::MAX
    };
    let there = before.descriptor_blocks().min(limit);
    let needed = all.div_ceil(per_block).min(limit) - there;
    if needed == 0 {
        return Ok(());
    }
    let kept = u32::from(before.reserved_gdt_blocks);
    let has_resize_inode = before.features.has(Feature::RESIZE_INODE);
    if let (Some(rest), true) = (kept.checked_sub(needed), has_resize_inode) {
        put_le16(bytes, 0xce, u16::try_from(rest).unwrap_or(0));
        return Ok(());
    }
    if has_resize_inode {
        let most = there.saturating_add(kept).saturating_mul(per_block) - before.group_count;
        let group_bytes = u64::from(before.blocks_per_group) * u64::from(before.block_size);
        return Err(no_room(format!(
            "its descriptor table has room for {most} more block groups, which are {} bytes, and {groups} are wanted: \
             take less, or let `tune2fs -O ^resize_inode` and `e2fsck -f` on the base lift the limit",
            u64::from(most) * group_bytes
        )));
    }
    if is_meta_bg {
        return Err(no_room(format!(
            "its descriptor table is to end at block {limit}, and nothing is kept for it up to there"
        )));
    }
    let incompat = le32(bytes, 0x60) | Feature::META_BG.bit();
    put_le32(bytes, 0x60, incompat);
    put_le32(bytes, 0x104, there);
    Ok(())
}

fn no_room(why: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("the filesystem cannot be made longer: {why}"),
    )
}
