//! What a guest is told when it asks how full its filesystem is (`statfs`, and so `df`), worked out from what its
//! kernel reads.
//!
//! The size leaves out the filesystem's own structures. Free is what the descriptors of all groups say: of foreign
//! groups, nothing. Of that the blocks kept for root are not available, nor the few that Linux keeps
//! back from everybody where files have extents.

use super::probe::{Probe, read_block, read_superblock};
use crate::error::Result;
use crate::ext4::features::Feature;
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::layout::Kind;
use crate::image::Image;
use crate::units::FsBlock;

/// One block in so many is kept back …
const RESERVE_SHARE: u64 = 50;
/// … but no more than so many.
const MAX_RESERVE: u64 = 4096;

/// How full a filesystem is for one of its VMs, in blocks and inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statfs {
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks that could hold data (`f_blocks`).
    pub blocks: u64,
    /// Free ones (`f_bfree`).
    pub free_blocks: u64,
    /// Free ones that any user may take (`f_bavail`).
    pub available_blocks: u64,
    /// Inodes (`f_files`).
    pub inodes: u32,
    /// Free ones (`f_ffree`).
    pub free_inodes: u32,
}

impl Statfs {
    /// What the guest of `disk` is told, which shows it the filesystem in `probe`.
    ///
    /// # Errors
    /// What reading the disk returns.
    pub(super) async fn of(disk: &dyn Image, probe: &Probe) -> Result<Self> {
        let (superblock, _) = read_superblock(disk, probe.place()).await?;
        let mut free_blocks: u64 = 0;
        let mut free_inodes: u32 = 0;
        let mut rest = superblock.group_count as usize;
        for index in 0..superblock.descriptor_blocks() {
            let block = superblock.descriptor_block(index);
            let bytes = read_block(disk, probe.place(), &superblock, block).await?;
            let descriptors = bytes.chunks_exact(usize::from(superblock.descriptor_size));
            for descriptor in descriptors.take(rest).map(GroupDescriptor::parse) {
                let free = descriptor.free();
                free_blocks = free_blocks.saturating_add(free.blocks);
                free_inodes = free_inodes.saturating_add(free.inodes);
                rest -= 1;
            }
        }
        let reserve = if superblock.features.has(Feature::EXTENTS) {
            MAX_RESERVE.min(superblock.blocks_count / RESERVE_SHARE)
        } else {
            0
        };
        let kept = superblock.reserved_blocks_count.saturating_add(reserve);
        Ok(Self {
            block_size: superblock.block_size,
            blocks: superblock.blocks_count.saturating_sub(overhead(probe)),
            free_blocks,
            available_blocks: free_blocks.saturating_sub(kept),
            inodes: superblock.inodes_count,
            free_inodes,
        })
    }

    /// Bytes that could hold data.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes(self.blocks)
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.bytes(self.blocks.saturating_sub(self.free_blocks))
    }

    /// Bytes that any user may take.
    #[must_use]
    pub fn available(&self) -> u64 {
        self.bytes(self.available_blocks)
    }

    fn bytes(&self, blocks: u64) -> u64 {
        blocks.saturating_mul(u64::from(self.block_size))
    }
}

/// The blocks of the filesystem's own structures, the journal's among them.
fn overhead(probe: &Probe) -> u64 {
    let layout = probe.layout();
    let structures = layout
        .pieces(0..probe.superblock().blocks_count)
        .filter(|(kind, _, _)| {
            !matches!(
                kind,
                Kind::Data { .. } | Kind::OrphanFile { .. } | Kind::MultipleMount
            )
        });
    structures.map(|(_, FsBlock(_), len)| len).sum()
}
