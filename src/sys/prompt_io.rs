//! Reads and writes that the kernel ends in the call itself, so that no ring has to be gone through.
//!
//! What lies in memory (in the page cache, or on a filesystem that is nothing but memory) is copied by the calling
//! thread, whichever way it is asked for. A plain call is then the shortest: a ring hands buffered writes, and all I/O
//! on tmpfs, to a kernel thread, which costs a wake-up each way and ten times the copy.
//!
//! # Invariants
//!
//! 1. Nothing here waits for a device: reads through the page cache are asked for with `RWF_NOWAIT`, and everything
//!    else is asked for only where there is no device. What is not done at once is left to the ring.
//! 2. Whatever has been moved is moved once: what is left for the ring begins where this ended.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::op::{self, Step};
use super::{Direction, HostFile, IoBuf};
use crate::units::HostOffset;

/// The longest row of attempts that are left out after attempts in vain, as a power of two.
const MAX_PAUSE_LOG: u32 = 6;

/// What I/O on a file can end in the call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Promptness {
    /// None, as far as anyone knows.
    #[default]
    Never,
    /// Reads of what the page cache holds.
    CachedReads,
    /// All of it: the file lies in memory.
    Always,
}

/// A file's promptness, and how well it has kept to it lately.
#[derive(Debug, Default)]
pub(super) struct Prompt {
    promptness: Promptness,
    /// The kernel has said that it does not know `RWF_NOWAIT` for this file.
    is_refused: AtomicBool,
    /// Attempts to leave out. This and the next are guesses: threads that overwrite each other's do no harm.
    pause: AtomicU32,
    /// Attempts in vain since the last that was not.
    misses: AtomicU32,
}

impl Prompt {
    pub(super) fn new(promptness: Promptness) -> Self {
        Self {
            promptness,
            ..Self::default()
        }
    }

    /// Whether fdatasync(2) has nothing to wait for.
    pub(super) fn syncs(&self) -> bool {
        self.promptness == Promptness::Always
    }

    /// The flags to ask with; `None` if it is not worth asking.
    fn flags(&self, direction: Direction) -> Option<libc::c_int> {
        match (self.promptness, direction) {
            (Promptness::Always, _) => Some(0),
            (Promptness::CachedReads, Direction::Read) => {
                let pause = self.pause.load(Ordering::Relaxed);
                if pause > 0 {
                    self.pause.store(pause - 1, Ordering::Relaxed);
                    return None;
                }
                (!self.is_refused.load(Ordering::Relaxed)).then_some(libc::RWF_NOWAIT)
            }
            _ => None,
        }
    }

    fn hit(&self) {
        if self.misses.load(Ordering::Relaxed) != 0 {
            self.misses.store(0, Ordering::Relaxed);
        }
    }

    /// After each attempt in vain the next comes later: a file that the page cache does not hold is not asked in vain
    /// each time.
    fn missed(&self) {
        let misses = self.misses.load(Ordering::Relaxed);
        self.misses
            .store((misses + 1).min(MAX_PAUSE_LOG), Ordering::Relaxed);
        self.pause.store((1 << misses) - 1, Ordering::Relaxed);
    }
}

impl HostFile {
    /// Reads or writes all of `buf` at `at` in calls of its own, if that makes nobody wait; how it ended.
    ///
    /// `None` if it does not end at once: `at` and `buf` are then what is left for [`HostFile::read`],
    /// [`HostFile::write`] or [`super::Reactor::submit_fast`]. Allocates nothing.
    pub fn attempt(
        &self,
        direction: Direction,
        at: &mut HostOffset,
        buf: &mut IoBuf,
    ) -> Option<io::Result<()>> {
        let prompt = self.prompt();
        let flags = prompt.flags(direction)?;
        loop {
            let answer = call(self, direction, *at, buf, flags);
            let step = match (direction, answer) {
                (_, Err(libc::EINTR)) => continue,
                (_, Err(libc::EOPNOTSUPP)) if flags != 0 => {
                    prompt.is_refused.store(true, Ordering::Relaxed);
                    return None;
                }
                // The ring has the last word on errors: it tries again what may be tried again.
                (_, Err(_)) => {
                    prompt.missed();
                    return None;
                }
                (Direction::Read, Ok(moved)) => op::has_read(self, at, buf, moved),
                (Direction::Write, Ok(moved)) => op::has_written(self, at, buf, moved),
            };
            if let Step::Done(outcome) = step {
                prompt.hit();
                return Some(outcome);
            }
        }
    }

    /// Makes completed writes durable, if that makes nobody wait; how it ended.
    pub(super) fn attempt_data_sync(&self) -> Option<io::Result<()>> {
        self.prompt()
            .syncs()
            .then(|| Ok(nix::unistd::fdatasync(self)?))
    }
}

