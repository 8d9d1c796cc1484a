//! Storage for hostile images: memory that grows only so far, and counts what is done to it.

use std::sync::atomic::{AtomicU64, Ordering};

use seethrough::error::{Error, ErrorKind, Result};
use seethrough::storage::{IoFuture, MemoryStorage, Storage, ZeroMode};
use seethrough::sys::IoBuf;
use seethrough::units::HostOffset;

/// How far a hostile image may make its file grow.
const LARGEST_FILE: u64 = 64 << 20;

/// Operations on the file that one body may take: honest images take some thousands, and a repair reads a table of the
/// most snapshots there may be, entry by entry, in each of its passes.
const OPERATIONS: u64 = 2_000_000;

pub struct Bounded {
    bytes: MemoryStorage,
    operations: AtomicU64,
}

impl Bounded {
    pub fn new(image: &[u8]) -> Self {
        Self {
            bytes: MemoryStorage::new(image.to_vec()),
            operations: AtomicU64::new(0),
        }
    }

    fn count(&self) {
        let operations = self.operations.fetch_add(1, Ordering::Relaxed);
        assert!(
            operations < OPERATIONS,
            "more than {OPERATIONS} operations on the file"
        );
    }

    fn admits(&self, at: HostOffset, len: u64) -> Result<()> {
        self.count();
        match at.checked_add(len) {
            Some(end) if end.0 <= LARGEST_FILE => Ok(()),
            _ => Err(Error::new(
                ErrorKind::NoSpace,
                "the file has grown too large",
            )),
        }
    }
}

impl Storage for Bounded {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.count();
        if at.0 > LARGEST_FILE {
            buf.zero(0..buf.len());
            return IoFuture::ready(Ok(()));
        }
        self.bytes.readv(at, buf)
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        match self.admits(at, buf.len() as u64) {
            Ok(()) => self.bytes.writev(at, buf),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn flush(&self) -> IoFuture<'_> {
        self.count();
        self.bytes.flush()
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        self.count();
        self.bytes.discard(at, len)
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        match self.admits(at, len) {
            Ok(()) => self.bytes.write_zeroes(at, len, mode),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        match self.admits(HostOffset(0), len) {
            Ok(()) => self.bytes.set_len(len),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn name(&self) -> &str {
        "hostile image"
    }
}
