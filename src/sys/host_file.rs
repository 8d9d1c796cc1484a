//! An open host file that rings submit to.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, fcntl};

use super::op::Call;
use super::prompt_io::{Prompt, Promptness};
use super::{IoBuf, RingOp};
use crate::units::HostOffset;

/// An open file (or block device), shared by everything that has I/O on it under way; the last clone closes it.
#[derive(Clone, Debug)]
pub struct HostFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    alignment: u32,
    len: AtomicU64,
    prompt: Prompt,
}

impl Drop for Inner {
    /// Gives up the locks of the open file now. Closing alone would leave them to every process that has inherited the
    /// descriptor: one that this process is just starting has it until it runs its own program.
    fn drop(&mut self) {
        let whole_file = libc::flock {
            l_type: libc::c_short::try_from(libc::F_UNLCK)
                .expect("a constant of fcntl(2) is small"),
            l_whence: libc::c_short::try_from(libc::SEEK_SET)
                .expect("a constant of fcntl(2) is small"),
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // A file that cannot be locked has no locks to give up.
        let _ = fcntl(&self.fd, FcntlArg::F_OFD_SETLK(&whole_file));
    }
}

impl HostFile {
    /// A file of `len` bytes whose I/O comes in multiples of `alignment` bytes: 1 unless opened with O_DIRECT. All I/O
    /// goes through rings.
    #[must_use]
    pub fn new(file: File, len: u64, alignment: u32) -> Self {
        Self::with_promptness(file, len, alignment, Promptness::Never)
    }

    /// As [`Self::new`], with I/O that ends at once as far as `promptness` goes.
    #[must_use]
    pub fn with_promptness(file: File, len: u64, alignment: u32, promptness: Promptness) -> Self {
        Self(Arc::new(Inner {
            fd: file.into(),
            alignment: alignment.max(1),
            len: AtomicU64::new(len),
            prompt: Prompt::new(promptness),
        }))
    }

    /// The granularity in bytes of offsets, lengths and memory: 1 through the page cache.
    #[must_use]
    pub fn alignment(&self) -> u32 {
        self.0.alignment
    }

    /// The file's length in bytes, as far as this process has changed it.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len.load(Ordering::Acquire)
    }

    /// Whether the file has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes that the file has been cut or grown to `len`.
    pub fn set_known_len(&self, len: u64) {
        self.0.len.store(len, Ordering::Release);
    }

    /// Notes that bytes up to `end` have been written.
    pub(super) fn has_reached(&self, end: u64) {
        if self.len() < end {
            self.0.len.fetch_max(end, Ordering::AcqRel);
        }
    }

    /// Whether I/O between `buf` and `at` needs no bounce buffer.
    #[must_use]
    pub fn takes(&self, at: HostOffset, buf: &IoBuf) -> bool {
        let alignment = self.0.alignment;
        alignment == 1
            || (at.0.is_multiple_of(u64::from(alignment))
                && usize::try_from(alignment).is_ok_and(|alignment| buf.is_aligned(alignment)))
    }

    /// Fills `buf` from `at`, with zeros past the end of the file. Everything is aligned to [`Self::alignment`].
    pub fn read(&self, at: HostOffset, buf: IoBuf) -> RingOp {
        RingOp::new(self.clone(), Call::Read { at, buf })
    }

    /// Writes all of `buf` at `at`. Everything is aligned to [`Self::alignment`].
    pub fn write(&self, at: HostOffset, buf: IoBuf) -> RingOp {
        RingOp::new(self.clone(), Call::Write { at, buf })
    }

    /// Makes completed writes durable (fdatasync).
    pub fn data_sync(&self) -> RingOp {
        RingOp::new(self.clone(), Call::DataSync)
    }

    /// Gives the room of a range back; it reads as zeros afterwards, and the length stays.
    ///
    /// Fails with `EOPNOTSUPP` where the host cannot.
    pub fn punch_hole(&self, at: HostOffset, len: u64) -> RingOp {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        RingOp::new(self.clone(), Call::Allocate { mode, at, len })
    }

    /// Makes a range inside the file read as zeros, and keeps its room.
    ///
    /// Fails with `EOPNOTSUPP` where the host cannot.
    pub fn zero_range_keep_len(&self, at: HostOffset, len: u64) -> RingOp {
        let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        RingOp::new(self.clone(), Call::Allocate { mode, at, len })
    }

    /// Makes a range read as zeros and gives it room; a file that ends before the range's end grows.
    ///
    /// Fails with `EOPNOTSUPP` where the host cannot.
    pub fn zero_range_growing(&self, at: HostOffset, len: u64) -> RingOp {
        let mode = libc::FALLOC_FL_ZERO_RANGE;
        RingOp::new(self.clone(), Call::Allocate { mode, at, len })
    }

    /// Cuts or grows the file to `len` bytes. Fails with `EINVAL` on kernels whose rings cannot (before 6.9).
    pub fn truncate(&self, len: u64) -> RingOp {
        RingOp::new(self.clone(), Call::Truncate { len })
    }

    pub(super) fn prompt(&self) -> &Prompt {
        &self.0.prompt
    }

    /// Whether `moved` bytes of direct I/O can be followed by more: otherwise the file ended there.
    pub(super) fn is_direct_aligned(&self, moved: usize) -> bool {
        usize::try_from(self.0.alignment).is_ok_and(|alignment| moved.is_multiple_of(alignment))
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl AsRawFd for HostFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}

/// Cuts or grows `file` in a blocking call, for kernels whose rings cannot.
///
/// # Errors
/// As ftruncate(2).
pub fn truncate_blocking(file: &HostFile, len: u64) -> io::Result<()> {
    let len = i64::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    Ok(nix::unistd::ftruncate(file, len)?)
}
