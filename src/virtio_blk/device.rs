//! One virtio block device: an image and what its driver has set.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::config::{Access, Config, WRITEBACK_OFFSET, WriteCache, features};
use super::{Status, status_of};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;

/// Bytes in a device's serial (virtio 1.3, section 5.2.6, `VIRTIO_BLK_T_GET_ID`).
pub const ID_LEN: usize = 20;

/// A block device. Shared by its queues; the driver's settings apply from the next request on.
pub struct Device {
    image: Arc<dyn Image>,
    id: [u8; ID_LEN],
    seg_max: u32,
    queue_count: u16,
    /// What the driver wrote to `writeback`, or the 1 it begins with.
    writeback: AtomicBool,
    /// Whether the driver can flush at all.
    can_flush: AtomicBool,
    failed_requests: AtomicU64,
}

impl Device {
    /// A device for `image` with rings of up to `queue_size` entries.
    ///
    /// # Errors
    /// If the serial has more than [`ID_LEN`] bytes.
    pub fn new(
        image: Arc<dyn Image>,
        serial: &str,
        queue_count: u16,
        queue_size: u16,
    ) -> Result<Self> {
        let mut id = [0; ID_LEN];
        let Some(start) = id.get_mut(..serial.len()) else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "serial \"{serial}\" has {} bytes; use at most {ID_LEN}",
                    serial.len()
                ),
            ));
        };
        start.copy_from_slice(serial.as_bytes());
        Ok(Self {
            image,
            id,
            // Without indirect descriptors a request takes ring entries, header and status among them.
            seg_max: u32::from(queue_size.saturating_sub(2).max(1)),
            queue_count,
            writeback: AtomicBool::new(true),
            can_flush: AtomicBool::new(true),
            failed_requests: AtomicU64::new(0),
        })
    }

    /// The disk behind the device.
    #[must_use]
    pub fn image(&self) -> &Arc<dyn Image> {
        &self.image
    }

    /// The serial, padded with zeros.
    #[must_use]
    pub fn id(&self) -> &[u8; ID_LEN] {
        &self.id
    }

    /// The most data segments of a request.
    #[must_use]
    pub fn seg_max(&self) -> u32 {
        self.seg_max
    }

    /// The feature bits to offer, those of the transport aside.
    #[must_use]
    pub fn features(&self) -> u64 {
        features(if self.image.is_read_only() {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        })
    }

    /// Begins anew: what the last driver set is forgotten.
    pub fn reset(&self) {
        self.can_flush.store(false, Ordering::Relaxed);
        self.writeback.store(true, Ordering::Relaxed);
    }

    /// Takes the features that a driver has accepted. What it has set stays: features may be told again at any time.
    pub fn negotiated(&self, features: u64) {
        use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
        let can_flush = features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        self.can_flush.store(can_flush, Ordering::Relaxed);
    }

    /// Whether a write has to be durable when it completes: because the driver says so, or because it cannot flush
    /// (virtio 1.3, section 5.2.6.2).
    #[must_use]
    pub fn write_cache(&self) -> WriteCache {
        if self.can_flush.load(Ordering::Relaxed) {
            self.told_write_cache()
        } else {
            WriteCache::WriteThrough
        }
    }

    /// What `writeback` says. A driver that reads it may not have accepted any features yet.
    fn told_write_cache(&self) -> WriteCache {
        if self.writeback.load(Ordering::Relaxed) {
            WriteCache::WriteBack
        } else {
            WriteCache::WriteThrough
        }
    }

    /// `len` bytes of the configuration space at `offset`.
    #[must_use]
    pub fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        let config = Config {
            disk_len: self.image.virtual_size(),
            limits: self.image.limits(),
            seg_max: self.seg_max,
            queue_count: self.queue_count,
            write_cache: self.told_write_cache(),
        };
        config.read(offset, len)
    }

    /// Takes a driver's write to the configuration space. Only `writeback` can be written; writes elsewhere change
    /// nothing.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) {
        let index = WRITEBACK_OFFSET
            .checked_sub(offset)
            .and_then(|i| usize::try_from(i).ok());
        if let Some(value) = index.and_then(|i| bytes.get(i)) {
            self.writeback.store(*value & 1 == 1, Ordering::Relaxed);
        }
    }

    /// Takes note that I/O which the daemon submitted for a request failed; what to tell the driver.
    pub fn io_failed(&self, error: io::Error) -> Status {
        let error = Error::io("host I/O", error);
        self.note_failure("request", &error);
        status_of(error.kind())
    }

    /// Logs why a request failed, seldom enough that no guest fills a log: the first, second, fourth, eighth … time.
    pub(super) fn note_failure(&self, what: &str, error: &Error) {
        let count = self
            .failed_requests
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        if count.is_power_of_two() {
            log::warn!(
                "{}: {what} failed: {error} (failed requests so far: {count})",
                self.image.name()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::device;
    use super::*;

    #[test]
    fn a_serial_that_does_not_fit_is_refused() {
        let image = Arc::clone(device(1 << 20).image());
        let id = Device::new(Arc::clone(&image), "12345678901234567890", 1, 128).unwrap();
        assert_eq!(id.id(), b"12345678901234567890");
        let error = Device::new(image, "123456789012345678901", 1, 128)
            .map(|_| ())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }

    #[test]
    fn the_write_cache_follows_the_driver() {
        let device = device(1 << 20);
        assert_eq!(device.write_cache(), WriteCache::WriteBack);
        device.write_config(WRITEBACK_OFFSET, &[0]);
        assert_eq!(device.write_cache(), WriteCache::WriteThrough);
        assert_eq!(device.read_config(WRITEBACK_OFFSET, 1), [0]);
        device.write_config(0, &[0; 32]);
        device.write_config(WRITEBACK_OFFSET + 1, &[1]);
        assert_eq!(device.write_cache(), WriteCache::WriteThrough);
        let mut all = [0; 60];
        all[32] = 1;
        device.write_config(0, &all);
        assert_eq!(device.write_cache(), WriteCache::WriteBack);
        device.negotiated(0);
        assert_eq!(
            device.write_cache(),
            WriteCache::WriteThrough,
            "a driver that cannot flush"
        );
        device.negotiated(device.features());
        assert_eq!(device.write_cache(), WriteCache::WriteBack);
        device.write_config(WRITEBACK_OFFSET, &[0]);
        device.negotiated(device.features());
        assert_eq!(
            device.write_cache(),
            WriteCache::WriteThrough,
            "told the same again"
        );
        device.reset();
        assert_eq!(
            device.read_config(WRITEBACK_OFFSET, 1),
            [1],
            "before any feature is accepted"
        );
        device.negotiated(device.features());
        assert_eq!(device.write_cache(), WriteCache::WriteBack);
    }
}
