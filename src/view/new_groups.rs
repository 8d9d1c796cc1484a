//! What a new child's overlay holds of the block groups that the child alone has: their descriptors, bitmaps and inode
//! tables, and the copies that they begin with.
//!
//! Blocks of the descriptor table that also describe groups of the base are in the overlay as they are in the base now;
//! of them the child's view takes its own groups' descriptors alone.

use super::ownership::GroupSet;
use super::probe::{Probe, read_block};
use crate::error::Result;
use crate::ext4::group::GroupBytes;
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::growth::Growth;
use crate::ext4::volatile::FreeCounts;
use crate::image::Image;
use crate::units::{BlockGroup, FsBlock};

/// What the overlay is to hold.
#[derive(Debug, Default)]
pub(super) struct NewGroups {
    /// What there is free in it.
    pub(super) free: FreeCounts,
    /// Blocks of zeros: the first of them, and how many.
    pub(super) zeroes: Vec<(FsBlock, u64)>,
    /// Other blocks.
    pub(super) blocks: Vec<(FsBlock, Vec<u8>)>,
}

impl NewGroups {
    /// Plans the groups that `growth` adds to the filesystem in `probe`, of which the child owns the groups `owned`.
    ///
    /// # Errors
    /// What reading the base returns.
    pub(super) async fn plan(
        base: &dyn Image,
        probe: &Probe,
        growth: &Growth,
        owned: &GroupSet,
    ) -> Result<Self> {
        let mut new = Self::default();
        let mut table = base_table(base, probe).await?;
        let size = usize::from(growth.after().descriptor_size);
        table.resize(size.saturating_mul(growth.after().group_count as usize), 0);
        let mut changed_from = growth.before().group_count;
        let (last, gained) = growth.last_group();
        if owned.contains(last) && !gained.is_empty() {
            let bytes = lengthened(base, probe, growth).await?;
            put_descriptor(growth, last, &bytes.descriptor, &mut table);
            let bitmap = GroupDescriptor::parse(&bytes.descriptor)
                .locations
                .block_bitmap;
            new.blocks.push((bitmap, bytes.block_bitmap));
            new.free.blocks = u64::from(gained.end - gained.start);
            changed_from = last.0;
        }
        for group in growth.groups() {
            new.add_group(growth, group, &mut table);
        }
        let after = growth.after();
        let first = changed_from / after.descriptors_per_block();
        for index in first..after.descriptor_blocks() {
            new.blocks.push((
                after.descriptor_block(index),
                table_block(growth, &table, index),
            ));
        }
        for group in growth.groups() {
            new.add_head(growth, group, &table);
        }
        for table in growth.inode_tables() {
            new.zeroes
                .push((FsBlock(table.start), table.end - table.start));
        }
        Ok(new)
    }

    fn add_group(&mut self, growth: &Growth, group: BlockGroup, table: &mut [u8]) {
        let Some(new) = growth.new_group(group) else {
            return;
        };
        put_descriptor(growth, group, &new.descriptor, table);
        let counts = GroupDescriptor::parse(&new.descriptor).free();
        self.free = [self.free, counts].into_iter().sum();
        let bitmaps = [
            (new.locations.block_bitmap, new.block_bitmap),
            (new.locations.inode_bitmap, new.inode_bitmap),
        ];
        for (block, bytes) in bitmaps {
            self.blocks.extend(bytes.map(|bytes| (block, bytes)));
        }
    }

    /// The copies that a new group begins with.
    fn add_head(&mut self, growth: &Growth, group: BlockGroup, table: &[u8]) {
        let after = growth.after();
        let head = after.group_head(group);
        let mut at = after.group_start(group).0;
        if head.superblock {
            let mut block = vec![0; usize::try_from(after.block_size).unwrap_or(0)];
            let copy = Growth::backup_of(growth.bytes(), group);
            if let Some(place) = block.get_mut(..copy.len()) {
                place.copy_from_slice(&copy);
            }
            self.blocks.push((FsBlock(at), block));
            at += 1;
        }
        let copies = after.copied_descriptor_blocks(group);
        for index in copies {
            self.blocks
                .push((FsBlock(at), table_block(growth, table, index)));
            at += 1;
        }
        if head.reserved_blocks > 0 {
            self.zeroes
                .push((FsBlock(at), u64::from(head.reserved_blocks)));
        }
    }
}

/// The last of the base's groups, which `probe` is of, as long as `growth` makes it.
///
/// # Errors
/// What reading the base returns, and [`crate::error::ErrorKind::Corrupt`] if the group is not sound.
pub(super) async fn lengthened(
    base: &dyn Image,
    probe: &Probe,
    growth: &Growth,
) -> Result<GroupBytes> {
    let (last, _) = growth.last_group();
    let mut bytes = probe.group(base, last).await?.into_bytes();
    growth.lengthen_last_group(&mut bytes);
    Ok(bytes)
}

/// The descriptors of all groups of the base.
async fn base_table(base: &dyn Image, probe: &Probe) -> Result<Vec<u8>> {
    let superblock = probe.superblock();
    let mut table = Vec::new();
    for index in 0..superblock.descriptor_blocks() {
        let block = superblock.descriptor_block(index);
        table.extend(read_block(base, probe.place(), superblock, block).await?);
    }
    let size = usize::from(superblock.descriptor_size);
    table.truncate(size.saturating_mul(superblock.group_count as usize));
    Ok(table)
}

/// Puts a descriptor into the table.
fn put_descriptor(growth: &Growth, group: BlockGroup, bytes: &[u8], table: &mut [u8]) {
    let at = usize::from(growth.after().descriptor_size).saturating_mul(group.0 as usize);
    if let Some(place) = table.get_mut(at..at.saturating_add(bytes.len())) {
        place.copy_from_slice(bytes);
    }
}

/// Block `index` of the table.
fn table_block(growth: &Growth, table: &[u8], index: u32) -> Vec<u8> {
    let len = usize::try_from(growth.after().block_size).unwrap_or(0);
    let start = len.saturating_mul(index as usize).min(table.len());
    let end = start.saturating_add(len).min(table.len());
    let mut block = table[start..end].to_vec();
    block.resize(len, 0);
    block
}
