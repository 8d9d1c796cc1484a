//! One host file (or memory, or a fault in place of either) as a byte-addressed store.
//!
//! Everything above reads and writes host bytes through [`Storage`] alone.

mod crash;
mod fault;
mod file;
mod future;
mod lock;
mod memory;
mod range_lock;
mod seeded;
mod swappable;

pub use crash::{CrashStorage, Lost, Moment};
pub use fault::{Fault, FaultStorage, Operation};
pub use file::{Access, CacheMode, FileStorage};
pub use future::IoFuture;
pub use lock::LockRole;
pub use memory::MemoryStorage;
pub(crate) use range_lock::{RangeGuard, RangeLock};
pub use seeded::Delays;
pub(crate) use swappable::{Swappable, Using};

use crate::sys::{HostFile, IoBuf};
use crate::units::HostOffset;

/// Whether a range that shall read as zeros may lose its room on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Room may be given back: later writes may fail for want of it.
    MayUnmap,
    /// Room stays reserved.
    KeepAllocated,
}

/// What the host keeps of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Bytes, or it does not tell.
    Data,
    /// Nothing: the range reads as zeros.
    Hole,
}

/// A byte-addressed store: asynchronous, shared by threads, without any order between operations that are
/// under way at the same time.
pub trait Storage: Send + Sync {
    /// Fills `buf` with the bytes at `at`; what lies behind the end of the store reads as zeros.
    ///
    /// Any offset and length are taken; those aligned to [`Storage::alignment`] need no bounce buffer.
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_>;

    /// Writes all of `buf` at `at`, growing the store if it ends further on. Not durable before a
    /// [`Storage::flush`] that starts after the write has completed.
    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_>;

    /// Makes every write that completed before this call durable.
    ///
    /// # Errors
    /// Once a flush has failed every later one fails too: what the failed one was to make durable may be gone.
    fn flush(&self) -> IoFuture<'_>;

    /// Says that the bytes are no longer needed: a hint, they read as anything afterwards.
    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_>;

    /// Makes the bytes read as zeros, growing the store if they end further on.
    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_>;

    /// Cuts or grows the store to `len` bytes; new bytes read as zeros.
    fn set_len(&self, len: u64) -> IoFuture<'_>;

    /// The store's present length in bytes.
    fn len(&self) -> u64;

    /// Whether the store has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the host keeps at `at`, and for how many of the next `len` bytes the answer is the same: at least one,
    /// unless `len` is 0. Blocks for as long as the host takes to look its own tables up: not for serving a guest.
    fn held(&self, _at: HostOffset, len: u64) -> (Held, u64) {
        (Held::Data, len)
    }

    /// Bytes that the store takes up on the host, if that is known. Blocks as [`Storage::held`].
    fn bytes_on_host(&self) -> Option<u64> {
        None
    }

    /// The granularity in bytes of offsets, lengths and memory that need no bounce buffer: 1 through the page
    /// cache.
    fn alignment(&self) -> u32;

    /// The name for messages: the file's path.
    fn name(&self) -> &str;

    /// The host file to which a worker may submit reads and writes itself, at the same offsets, where
    /// [`HostFile::takes`] says so; `None` if all I/O has to come through this trait.
    fn host_file(&self) -> Option<&HostFile> {
        None
    }
}
