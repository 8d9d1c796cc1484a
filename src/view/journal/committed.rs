//! A base's disk as of its last committed transaction: what children read of it.

use std::ops::Range;
use std::sync::Arc;

use super::follow::Follower;
use super::index::{Index, Logged};
use super::log::Journal;
use super::readers::Readers;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::ext4::{jbd2, jbd2_log};
use crate::image::{Allocation, Image, ImageFuture, Limits, Mapped};
use crate::storage::ZeroMode;
use crate::sys::IoBuf;
use crate::units::{FsBlock, GuestOffset};
use crate::view::compose::read_bytes;
use crate::view::disk::Payload;
use crate::view::route::Piece;
use crate::view::territory::Filesystem;

/// How often a block is read anew that the base moves about meanwhile, before that is an error.
const MAX_ATTEMPTS: u32 = 64;

/// The base's disk as children see it. It is read-only.
pub struct Committed {
    disk: Arc<dyn Image>,
    followed: Option<Followed>,
}

/// A journal and what is known of it.
struct Followed {
    journal: Journal,
    index: Index,
    readers: Readers,
    follower: async_lock::Mutex<Follower>,
}

impl Committed {
    /// The disk `disk` with the base's `filesystem`, if it has one, and what its log holds now.
    ///
    /// # Errors
    /// What reading the log returns.
    pub(in crate::view) async fn open(
        disk: Arc<dyn Image>,
        filesystem: Option<Filesystem>,
    ) -> Result<Self> {
        let journal = filesystem.and_then(|filesystem| Journal::of(Arc::clone(&disk), filesystem));
        let committed = Self {
            disk,
            followed: journal.map(|journal| Followed {
                index: Index::new(journal.filesystem().superblock().blocks_count),
                journal,
                readers: Readers::default(),
                follower: async_lock::Mutex::default(),
            }),
        };
        if let Some(followed) = &committed.followed {
            followed
                .catch_up()
                .await
                .context(|| format!("reading the journal of {}", committed.disk.name()))?;
        }
        Ok(committed)
    }

    /// Takes in what the base's VM has just written to `piece`, a part of its journal, before it learns that it has.
    ///
    /// # Errors
    /// What reading the log returns.
    pub(in crate::view) async fn note_write(&self, piece: &Piece, payload: &Payload) -> Result<()> {
        match &self.followed {
            Some(followed) => followed.note_write(piece, payload).await,
            None => Ok(()),
        }
    }

    /// Whether any of `len` bytes at `at` are to be written with [`Self::settle`] before.
    pub(in crate::view) fn is_logged(&self, at: GuestOffset, len: u64) -> bool {
        self.followed.as_ref().is_some_and(|followed| {
            let blocks = Self::blocks(followed.journal.filesystem(), at, len);
            followed.index.first_in(blocks).is_some()
        })
    }

    /// Waits until the base's VM may write `len` bytes at `at` in their place (invariant 4 of [`super`]).
    pub(in crate::view) async fn settle(&self, at: GuestOffset, len: u64) {
        if let Some(followed) = &self.followed
            && self.is_logged(at, len)
        {
            followed.readers.settle(followed.index.commits()).await;
        }
    }

    fn blocks(filesystem: &Filesystem, at: GuestOffset, len: u64) -> Range<FsBlock> {
        let disk = filesystem.range();
        let start = at.max(disk.start);
        let end = GuestOffset(at.0.saturating_add(len)).min(disk.end);
        if start >= end {
            return FsBlock(0)..FsBlock(0);
        }
        let last = filesystem.block_at(GuestOffset(end.0 - 1));
        filesystem.block_at(start)..FsBlock(last.0 + 1)
    }

    async fn read_range(&self, at: GuestOffset, buf: IoBuf) -> Result<()> {
        let Some(followed) = &self.followed else {
            return self.disk.read(at, buf).await;
        };
        let end = GuestOffset(at.0.saturating_add(buf.len() as u64));
        let mut at = at;
        let mut rest = buf;
        let mut attempts = 0;
        while at < end {
            let reading = followed.readers.enter();
            let (run, logged) = followed.run_at(at, end);
            let len = index(run.0 - at.0);
            let part = rest.slice(0..len);
            let is_settled = match logged {
                Some(logged) => {
                    drop(reading);
                    followed.read_logged(at, part, logged).await?
                }
                None => {
                    self.disk.read(at, reading.held_by(part)).await?;
                    true
                }
            };
            if is_settled {
                rest = rest.slice(len..rest.len());
                at = run;
                attempts = 0;
                continue;
            }
            attempts += 1;
            if attempts == MAX_ATTEMPTS {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!("{}: byte {at} changes faster than it is read", self.name()),
                ));
            }
        }
        Ok(())
    }
}

