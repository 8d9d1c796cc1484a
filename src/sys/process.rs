//! What other processes share with this one: descriptors that they left open for it, and memory of theirs that
//! is mapped here; and the memory that this one's threads share.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use vm_memory::GuestRegionMmap;

/// Takes over a descriptor that the parent process left open, as named on the command line. It is not inherited
/// further.
///
/// # Errors
/// If there is no such descriptor, or it is one of the three standard ones.
pub fn take_inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: fcntl(F_GETFD) takes any number and touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open. Nothing in this process opened it: the caller gives the number that the parent
    // process chose, once, before anything else has been opened.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(owned)
}

/// Has threads share the memory that they free, in two heaps: by default a C library keeps as many as eight for each
/// processor, and what one has freed is of no use to the others. Requests allocate nothing on their hot path.
///
/// Call it before there are threads.
pub fn share_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the call changes a parameter of malloc and touches no memory of ours.
        let is_set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) } == 1;
        if !is_set {
            log::debug!("the number of malloc's heaps stays as it is");
        }
    }
}

/// Keeps a guest's memory out of core dumps of this process: it is large, and the guest's own affair.
pub fn exclude_from_core_dumps(region: &GuestRegionMmap) {
    // SAFETY: the range is a mapping that `region` keeps; the advice changes no contents.
    let failed =
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTDUMP) } != 0;
    if failed {
        log::warn!(
            "guest memory stays in core dumps: {}",
            io::Error::last_os_error()
        );
    }
}
