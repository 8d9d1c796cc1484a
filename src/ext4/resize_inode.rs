//! The inode that keeps blocks behind each copy of the descriptor table for its growth (`resize_inode`), and what
//! becomes of it when the table takes some of them.
//!
//! Its double indirect block has an entry for each block of the table, as far as these numbers go round: 0 for one in
//! use, the block itself for one that is kept. A kept block is an indirect block at the same time: it names the blocks
//! at the same place of the copies, in the order of their groups.

use super::fields::{le32, low32, put_le32};
use super::growth::Growth;
use super::inode;
use super::superblock::Superblock;
use crate::units::{BlockGroup, FsBlock, InodeNumber};

/// The inode's number.
pub const NUMBER: InodeNumber = InodeNumber(7);

const SECTORS: usize = 0x1c;
const DOUBLE_INDIRECT: usize = inode::BLOCK + 13 * 4;
const ENTRY: usize = 4;

impl Growth {
    /// Whether the inode and its blocks are others than before.
    #[must_use]
    pub fn changes_resize_inode(&self) -> bool {
        let kept =
            |superblock: &Superblock| (superblock.reserved_gdt_blocks, backups(superblock).count());
        // Without the feature, nothing is kept.
        self.before().reserved_gdt_blocks > 0 && kept(self.before()) != kept(self.after())
    }

    /// Turns the inode's record into what it is afterwards.
    pub fn grow_resize_inode(&self, record: &mut [u8]) {
        let sectors = le32(record, SECTORS)
            .wrapping_sub(sectors(self.before()))
            .wrapping_add(sectors(self.after()));
        put_le32(record, SECTORS, sectors);
        inode::seal(&self.after().checksums, NUMBER, record);
    }

    /// Takes out of the double indirect block what is not kept any more.
    pub fn grow_double_indirect(&self, block: &mut [u8]) {
        let entries = block.len() / ENTRY;
        let taken =
            self.before().descriptor_blocks_at_start()..self.after().descriptor_blocks_at_start();
        for index in taken {
            let index = usize::try_from(index).unwrap_or(0);
            put_le32(block, index.checked_rem(entries).unwrap_or(0) * ENTRY, 0);
        }
    }

    /// The blocks that are still kept, and what they hold.
    pub fn kept_blocks(&self) -> impl Iterator<Item = (FsBlock, Vec<u8>)> + '_ {
        let after = self.after();
        let first =
            u64::from(after.first_data_block) + 1 + u64::from(after.descriptor_blocks_at_start());
        (0..u64::from(after.reserved_gdt_blocks)).map(move |index| {
            let kept = FsBlock(first + index);
            let mut block = vec![0; usize::try_from(after.block_size).unwrap_or(0)];
            for (at, group) in (0..).step_by(ENTRY).zip(backups(after)) {
                let copy = kept.0 + u64::from(group.0) * u64::from(after.blocks_per_group);
                put_le32(&mut block, at, low32(copy));
            }
            (kept, block)
        })
    }
}

/// The double indirect block of the inode whose record is `record`.
#[must_use]
pub fn double_indirect(record: &[u8]) -> FsBlock {
    FsBlock(u64::from(le32(record, DOUBLE_INDIRECT)))
}

/// The groups that hold copies.
fn backups(superblock: &Superblock) -> impl Iterator<Item = BlockGroup> + '_ {
    let others = superblock.groups().skip(1);
    others.filter(|group| superblock.has_superblock(*group))
}

/// What the kept blocks and their copies add to the inode's `i_blocks`.
fn sectors(superblock: &Superblock) -> u32 {
    let copies = backups(superblock).count();
    let copies = u32::try_from(copies).unwrap_or(u32::MAX).saturating_add(1);
    u32::from(superblock.reserved_gdt_blocks)
        .saturating_mul(copies)
        .saturating_mul(superblock.block_size / 512)
}
