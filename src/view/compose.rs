//! What a VM reads where the stored bytes are not what it is to see.
//!
//! A shared block is an array of records, and every record has an owner: own records come from the VM's own
//! store, foreign ones from the base, changed so that the VM's kernel finds nothing there to write.

use std::ops::Range;

use super::disk::View;
use super::route::{Composed, Piece};
use super::territory::{Filesystem, Side};
use crate::error::{Error, ErrorKind, Result};
use crate::ext4::inode::Inode;
use crate::ext4::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE};
use crate::ext4::volatile::FreeCounts;
use crate::ext4::{bitmap, group_descriptor, inode, volatile, xattr_block};
use crate::image::Image;
use crate::sys::IoBuf;
use crate::units::{BlockGroup, FsBlock, GuestOffset};

/// The most bytes of an inode table that are held in memory at once, for one request.
const INODE_CHUNK: u64 = 64 << 10;

/// A shared block in its two forms.
pub(super) struct SharedBlock {
    /// The bytes in the VM's own store, which for a block never written are the base's.
    pub(super) stored: Vec<u8>,
    /// The bytes in the base, if the VM writes records of its own there.
    pub(super) in_place: Option<Vec<u8>>,
    /// The bytes that the VM reads.
    pub(super) served: Vec<u8>,
}

impl View {
    /// Fills `buf` with what the VM reads at `piece`.
    pub(super) async fn compose(
        &self,
        filesystem: &Filesystem,
        what: Composed,
        piece: &Piece,
        buf: &IoBuf,
    ) -> Result<()> {
        match what {
            Composed::BlockBitmap(_) | Composed::InodeBitmap(_) => {
                fill(buf, bitmap::FULL);
                Ok(())
            }
            Composed::Inodes(group) => {
                let mut at = piece.at;
                while at < piece.end() {
                    let chunk = filesystem.inode_chunk(at, piece.end(), INODE_CHUNK);
                    let served = self.foreign_inodes(filesystem, group, &chunk).await?;
                    let place = index(at.0 - piece.at.0);
                    buf.copy_from(place, &served[chunk.wanted.clone()]);
                    at = GuestOffset(at.0 + chunk.wanted.len() as u64);
                }
                Ok(())
            }
            Composed::Attributes(_) => {
                let block = filesystem.block_at(piece.at);
                let at = filesystem.offset_of(block);
                let mut bytes = read_bytes(&*self.truth, at, filesystem.block_size()).await?;
                xattr_block::foreign(&filesystem.superblock().checksums, block, &mut bytes);
                buf.copy_from(0, &bytes[filesystem.within_block(piece)]);
                Ok(())
            }
            Composed::Superblock | Composed::Descriptors(_) => {
                if what == Composed::Superblock
                    && let Some(refresher) = &self.refresher
                {
                    refresher.before_superblock_read().await;
                }
                let block = filesystem.block_at(piece.at);
                // What is stored and what is hidden of it move together.
                let _settled = match what {
                    Composed::Superblock => Some(self.ledger.lock(block).await),
                    _ => None,
                };
                let shared = self.shared_block(filesystem, what, block).await?;
                buf.copy_from(0, &shared.served[filesystem.within_block(piece)]);
                Ok(())
            }
        }
    }

    /// Whole blocks of a foreign inode table, as the VM reads them.
    pub(super) async fn foreign_inodes(
        &self,
        filesystem: &Filesystem,
        group: BlockGroup,
        chunk: &InodeChunk,
    ) -> Result<Vec<u8>> {
        let superblock = filesystem.superblock();
        let mut bytes = read_bytes(&*self.truth, chunk.at, chunk.len).await?;
        let record = usize::from(superblock.inode_size);
        for (index, inode) in (chunk.first_index..).zip(bytes.chunks_exact_mut(record)) {
            let Inode { file_acl, .. } = Inode::parse(inode);
            if file_acl != 0 {
                filesystem.note_attributes(FsBlock(file_acl));
            }
            inode::foreign(superblock, superblock.inode_number(group, index), inode);
        }
        Ok(bytes)
    }