/// One call of the kernel; the bytes that it has moved, or its error number.
fn call(
    file: &HostFile,
    direction: Direction,
    at: HostOffset,
    buf: &IoBuf,
    flags: libc::c_int,
) -> Result<usize, i32> {
    let segments = op::segments_of_one_call(buf.iovecs());
    let count = libc::c_int::try_from(segments.len()).map_err(|_| libc::EINVAL)?;
    let offset = libc::off_t::try_from(at.0).map_err(|_| libc::EFBIG)?;
    let fd = file.as_raw_fd();
    // SAFETY: the segments point into memory that `buf` keeps mapped until after the call.
    let answer = unsafe {
        match (direction, segments) {
            (Direction::Read, [one]) if flags == 0 => {
                libc::pread(fd, one.iov_base, one.iov_len, offset)
            }
            (Direction::Write, [one]) if flags == 0 => {
                libc::pwrite(fd, one.iov_base, one.iov_len, offset)
            }
            (Direction::Read, many) => libc::preadv2(fd, many.as_ptr(), count, offset, flags),
            (Direction::Write, many) => libc::pwritev2(fd, many.as_ptr(), count, offset, flags),
        }
    };
    usize::try_from(answer).map_err(|_| {
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;

    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::sys::is_in_memory;

    const LEN: usize = 8192;

    fn file_in_memory() -> HostFile {
        let file: OwnedFd = memfd_create("prompt", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(is_in_memory(&file).unwrap());
        HostFile::with_promptness(File::from(file), 0, 1, Promptness::Always)
    }

    /// A file of [`LEN`] sevens on the checkout's disk.
    fn file_on_disk() -> (HostFile, File) {
        use std::io::Write;
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&[7; LEN]).unwrap();
        file.sync_all().unwrap();
        let same = file.try_clone().unwrap();
        let len = u64::try_from(LEN).unwrap();
        let host_file = HostFile::with_promptness(file, len, 1, Promptness::CachedReads);
        (host_file, same)
    }

    #[test]
    fn what_lies_in_memory_is_written_and_read_at_once_with_zeros_behind_its_end() {
        let file = file_in_memory();
        let (mut at, mut buf) = (HostOffset(100), IoBuf::from_bytes(b"abc"));
        let outcome = file.attempt(Direction::Write, &mut at, &mut buf);
        assert!(matches!(outcome, Some(Ok(()))));
        assert_eq!(file.len(), 103);
        let parts = [IoBuf::from_bytes(&[9; 3]), IoBuf::from_bytes(&[9; 4])];
        let (mut at, mut buf) = (HostOffset(99), IoBuf::concat(parts));
        let whole = buf.clone();
        let outcome = file.attempt(Direction::Read, &mut at, &mut buf);
        assert!(matches!(outcome, Some(Ok(()))));
        assert_eq!(whole.to_vec(), b"\0abc\0\0\0");
        assert!(matches!(file.attempt_data_sync(), Some(Ok(()))));
    }

    #[test]
    fn an_error_is_left_to_the_ring() {
        let null = File::open("/dev/null").unwrap();
        let file = HostFile::with_promptness(null, 0, 1, Promptness::Always);
        let (mut at, mut buf) = (HostOffset(0), IoBuf::zeroed(4));
        assert!(file.attempt(Direction::Write, &mut at, &mut buf).is_none());
        assert_eq!((at, buf.len()), (HostOffset(0), 4));
    }

    #[test]
    fn cached_bytes_are_read_at_once_and_others_stay_to_be_read() {
        let (file, same) = file_on_disk();
        posix_fadvise(&same, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        for _ in 0..3 {
            let (mut at, mut buf) = (HostOffset(0), IoBuf::zeroed(LEN));
            let whole = buf.clone();
            match file.attempt(Direction::Read, &mut at, &mut buf) {
                Some(outcome) => outcome.unwrap(),
                // The first time, or always on a filesystem that does not know how.
                None => crate::sys::block_on(file.read(at, buf)).unwrap(),
            }
            assert_eq!(whole.to_vec(), vec![7; LEN]);
        }
    }

    #[test]
    fn writes_to_a_disk_and_files_that_promise_nothing_are_not_attempted() {
        let (file, _) = file_on_disk();
        let (mut at, mut buf) = (HostOffset(0), IoBuf::zeroed(4));
        assert!(file.attempt(Direction::Write, &mut at, &mut buf).is_none());
        assert!(file.attempt_data_sync().is_none());
        let plain = HostFile::new(tempfile::tempfile().unwrap(), 0, 1);
        assert!(plain.attempt(Direction::Read, &mut at, &mut buf).is_none());
    }

    #[test]
    fn the_more_attempts_are_in_vain_the_fewer_are_made_until_one_is_not() {
        let prompt = Prompt::new(Promptness::CachedReads);
        let mut attempts = 0;
        for _ in 0..1000 {
            if prompt.flags(Direction::Read).is_some() {
                attempts += 1;
                prompt.missed();
            }
        }
        assert!((20..30).contains(&attempts), "{attempts}");
        while prompt.flags(Direction::Read).is_none() {}
        prompt.hit();
        for _ in 0..10 {
            assert_eq!(prompt.flags(Direction::Read), Some(libc::RWF_NOWAIT));
        }
    }
}
