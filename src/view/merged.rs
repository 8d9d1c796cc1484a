//! A child's true disk: what its overlay and the base are together, as a filesystem of its own.
//!
//! Unlike a view, it hides nothing: every group's structures are as their owner left them, no inode is made
//! immutable, and the superblock counts what is free in all groups. `e2fsck -fn` finds nothing amiss in it, if
//! both VMs have unmounted cleanly.

use std::sync::Arc;

use super::compose::{put_superblock, read_bytes, superblock_in};
use super::merged_growth::AroundGrown;
use super::route::{Composed, Piece, Pieces, Route, Treatment};
use super::territory::{Filesystem, Territory};
use crate::error::{Error, ErrorKind, Result};
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::superblock::{SUPERBLOCK_SIZE, Superblock};
use crate::ext4::volatile::{self, FreeCounts};
use crate::image::{Image, ImageFuture};
use crate::jobs::extents::Extents;
use crate::jobs::source::{Content, Source, Walk};
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// The disk that a child's overlay and its base make together.
pub struct Merged {
    own: Arc<dyn Image>,
    truth: Arc<dyn Image>,
    pub(super) territory: Territory,
    /// The block of the superblock.
    pub(super) superblock_block: Vec<u8>,
    /// What else is not as the base has it, if the child has groups behind the base's end.
    pub(super) around: Option<AroundGrown>,
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
            around: None,
        };
        if let Some(filesystem) = merged.territory.filesystem() {
            merged.around = AroundGrown::read(&*merged.truth, filesystem).await?;
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
            Treatment::Foreign(_) | Treatment::InPlace => {
                return self.read_truth(piece, part).await;
            }
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
            _ => self.read_truth(piece, part).await,
        }
    }

    async fn read_truth(&self, piece: &Piece, part: IoBuf) -> Result<()> {
        self.truth.read(piece.at, part.clone()).await?;
        self.correct(piece, &part).await
    }

    /// Block `index` of the descriptor table: every descriptor as its owner wrote it.
    pub(super) async fn merge_descriptors(
        &self,
        filesystem: &Filesystem,
        index: u32,
    ) -> Result<Vec<u8>> {
        let at = filesystem.offset_of(filesystem.superblock().descriptor_block(index));
        let len = filesystem.block_size();
        let own = read_bytes(&*self.own, at, len).await?;
        if filesystem.describes_new_groups_alone(index) {
            return Ok(own);
        }
        let mut merged = read_bytes(&*self.truth, at, len).await?;
        let size = usize::from(filesystem.superblock().descriptor_size);
        let records = merged.chunks_exact_mut(size).zip(own.chunks_exact(size));
        for (group, (merged, own)) in filesystem.groups_of_descriptor_block(index).zip(records) {
            let around = self.around.as_ref();
            if filesystem.owns(group) && !filesystem.is_in_place(group) {
                merged.copy_from_slice(own);
            } else if let Some(longer) = around.and_then(|around| around.descriptor(group)) {
                merged.copy_from_slice(longer);
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
        let mut merged = volatile::scatter_superblock(&self.structure(filesystem, &base), &own);
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

    /// The superblock whose structure the disk has: the base's, or a longer one.
    fn structure(
        &self,
        filesystem: &Filesystem,
        base: &[u8; SUPERBLOCK_SIZE],
    ) -> [u8; SUPERBLOCK_SIZE] {
        match &self.around {
            Some(_) => *filesystem.structure(),
            None => *base,
        }
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
}

impl Source for Merged {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(Merged::read(self, at, buf))
    }

    fn walk(&self) -> Box<dyn Walk + '_> {
        Box::new(MergedWalk {
            merged: self,
            own: Extents::new(&self.own),
        })
    }
}

/// A walk over the disk: what the child alone decides is known from its images, all else has to be read.
struct MergedWalk<'a> {
    merged: &'a Merged,
    own: Extents,
}

impl Walk for MergedWalk<'_> {
    fn next(&mut self, at: GuestOffset, end: u64) -> ImageFuture<'_, (Content, u64)> {
        Box::pin(async move {
            let len = end.saturating_sub(at.0);
            let piece = Pieces::new(&self.merged.territory, at, len, Route::Read).next();
            let Some(piece) = piece else {
                return Ok((Content::Zero, len));
            };
            if piece.treatment != Treatment::Through {
                return Ok((Content::Data, piece.len));
            }
            let extent = self.own.next(at, piece.end().0).await?;
            let content = if extent.is_zero() {
                Content::Zero
            } else {
                Content::Data
            };
            Ok((content, extent.len))
        })
    }
}
