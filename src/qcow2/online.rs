//! An image that VMs use while snapshots of it come and go.
//!
//! A snapshot is one new revision of the image's metadata (`qcow2::revision`), and a revision begins and ends with an
//! image that nobody has open. So all requests wait for as long as that takes: those under way end first, what memory
//! has is written back, and the engine is opened anew on the new revision. A snapshot of an image in use is what a
//! power cut at that moment would have left of the disk, with nothing lost that had been written.
//!
//! # Invariants
//!
//! 1. While the metadata changes no request is under way: none uses the engine, and no I/O on an extent that the fast
//!    path has given out is left.
//! 2. What only memory has is on disk before the engine is given up. So a revision that fails costs nothing.
//! 3. A snapshot that is open is deleted only after its last request has ended: [`Qcow2::all_ended`].

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::SystemTime;

use super::cache_budget::CacheBudget;
use super::engine::Qcow2;
use super::header::Header;
use super::header_extension::ExtensionType;
use super::snapshot_table::{Snapshot, printable, read_snapshots};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Allocation, Image, ImageFuture, Limits, Mapped};
use crate::storage::{Storage, Swappable, Using, ZeroMode};
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// A writable image whose snapshots can be taken and deleted while it is in use.
pub struct OnlineQcow2 {
    image: Swappable<Qcow2>,
    storage: Arc<dyn Storage>,
    data: Option<Arc<dyn Storage>>,
    backing: Option<Arc<dyn Image>>,
    budget: Arc<CacheBudget>,
    access: Access,
    virtual_size: u64,
    limits: Limits,
}

impl OnlineQcow2 {
    /// `image`, which nobody else has, and whose metadata cache goes on sharing its budget.
    #[must_use]
    pub fn new(image: Qcow2) -> Self {
        Self {
            storage: Arc::clone(&image.storage),
            data: image
                .data_file
                .as_ref()
                .map(|data| Arc::clone(data.storage())),
            backing: image.backing.clone(),
            budget: Arc::clone(image.l2.budget()),
            access: image.access,
            virtual_size: image.virtual_size(),
            limits: image.limits(),
            image: Swappable::new(image),
        }
    }

    /// The image's internal snapshots.
    ///
    /// # Errors
    /// As [`Qcow2::snapshots`].
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.engine().await?.snapshots().await
    }

    /// Takes a snapshot of the disk as it is at this moment.
    ///
    /// # Errors
    /// As [`Qcow2::create_snapshot`].
    pub async fn create_snapshot(&self, name: &OsStr, taken: SystemTime) -> Result<()> {
        self.revise(async |image| image.create_snapshot(name, taken).await)
            .await
    }

    /// Deletes a snapshot, by its name or ID.
    ///
    /// # Errors
    /// As [`Qcow2::delete_snapshot`].
    pub async fn delete_snapshot(&self, wanted: &OsStr) -> Result<()> {
        self.revise(async |image| image.delete_snapshot(wanted).await)
            .await
    }

    /// The disk as it was when the snapshot called `name` was taken, read-only.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] if there is none of that name, and as [`Qcow2::open`].
    pub async fn open_snapshot(&self, name: &OsStr) -> Result<Qcow2> {
        // So that the table is not replaced meanwhile.
        let _engine = self.engine().await?;
        let header = Header::read(self.storage.as_ref()).await?;
        let snapshots = read_snapshots(self.storage.as_ref(), &header).await?;
        let found = snapshots.into_iter().find(|snapshot| snapshot.name == name);
        let snapshot = found.ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfBounds,
                format!("{} has no snapshot '{}'", self.name(), printable(name)),
            )
        })?;
        Qcow2::open_with_header(
            Arc::clone(&self.storage),
            self.data.clone(),
            self.backing.clone(),
            Access::ReadOnly,
            &self.budget,
            snapshot.header(&header)?,
        )
        .await
        .context(|| format!("opening snapshot '{}' of {}", printable(name), self.name()))
    }

    /// As [`Qcow2::set_extension`].
    ///
    /// # Errors
    /// As [`Qcow2::set_extension`].
    pub async fn set_extension(&self, extension_type: ExtensionType, data: &[u8]) -> Result<()> {
        let engine = self.engine().await?;
        engine.set_extension(extension_type, data).await
    }

    /// Whether nothing has been written since `snapshot` was taken, one of this image's. May say no where only
    /// what was there before was written again.
    ///
    /// # Errors
    /// If the image has been lost.
    pub async fn is_unchanged_since(&self, snapshot: &Qcow2) -> Result<bool> {
        // A first change anywhere moves an L2 table that is shared (rule 8 of `qcow2::flush`).
        Ok(self.engine().await?.l1.has_same_tables(&snapshot.l1))
    }

    async fn engine(&self) -> Result<Using<'_, Qcow2>> {
        self.image.use_now().await.ok_or_else(|| self.is_gone())
    }

    fn is_gone(&self) -> Error {
        Error::new(
            ErrorKind::Poisoned,
            format!(
                "{} takes no requests until it is reopened: taking or deleting a snapshot failed, and what it holds \
                 could not be read again",
                self.name()
            ),
        )
    }

    /// Has `work` bring a new revision into force.
    async fn revise(&self, work: impl AsyncFnOnce(Qcow2) -> Result<Qcow2>) -> Result<()> {
        let mut exchange = self.image.exchange().await;
        let image = exchange.value().ok_or_else(|| self.is_gone())?;
        // Invariant 1.
        image.all_ended().await;
        // Invariant 2.
        image.close_cleanly().await?;
        let image = exchange.take().ok_or_else(|| self.is_gone())?;
        match work(image).await {
            Ok(image) => {
                exchange.put(image);
                Ok(())
            }
            Err(error) => {
                exchange.put(self.open_again().await?);
                Err(error)
            }
        }
    }

    async fn open_again(&self) -> Result<Qcow2> {
        Qcow2::open_sharing(
            Arc::clone(&self.storage),
            self.data.clone(),
            self.backing.clone(),
            self.access,
            &self.budget,
        )
        .await
    }
}

impl Qcow2 {
    /// Waits until every request has ended that began before.
    pub async fn all_ended(&self) {
        self.grace.all_ended().await;
    }
}

impl Image for OnlineQcow2 {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped {
        match self.image.try_use() {
            Some(image) => image.map_read(at, len),
            None => Mapped::Slow,
        }
    }

    fn map_write(&self, at: GuestOffset, len: u64) -> Mapped {
        match self.image.try_use() {
            Some(image) => image.map_write(at, len),
            None => Mapped::Slow,
        }
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move { self.engine().await?.read(at, buf).await })
    }

    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move { self.engine().await?.write(at, buf).await })
    }

    fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> ImageFuture<'_> {
        Box::pin(async move { self.engine().await?.write_zeroes(at, len, mode).await })
    }

    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_> {
        Box::pin(async move { self.engine().await?.discard(at, len).await })
    }

    fn flush(&self) -> ImageFuture<'_> {
        Box::pin(async move { self.engine().await?.flush().await })
    }

    fn close(&self) -> ImageFuture<'_> {
        Box::pin(async move { self.engine().await?.close().await })
    }

    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        Box::pin(async move { self.engine().await?.allocation(at, len).await })
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn name(&self) -> &str {
        self.storage.name()
    }

    fn data_file(&self) -> &str {
        self.data.as_ref().unwrap_or(&self.storage).name()
    }
}
