//! Freeing and zeroing ranges, and the file's length: by fallocate(2), or by writing zeros where the host has
//! nothing better.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{FileStorage, out_of_range};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, ZeroMode};
use crate::sys::{self, IoBuf, RingOp};
use crate::units::HostOffset;

/// The most bytes of zeros written in one operation.
const ZERO_CHUNK: u64 = 1 << 20;

impl FileStorage {
    /// Gives back of the range what the host can give back.
    pub(super) async fn punch(&self, at: HostOffset, len: u64) -> Result<()> {
        let range = self.range(at, len)?;
        let inside = range.start..range.end.min(self.len());
        let whole = self.whole_units(&inside);
        if whole.is_empty() {
            return Ok(());
        }
        let _held = self.ranges.lock(self.touched_blocks(&inside)).await;
        let hole = self.file.punch_hole(HostOffset(whole.start), size(&whole));
        supported(&self.can_punch, hole)
            .await
            .map_err(|error| self.fail("discarding", at, len, error))?;
        Ok(())
    }

    pub(super) async fn zero(&self, at: HostOffset, len: u64, mode: ZeroMode) -> Result<()> {
        let range = self.range(at, len)?;
        let _held = self.ranges.lock(self.touched_blocks(&range)).await;
        let old_end = self.len();
        let inside = range.start..range.end.min(old_end);
        let beyond = range.start.max(old_end)..range.end;
        let mut outcome = self.zero_inside(&inside, mode).await;
        if outcome.is_ok() && !beyond.is_empty() {
            outcome = self.zero_beyond(&beyond, mode).await;
        }
        outcome.map_err(|error| self.fail("zeroing", at, len, error))
    }

    pub(super) async fn resize(&self, len: u64) -> Result<()> {
        if self.id.is_block_device() && len != self.len() {
            let context = format!("{}: a block device keeps its length", self.name);
            return Err(Error::new(ErrorKind::Unsupported, context));
        }
        let mut outcome = self.file.truncate(len).await;
        if matches!(&outcome, Err(error) if error.raw_os_error() == Some(libc::EINVAL)) {
            outcome = sys::truncate_blocking(&self.file, len);
        }
        outcome.map_err(|error| self.fail("cutting or growing to", HostOffset(0), len, error))?;
        self.file.set_known_len(len);
        Ok(())
    }

    /// Zeroes what lies inside the file.
    async fn zero_inside(&self, range: &Range<u64>, mode: ZeroMode) -> io::Result<()> {
        let whole = self.whole_units(range);
        if whole.is_empty() {
            return self.write_zero_bytes(range.clone()).await;
        }
        self.write_zero_bytes(range.start..whole.start).await?;
        self.write_zero_bytes(whole.end..range.end).await?;
        let (at, len) = (HostOffset(whole.start), size(&whole));
        let unmaps = mode == ZeroMode::MayUnmap;
        if unmaps && supported(&self.can_punch, self.file.punch_hole(at, len)).await? {
            return Ok(());
        }
        let zero_range = self.file.zero_range_keep_len(at, len);
        if supported(&self.can_zero, zero_range).await? {
            return Ok(());
        }
        self.write_zero_bytes(whole).await
    }

    /// Grows the file by `range`, which begins at its end or beyond. Only ever lengthens: a write at the same time
    /// may have grown the file further.
    async fn zero_beyond(&self, range: &Range<u64>, mode: ZeroMode) -> io::Result<()> {
        if mode == ZeroMode::KeepAllocated {
            let zero_range = self
                .file
                .zero_range_growing(HostOffset(range.start), size(range));
            if supported(&self.can_zero, zero_range).await? {
                return Ok(());
            }
            return self.write_zero_bytes(range.clone()).await;
        }
        let last = size(range).min(u64::from(self.file.alignment()));
        self.write_zero_bytes(range.end - last..range.end).await
    }

    /// Writes zeros. The caller holds the blocks.
    async fn write_zero_bytes(&self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let chunk = size(&range).min(ZERO_CHUNK);
        let zeros = IoBuf::zeroed(usize::try_from(chunk).map_err(io::Error::other)?);
        let mut at = range.start;
        while at < range.end {
            let len = chunk.min(range.end - at);
            let len_in_memory = usize::try_from(len).map_err(io::Error::other)?;
            self.write_held(HostOffset(at), zeros.slice(0..len_in_memory))
                .await?;
            at += len;
        }
        Ok(())
    }

    fn range(&self, at: HostOffset, len: u64) -> Result<Range<u64>> {
        at.0.checked_add(len)
            .filter(|end| i64::try_from(*end).is_ok())
            .map(|end| at.0..end)
            .ok_or_else(|| out_of_range(&self.name))
    }

    /// The part of `range` that fallocate takes: whole logical blocks of a block device.
    fn whole_units(&self, range: &Range<u64>) -> Range<u64> {
        let unit = self.hole_alignment;
        let start = range.start.next_multiple_of(unit);
        let end = range.end - range.end % unit;
        start..end.max(start)
    }

    /// The blocks that a read-modify-write of another operation could take along.
    fn touched_blocks(&self, range: &Range<u64>) -> Range<u64> {
        let unit = u64::from(self.file.alignment());
        range.start - range.start % unit..range.end.next_multiple_of(unit)
    }
}

fn size(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// Whether `op` was done; not if the host does not know it, which `is_known` remembers.
async fn supported(is_known: &AtomicBool, op: RingOp) -> io::Result<bool> {
    if !is_known.load(Ordering::Relaxed) {
        return Ok(false);
    }
    match op.await {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV) => {
                is_known.store(false, Ordering::Relaxed);
                Ok(false)
            }
            _ => Err(error),
        },
    }
}
