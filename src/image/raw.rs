//! A raw image: the disk is the file, byte for byte.

use std::future::ready;
use std::sync::Arc;

use super::{Access, Allocation, Image, ImageFuture, InFlight, Limits, Mapped};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Held, Storage, ZeroMode};
use crate::sys::IoBuf;
use crate::units::{GuestOffset, HostOffset, SECTOR_SIZE};

/// What nearly every host filesystem reads, writes and frees at once.
const HOST_BLOCK: u32 = 4096;

/// The disk in a raw file. A file that ends within a sector counts as one whole sector more, which reads as
/// zeros behind the file's end: as in stock QEMU.
pub struct RawImage {
    storage: Arc<dyn Storage>,
    virtual_size: u64,
    access: Access,
}

impl RawImage {
    /// The disk in `storage`, as long as the storage is now.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>, access: Access) -> Self {
        let virtual_size = storage.len().next_multiple_of(SECTOR_SIZE);
        Self {
            storage,
            virtual_size,
            access,
        }
    }

    /// The host offset of a range, if it lies inside the disk.
    fn range(&self, at: GuestOffset, len: u64) -> Result<HostOffset> {
        if at
            .checked_add(len)
            .is_some_and(|end| end.0 <= self.virtual_size)
        {
            return Ok(HostOffset(at.0));
        }
        Err(Error::new(
            ErrorKind::OutOfBounds,
            format!(
                "{}: {len} bytes at {at} leave the disk of {} bytes",
                self.name(),
                self.virtual_size
            ),
        ))
    }

    fn writable_range(&self, at: GuestOffset, len: u64) -> Result<HostOffset> {
        match self.access {
            Access::ReadWrite => self.range(at, len),
            Access::ReadOnly => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{} is open read-only", self.name()),
            )),
        }
    }

    fn mapped(&self, at: Option<HostOffset>) -> Mapped {
        match at {
            Some(at) => Mapped::Extent {
                storage: Arc::clone(&self.storage),
                at,
                guard: InFlight::none(),
            },
            None => Mapped::Slow,
        }
    }
}

impl Image for RawImage {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn limits(&self) -> Limits {
        let logical = self.storage.alignment().max(512);
        let physical = logical.max(HOST_BLOCK);
        Limits {
            logical_block_size: logical,
            physical_block_size: physical,
            optimal_io_size: physical,
            discard_granularity: physical,
        }
    }

    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped {
        self.mapped(self.range(at, len).ok())
    }

    fn map_write(&self, at: GuestOffset, len: u64) -> Mapped {
        self.mapped(self.writable_range(at, len).ok())
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        match self.range(at, buf.len() as u64) {
            Ok(at) => Box::pin(self.storage.readv(at, buf)),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        match self.writable_range(at, buf.len() as u64) {
            Ok(at) => Box::pin(self.storage.writev(at, buf)),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> ImageFuture<'_> {
        match self.writable_range(at, len) {
            Ok(at) => Box::pin(self.storage.write_zeroes(at, len, mode)),
            Err(error) => Box::pin(ready(Err(error))),
        }
    }

    /// A raw file has no record of what it does not hold, and a discarded range must not come back as another
    /// guest's bytes: it reads as zeros.
    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_> {
        self.write_zeroes(at, len, ZeroMode::MayUnmap)
    }

    fn flush(&self) -> ImageFuture<'_> {
        match self.access {
            Access::ReadWrite => Box::pin(self.storage.flush()),
            Access::ReadOnly => Box::pin(ready(Ok(()))),
        }
    }

    /// Holes of the file are zeros with room reserved.
    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        Box::pin(ready(self.range(at, len).map(|host| {
            let (held, same) = self.storage.held(host, len);
            let allocation = match held {
                Held::Data => Allocation::Data(Some(host)),
                Held::Hole => Allocation::Zero(Some(host)),
            };
            // A file that ends within a sector, or a filesystem with blocks of less.
            let end = (host.0 + same).next_multiple_of(SECTOR_SIZE);
            (allocation, (end - host.0).min(len))
        })))
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    fn name(&self) -> &str {
        self.storage.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    fn image(len: usize, access: Access) -> RawImage {
        RawImage::new(Arc::new(MemoryStorage::new(vec![7; len])), access)
    }

    fn read(image: &RawImage, at: u64, len: usize) -> Result<Vec<u8>> {
        let buf = IoBuf::zeroed(len);
        block_on(image.read(GuestOffset(at), buf.clone()))?;
        Ok(buf.to_vec())
    }

    #[test]
    fn a_file_that_ends_within_a_sector_counts_as_whole() {
        let image = image(700, Access::ReadWrite);
        assert_eq!(image.virtual_size(), 1024);
        assert_eq!(read(&image, 699, 3).unwrap(), [7, 0, 0]);
        let last = IoBuf::from_bytes(&[9; 512]);
        block_on(image.write(GuestOffset(512), last)).unwrap();
        assert_eq!(read(&image, 511, 3).unwrap(), [7, 9, 9]);
    }

    #[test]
    fn ranges_outside_the_disk_are_refused() {
        let image = image(1024, Access::ReadWrite);
        for (at, len) in [(1023, 2), (1024, 1), (u64::MAX, 1)] {
            let error = read(&image, at, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds);
            assert!(matches!(
                image.map_read(GuestOffset(at), len as u64),
                Mapped::Slow
            ));
            let zeroes = image.write_zeroes(GuestOffset(at), len as u64, ZeroMode::MayUnmap);
            assert_eq!(block_on(zeroes).unwrap_err().kind(), ErrorKind::OutOfBounds);
        }
    }

    #[test]
    fn a_read_only_image_refuses_every_change() {
        let image = image(1024, Access::ReadOnly);
        let at = GuestOffset(0);
        assert!(matches!(image.map_write(at, 512), Mapped::Slow));
        assert!(matches!(image.map_read(at, 512), Mapped::Extent { .. }));
        for refused in [
            image.write(at, IoBuf::zeroed(512)),
            image.write_zeroes(at, 512, ZeroMode::KeepAllocated),
            image.discard(at, 512),
        ] {
            assert_eq!(block_on(refused).unwrap_err().kind(), ErrorKind::ReadOnly);
        }
        assert_eq!(read(&image, 0, 4).unwrap(), [7; 4]);
    }

    #[test]
    fn a_discarded_range_reads_as_zeros() {
        let image = image(1024, Access::ReadWrite);
        block_on(image.discard(GuestOffset(512), 512)).unwrap();
        assert_eq!(read(&image, 510, 4).unwrap(), [7, 7, 0, 0]);
    }
}
