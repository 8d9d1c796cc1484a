//! A VM's disk: the stored images, seen and written as one VM may.
//!
//! Reads and writes of what is plainly the VM's own go straight through to the VM's own store, whose unwritten ranges
//! fall through to the base; what is its own in a shared region goes straight through to the base; reads of plain
//! foreign blocks go straight to the base. Everything else is composed on the way out and scattered on the way in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::journal::Committed;
use super::lease::Holding;
use super::ledger::Ledger;
use super::refresh::Refresher;
use super::refusal::{Answer, Operation, Refusal, Refusals};
use super::route::{Piece, Pieces, Route, Treatment};
use super::session::journal_superblock;
use super::territory::{Filesystem, Side, Territory};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Allocation, Image, ImageFuture, Limits, Mapped};
use crate::storage::ZeroMode;
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// One VM's view of a disk that several VMs write.
pub struct View {
    /// What the VM's own writes go to: a child's overlay, or the base's image.
    pub(super) own: Arc<dyn Image>,
    /// Where whatever is foreign is read from: the base, never what an overlay has captured of it.
    pub(super) truth: Arc<dyn Image>,
    pub(super) territory: Territory,
    /// What children are shown of this disk, if it is the base's.
    committed: Option<Arc<Committed>>,
    pub(super) refusals: Arc<Refusals>,
    /// What moves a child's view of its base, unless that is live.
    pub(super) refresher: Option<Arc<Refresher>>,
    /// The shared blocks of `own`.
    pub(super) ledger: Arc<Ledger>,
    /// Where a child's shared regions are, if it owns any.
    pub(super) in_place: Option<InPlace>,
    /// What says that they are this child's to write.
    holding: Option<Holding>,
    /// Whether the guest is replaying its journal: see [`super::session`].
    pub(super) recovering: AtomicBool,
    /// Where the superblock of the guest's journal is.
    pub(super) journal_superblock: Option<GuestOffset>,
}

/// What a view is made of.
pub struct Stores {
    /// What takes the VM's writes: a child's overlay, or the base's image.
    pub own: Arc<dyn Image>,
    /// Where what is foreign is read from: for the base's VM `own` itself, for a child what its base has committed.
    pub truth: Arc<dyn Image>,
    /// What is to be told of the writes of the base's VM to its journal; `None` for a child.
    pub committed: Option<Arc<Committed>>,
    /// What is known of the shared blocks of `own`.
    pub(super) ledger: Arc<Ledger>,
    /// Where a child's shared regions are, if it owns any.
    pub(super) in_place: Option<InPlace>,
    /// What says that they are this child's to write; `None` for a child that only reads.
    pub(super) holding: Option<Holding>,
}

/// The base as a child with shared regions writes it.
pub(super) struct InPlace {
    /// The base as it is stored.
    pub(super) disk: Arc<dyn Image>,
    /// What is known of its shared blocks.
    pub(super) ledger: Arc<Ledger>,
}

/// What a request brings.
#[derive(Clone)]
pub(super) enum Payload {
    Bytes(IoBuf),
    Zeroes(ZeroMode),
    Nothing,
}

impl Payload {
    pub(super) fn operation(&self) -> Operation {
        match self {
            Self::Bytes(_) => Operation::Write,
            Self::Zeroes(_) => Operation::WriteZeroes,
            Self::Nothing => Operation::Discard,
        }
    }

    /// A copy of `len` bytes, `skip` bytes on.
    pub(super) fn bytes(&self, skip: u64, len: u64) -> Vec<u8> {
        let index = |n: u64| usize::try_from(n).expect("a piece's bytes fit in memory");
        let mut bytes = vec![0; index(len)];
        self.copy_to(index(skip), &mut bytes);
        bytes
    }

    /// Fills `into`, which holds zeros, with the bytes `skip` bytes on.
    pub(super) fn copy_to(&self, skip: usize, into: &mut [u8]) {
        if let Self::Bytes(buf) = self {
            buf.copy_to(skip, into);
        }
    }
}

impl View {
    /// The view of the VM that owns `territory`.
    #[must_use]
    pub fn new(stores: Stores, territory: Territory, refusals: Arc<Refusals>) -> Self {
        Self {
            journal_superblock: journal_superblock(&territory),
            own: stores.own,
            truth: stores.truth,
            committed: stores.committed,
            territory,
            refusals,
            refresher: None,
            ledger: stores.ledger,
            in_place: stores.in_place,
            holding: stores.holding,
            recovering: AtomicBool::new(false),
        }
    }

    /// The refusals so far.
    #[must_use]
    pub fn refusals(&self) -> &Arc<Refusals> {
        &self.refusals
    }

