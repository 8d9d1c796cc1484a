//! The daemon's end of a control socket: one thread that listens, and one for each client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::daemon::Daemon;
use super::{MAX_CLIENTS, MAX_LINE, answer, failure};
use crate::error::{Error, Result};
use crate::vhost_user::Listener;

/// How long a client may leave an answer unread before it is let go.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to listen to nobody after a failure, which may last.
const PAUSE: Duration = Duration::from_secs(1);

const CLIENT: u64 = 0;
const STOP: u64 = 1;

/// A control socket that is served, until it is dropped.
pub struct ControlSocket {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Serves `daemon` to whoever connects to `listener`.
    ///
    /// # Errors
    /// If the system lacks descriptors or threads.
    pub fn serve(listener: Listener, daemon: Arc<Daemon>) -> Result<Self> {
        let fail = |error: std::io::Error| Error::io("serving the control socket", error);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = EventFd::from_flags(flags).map_err(|error| fail(error.into()))?;
        let stop = Arc::new(stop);
        listener.socket().set_nonblocking(true).map_err(fail)?;
        let epoll = watch(&listener, &stop).map_err(|error| fail(error.into()))?;
        let reception = Reception {
            listener,
            daemon,
            epoll,
            clients: Vec::new(),
        };
        let thread = Builder::new()
            .name("control".to_owned())
            .spawn(move || reception.run())
            .map_err(fail)?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for ControlSocket {
    /// Lets every client go, once its command under way has ended.
    fn drop(&mut self) {
        // Fails only when the counter is full, and then the descriptor is readable anyway.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the control socket's thread has panicked");
        }
    }
}

fn watch(listener: &Listener, stop: &EventFd) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let readable = |data| EpollEvent::new(EpollFlags::EPOLLIN, data);
    epoll.add(listener.socket(), readable(CLIENT))?;
    epoll.add(stop, readable(STOP))?;
    Ok(epoll)
}

/// A client, and its thread.
struct Client {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

/// The thread that listens.
struct Reception {
    listener: Listener,
    daemon: Arc<Daemon>,
    epoll: Epoll,
    clients: Vec<Client>,
}

impl Reception {
    fn run(mut self) {
        loop {
            let mut events = [EpollEvent::empty(); 2];
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(error) => {
                    log::error!("the control socket is closed: {error}");
                    break;
                }
            };
            if events[..count].iter().any(|event| event.data() == STOP) {
                break;
            }
            self.accept();
        }
        for Client { stream, thread } in self.clients.drain(..) {
            // Fails when the client has left already.
            let _ = stream.shutdown(Shutdown::Both);
            join(thread);
        }
    }

    fn accept(&mut self) {
        self.collect_ended();
        let accepted = self.listener.socket().accept();
        let begun = match accepted {
            Ok((stream, _)) if self.clients.len() >= MAX_CLIENTS => turn_away(stream),
            Ok((stream, _)) => self.begin(stream),
            Err(error) => Err(error),
        };
        if let Err(error) = begun
            && error.kind() != std::io::ErrorKind::WouldBlock
        {
            log::warn!("a client of the control socket cannot be served: {error}");
            // It may be waiting still, and would be found at once again.
            std::thread::sleep(PAUSE);
        }
    }

    fn begin(&mut self, stream: UnixStream) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let own = stream.try_clone()?;
        let daemon = Arc::clone(&self.daemon);
        let thread = Builder::new()
            .name("control-client".to_owned())
            .spawn(move || {
                converse(&daemon, &stream);
                // There is another descriptor of it: the client would wait. Fails when it has left already.
                let _ = stream.shutdown(Shutdown::Both);
            })?;
        self.clients.push(Client {
            stream: own,
            thread,
        });
        Ok(())
    }

    /// Forgets those that have left.
    fn collect_ended(&mut self) {
        for client in self
            .clients
            .extract_if(.., |client| client.thread.is_finished())
        {
            join(client.thread);
        }
    }
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        log::error!("a command on the control socket has panicked");
    }
}

fn turn_away(mut stream: UnixStream) -> std::io::Result<()> {
    // What does not fit the socket's buffer is lost: nobody waits for this client.
    stream.set_nonblocking(true)?;
    send(
        &mut stream,
        &failure(&format!(
            "{MAX_CLIENTS} clients are connected already; come back when one has left"
        )),
    )
}

/// Answers one request after the other, until the client leaves or breaks a rule.
fn converse(daemon: &Daemon, stream: &UnixStream) {
    let mut writer = stream;
    let mut reader = BufReader::new(stream);
    let limit = u64::try_from(MAX_LINE)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    let mut line = Vec::new();
    loop {
        line.clear();
        let taken = reader.by_ref().take(limit).read_until(b'\n', &mut line);
        let answered = match (taken, line.pop()) {
            (Ok(_), Some(b'\n')) => send(&mut writer, &answer(daemon, &line)),
            (Ok(_), Some(_)) if line.len() >= MAX_LINE => {
                let why = format!("a request has more than {MAX_LINE} bytes");
                // The connection ends in any case.
                let _ = send(&mut writer, &failure(&why));
                return;
            }
            // Gone, perhaps in the middle of a line.
            _ => return,
        };
        if let Err(error) = answered {
            log::debug!("a client of the control socket does not take its answer: {error}");
            return;
        }
    }
}

fn send(stream: &mut impl Write, answer: &serde_json::Value) -> std::io::Result<()> {
    stream.write_all(format!("{answer}\n").as_bytes())
}
