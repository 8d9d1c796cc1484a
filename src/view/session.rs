//! Whether a guest is recovering its journal.
//!
//! A guest that was cut off replays its journal when it mounts again. A block in it that is not the VM's to
//! write (a root user wrote it) would make every mount fail. So while a guest recovers, refused writes
//! are dropped rather than failed.
//!
//! A guest recovers from when it reads the superblock of its own journal, and that says that there is something to
//! replay (`s_start` is not 0), until it writes anything to the journal. A kernel reads that superblock when it mounts
//! and at no other time, and writes nothing to the journal before all has been replayed; then it writes the superblock.
//! So a guest that stays mounted while the daemon is restarted, or its front-end comes back, is never taken for one
//! that recovers: it reads no journal. A root user who reads the journal of a mounted filesystem has its own refused
//! writes dropped, until the next commit: what it hears changes, not what is written.

use std::sync::atomic::Ordering;

use super::compose::{read_bytes, superblock_in};
use super::disk::View;
use super::lease::Unmounted;
use super::territory::{Filesystem, Territory};
use crate::error::Result;
use crate::ext4::jbd2::{JOURNAL_SUPERBLOCK_SIZE, JournalSuperblock};
use crate::ext4::superblock::Superblock;
use crate::image::Image;
use crate::units::GuestOffset;

/// Where the superblock of the VM's own journal lies on the disk.
pub(super) fn journal_superblock(territory: &Territory) -> Option<GuestOffset> {
    let filesystem = territory.filesystem()?;
    Some(filesystem.offset_of(filesystem.journal_start()?))
}

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

    /// Another guest, or the same one, begins: what it does next tells whether it recovers.
    pub(super) fn start_session(&self) {
        self.recovering.store(false, Ordering::Release);
    }

    /// Whether any byte of the superblock of the guest's journal is among `len` bytes at `at`.
    pub(super) fn takes_in_journal_superblock(&self, at: GuestOffset, len: u64) -> bool {
        self.journal_superblock.is_some_and(|journal| {
            let end = journal.0.saturating_add(JOURNAL_SUPERBLOCK_SIZE as u64);
            at.0 < end && journal.0 < at.0.saturating_add(len)
        })
    }

    /// Begins recovery, if the guest now reads that there is something to replay.
    pub(super) async fn note_journal_read(&self) -> Result<()> {
        if self.has_to_replay().await? && !self.recovering.swap(true, Ordering::AcqRel) {
            log::debug!(
                "vm {}: its journal has to be replayed; until then refused writes are dropped, not failed",
                self.refusals.vm()
            );
        }
        Ok(())
    }

    async fn has_to_replay(&self) -> Result<bool> {
        let (Some(at), Some(filesystem)) = (self.journal_superblock, self.territory.filesystem())
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

    /// Ends recovery once the guest has written to its journal.
    pub(super) fn note_recovery_progress(&self, at: GuestOffset, len: u64) {
        let Some(filesystem) = self.territory.filesystem() else {
            return;
        };
        let end = at.0.saturating_add(len);
        let written = filesystem.journal().iter().any(|extent| {
            let start = filesystem.offset_of(extent.start).0;
            let bytes = u64::from(extent.len).saturating_mul(filesystem.block_size() as u64);
            at.0 < start.saturating_add(bytes) && start < end
        });
        if written && self.recovering.swap(false, Ordering::AcqRel) {
            log::debug!("vm {}: its journal has been replayed", self.refusals.vm());
        }
    }
}
