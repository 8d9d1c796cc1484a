//! A qcow2 image as an [`Image`]: the fast path, and the way into every operation.

use std::sync::Arc;

use super::engine::Qcow2;
use super::mapping::{Found, ReadMapping, WriteMapping};
use crate::error::Result;
use crate::image::{Access, Allocation, Image, ImageFuture, Limits, Mapped};
use crate::storage::ZeroMode;
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// The largest block that is told to a guest as a physical block: filesystems do not take more.
const MAX_PHYSICAL_BLOCK: u64 = 4096;

impl Qcow2 {
    /// The whole range as one run, as far as memory tells.
    fn map_read_run(&self, at: GuestOffset, len: u64) -> Option<ReadMapping> {
        let Found::Run(mapping, mut run) = self.look_up_read(at, len).ok()? else {
            return None;
        };
        while run < len {
            let Found::Run(next, next_run) =
                self.look_up_read(GuestOffset(at.0 + run), len - run).ok()?
            else {
                return None;
            };
            if !mapping.continues(run, next) {
                return None;
            }
            run += next_run;
        }
        Some(mapping)
    }

    /// What reads of an unallocated range come down to.
    fn map_backing(&self, at: GuestOffset, len: u64) -> Mapped {
        match &self.backing {
            None => Mapped::Zeroes,
            Some(backing) => match usize::try_from(len) {
                Ok(whole) if self.backed_len(at, whole) == whole => backing.map_read(at, len),
                _ => Mapped::Slow,
            },
        }
    }

    /// Changes a range of the disk: what every operation goes through that does.
    ///
    /// # Errors
    /// Those of `change`, for a range that is not the disk's, and where writing is forbidden.
    pub(super) async fn change<F>(
        &self,
        at: GuestOffset,
        len: u64,
        change: impl Fn() -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>>,
    {
        self.begin_writing().await?;
        self.check_bounds(at, len)?;
        self.make_room_in_memory().await?;
        self.with_room(change).await
    }
}

impl Image for Qcow2 {
    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    fn limits(&self) -> Limits {
        let small = |size: u64| u32::try_from(size).unwrap_or(u32::MAX);
        let subcluster = self.geometry.subcluster_size();
        Limits {
            logical_block_size: self.data().alignment().max(512),
            physical_block_size: small(subcluster.min(MAX_PHYSICAL_BLOCK))
                .max(self.data().alignment()),
            optimal_io_size: small(subcluster.max(MAX_PHYSICAL_BLOCK)),
            discard_granularity: small(subcluster),
        }
    }

    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped {
        if len == 0 || self.check_bounds(at, len).is_err() {
            return Mapped::Slow;
        }
        // Before the lookup: what it finds stays ours until the guard is dropped.
        let guard = self.grace.enter();
        match self.map_read_run(at, len) {
            Some(ReadMapping::Data(host)) => Mapped::Extent {
                storage: Arc::clone(self.data()),
                at: host,
                guard,
            },
            Some(ReadMapping::Zero) => Mapped::Zeroes,
            Some(ReadMapping::Unallocated) => self.map_backing(at, len),
            Some(ReadMapping::Compressed(_)) | None => Mapped::Slow,
        }
    }

    fn map_write(&self, at: GuestOffset, len: u64) -> Mapped {
        if len == 0 || !self.health.allows_writes() || self.check_bounds(at, len).is_err() {
            return Mapped::Slow;
        }
        let guard = self.grace.enter();
        let Ok(Found::Run(WriteMapping::InPlace(first), mut run)) = self.look_up_write(at, len)
        else {
            return Mapped::Slow;
        };
        while run < len {
            match self.look_up_write(GuestOffset(at.0 + run), len - run) {
                Ok(Found::Run(WriteMapping::InPlace(next), next_run))
                    if first.checked_add(run) == Some(next) =>
                {
                    run += next_run;
                }
                _ => return Mapped::Slow,
            }
        }
        Mapped::Extent {
            storage: Arc::clone(self.data()),
            at: first,
            guard,
        }
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move {
            self.check_bounds(at, buf.len() as u64)?;
            self.read_range(at, &buf).await
        })
    }

    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move {
            self.change(at, buf.len() as u64, || self.write_range(at, &buf))
                .await
        })
    }

    fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> ImageFuture<'_> {
        Box::pin(self.change(at, len, move || self.zero_range(at, len, mode)))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_> {
        Box::pin(self.change(at, len, move || self.discard_range(at, len)))
    }

    fn flush(&self) -> ImageFuture<'_> {
        Box::pin(async move {
            match self.access {
                Access::ReadOnly => Ok(()),
                Access::ReadWrite => self.flush_all().await,
            }
        })
    }

    fn close(&self) -> ImageFuture<'_> {
        Box::pin(async move {
            match self.access {
                Access::ReadOnly => Ok(()),
                Access::ReadWrite => self.close_cleanly().await,
            }
        })
    }

    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        Box::pin(async move {
            self.check_bounds(at, len)?;
            let _in_flight = self.grace.enter();
            self.find_allocation(at, len).await
        })
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn name(&self) -> &str {
        self.storage.name()
    }

    fn data_file(&self) -> &str {
        self.data().name()
    }
}
