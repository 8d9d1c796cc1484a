//! What of a base is not as it is stored in the true disk of a child with block groups behind the base's end: the
//! copies of superblock and descriptors, the inode that keeps room for descriptors, and the end of the base's last
//! group.
//!
//! A VM that runs needs none of it, so a view shows all this as the base has it. A disk of its own needs all of it.

use std::collections::BTreeMap;

use super::compose::superblock_in;
use super::merged::Merged;
use super::probe::{locate_inode, read_block, read_descriptor};
use super::route::Piece;
use super::territory::Filesystem;
use crate::error::Result;
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::growth::Growth;
use crate::ext4::layout::Kind;
use crate::ext4::resize_inode;
use crate::image::Image;
use crate::sys::IoBuf;
use crate::units::{BlockGroup, FsBlock, GuestOffset};

/// What differs from the base as it is stored.
pub(super) struct AroundGrown {
    /// Whole blocks.
    blocks: BTreeMap<FsBlock, Vec<u8>>,
    /// The descriptor of the base's last group, if that is the base's and has become longer.
    last: Option<(BlockGroup, Vec<u8>)>,
}

impl AroundGrown {
    /// What differs in `filesystem` from the base `truth`, which nobody has mounted; `None` if it has no groups that
    /// the base does not have.
    ///
    /// # Errors
    /// What reading the base returns.
    pub(super) async fn read(truth: &dyn Image, filesystem: &Filesystem) -> Result<Option<Self>> {
        let Some(growth) = filesystem.probe().growth() else {
            return Ok(None);
        };
        let mut around = Self {
            blocks: BTreeMap::new(),
            last: None,
        };
        if growth.changes_resize_inode() {
            around.note_resize_inode(truth, filesystem, growth).await?;
        }
        let (last, gained) = growth.last_group();
        if !gained.is_empty() && !filesystem.owns(last) {
            around.note_last_group(truth, filesystem, growth).await?;
        }
        Ok(Some(around))
    }

    async fn note_resize_inode(
        &mut self,
        truth: &dyn Image,
        filesystem: &Filesystem,
        growth: &Growth,
    ) -> Result<()> {
        let (place, superblock) = (filesystem.probe().place(), growth.before());
        let (at, within) = locate_inode(truth, place, superblock, resize_inode::NUMBER).await?;
        let mut table = read_block(truth, place, superblock, at).await?;
        let record = &mut table[within..within + usize::from(superblock.inode_size)];
        let map = resize_inode::double_indirect(record);
        growth.grow_resize_inode(record);
        let mut entries = read_block(truth, place, superblock, map).await?;
        growth.grow_double_indirect(&mut entries);
        self.blocks.insert(at, table);
        self.blocks.insert(map, entries);
        self.blocks.extend(growth.kept_blocks());
        Ok(())
    }

    async fn note_last_group(
        &mut self,
        truth: &dyn Image,
        filesystem: &Filesystem,
        growth: &Growth,
    ) -> Result<()> {
        let (place, superblock) = (filesystem.probe().place(), growth.before());
        let (last, _) = growth.last_group();
        let mut descriptor = read_descriptor(truth, place, superblock, last).await?;
        let at = GroupDescriptor::parse(&descriptor).locations.block_bitmap;
        let mut bitmap = read_block(truth, place, superblock, at).await?;
        growth.lengthen_block_bitmap(&mut bitmap);
        growth.lengthen_descriptor(&mut descriptor, &bitmap);
        self.blocks.insert(at, bitmap);
        self.last = Some((last, descriptor));
        Ok(())
    }

    /// The descriptor of `group`, if it is not the base's.
    pub(super) fn descriptor(&self, group: BlockGroup) -> Option<&[u8]> {
        let (last, descriptor) = self.last.as_ref()?;
        (*last == group).then_some(descriptor)
    }
}

impl Merged {
    /// Puts what differs into what was read of the base at `piece`.
    ///
    /// # Errors
    /// What reading the images returns.
    pub(super) async fn correct(&self, piece: &Piece, part: &IoBuf) -> Result<()> {
        let (Some(around), Some(filesystem)) = (&self.around, self.territory.filesystem()) else {
            return Ok(());
        };
        let range = filesystem.range();
        if piece.len == 0 || piece.at < range.start || piece.at >= range.end {
            return Ok(());
        }
        let first = filesystem.block_at(piece.at);
        let behind = FsBlock(filesystem.block_at(GuestOffset(piece.end().0 - 1)).0 + 1);
        for (block, bytes) in around.blocks.range(first..behind) {
            put(filesystem, *block, bytes, piece, part);
        }
        for (kind, start, len) in filesystem.probe().layout().pieces(first.0..behind.0) {
            let Kind::Backup { group } = kind else {
                continue;
            };
            for block in (start.0..start.0 + len).map(FsBlock) {
                if let Some(bytes) = self.copy_at(filesystem, group, block).await? {
                    put(filesystem, block, &bytes, piece, part);
                }
            }
        }
        Ok(())
    }

    /// What `block`, of those that `group` begins with, is a copy of; `None` for room that nothing is in yet.
    async fn copy_at(
        &self,
        filesystem: &Filesystem,
        group: BlockGroup,
        block: FsBlock,
    ) -> Result<Option<Vec<u8>>> {
        let superblock = filesystem.superblock();
        let within = block.0.saturating_sub(superblock.group_start(group).0);
        let within = u32::try_from(within).unwrap_or(u32::MAX);
        let has_superblock = superblock.has_superblock(group);
        if has_superblock && within == 0 {
            let bytes = superblock_in(&self.superblock_block)?;
            return Ok(Some(Growth::backup_of(&bytes, group).to_vec()));
        }
        let copies = superblock.copied_descriptor_blocks(group);
        let index = copies
            .start
            .saturating_add(within - u32::from(has_superblock));
        if !copies.contains(&index) {
            return Ok(None);
        }
        self.merge_descriptors(filesystem, index).await.map(Some)
    }
}

/// Puts those of `bytes`, with which `block` begins, that lie in `piece` to their place in `part`.
fn put(filesystem: &Filesystem, block: FsBlock, bytes: &[u8], piece: &Piece, part: &IoBuf) {
    let start = filesystem.offset_of(block).0;
    let from = start.max(piece.at.0);
    let to = start.saturating_add(bytes.len() as u64).min(piece.end().0);
    let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    if from < to
        && let Some(wanted) = bytes.get(index(from - start)..index(to - start))
    {
        part.copy_from(index(from - piece.at.0), wanted);
    }
}
