//! Signalling an eventfd whose file description somebody else has, too.
//!
//! write(2) on an eventfd waits while the counter is full, unless the description is non-blocking; and whoever has
//! the description can fill the counter and change the flag at any moment. The kernel's own way of signalling, which
//! its drivers use, never waits: it adds what there is room for. A ring whose completions are signalled on the eventfd
//! (`IORING_REGISTER_EVENTFD`) gives that to a process: an operation that does nothing makes one signal, in one system
//! call, as the write would.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode};

/// How often a kernel that lacks memory is asked again.
const ATTEMPTS: usize = 100;

/// A way to signal one eventfd, which never waits for whoever reads it.
pub struct Signal(IoUring);

impl Signal {
    /// Signals `eventfd` from now on.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if it is no eventfd; when the kernel does not give a ring.
    pub fn new(eventfd: &File) -> io::Result<Self> {
        let uring = IoUring::new(1)?;
        uring.submitter().register_eventfd(eventfd.as_raw_fd())?;
        Ok(Self(uring))
    }

    /// Adds one to the counter, if there is room for it. Never waits.
    ///
    /// # Errors
    /// What io_uring_enter(2) returns; the next signal makes up for it.
    pub fn send(&mut self) -> io::Result<()> {
        self.0.completion().for_each(drop);
        // SAFETY: an operation that does nothing points to nothing. There is no room only if the last one was not
        // taken, which then does.
        let _ = unsafe { self.0.submission().push(&opcode::Nop::new().build()) };
        let mut left = ATTEMPTS;
        loop {
            match self.0.submit() {
                Ok(_) => return Ok(()),
                Err(error) if left == 0 => return Err(error),
                Err(_) => left -= 1,
            }
        }
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signal").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    #[test]
    fn every_signal_adds_one_and_a_full_counter_keeps_nobody() {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        let shared = File::from(eventfd.as_fd().try_clone_to_owned().unwrap());
        let mut signal = Signal::new(&shared).unwrap();
        drop(shared);
        for _ in 0..1000 {
            signal.send().unwrap();
        }
        assert_eq!(eventfd.read().unwrap(), 1000);
        eventfd.write(u64::MAX - 1).unwrap();
        for _ in 0..1000 {
            signal.send().unwrap();
        }
        assert!(eventfd.read().unwrap() >= u64::MAX - 1);
        signal.send().unwrap();
        assert_eq!(eventfd.read().unwrap(), 1);
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(
            Signal::new(&file).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
