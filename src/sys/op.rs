//! One operation on a host file: what it asks of the kernel, how far it has come, and who waits for it.

use std::io;
use std::os::fd::AsRawFd;
use std::task::Waker;

use io_uring::{opcode, squeue, types};

use super::{Direction, HostFile, IoBuf};
use crate::units::HostOffset;

/// The most segments that the kernel takes in one call (`IOV_MAX`); longer lists go in pieces.
const MAX_SEGMENTS: usize = 1024;

/// The most bytes of a single segment in one call: what the kernel moves at most (`MAX_RW_COUNT`).
const MAX_SEGMENT_LEN: u32 = 0x7fff_f000;

/// How often in a row an operation is tried again that was interrupted or told to come back.
const MAX_RETRIES: u8 = 100;

/// What is asked of the kernel.
#[derive(Debug)]
pub(crate) enum Call {
    /// Fill the buffer from the file; what lies past its end reads as zeros.
    Read { at: HostOffset, buf: IoBuf },
    /// Write the whole buffer.
    Write { at: HostOffset, buf: IoBuf },
    /// Make completed writes durable, with what is needed to find them again.
    DataSync,
    /// Change how a range of the file is allocated; `mode` as in fallocate(2).
    Allocate {
        mode: libc::c_int,
        at: HostOffset,
        len: u64,
    },
    /// Cut or grow the file.
    Truncate { len: u64 },
}

impl Call {
    /// Does at once what can be done at once; how it ended, or `None` where this is what is left of the call.
    pub(super) fn attempt(&mut self, file: &HostFile) -> Option<io::Result<()>> {
        match self {
            Self::Read { at, buf } => file.attempt(Direction::Read, at, buf),
            Self::Write { at, buf } => file.attempt(Direction::Write, at, buf),
            Self::DataSync => file.attempt_data_sync(),
            Self::Allocate { .. } | Self::Truncate { .. } => None,
        }
    }
}

/// Who is told that an operation has ended.
#[derive(Debug)]
pub(super) enum Owner {
    /// The worker that gave this token.
    Token(u64),
    /// A future, once it has been polled; and the outcome until the future takes it.
    Future {
        waker: Option<Waker>,
        outcome: Option<io::Result<()>>,
    },
    /// Nobody any more: the future was dropped.
    Nobody,
}

/// What comes after an answer of the kernel.
pub(super) enum Step {
    /// The rest, or the same once more, has to be submitted.
    Again,
    /// The operation has ended.
    Done(io::Result<()>),
}

/// An operation that the ring has accepted. It owns all memory that the kernel touches.
#[derive(Debug)]
pub(super) struct Op {
    file: HostFile,
    call: Call,
    pub(super) owner: Owner,
    retries: u8,
}

impl Op {
    pub(super) fn new(file: HostFile, call: Call, owner: Owner) -> Self {
        Self {
            file,
            call,
            owner,
            retries: 0,
        }
    }

    /// The submission queue entry for what is left to do. It points into `self`.
    pub(super) fn entry(&self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        match &self.call {
            Call::Read { at, buf } => match buf.iovecs() {
                [one] => opcode::Read::new(fd, one.iov_base.cast(), segment_len(one))
                    .offset(at.0)
                    .build(),
                many => opcode::Readv::new(fd, many.as_ptr(), segment_count(many))
                    .offset(at.0)
                    .build(),
            },
            Call::Write { at, buf } => match buf.iovecs() {
                [one] => opcode::Write::new(fd, one.iov_base.cast_const().cast(), segment_len(one))
                    .offset(at.0)
                    .build(),
                many => opcode::Writev::new(fd, many.as_ptr(), segment_count(many))
                    .offset(at.0)
                    .build(),
            },
            Call::DataSync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Call::Allocate { mode, at, len } => opcode::Fallocate::new(fd, *len)
                .offset(at.0)
                .mode(*mode)
                .build(),
            Call::Truncate { len } => opcode::Ftruncate::new(fd, *len).build(),
        }
    }

    /// Takes in the kernel's answer: bytes moved, or a negative error number.
    pub(super) fn advance(&mut self, answer: i32) -> Step {
        let Ok(moved) = usize::try_from(answer) else {
            return self.failed(-answer);
        };
        self.retries = 0;
        match &mut self.call {
            Call::Read { at, buf } => has_read(&self.file, at, buf, moved),
            Call::Write { at, buf } => has_written(&self.file, at, buf, moved),
            Call::Allocate { mode, at, len } => {
                if *mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
                    self.file.has_reached(at.0.saturating_add(*len));
                }
                Step::Done(Ok(()))
            }
            Call::Truncate { len } => {
                self.file.set_known_len(*len);
                Step::Done(Ok(()))
            }
            Call::DataSync => Step::Done(Ok(())),
        }
    }

    fn failed(&mut self, error: i32) -> Step {
        let transient = matches!(error, libc::EINTR | libc::EAGAIN);
        if transient && self.retries < MAX_RETRIES {
            self.retries += 1;
            return Step::Again;
        }
        Step::Done(Err(io::Error::from_raw_os_error(error)))
    }
}

/// Takes in that `moved` bytes at `at` have been read into `buf`.
pub(super) fn has_read(
    file: &HostFile,
    at: &mut HostOffset,
    buf: &mut IoBuf,
    moved: usize,
) -> Step {
    let end_of_file = moved == 0 || !file.is_direct_aligned(moved);
    if moved >= buf.len() {
        Step::Done(Ok(()))
    } else if end_of_file {
        buf.zero(moved..buf.len());
        Step::Done(Ok(()))
    } else {
        skip(at, buf, moved)
    }
}

/// Takes in that `moved` bytes of `buf` have been written at `at`.
pub(super) fn has_written(
    file: &HostFile,
    at: &mut HostOffset,
    buf: &mut IoBuf,
    moved: usize,
) -> Step {
    let end =
        at.0.saturating_add(u64::try_from(moved).unwrap_or(u64::MAX));
    file.has_reached(end);
    if moved >= buf.len() {
        Step::Done(Ok(()))
    } else if moved == 0 {
        Step::Done(Err(io::ErrorKind::WriteZero.into()))
    } else {
        skip(at, buf, moved)
    }
}

/// The first of `segments`, as many as the kernel takes in one call.
pub(super) fn segments_of_one_call(segments: &[libc::iovec]) -> &[libc::iovec] {
    &segments[..segments.len().min(MAX_SEGMENTS)]
}

/// Leaves `buf` and `at` at what has not been moved yet.
fn skip(at: &mut HostOffset, buf: &mut IoBuf, moved: usize) -> Step {
    let next = u64::try_from(moved).ok().and_then(|m| at.checked_add(m));
    let Some(next) = next else {
        return Step::Done(Err(io::Error::from_raw_os_error(libc::EFBIG)));
    };
    *at = next;
    *buf = buf.slice(moved..buf.len());
    Step::Again
}

fn segment_len(segment: &libc::iovec) -> u32 {
    u32::try_from(segment.iov_len).map_or(MAX_SEGMENT_LEN, |len| len.min(MAX_SEGMENT_LEN))
}

fn segment_count(segments: &[libc::iovec]) -> u32 {
    u32::try_from(segments.len().min(MAX_SEGMENTS)).expect("IOV_MAX is a small number")
}
