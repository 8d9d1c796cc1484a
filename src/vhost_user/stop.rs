//! Asking a worker to end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// A request to stop: a flag to look at while busy, a descriptor to wake from sleep.
#[derive(Debug)]
pub(super) struct Stop {
    requested: AtomicBool,
    eventfd: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            requested: AtomicBool::new(false),
            eventfd: EventFd::from_flags(flags)?,
        })
    }

    /// Asks to stop, for good.
    pub(super) fn request(&self) {
        self.requested.store(true, Ordering::Release);
        // Fails only when the counter is full, and then the descriptor is readable anyway.
        let _ = self.eventfd.write(1);
    }

    /// Whether to stop.
    pub(super) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }
}

/// Readable once stopping has been requested.
impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
