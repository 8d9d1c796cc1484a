//! The blocks of a journal on the base's disk.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::ext4::extent::Extent;
use crate::ext4::jbd2::{JOURNAL_SUPERBLOCK_SIZE, JournalSuperblock};
use crate::ext4::jbd2_log::{LogFormat, LogScan};
use crate::image::Image;
use crate::units::{FsBlock, GuestOffset, LogBlock};
use crate::view::compose::read_bytes;
use crate::view::route::Piece;
use crate::view::territory::Filesystem;

/// Blocks of the log that are read at once.
const READ_AHEAD: u32 = 32;

/// A journal: where its blocks are.
pub(super) struct Journal {
    pub(super) disk: Arc<dyn Image>,
    filesystem: Filesystem,
    extents: Vec<Extent>,
}

/// A part of the log in memory.
#[derive(Default)]
pub(super) struct ReadAhead {
    at: u32,
    len: u32,
    bytes: Vec<u8>,
}

impl Journal {
    /// The journal of the base's `filesystem` on `disk`; `None` if it has none.
    pub(super) fn of(disk: Arc<dyn Image>, filesystem: Filesystem) -> Option<Self> {
        let mut extents = filesystem.journal().to_vec();
        extents.sort_by_key(|extent| extent.logical);
        (!extents.is_empty()).then_some(Self {
            disk,
            filesystem,
            extents,
        })
    }

    /// The filesystem, as the base's VM owns it.
    pub(super) fn filesystem(&self) -> &Filesystem {
        &self.filesystem
    }

    /// The journal's superblock; `None` if it is damaged, in which case no kernel replays the log.
    ///
    /// # Errors
    /// What reading the disk returns.
    pub(super) async fn superblock(&self) -> Result<Option<JournalSuperblock>> {
        let at = self.offset_of(LogBlock(0))?;
        let bytes = read_bytes(&*self.disk, at, JOURNAL_SUPERBLOCK_SIZE).await?;
        let superblock = self.filesystem.superblock();
        Ok(bytes.first_chunk().and_then(|bytes| {
            JournalSuperblock::parse(superblock, self.filesystem.journal_blocks(), bytes).ok()
        }))
    }

    /// How the log behind `superblock` is written.
    pub(super) fn format(&self, superblock: &JournalSuperblock) -> LogFormat {
        LogFormat::new(superblock, self.filesystem.superblock().block_size)
    }

    /// The bytes of the block that a scan wants next, `ahead` holding what has been read already.
    ///
    /// # Errors
    /// What reading the disk returns.
    pub(super) async fn next_of<'a>(
        &self,
        scan: &LogScan,
        ahead: &'a mut ReadAhead,
    ) -> Result<Option<&'a [u8]>> {
        let Some(LogBlock(next)) = scan.next_block() else {
            return Ok(None);
        };
        let size = self.filesystem.block_size();
        if !(ahead.at..ahead.at + ahead.len).contains(&next) {
            let (start, run) = self.run_at(LogBlock(next))?;
            let len = run.min(READ_AHEAD);
            let bytes = size.saturating_mul(usize::try_from(len).unwrap_or(usize::MAX));
            *ahead = ReadAhead {
                at: next,
                len,
                bytes: read_bytes(&*self.disk, self.filesystem.offset_of(start), bytes).await?,
            };
        }
        let within = usize::try_from(next - ahead.at).unwrap_or(usize::MAX);
        Ok(ahead.bytes.chunks_exact(size).nth(within))
    }

    /// The disk offset of a block of the journal.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the journal's file has no such block.
    pub(super) fn offset_of(&self, at: LogBlock) -> Result<GuestOffset> {
        let (block, _) = self.run_at(at)?;
        Ok(self.filesystem.offset_of(block))
    }

    /// Where a block of the journal lies, and how many follow one another from there.
    fn run_at(&self, at: LogBlock) -> Result<(FsBlock, u32)> {
        let behind = self
            .extents
            .partition_point(|extent| extent.logical <= at.0);
        let extent = behind
            .checked_sub(1)
            .and_then(|index| self.extents.get(index));
        extent
            .map(|extent| (extent, at.0 - extent.logical))
            .filter(|(extent, skip)| *skip < extent.len)
            .map(|(extent, skip)| {
                (
                    FsBlock(extent.start.0.saturating_add(u64::from(skip))),
                    extent.len - skip,
                )
            })
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Corrupt,
                    format!("the journal of {} has no block {at}", self.disk.name()),
                )
            })
    }

    /// Whether a piece of a request touches the journal's first block.
    pub(super) fn touches_superblock(&self, piece: &Piece) -> bool {
        let size = self.filesystem.block_size() as u64;
        self.offset_of(LogBlock(0))
            .is_ok_and(|at| piece.at.0 < at.0.saturating_add(size) && at < piece.end())
    }
}