    /// Which of the VMs that share the disk this one is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.territory.side()
    }

    /// The filesystem, which is there wherever a piece of it is composed.
    fn shared_filesystem(&self) -> Result<&Filesystem> {
        self.territory.filesystem().ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                "a disk without a filesystem holds no records",
            )
        })
    }

    fn check_bounds(&self, at: GuestOffset, len: u64) -> Result<()> {
        let size = self.own.virtual_size();
        match at.checked_add(len) {
            Some(end) if end.0 <= size => Ok(()),
            _ => Err(Error::new(
                ErrorKind::OutOfBounds,
                format!("{len} bytes at {at} leave the disk of {size} bytes"),
            )),
        }
    }

    /// How a whole range is treated, if it is one piece.
    fn treatment_of(&self, at: GuestOffset, len: u64, route: Route) -> Option<Treatment> {
        let mut pieces = Pieces::new(&self.territory, at, len, route);
        match (pieces.next(), pieces.next()) {
            (None, _) => Some(Treatment::Through),
            (Some(only), None) => Some(only.treatment),
            _ => None,
        }
    }

    /// The store that a whole range is read from as it is, if it is one.
    fn store_of(&self, at: GuestOffset, len: u64) -> Option<&Arc<dyn Image>> {
        match self.treatment_of(at, len, Route::Read)? {
            Treatment::Through | Treatment::Journal => Some(&self.own),
            Treatment::InPlace => self.in_place.as_ref().map(|base| &base.disk),
            Treatment::Foreign(_) => Some(&self.truth),
            Treatment::Composed(_) => None,
        }
    }

    async fn read_pieces(&self, at: GuestOffset, buf: IoBuf) -> Result<()> {
        let len = buf.len() as u64;
        self.check_bounds(at, len)?;
        if self.takes_in_journal_superblock(at, len) {
            self.note_journal_read().await?;
        }
        if let Some(store) = self.store_of(at, len) {
            return store.read(at, buf).await;
        }
        for piece in Pieces::new(&self.territory, at, len, Route::Read) {
            let part = buf.slice(piece.within(at));
            match piece.treatment {
                Treatment::Through | Treatment::Journal => self.own.read(piece.at, part).await?,
                Treatment::InPlace => self.in_place()?.disk.read(piece.at, part).await?,
                Treatment::Composed(what) => {
                    self.compose(self.shared_filesystem()?, what, &piece, &part)
                        .await?;
                }
                // Whatever is foreign may be read.
                Treatment::Foreign(_) => self.truth.read(piece.at, part).await?,
            }
        }
        Ok(())
    }

    async fn write_pieces(&self, at: GuestOffset, len: u64, payload: Payload) -> Result<()> {
        self.check_bounds(at, len)?;
        if self.is_read_only() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{} is read-only", self.name()),
            ));
        }
        let recovering = self.recovering.load(Ordering::Acquire);
        if !recovering {
            self.refuse_whole(at, len, &payload)?;
        }
        for piece in Pieces::new(&self.territory, at, len, Route::Write) {
            let part = match &payload {
                Payload::Bytes(buf) => Payload::Bytes(buf.slice(piece.within(at))),
                other => other.clone(),
            };
            match piece.treatment {
                Treatment::Through => {
                    if let Some(committed) = &self.committed {
                        committed.settle(piece.at, piece.len).await;
                    }
                    write_through(&self.own, &piece, part).await?;
                }
                Treatment::InPlace => write_through(&self.in_place()?.disk, &piece, part).await?,
                Treatment::Journal => {
                    write_through(&self.own, &piece, part.clone()).await?;
                    self.note_journal_write(&piece, &part).await?;
                }
                Treatment::Composed(what) => {
                    self.scatter(self.shared_filesystem()?, what, &piece, part)
                        .await?;
                }
                Treatment::Foreign(foreign) => self.refusals.record(&Refusal {
                    operation: payload.operation(),
                    range: (piece.at, piece.len),
                    structure: foreign.structure,
                    group: foreign.group,
                    inode: None,
                    answer: Answer::Dropped,
                }),
            }
        }
        if recovering {
            self.note_recovery_progress(at, len);
        }
        Ok(())
    }

    /// Refuses the whole request, before anything of it is applied, if any of it is foreign and no metadata.
    fn refuse_whole(&self, at: GuestOffset, len: u64, payload: &Payload) -> Result<()> {
        let mut refused = Pieces::new(&self.territory, at, len, Route::Write).filter_map(|piece| {
            match piece.treatment {
                Treatment::Foreign(foreign) if foreign.structure.answer() == Answer::Failed => {
                    Some((piece, foreign))
                }
                _ => None,
            }
        });
        let Some((piece, foreign)) = refused.next() else {
            return Ok(());
        };
        let refusal = Refusal {
            operation: payload.operation(),
            range: (piece.at, piece.len),
            structure: foreign.structure,
            group: foreign.group,
            inode: None,
            answer: Answer::Failed,
        };
        self.refusals.record(&refusal);
        Err(Error::new(
            ErrorKind::Refused,
            format!("vm {}: {refusal}", self.refusals.vm()),
        ))
    }

    /// Tells whoever shows the base to children what its VM has written to its journal.
    async fn note_journal_write(&self, piece: &Piece, payload: &Payload) -> Result<()> {
        match &self.committed {
            Some(committed) => committed.note_write(piece, payload).await,
            None => Ok(()),
        }
    }

    /// The base as this VM writes it, which is there wherever a piece lies in it.
    pub(super) fn in_place(&self) -> Result<&InPlace> {
        self.in_place.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                "a disk without shared regions has nothing in its base",
            )
        })
    }

    /// Makes durable what was written to any store. A guest's journal in its overlay may speak at once of what it has
    /// written to the base, so both are durable before the guest hears of it.
    async fn flush_stores(&self) -> Result<()> {
        if let Some(base) = &self.in_place
            && !base.disk.is_read_only()
        {
            base.disk.flush().await?;
        }
        self.own.flush().await
    }

    /// Ends writing. Shared regions are given back if the guest has unmounted its filesystem cleanly, in which case
    /// nothing in its journal can undo what the next holder writes.
    pub(super) async fn close_stores(&self) -> Result<()> {
        self.flush_stores().await?;
        if let Some(holding) = &self.holding {
            if self.is_clean().await? {
                holding.give_back().await?;
            } else {
                log::info!(
                    "vm {}: its filesystem is not unmounted cleanly: it keeps its shared regions until it is",
                    self.refusals.vm()
                );
            }
        }
        self.own.close().await?;
        match &self.in_place {
            Some(base) if !base.disk.is_read_only() => base.disk.close().await,
            _ => Ok(()),
        }
    }
}