    /// Reads a block that holds records of several owners.
    pub(super) async fn shared_block(
        &self,
        filesystem: &Filesystem,
        what: Composed,
        block: FsBlock,
    ) -> Result<SharedBlock> {
        let at = filesystem.offset_of(block);
        let len = filesystem.block_size();
        let stored = read_bytes(&*self.own, at, len).await?;
        let mut served = stored.clone();
        let mut in_place = None;
        match what {
            Composed::Descriptors(index) => {
                if filesystem.describes_in_place(index) {
                    in_place = Some(read_bytes(&*self.in_place()?.disk, at, len).await?);
                }
                compose_descriptors(filesystem, index, in_place.as_deref(), &mut served);
            }
            _ => {
                let truth = match filesystem.side() {
                    Side::Base => None,
                    Side::Child => Some(read_bytes(&*self.truth, at, len).await?),
                };
                let foreign_free = self.ledger.foreign_free();
                compose_superblock(filesystem, truth, foreign_free, &mut served)?;
            }
        }
        Ok(SharedBlock {
            stored,
            in_place,
            served,
        })
    }
}

/// Replaces the foreign descriptors in block `index` of the table, and those that the VM writes in the base, whose
/// block is `in_place`.
fn compose_descriptors(
    filesystem: &Filesystem,
    index: u32,
    in_place: Option<&[u8]>,
    block: &mut [u8],
) {
    let superblock = filesystem.superblock();
    let size = usize::from(superblock.descriptor_size);
    for ((group, descriptor), at) in filesystem
        .groups_of_descriptor_block(index)
        .zip(block.chunks_exact_mut(size))
        .zip((0..).step_by(size))
    {
        if filesystem.is_in_place(group) {
            if let Some(base) = in_place.and_then(|base| base.get(at..at + size)) {
                descriptor.copy_from_slice(base);
            }
        } else if !filesystem.owns(group)
            && let Some(locations) = filesystem.locations(group)
        {
            group_descriptor::full(superblock, group, locations, descriptor);
        }
    }
}

/// Turns the VM's stored superblock block into what it reads; `truth` is the base's block, for a child. The
/// base's superblock in it is not looked at: what the filesystem is was read when the view was opened, and
/// ownership rests on it.
fn compose_superblock(
    filesystem: &Filesystem,
    truth: Option<Vec<u8>>,
    foreign_free: FreeCounts,
    block: &mut Vec<u8>,
) -> Result<()> {
    let own = superblock_in(block)?;
    let composed = match truth {
        None => {
            let mut served = own;
            volatile::hide_free(&mut served, foreign_free);
            volatile::hide_features(&mut served);
            served
        }
        Some(truth) => {
            *block = truth;
            volatile::compose_superblock(filesystem.structure(), &own, filesystem.share())
        }
    };
    put_superblock(block, &composed);
    Ok(())
}

/// The superblock in its block.
pub(super) fn superblock_in(block: &[u8]) -> Result<[u8; SUPERBLOCK_SIZE]> {
    let bytes = block.get(superblock_within(block.len()));
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::new(ErrorKind::Corrupt, "the superblock's block is too short"))
}

/// Puts `superblock` into its block.
pub(super) fn put_superblock(block: &mut [u8], superblock: &[u8; SUPERBLOCK_SIZE]) {
    let within = superblock_within(block.len());
    if let Some(place) = block.get_mut(within) {
        place.copy_from_slice(superblock);
    }
}

/// A part of an inode table: whole blocks, and which of their bytes are wanted.
pub(super) struct InodeChunk {
    /// The first block's disk offset.
    pub(super) at: GuestOffset,
    /// Bytes of all blocks.
    pub(super) len: usize,
    /// The index in its group of the first inode.
    pub(super) first_index: u32,
    /// The wanted bytes of them.
    pub(super) wanted: Range<usize>,
}

/// Where the superblock lies in its block of `block_size` bytes.
pub(super) fn superblock_within(block_size: usize) -> Range<usize> {
    let start = if block_size > SUPERBLOCK_SIZE {
        index(SUPERBLOCK_OFFSET)
    } else {
        0
    };
    start..start + SUPERBLOCK_SIZE
}

/// A copy of `len` bytes of a disk.
pub(super) async fn read_bytes(image: &dyn Image, at: GuestOffset, len: usize) -> Result<Vec<u8>> {
    let buf = IoBuf::zeroed(len);
    image.read(at, buf.clone()).await?;
    Ok(buf.to_vec())
}

fn fill(buf: &IoBuf, value: u8) {
    const PATTERN_LEN: usize = 4096;
    let pattern = [value; PATTERN_LEN];
    for at in (0..buf.len()).step_by(PATTERN_LEN) {
        let len = PATTERN_LEN.min(buf.len() - at);
        buf.copy_from(at, &pattern[..len]);
    }
}

/// A length within a request or a block, which the caller has bounded.
fn index(len: u64) -> usize {
    usize::try_from(len).expect("a request's buffer fits in memory")
}
