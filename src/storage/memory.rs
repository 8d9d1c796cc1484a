//! A store in memory, for tests and for measuring what the layers above cost.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{IoFuture, Storage, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// Bytes in memory.
#[derive(Debug, Default)]
pub struct MemoryStorage {
    bytes: Mutex<Vec<u8>>,
}

impl MemoryStorage {
    /// A store that holds `bytes`.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
        }
    }

    /// A copy of the present contents.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_now(&self, at: HostOffset, buf: &IoBuf) -> Result<()> {
        let bytes = self.lock();
        let start = index(at.0)?.min(bytes.len());
        let end = start.saturating_add(buf.len()).min(bytes.len());
        buf.copy_from(0, &bytes[start..end]);
        buf.zero(end - start..buf.len());
        Ok(())
    }

    fn write_now(&self, at: HostOffset, write: impl FnOnce(&mut [u8]), len: usize) -> Result<()> {
        let start = index(at.0)?;
        let end = start.checked_add(len).ok_or_else(too_far)?;
        let mut bytes = self.lock();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        write(&mut bytes[start..end]);
        Ok(())
    }
}

fn too_far() -> Error {
    Error::new(
        ErrorKind::OutOfBounds,
        "the offset lies outside what memory can hold",
    )
}

fn index(offset: u64) -> Result<usize> {
    usize::try_from(offset).map_err(|_| too_far())
}

impl Storage for MemoryStorage {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        IoFuture::ready(self.read_now(at, &buf))
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        IoFuture::ready(self.write_now(at, |bytes| buf.copy_to(0, bytes), buf.len()))
    }

    fn flush(&self) -> IoFuture<'_> {
        IoFuture::ready(Ok(()))
    }

    fn discard(&self, _at: HostOffset, _len: u64) -> IoFuture<'_> {
        IoFuture::ready(Ok(()))
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, _mode: ZeroMode) -> IoFuture<'_> {
        let done = index(len).and_then(|len| self.write_now(at, |bytes| bytes.fill(0), len));
        IoFuture::ready(done)
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        IoFuture::ready(index(len).map(|len| self.lock().resize(len, 0)))
    }

    fn len(&self) -> u64 {
        self.lock().len() as u64
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn name(&self) -> &str {
        "memory"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::block_on;

    #[test]
    fn reads_past_the_end_are_zeros_and_writes_grow() {
        let storage = MemoryStorage::new(vec![7; 4]);
        let buf = IoBuf::from_bytes(&[1; 6]);
        block_on(storage.readv(HostOffset(2), buf.clone())).unwrap();
        assert_eq!(buf.to_vec(), [7, 7, 0, 0, 0, 0]);
        block_on(storage.writev(HostOffset(6), IoBuf::from_bytes(&[9, 9]))).unwrap();
        assert_eq!(storage.contents(), [7, 7, 7, 7, 0, 0, 9, 9]);
        block_on(storage.write_zeroes(HostOffset(7), 3, ZeroMode::MayUnmap)).unwrap();
        assert_eq!(storage.len(), 10);
    }
}