async fn write_through(store: &Arc<dyn Image>, piece: &Piece, payload: Payload) -> Result<()> {
    match payload {
        Payload::Bytes(buf) => store.write(piece.at, buf).await,
        Payload::Zeroes(mode) => store.write_zeroes(piece.at, piece.len, mode).await,
        Payload::Nothing => store.discard(piece.at, piece.len).await,
    }
}

impl Image for View {
    fn virtual_size(&self) -> u64 {
        self.own.virtual_size()
    }

    fn is_read_only(&self) -> bool {
        self.own.is_read_only()
    }

    fn limits(&self) -> Limits {
        match &self.in_place {
            Some(base) => self.own.limits().with(base.disk.limits()),
            None => self.own.limits(),
        }
    }

    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped {
        if self.takes_in_journal_superblock(at, len) {
            return Mapped::Slow;
        }
        match self.store_of(at, len) {
            Some(store) => store.map_read(at, len),
            None => Mapped::Slow,
        }
    }

    fn map_write(&self, at: GuestOffset, len: u64) -> Mapped {
        if self.recovering.load(Ordering::Acquire) || self.is_read_only() {
            return Mapped::Slow;
        }
        if self
            .committed
            .as_ref()
            .is_some_and(|committed| committed.is_logged(at, len))
        {
            return Mapped::Slow;
        }
        match (self.treatment_of(at, len, Route::Write), &self.in_place) {
            (Some(Treatment::Through), _) => self.own.map_write(at, len),
            (Some(Treatment::InPlace), Some(base)) => base.disk.map_write(at, len),
            _ => Mapped::Slow,
        }
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(self.read_pieces(at, buf))
    }

    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        let len = buf.len() as u64;
        Box::pin(self.write_pieces(at, len, Payload::Bytes(buf)))
    }

    fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> ImageFuture<'_> {
        Box::pin(self.write_pieces(at, len, Payload::Zeroes(mode)))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_> {
        Box::pin(self.write_pieces(at, len, Payload::Nothing))
    }

    fn flush(&self) -> ImageFuture<'_> {
        match self.in_place {
            Some(_) => Box::pin(self.flush_stores()),
            None => self.own.flush(),
        }
    }

    fn close(&self) -> ImageFuture<'_> {
        Box::pin(self.end_session())
    }

    /// A view is a whole: it says nothing about the layers below.
    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        Box::pin(async move {
            self.check_bounds(at, len)?;
            Ok((Allocation::Data(None), len))
        })
    }

    fn begin_session(&self) -> ImageFuture<'_> {
        Box::pin(self.begin_session_of_guest())
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    fn name(&self) -> &str {
        self.own.name()
    }
}
