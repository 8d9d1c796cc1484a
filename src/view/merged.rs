//! A child's true disk: what its overlay and the base are together, as a filesystem of its own.
//!
//! Unlike a view, it hides nothing: every group's structures are as their owner left them, no inode is made
//! immutable, and the superblock counts what is free in all groups. `e2fsck -fn` finds nothing amiss in it, if
//! both VMs have unmounted cleanly.

use std::sync::Arc;

use super::compose::{put_superblock, read_bytes, superblock_in};
use super::route::{Composed, Piece, Pieces, Route, Treatment};
use super::territory::{Filesystem, Territory};
use crate::error::{Error, ErrorKind, Result};
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::superblock::Superblock;
use crate::ext4::volatile::{self, FreeCounts};
use crate::image::{Allocation, Image};
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// How much is copied at a time, in bytes.
const CHUNK: u64 = 1 << 20;
/// Runs of zeros of at least this length are not written, in bytes.
const HOLE: usize = 4096;

/// The disk that a child's overlay and its base make together.
pub struct Merged {
    own: Arc<dyn Image>,
    truth: Arc<dyn Image>,
    territory: Territory,
    /// The block of the superblock.
    superblock_block: Vec<u8>,
}

impl Merged {
    /// The disk of the child that owns `territory`, with the overlay `own` on the base `truth`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if either filesystem is in use or was not unmounted cleanly, and what reading
    /// the images returns.
    pub async fn open(
        own: Arc<dyn Image>,
        truth: Arc<dyn Image>,
        territory: Territory,
    ) -> Result<Self> {
        let mut merged = Self {
            own,
            truth,
            territory,
            superblock_block: Vec::new(),
        };
        if let Some(filesystem) = merged.territory.filesystem() {
            merged.superblock_block = merged.merge_superblock(filesystem).await?;
        }
        Ok(merged)
    }

