//! Where others connect: a socket of our own making, or one that was handed over.

use std::fs;
use std::io::ErrorKind as IoErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, bind,
    getsockname, getsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use crate::error::{Error, ErrorKind, Result};

/// Where a VM's front-end connects.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that listens.
    Listener(Listener),
    /// A connection that exists already; when it ends, none follows.
    Connected(UnixStream),
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Whom the umask lets.
    ByUmask,
    /// The user that made it, and nobody else.
    Owner,
}

/// A listening socket, and its file if we made it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    _file: Option<SocketFile>,
}

/// A socket file that goes when its listener does.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else may have put another socket there.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{} cannot be removed: {error}", self.path.display());
        }
    }
}

impl Endpoint {
    /// Listens at `path`. A socket file that nobody listens at is replaced. Who may connect follows from the umask.
    ///
    /// # Errors
    /// If somebody listens there, something else than a socket is there, or the socket cannot be made.
    pub fn listen(path: &Path) -> Result<Self> {
        Listener::bind(path, Audience::ByUmask).map(Self::Listener)
    }

    /// Takes a stream socket over that listens or is connected.
    ///
    /// # Errors
    /// If it is something else.
    pub fn adopt(fd: OwnedFd) -> Result<Self> {
        let refuse = |why: String| {
            Error::new(
                ErrorKind::InvalidConfig,
                format!("--fd is no Unix stream socket: {why}"),
            )
        };
        let address: SockaddrStorage =
            getsockname(fd.as_raw_fd()).map_err(|error| refuse(error.to_string()))?;
        if address.family() != Some(AddressFamily::Unix) {
            return Err(refuse("it belongs to another address family".to_owned()));
        }
        if getsockopt(&fd, sockopt::SockType).ok() != Some(SockType::Stream) {
            return Err(refuse("it is of another type".to_owned()));
        }
        let listens =
            getsockopt(&fd, sockopt::AcceptConn).map_err(|error| refuse(error.to_string()))?;
        Ok(if listens {
            Self::Listener(Listener {
                socket: fd.into(),
                _file: None,
            })
        } else {
            Self::Connected(fd.into())
        })
    }
}

impl Listener {
    /// Listens at `path` to `audience`. A socket file that nobody listens at is replaced; ours goes with the listener.
    ///
    /// # Errors
    /// As [`Endpoint::listen`].
    pub fn bind(path: &Path, audience: Audience) -> Result<Self> {
        let fail = |what: &str, error| Error::io(format!("{}: {what}", path.display()), error);
        remove_stale(path)?;
        let socket = listen(path, audience).map_err(|error| fail("listening", error))?;
        let made =
            fs::symlink_metadata(path).map_err(|error| fail("looking at the new socket", error))?;
        let file = SocketFile {
            path: path.to_owned(),
            device: made.dev(),
            inode: made.ino(),
        };
        Ok(Self {
            socket,
            _file: Some(file),
        })
    }

    /// The socket.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }
}

fn listen(path: &Path, audience: Audience) -> std::io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    if audience == Audience::Owner {
        // The file is made with the mode of its socket, so there is no moment in which others could connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    }
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    nix::sys::socket::listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// Removes a socket file whose listener is gone.
fn remove_stale(path: &Path) -> Result<()> {
    let in_the_way = |what: &str| {
        let context = format!("{}: {what}", path.display());
        Err(Error::new(ErrorKind::InUse, context))
    };
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == IoErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(path.display().to_string(), error)),
        Ok(found) => found,
    };
    if !found.file_type().is_socket() {
        return in_the_way(
            "something that is no socket is there; remove it or choose another path",
        );
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == IoErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|error| {
                Error::io(
                    format!("{}: removing the stale socket", path.display()),
                    error,
                )
            }),
        _ => in_the_way("another process listens there; end it or choose another path"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adopted(endpoint: &Result<Endpoint>) -> &'static str {
        match endpoint {
            Ok(Endpoint::Listener(_)) => "listener",
            Ok(Endpoint::Connected(_)) => "connected",
            Err(_) => "refused",
        }
    }

    #[test]
    fn the_socket_file_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let endpoint = Endpoint::listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(endpoint);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_file_of_somebody_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let endpoint = Endpoint::listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(endpoint);
        assert!(path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let live = UnixListener::bind(&path).unwrap();
        assert_eq!(
            Endpoint::listen(&path).unwrap_err().kind(),
            ErrorKind::InUse
        );
        drop(live);
        assert!(path.exists());
        Endpoint::listen(&path).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        fs::write(&path, "precious").unwrap();
        assert_eq!(
            Endpoint::listen(&path).unwrap_err().kind(),
            ErrorKind::InUse
        );
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn descriptors_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        assert_eq!(adopted(&Endpoint::adopt(listener.into())), "listener");
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(adopted(&Endpoint::adopt(one.into())), "connected");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(adopted(&Endpoint::adopt(tcp.into())), "refused");
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        assert_eq!(adopted(&Endpoint::adopt(datagram.into())), "refused");
        let file = fs::File::open("/dev/null").unwrap();
        assert_eq!(adopted(&Endpoint::adopt(file.into())), "refused");
    }
}
