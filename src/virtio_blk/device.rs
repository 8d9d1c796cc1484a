//! One virtio block device: an image and what its driver has set.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::config::{Access, Config, WRITEBACK_OFFSET, WriteCache, features};
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

    /// Begins anew with the features that a driver has accepted: settings are as after a reset.
    pub fn negotiated(&self, features: u64) {
        use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
        self.can_flush
            .store(features & (1 << VIRTIO_BLK_F_FLUSH) != 0, Ordering::Relaxed);
        self.writeback.store(true, Ordering::Relaxed);
    }

    /// Whether a write has to be durable when it completes: because the driver says so, or because it cannot flush
    /// (virtio 1.3, section 5.2.6.2).
    #[must_use]
    pub fn write_cache(&self) -> WriteCache {
        if self.writeback.load(Ordering::Relaxed) && self.can_flush.load(Ordering::Relaxed) {
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
            write_cache: self.write_cache(),
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
    }
}
