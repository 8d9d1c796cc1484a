//! Locks that stock QEMU understands, so that `qemu-img` or a VM refuses an image that is in use here, and the
//! other way round.
//!
//! QEMU tells other processes what it does with an image by read locks (of the open file description,
//! F_OFD_SETLK) on single bytes of it: byte 100 + *p* says "uses permission *p*", byte 200 + *p* "does not share
//! permission *p*". Nobody ever holds a write lock; to test for one shows whether another holds a read lock.
//!
//! # Invariants
//!
//! 1. First lock, then test: of two that start at once at least one sees the other.
//! 2. After a failure nothing is locked.

use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::HostFile;

/// What a process uses an image for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockRole {
    /// It reads what nobody may change meanwhile.
    Reader,
    /// It reads, writes and resizes, and shares that with nobody.
    Writer,
}

/// QEMU's name for a permission, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Permission {
    name: &'static str,
    number: i64,
}

const CONSISTENT_READ: Permission = Permission {
    name: "consistent read",
    number: 0,
};
const WRITE: Permission = Permission {
    name: "write",
    number: 1,
};
const RESIZE: Permission = Permission {
    name: "resize",
    number: 3,
};

/// The byte that says that permission 0 is used.
const USED_BASE: i64 = 100;
/// The byte that says that permission 0 is not shared.
const UNSHARED_BASE: i64 = 200;

/// Held by both roles: neither bears that another writes or resizes.
const UNSHARED: [Permission; 2] = [WRITE, RESIZE];

impl LockRole {
    fn used(self) -> &'static [Permission] {
        match self {
            Self::Reader => &[CONSISTENT_READ],
            Self::Writer => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }
}

/// Locks `file`, whose name is `name`, for `role`, until its last clone is closed.
///
/// # Errors
/// [`ErrorKind::InUse`] if another process, or another open file of this one, uses it in a way that `role` excludes.
pub(super) fn lock(file: &HostFile, name: &str, role: LockRole) -> Result<()> {
    let outcome = take(file, role).and_then(|()| test(file, role));
    let Err(conflict) = outcome else {
        return Ok(());
    };
    // Nothing is left to do about a failure: closing the file unlocks it in any case.
    let _ = release(file, role);
    Err(match conflict {
        Conflict::With(permission) => {
            let context = format!(
                "{name}: cannot get the \"{}\" lock: is another process, such as a VM or qemu-img, using it?",
                permission.name
            );
            Error::new(ErrorKind::InUse, context)
        }
        Conflict::Host(error) => {
            let context = format!("{name}: the host's filesystem does not let it be locked");
            Error::io(context, error.into())
        }
    })
}

enum Conflict {
    With(Permission),
    Host(Errno),
}

fn take(file: &HostFile, role: LockRole) -> Result<(), Conflict> {
    for (byte, permission) in bytes(role) {
        let request = lock_of(libc::F_RDLCK, byte);
        fcntl(file, FcntlArg::F_OFD_SETLK(&request)).map_err(|error| match error {
            Errno::EAGAIN | Errno::EACCES => Conflict::With(permission),
            other => Conflict::Host(other),
        })?;
    }
    Ok(())
}

/// Fails if another uses what `role` does not share, or does not share what `role` uses.
fn test(file: &HostFile, role: LockRole) -> Result<(), Conflict> {
    let excluded = role.used().iter().map(|p| (UNSHARED_BASE + p.number, *p));
    let unwanted = UNSHARED.iter().map(|p| (USED_BASE + p.number, *p));
    for (byte, permission) in excluded.chain(unwanted) {
        let mut found = lock_of(libc::F_WRLCK, byte);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).map_err(Conflict::Host)?;
        if found.l_type != type_of(libc::F_UNLCK) {
            return Err(Conflict::With(permission));
        }
    }
    Ok(())
}

fn release(file: &HostFile, role: LockRole) -> io::Result<()> {
    for (byte, _) in bytes(role) {
        let request = lock_of(libc::F_UNLCK, byte);
        fcntl(file, FcntlArg::F_OFD_SETLK(&request))?;
    }
    Ok(())
}

/// The bytes that `role` locks.
fn bytes(role: LockRole) -> impl Iterator<Item = (i64, Permission)> {
    let used = role.used().iter().map(|p| (USED_BASE + p.number, *p));
    let unshared = UNSHARED.iter().map(|p| (UNSHARED_BASE + p.number, *p));
    used.chain(unshared)
}

fn lock_of(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        l_type: type_of(kind),
        l_whence: type_of(libc::SEEK_SET),
        l_start: byte,
        l_len: 1,
        // Has to be zero for locks of a file description.
        l_pid: 0,
    }
}

fn type_of(constant: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(constant).expect("a constant of fcntl(2) is small")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    fn open_twice() -> (HostFile, HostFile) {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            HostFile::new(
                File::options().read(true).write(true).open(&named).unwrap(),
                0,
                1,
            )
        };
        (open(), open())
    }

    #[test]
    fn readers_share_and_writers_share_with_nobody() {
        use LockRole::{Reader, Writer};
        for (held, wanted, is_granted) in [
            (Reader, Reader, true),
            (Reader, Writer, false),
            (Writer, Reader, false),
            (Writer, Writer, false),
        ] {
            let (first, second) = open_twice();
            lock(&first, "disk", held).unwrap();
            match lock(&second, "disk", wanted) {
                Ok(()) => assert!(is_granted, "{held:?} {wanted:?}"),
                Err(error) => {
                    assert!(!is_granted, "{held:?} {wanted:?}: {error}");
                    assert_eq!(error.kind(), ErrorKind::InUse);
                    assert!(error.to_string().starts_with("disk: "), "{error}");
                }
            }
        }
    }

    #[test]
    fn a_refused_lock_leaves_nothing_locked() {
        let (first, second) = open_twice();
        lock(&first, "disk", LockRole::Reader).unwrap();
        lock(&second, "disk", LockRole::Writer).unwrap_err();
        for (byte, _) in bytes(LockRole::Writer) {
            let mut found = lock_of(libc::F_WRLCK, byte);
            fcntl(&first, FcntlArg::F_OFD_GETLK(&mut found)).unwrap();
            assert_eq!(found.l_type, type_of(libc::F_UNLCK), "byte {byte}");
        }
    }

    #[test]
    fn closing_the_file_unlocks_it_whoever_has_inherited_its_descriptor() {
        let (first, second) = open_twice();
        lock(&first, "disk", LockRole::Writer).unwrap();
        // As a process has it that is being started, until it runs its program.
        let inherited = first.as_fd().try_clone_to_owned().unwrap();
        drop(first);
        lock(&second, "disk", LockRole::Writer).unwrap();
        drop(inherited);
    }
}
