//! A virtual disk: what a guest's byte range means, whatever the format.
//!
//! Raw files, qcow2 files and their chains, and a VM's view of either are all an [`Image`].

pub(crate) mod grace;
mod raw;
mod read_only;

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

pub use crate::storage::Access;
pub use raw::RawImage;
pub use read_only::ReadOnlyImage;

use crate::error::Result;
use crate::storage::{Storage, ZeroMode};
use crate::sys::IoBuf;
use crate::units::{GuestOffset, HostOffset};

/// An operation on a virtual disk under way. It stays on the thread that began it.
pub type ImageFuture<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// What a guest range is, answered from memory alone.
pub enum Mapped {
    /// The whole range is one extent of one host file, and stays so until `guard` is dropped.
    Extent {
        /// The file that holds it.
        storage: Arc<dyn Storage>,
        /// Where its first byte lies.
        at: HostOffset,
        /// Keeps the host range from being given to other data while I/O on it is under way.
        guard: InFlight,
    },
    /// The whole range reads as zeros. (Never the answer for a write.)
    Zeroes,
    /// Memory alone does not tell, or there is more to it than one extent: use the operation itself.
    Slow,
}

/// One I/O on a mapped extent under way; dropping it says that the I/O has ended.
///
/// A freed host cluster is handed out again only after every I/O that may still touch it has ended; and a base brings
/// what it has committed to its place only after every read of a child's that may still find the old contents there.
#[derive(Debug, Default)]
pub struct InFlight {
    token: Option<Token>,
    /// What another layer waits for.
    other: Option<Token>,
}

type Token = Arc<dyn Send + Sync + std::any::Any>;

impl InFlight {
    /// A guard for an image whose extents never move.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// `buf`, which holds this guard too: until the I/O with it has ended, even where nobody waits for that any more.
    #[must_use]
    pub fn held_by(&self, buf: IoBuf) -> IoBuf {
        let tokens = self.token.iter().chain(&self.other);
        tokens.fold(buf, |buf, token| buf.keeping(Arc::clone(token) as _))
    }

    /// A guard that lives as long as `token` is held.
    #[must_use]
    pub fn holding(token: Token) -> Self {
        Self {
            token: Some(token),
            other: None,
        }
    }

    /// This guard, of one layer, and that of a layer above.
    #[must_use]
    pub fn and(self, above: Self) -> Self {
        Self {
            token: self.token.or(self.other),
            other: above.token,
        }
    }
}

/// What a range of a virtual disk holds in one layer of a chain, and where in the file that
/// [`Image::data_file`] names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// The layer holds data, from this host offset on unless it lies in several places.
    Data(Option<HostOffset>),
    /// The layer holds data, compressed.
    Compressed,
    /// The layer has room for data at this host offset, where the host keeps nothing: zeros.
    Sparse(HostOffset),
    /// The layer says that the range reads as zeros, and may keep room for it at a host offset.
    Zero(Option<HostOffset>),
    /// The layer says nothing: the backing image decides, or zeros where there is none. It may keep room for the
    /// range at a host offset.
    Unallocated(Option<HostOffset>),
}

impl Allocation {
    /// What the layer holds `len` bytes further on, if that is the same.
    #[must_use]
    pub fn after(self, len: u64) -> Self {
        let further = |at: Option<HostOffset>| at.and_then(|at| at.checked_add(len));
        match self {
            Self::Data(at) => Self::Data(further(at)),
            Self::Compressed => Self::Compressed,
            Self::Sparse(at) => Self::Sparse(HostOffset(at.0.saturating_add(len))),
            Self::Zero(at) => Self::Zero(further(at)),
            Self::Unallocated(at) => Self::Unallocated(further(at)),
        }
    }
}

/// The sizes that a device tells its guest, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The smallest unit that can be addressed: 512 unless direct I/O needs more.
    pub logical_block_size: u32,
    /// The unit below which a first write has to copy or to read before it writes.
    pub physical_block_size: u32,
    /// The best size of a request.
    pub optimal_io_size: u32,
    /// The unit in which discarded room comes back.
    pub discard_granularity: u32,
}

impl Limits {
    /// The sizes of a disk of which a part lies here, and another part elsewhere.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        let larger = |of: fn(&Self) -> u32| of(&self).max(of(&other));
        Self {
            logical_block_size: larger(|limits| limits.logical_block_size),
            physical_block_size: larger(|limits| limits.physical_block_size),
            optimal_io_size: larger(|limits| limits.optimal_io_size),
            discard_granularity: larger(|limits| limits.discard_granularity),
        }
    }
}

/// A virtual disk. Operations on ranges that overlap and are under way at the same time have no order.
///
/// Ranges that leave the disk fail with [`crate::error::ErrorKind::OutOfBounds`]; writes to a read-only
/// disk with [`crate::error::ErrorKind::ReadOnly`].
pub trait Image: Any + Send + Sync {
    /// The disk's length in bytes, as the guest sees it.
    fn virtual_size(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// The sizes to tell a guest.
    fn limits(&self) -> Limits;

    /// Where `len` bytes at `at` can be read from: the fast path, without I/O, allocation or a lock held
    /// afterwards.
    fn map_read(&self, at: GuestOffset, len: u64) -> Mapped;

    /// Where `len` bytes at `at` can be overwritten in place, no metadata changing: the fast path, as
    /// [`Image::map_read`].
    fn map_write(&self, at: GuestOffset, len: u64) -> Mapped;

    /// Fills `buf` with the bytes at `at`.
    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_>;

    /// Writes all of `buf` at `at`; durable after a [`Image::flush`] that starts after the write has completed.
    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_>;

    /// Makes `len` bytes at `at` read as zeros.
    fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> ImageFuture<'_>;

    /// Says that `len` bytes at `at` are no longer needed. They read as zeros or as before.
    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_>;

    /// Makes every write that completed before this call durable.
    fn flush(&self) -> ImageFuture<'_>;

    /// Says that writing has ended, until the next write: makes everything durable, and the image one that was closed
    /// cleanly. Nothing may be under way that changes the disk.
    fn close(&self) -> ImageFuture<'_> {
        self.flush()
    }

    /// What this layer alone, not its backing, holds at `at`, and for how many of the next `len` bytes (at least
    /// one) the answer is the same. May ask the host, which blocks: not for serving a guest.
    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)>;

    /// Says that a front-end has taken the disk over, before its first request is served: whatever depends on what
    /// its guest has done since is to start anew. A view looks here whether the guest has a journal to replay.
    fn begin_session(&self) -> ImageFuture<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// The image that decides where this one says nothing.
    fn backing(&self) -> Option<&Arc<dyn Image>>;

    /// The name for messages: the file's path.
    fn name(&self) -> &str;

    /// The path of the file to which the host offsets of [`Image::allocation`] belong.
    fn data_file(&self) -> &str {
        self.name()
    }
}
