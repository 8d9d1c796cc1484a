//! A device session: from one front-end's coming to the next, and what its guest has to recover.
//!
//! A guest that was cut off replays its journal when it mounts again. A block in it that is not the VM's to
//! write (a root user wrote it) would make every mount fail. So while a guest recovers, refused writes
//! are dropped rather than failed. A guest recovers if the superblock of its own journal says that there is
//! something to replay (`s_start` is not 0) when the session begins, and until it writes that superblock again,
//! which a kernel does when all has been replayed.

use std::sync::atomic::Ordering;

use super::compose::{read_bytes, superblock_in};
use super::disk::View;
use super::lease::Unmounted;
use super::territory::Filesystem;
use crate::error::Result;
use crate::ext4::jbd2::{JOURNAL_SUPERBLOCK_SIZE, JournalSuperblock};
use crate::ext4::superblock::Superblock;
use crate::image::Image;
use crate::units::GuestOffset;

/// Whether the VM whose own store is `own` has unmounted `filesystem` cleanly: its superblock says so, and its journal
/// has nothing to bring to its place. What cannot be read was not unmounted.
pub(super) async fn unmounted(own: &dyn Image, filesystem: &Filesystem) -> Result<Unmounted> {
    let at = filesystem.superblock_block_offset();
    let block = read_bytes(own, at, filesystem.block_size()).await?;
    let superblock = Superblock::parse(&superblock_in(&block)?);
    let is_clean = superblock.is_ok_and(|superblock| superblock.is_clean());
    let is_empty = match filesystem.journal_start() {
        Some(start) => {
            let at = filesystem.offset_of(start);
            let bytes = read_bytes(own, at, JOURNAL_SUPERBLOCK_SIZE).await?;
            bytes.first_chunk().is_some_and(|bytes| {
                let blocks = filesystem.journal_blocks();
                JournalSuperblock::parse(filesystem.superblock(), blocks, bytes)
                    .is_ok_and(|journal| journal.is_empty())
            })
        }
        None => true,
    };
    Ok(if is_clean && is_empty {
        Unmounted::Cleanly
    } else {
        Unmounted::Not
    })
}

impl View {
    /// Whether the guest has unmounted its filesystem cleanly, if the disk has one that this knows of.
    pub(super) async fn is_clean(&self) -> Result<bool> {
        match self.territory.filesystem() {
            Some(filesystem) => Ok(unmounted(&*self.own, filesystem).await? == Unmounted::Cleanly),
            None => Ok(true),
        }
    }

    /// Looks whether the guest has a journal to replay.
    pub(super) async fn start_session(&self) -> Result<()> {
        let recovering = self.has_to_replay().await?;
        self.recovering.store(recovering, Ordering::Release);
        if recovering {
            log::info!(
                "vm {}: its journal has to be replayed; until then refused writes are dropped, not failed",
                self.refusals.vm()
            );
        }
        Ok(())
    }

    async fn has_to_replay(&self) -> Result<bool> {
        let (Some(at), Some(filesystem)) = (self.journal_superblock(), self.territory.filesystem())
        else {
            return Ok(false);
        };
        let bytes = read_bytes(&*self.own, at, JOURNAL_SUPERBLOCK_SIZE).await?;
        let Some(bytes) = bytes.first_chunk() else {
            return Ok(false);
        };
        // No kernel replays a journal whose superblock is damaged.
        let journal =
            JournalSuperblock::parse(filesystem.superblock(), filesystem.journal_blocks(), bytes);
        Ok(journal.is_ok_and(|journal| !journal.is_empty()))
    }

    /// Ends recovery once the guest has written its journal's superblock.
    pub(super) fn note_recovery_progress(&self, at: GuestOffset, len: u64) {
        let end = at.0.saturating_add(len);
        let written = self
            .journal_superblock()
            .is_some_and(|journal| at <= journal && journal.0 < end);
        if written && self.recovering.swap(false, Ordering::AcqRel) {
            log::info!("vm {}: its journal has been replayed", self.refusals.vm());
        }
    }

    /// Where the superblock of the VM's own journal lies on the disk.
    fn journal_superblock(&self) -> Option<GuestOffset> {
        let filesystem = self.territory.filesystem()?;
        let block = filesystem.journal_start()?;
        Some(filesystem.offset_of(block))
    }
}