impl Followed {
    async fn catch_up(&self) -> Result<()> {
        let mut follower = self.follower.lock().await;
        follower.note_superblock(&self.journal, &self.index).await?;
        follower.advance(&self.journal, &self.index).await
    }

    async fn note_write(&self, piece: &Piece, payload: &Payload) -> Result<()> {
        if self.journal.touches_superblock(piece) {
            return self.catch_up().await;
        }
        let brings_commit = self.brings_commit(piece, payload);
        let mut follower = self.follower.lock().await;
        if brings_commit || follower.awaits_more() {
            follower.advance(&self.journal, &self.index).await?;
        }
        Ok(())
    }

    /// Whether a block of what is written is a commit block.
    fn brings_commit(&self, piece: &Piece, payload: &Payload) -> bool {
        const HEADER: usize = 12;
        let filesystem = self.journal.filesystem();
        let size = filesystem.block_size();
        let into_block = index(piece.at.0 - filesystem.offset_of(filesystem.block_at(piece.at)).0);
        let first = (size - into_block) % size;
        let last = index(piece.len).saturating_sub(HEADER);
        (first..=last).step_by(size).any(|skip| {
            let mut header = [0; HEADER];
            payload.copy_to(skip, &mut header);
            jbd2_log::is_commit(&header)
        })
    }

    /// Up to where the bytes from `at` are in one place, and which one if that is the log.
    fn run_at(
        &self,
        at: GuestOffset,
        end: GuestOffset,
    ) -> (GuestOffset, Option<(FsBlock, Logged)>) {
        let filesystem = self.journal.filesystem();
        let blocks = Committed::blocks(filesystem, at, end.0 - at.0);
        let Some(block) = self.index.first_in(blocks) else {
            return (end, None);
        };
        let start = filesystem.offset_of(block);
        if start > at {
            return (start, None);
        }
        let behind = filesystem.offset_of(FsBlock(block.0 + 1)).min(end);
        match self.index.get(block) {
            Some(logged) => (behind, Some((block, logged))),
            None => (behind, None),
        }
    }

    /// Reads a part of one block from the log; whether that is still its place (invariant 3 of [`super`]).
    async fn read_logged(
        &self,
        at: GuestOffset,
        buf: IoBuf,
        (block, logged): (FsBlock, Logged),
    ) -> Result<bool> {
        let filesystem = self.journal.filesystem();
        let place = self.journal.offset_of(logged.at)?;
        let mut bytes = read_bytes(&*self.journal.disk, place, filesystem.block_size()).await?;
        if self.index.get(block) != Some(logged) {
            return Ok(false);
        }
        if logged.escaped {
            jbd2::unescape(&mut bytes);
        }
        let within = index(at.0 - filesystem.offset_of(block).0);
        buf.copy_from(0, &bytes[within..within + buf.len()]);
        Ok(true)
    }
}

impl Image for Committed {
    fn virtual_size(&self) -> u64 {
        self.disk.virtual_size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped {
        let Some(followed) = &self.followed else {
            return self.disk.map_read(at, len);
        };
        let reading = followed.readers.enter();
        if self.is_logged(at, len) {
            return Mapped::Slow;
        }
        match self.disk.map_read(at, len) {
            Mapped::Extent { storage, at, guard } => Mapped::Extent {
                storage,
                at,
                guard: guard.and(reading),
            },
            other => other,
        }
    }

    fn map_write(&self, _: GuestOffset, _: u64) -> Mapped {
        Mapped::Slow
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(self.read_range(at, buf))
    }

    fn write(&self, _: GuestOffset, _: IoBuf) -> ImageFuture<'_> {
        self.refuse()
    }

    fn write_zeroes(&self, _: GuestOffset, _: u64, _: ZeroMode) -> ImageFuture<'_> {
        self.refuse()
    }

    fn discard(&self, _: GuestOffset, _: u64) -> ImageFuture<'_> {
        self.refuse()
    }

    fn flush(&self) -> ImageFuture<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        self.disk.allocation(at, len)
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    fn name(&self) -> &str {
        self.disk.name()
    }
}

impl Committed {
    fn refuse(&self) -> ImageFuture<'_> {
        let refusal = Error::new(
            ErrorKind::ReadOnly,
            format!("{} is the base's to write", self.name()),
        );
        Box::pin(std::future::ready(Err(refusal)))
    }
}

/// A length within a request or a block.
fn index(len: u64) -> usize {
    usize::try_from(len).expect("a request's buffer fits in memory")
}
