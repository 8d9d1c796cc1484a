//! Direct I/O for what is not aligned: through a buffer of our own, whole blocks at a time.
//!
//! # Invariants
//!
//! 1. Of two writes through [`super::super::Storage`] that touch the same block, the one is over before the other
//!    reads or writes it: bytes that only one of them writes are not lost.

use std::io;
use std::ops::Range;

use super::{FileStorage, len_of, out_of_range};
use crate::error::Result;
use crate::sys::IoBuf;
use crate::units::HostOffset;

impl FileStorage {
    pub(super) async fn read_bounced(&self, at: HostOffset, buf: IoBuf) -> Result<()> {
        let len = len_of(&buf);
        let too_far = || out_of_range(&self.name);
        let blocks = self.blocks_around(at, len).ok_or_else(too_far)?;
        let bounce = bounce_buffer(&blocks).ok_or_else(too_far)?;
        self.file
            .read(HostOffset(blocks.start), bounce.clone())
            .await
            .map_err(|error| self.fail("reading", at, len, error))?;
        let skip = offset_within(&blocks, at);
        buf.copy_from_buf(0, &bounce.slice(skip..skip + buf.len()));
        Ok(())
    }

    pub(super) async fn write_direct(&self, at: HostOffset, buf: IoBuf) -> Result<()> {
        let len = len_of(&buf);
        let blocks = self
            .blocks_around(at, len)
            .ok_or_else(|| out_of_range(&self.name))?;
        let _held = self.ranges.lock(blocks).await;
        self.write_held(at, buf)
            .await
            .map_err(|error| self.fail("writing", at, len, error))
    }

    /// Writes `buf`, by way of whole blocks if need be. The caller holds the blocks.
    pub(super) async fn write_held(&self, at: HostOffset, buf: IoBuf) -> io::Result<()> {
        if self.file.takes(at, &buf) {
            return self.file.write(at, buf).await;
        }
        let too_far = || io::Error::from_raw_os_error(libc::EFBIG);
        let blocks = self.blocks_around(at, len_of(&buf)).ok_or_else(too_far)?;
        let bounce = bounce_buffer(&blocks).ok_or_else(too_far)?;
        let block = usize::try_from(self.file.alignment()).map_err(io::Error::other)?;
        let start = offset_within(&blocks, at);
        let end = start + buf.len();
        let last = bounce.len() - block;
        let head_is_partial = start > 0;
        let tail_is_partial = end < bounce.len();
        if head_is_partial {
            let head = bounce.slice(0..block);
            self.file.read(HostOffset(blocks.start), head).await?;
        }
        if tail_is_partial && !(head_is_partial && last == 0) {
            let tail = bounce.slice(last..bounce.len());
            let tail_at = HostOffset(blocks.end - u64::from(self.file.alignment()));
            self.file.read(tail_at, tail).await?;
        }
        bounce.copy_from_buf(start, &buf);
        // What the request holds is held until the kernel is done, even if nobody waits for that any more.
        let bounce = bounce.keeping_as(&buf);
        self.file.write(HostOffset(blocks.start), bounce).await
    }

    /// The whole blocks that hold `len` bytes at `at`.
    fn blocks_around(&self, at: HostOffset, len: u64) -> Option<Range<u64>> {
        let block = u64::from(self.file.alignment());
        let start = at.0 - at.0 % block;
        let end = at.0.checked_add(len)?.checked_next_multiple_of(block)?;
        Some(start..end)
    }
}

fn bounce_buffer(blocks: &Range<u64>) -> Option<IoBuf> {
    let len = usize::try_from(blocks.end - blocks.start).ok()?;
    Some(IoBuf::zeroed(len))
}

fn offset_within(blocks: &Range<u64>, at: HostOffset) -> usize {
    usize::try_from(at.0 - blocks.start).expect("less than a block")
}