    /// The disk's length in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.own.virtual_size()
    }

    /// Fills `buf` with the bytes at `at`.
    ///
    /// # Errors
    /// What reading the images returns.
    pub async fn read(&self, at: GuestOffset, buf: IoBuf) -> Result<()> {
        for piece in Pieces::new(&self.territory, at, buf.len() as u64, Route::Read) {
            self.read_piece(&piece, buf.slice(piece.within(at))).await?;
        }
        Ok(())
    }

    async fn read_piece(&self, piece: &Piece, part: IoBuf) -> Result<()> {
        let what = match piece.treatment {
            Treatment::Composed(what) => what,
            Treatment::Foreign(_) => return self.truth.read(piece.at, part).await,
            Treatment::Through | Treatment::Journal => return self.own.read(piece.at, part).await,
        };
        let Some(filesystem) = self.territory.filesystem() else {
            return self.own.read(piece.at, part).await;
        };
        match what {
            Composed::Superblock => {
                part.copy_from(0, &self.superblock_block[filesystem.within_block(piece)]);
                Ok(())
            }
            Composed::Descriptors(index) => {
                let block = self.merge_descriptors(filesystem, index).await?;
                part.copy_from(0, &block[filesystem.within_block(piece)]);
                Ok(())
            }
            _ => self.truth.read(piece.at, part).await,
        }
    }

    /// Block `index` of the descriptor table: every descriptor as its owner wrote it.
    async fn merge_descriptors(&self, filesystem: &Filesystem, index: u32) -> Result<Vec<u8>> {
        let at = filesystem.offset_of(filesystem.superblock().descriptor_block(index));
        let len = filesystem.block_size();
        let mut merged = read_bytes(&*self.truth, at, len).await?;
        let own = read_bytes(&*self.own, at, len).await?;
        let size = usize::from(filesystem.superblock().descriptor_size);
        let records = merged.chunks_exact_mut(size).zip(own.chunks_exact(size));
        for (group, (merged, own)) in filesystem.groups_of_descriptor_block(index).zip(records) {
            if filesystem.owns(group) {
                merged.copy_from_slice(own);
            }
        }
        Ok(merged)
    }

    /// The base's superblock with the child's volatile fields, and the free counts of all groups.
    async fn merge_superblock(&self, filesystem: &Filesystem) -> Result<Vec<u8>> {
        let at = filesystem.superblock_block_offset();
        let len = filesystem.block_size();
        let mut block = read_bytes(&*self.truth, at, len).await?;
        let base = superblock_in(&block)?;
        let own = superblock_in(&read_bytes(&*self.own, at, len).await?)?;
        let mut merged = volatile::scatter_superblock(&base, &own);
        for (bytes, image) in [(&base, &self.truth), (&merged, &self.own)] {
            if !Superblock::parse(bytes)?.is_clean() {
                return Err(Error::new(
                    ErrorKind::InvalidConfig,
                    format!(
                        "the filesystem of {} is mounted or was not unmounted cleanly; let its VM mount and \
                         unmount it, then flatten",
                        image.name()
                    ),
                ));
            }
        }
        let free = self.count_free(filesystem).await?;
        volatile::put_free(&mut merged, free);
        put_superblock(&mut block, &merged);
        Ok(block)
    }

    async fn count_free(&self, filesystem: &Filesystem) -> Result<FreeCounts> {
        let superblock = filesystem.superblock();
        let size = usize::from(superblock.descriptor_size);
        let mut free = FreeCounts::default();
        for index in 0..superblock.descriptor_blocks() {
            let block = self.merge_descriptors(filesystem, index).await?;
            for (_, descriptor) in filesystem
                .groups_of_descriptor_block(index)
                .zip(block.chunks_exact(size))
            {
                let descriptor = GroupDescriptor::parse(descriptor);
                free.blocks = free
                    .blocks
                    .saturating_add(u64::from(descriptor.free_blocks_count));
                free.inodes = free.inodes.saturating_add(descriptor.free_inodes_count);
            }
        }
        Ok(free)
    }

    /// Writes the disk to `out`, which reads as zeros and is at least as long. Zeros are left out.
    ///
    /// # Errors
    /// What reading the images or writing `out` returns.
    pub async fn copy_to(&self, out: &dyn Image) -> Result<()> {
        let whole = self.virtual_size();
        for piece in Pieces::new(&self.territory, GuestOffset(0), whole, Route::Read) {
            let mut at = piece.at;
            while at < piece.end() {
                let left = piece.end().0 - at.0;
                let (zero, len) = match piece.treatment {
                    Treatment::Through | Treatment::Journal => {
                        reads_as_zeros(&self.own, at, left).await?
                    }
                    Treatment::Foreign(_) => reads_as_zeros(&self.truth, at, left).await?,
                    Treatment::Composed(_) => (false, left),
                };
                let len = if zero { len } else { len.min(CHUNK) };
                if !zero {
                    let part = Piece { at, len, ..piece };
                    self.copy_part(&part, out).await?;
                }
                at = GuestOffset(at.0 + len);
            }
        }
        out.flush().await
    }

    async fn copy_part(&self, part: &Piece, out: &dyn Image) -> Result<()> {
        let buf = IoBuf::zeroed(usize::try_from(part.len).expect("a chunk fits in memory"));
        self.read_piece(part, buf.clone()).await?;
        let bytes = buf.to_vec();
        for (start, end) in data_runs(&bytes) {
            let at = GuestOffset(part.at.0 + start as u64);
            out.write(at, buf.slice(start..end)).await?;
        }
        Ok(())
    }
}

/// The runs of `bytes` that are not holes.
fn data_runs(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, block) in bytes.chunks(HOLE).enumerate() {
        if block.iter().all(|&byte| byte == 0) {
            continue;
        }
        let start = index * HOLE;
        let end = start + block.len();
        match runs.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => runs.push((start, end)),
        }
    }
    runs
}

/// Whether an image and its backing chain say that `at` reads as zeros, and for how many of the next `len` bytes the
/// answer is the same.
async fn reads_as_zeros(image: &Arc<dyn Image>, at: GuestOffset, len: u64) -> Result<(bool, u64)> {
    let mut layer = image;
    let mut len = len;
    loop {
        if at.0 >= layer.virtual_size() {
            return Ok((true, len));
        }
        let inside = len.min(layer.virtual_size() - at.0);
        let (allocation, same) = layer.allocation(at, inside).await?;
        len = same.clamp(1, inside);
        match (allocation, layer.backing()) {
            (Allocation::Data(_) | Allocation::Compressed, _) => return Ok((false, len)),
            (Allocation::Zero(_) | Allocation::Sparse(_), _)
            | (Allocation::Unallocated(_), None) => return Ok((true, len)),
            (Allocation::Unallocated(_), Some(backing)) => layer = backing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_left_out_and_neighbours_joined() {
        let mut bytes = vec![0; 5 * HOLE + 10];
        bytes[HOLE] = 1;
        bytes[2 * HOLE + 5] = 1;
        bytes[5 * HOLE + 9] = 1;
        assert_eq!(
            data_runs(&bytes),
            [(HOLE, 3 * HOLE), (5 * HOLE, 5 * HOLE + 10)]
        );
        assert!(data_runs(&[0; 100]).is_empty());
    }
}
