//! What a child's view reads as its base: the pin in force, which can be exchanged for another.

use super::pin::Pin;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Allocation, Image, ImageFuture, Limits, Mapped};
use crate::storage::{Swappable, ZeroMode};
use crate::sys::IoBuf;
use crate::units::GuestOffset;
use std::sync::Arc;

/// A base's disk through a pin. It is read-only, and shows nothing while no front-end is there.
pub(in crate::view) struct Window {
    /// The pin in force; requests under way keep it so.
    pub(super) pin: Swappable<Option<Pin>>,
    name: String,
    virtual_size: u64,
    limits: Limits,
}

impl Window {
    /// A window on `base` that shows nothing yet.
    pub(super) fn new(base: &dyn Image) -> Self {
        Self {
            pin: Swappable::new(None),
            name: base.name().to_owned(),
            virtual_size: base.virtual_size(),
            limits: base.limits(),
        }
    }

    async fn read_pin(&self, at: GuestOffset, buf: IoBuf) -> Result<()> {
        let using = self.pin.use_now().await;
        match using.as_deref() {
            Some(Some(pin)) => pin.committed.read(at, buf).await,
            _ => Err(Error::new(
                ErrorKind::Io,
                format!("{}: no snapshot of it is being shown", self.name),
            )),
        }
    }

    fn refuse(&self) -> ImageFuture<'_> {
        let refusal = Error::new(
            ErrorKind::ReadOnly,
            format!("{} is the base's to write", self.name),
        );
        Box::pin(std::future::ready(Err(refusal)))
    }
}

impl Image for Window {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped {
        match self.pin.try_use().as_deref() {
            Some(Some(pin)) => pin.committed.map_read(at, len),
            _ => Mapped::Slow,
        }
    }

    fn map_write(&self, _: GuestOffset, _: u64) -> Mapped {
        Mapped::Slow
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(self.read_pin(at, buf))
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

    /// A window is a whole: it says nothing about the layers below.
    fn allocation(&self, _: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        Box::pin(std::future::ready(Ok((Allocation::Data(None), len))))
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    fn name(&self) -> &str {
        &self.name
    }
}
