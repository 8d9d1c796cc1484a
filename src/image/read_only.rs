//! A disk that others may write to, without the right to.

use std::future::ready;
use std::sync::Arc;

use super::{Allocation, Image, ImageFuture, Limits, Mapped};
use crate::error::{Error, ErrorKind};
use crate::storage::ZeroMode;
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// An image that serves everything but changes.
pub struct ReadOnlyImage {
    image: Arc<dyn Image>,
}

impl ReadOnlyImage {
    /// `image` without the right to change it.
    #[must_use]
    pub fn new(image: Arc<dyn Image>) -> Self {
        Self { image }
    }

    /// The image that others may write to.
    #[must_use]
    pub fn writable(&self) -> &Arc<dyn Image> {
        &self.image
    }

    fn refuse(&self) -> ImageFuture<'_> {
        let error = Error::new(
            ErrorKind::ReadOnly,
            format!("{} is open read-only", self.name()),
        );
        Box::pin(ready(Err(error)))
    }
}

impl Image for ReadOnlyImage {
    fn virtual_size(&self) -> u64 {
        self.image.virtual_size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        self.image.limits()
    }

    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped {
        self.image.map_read(at, len)
    }

    fn map_write(&self, _at: GuestOffset, _len: u64) -> Mapped {
        Mapped::Slow
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        self.image.read(at, buf)
    }

    fn write(&self, _at: GuestOffset, _buf: IoBuf) -> ImageFuture<'_> {
        self.refuse()
    }

    fn write_zeroes(&self, _at: GuestOffset, _len: u64, _mode: ZeroMode) -> ImageFuture<'_> {
        self.refuse()
    }

    fn discard(&self, _at: GuestOffset, _len: u64) -> ImageFuture<'_> {
        self.refuse()
    }

    /// Nothing of this disk's own needs to become durable.
    fn flush(&self) -> ImageFuture<'_> {
        Box::pin(ready(Ok(())))
    }

    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        self.image.allocation(at, len)
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.image.backing()
    }

    fn name(&self) -> &str {
        self.image.name()
    }

    fn data_file(&self) -> &str {
        self.image.data_file()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Access, RawImage};
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    #[test]
    fn a_writable_image_refuses_changes_behind_it() {
        let storage = Arc::new(MemoryStorage::new(vec![7; 1024]));
        let image = ReadOnlyImage::new(Arc::new(RawImage::new(storage, Access::ReadWrite)));
        let at = GuestOffset(0);
        assert!(image.is_read_only());
        assert!(matches!(image.map_write(at, 512), Mapped::Slow));
        for refused in [
            image.write(at, IoBuf::zeroed(512)),
            image.write_zeroes(at, 512, ZeroMode::MayUnmap),
            image.discard(at, 512),
        ] {
            assert_eq!(block_on(refused).unwrap_err().kind(), ErrorKind::ReadOnly);
        }
        let buf = IoBuf::zeroed(4);
        block_on(image.read(at, buf.clone())).unwrap();
        assert_eq!(buf.to_vec(), [7; 4]);
        block_on(image.flush()).unwrap();
    }
}
