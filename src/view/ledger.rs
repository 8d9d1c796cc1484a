//! What the VMs that write to one disk have to agree on: who exchanges the records of a shared block, and how much
//! is free in the groups that are not the base's VM's.
//!
//! Children with shared regions store descriptors in the blocks in which the base's VM and other children have theirs.
//! The superblock as it is stored counts what is free in all groups, so it moves with every such descriptor; what the
//! base's VM reads as its own stays as it was.
//!
//! # Invariants
//!
//! 1. What the stored superblock counts as free is what the base's VM counts and [`Ledger::foreign_free`] together,
//!    whenever its block is not locked. A failed write makes it untrue until the base's VM writes its superblock again.
//! 2. A crash between a descriptor and the superblock leaves counts that differ. A kernel counts the descriptors when
//!    it mounts; for a base that nobody has mounted [`Ledger::open`] does.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::compose::{put_superblock, read_bytes, superblock_in};
use super::ownership::GroupSet;
use super::probe::{Probe, read_block};
use super::territory::Filesystem;
use crate::error::Result;
use crate::ext4::volatile::{self, FreeCounts};
use crate::image::Image;
use crate::storage::{RangeGuard, RangeLock};
use crate::sys::IoBuf;
use crate::units::{FsBlock, GuestOffset};

/// What the writers of one disk have in common.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Blocks of the filesystem whose records are being exchanged: two writes under way at once would lose one
    /// another's, since a block is read, changed and written back.
    blocks: RangeLock,
    foreign_free: Mutex<FreeCounts>,
}

impl Ledger {
    /// The ledger of the base stored in `disk`, in which the groups `reserved` are not the base's VM's.
    ///
    /// # Errors
    /// What reading and writing the disk returns.
    pub(super) async fn open(
        disk: &dyn Image,
        probe: &Probe,
        reserved: &GroupSet,
        stored: Stored,
    ) -> Result<Self> {
        if stored == Stored::ByChildren && !disk.is_read_only() && probe.superblock().is_clean() {
            count_anew(disk, probe).await?;
        }
        let foreign_free = probe.count_free(disk, reserved.iter()).await?;
        Ok(Self {
            blocks: RangeLock::default(),
            foreign_free: Mutex::new(foreign_free),
        })
    }

    /// Waits for a block in which several VMs have records.
    pub(super) async fn lock(&self, block: FsBlock) -> RangeGuard<'_> {
        self.blocks.lock(block.0..block.0.saturating_add(1)).await
    }

    /// What is free in the groups that the base's VM does not own.
    pub(super) fn foreign_free(&self) -> FreeCounts {
        *self.counts()
    }

    fn counts(&self) -> MutexGuard<'_, FreeCounts> {
        self.foreign_free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that groups which are not the base's VM's had `before` free, and have `after` now (invariant 1).
    ///
    /// # Errors
    /// What reading and writing the disk returns.
    pub(super) async fn note_free(
        &self,
        disk: &dyn Image,
        filesystem: &Filesystem,
        before: FreeCounts,
        after: FreeCounts,
    ) -> Result<()> {
        if before == after {
            return Ok(());
        }
        let at = filesystem.superblock_block_offset();
        let _writer = self.lock(filesystem.block_at(at)).await;
        {
            let mut counts = self.counts();
            *counts = counts.moved(before, after);
        }
        let mut block = read_bytes(disk, at, filesystem.block_size()).await?;
        let mut superblock = superblock_in(&block)?;
        volatile::hide_free(&mut superblock, before);
        volatile::reveal_free(&mut superblock, after);
        put_superblock(&mut block, &superblock);
        disk.write(at, IoBuf::from_bytes(&block)).await
    }
}

/// Who writes what a base's disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// The base's VM alone.
    ByBase,
    /// Children as well.
    ByChildren,
}

/// Has the superblock count what the descriptors say (invariant 2).
async fn count_anew(disk: &dyn Image, probe: &Probe) -> Result<()> {
    let superblock = probe.superblock();
    let counted = probe.count_all_free(disk).await?;
    let number = FsBlock(u64::from(superblock.first_data_block));
    let mut block = read_block(disk, probe.place(), superblock, number).await?;
    let mut bytes = superblock_in(&block)?;
    if volatile::free_counts(&bytes) == counted {
        return Ok(());
    }
    log::info!(
        "{}: a child did not get to count what it had used; the superblock counts it now",
        disk.name()
    );
    volatile::put_free(&mut bytes, counted);
    put_superblock(&mut block, &bytes);
    let at = probe.place().start.0 + number.0 * u64::from(superblock.block_size);
    disk.write(GuestOffset(at), IoBuf::from_bytes(&block))
        .await?;
    disk.flush().await
}
