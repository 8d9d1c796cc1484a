//! The daemon's main thread: waits for front-ends and signals.
//!
//! One front-end is served per VM at a time; others wait in the listener's backlog until it has left. A signal to end
//! lets every request that was taken end, closes every disk and removes the socket files.

use std::any::Any;
use std::fmt;
use std::io::ErrorKind as IoErrorKind;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::session::{close, serve};
use super::socket::{Endpoint, Listener};
use super::{MAX_QUEUE_SIZE, MAX_QUEUES, thread_name};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::log_limit::LogLimit;
use crate::metrics::QueueCounters;
use crate::virtio_blk::Device;

/// How long requests under way may take to end once the daemon shall end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);

const SIGNALS: u64 = u64::MAX;
const SESSION_ENDED: u64 = u64::MAX - 1;

/// A VM's disk device, as its front-end may use it.
pub struct Vm {
    name: String,
    device: Arc<Device>,
    queue_count: u16,
    queue_size: u16,
    counters: Arc<QueueCounters>,
    connected: AtomicBool,
    lines: Arc<LogLimit>,
}

/// Says that a front-end is connected, until it is dropped.
pub(super) struct Connection<'a>(&'a AtomicBool);

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Vm {
    /// A VM's device with up to `queue_count` vrings of up to `queue_size` entries.
    ///
    /// # Errors
    /// If the numbers are out of range, or the serial does not fit.
    pub fn new(
        name: &str,
        image: Arc<dyn crate::image::Image>,
        serial: &str,
        queue_count: u16,
        queue_size: u16,
    ) -> Result<Self> {
        let refuse = |why: String| {
            Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("{name}: {why}"),
            ))
        };
        if !(1..=MAX_QUEUES).contains(&queue_count) {
            return refuse(format!("{queue_count} queues; choose 1 to {MAX_QUEUES}"));
        }
        if !queue_size.is_power_of_two() || queue_size > MAX_QUEUE_SIZE {
            return refuse(format!(
                "queues of {queue_size} entries; choose a power of two up to {MAX_QUEUE_SIZE}"
            ));
        }
        let device = Device::new(image, serial, queue_count, queue_size).context(|| name)?;
        Ok(Self {
            name: name.to_owned(),
            device: Arc::new(device),
            queue_count,
            queue_size,
            counters: Arc::default(),
            connected: AtomicBool::new(false),
            lines: Arc::default(),
        })
    }

    /// The VM's name, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its disk device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// What its queues did so far.
    #[must_use]
    pub fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    /// Whether a front-end is connected.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// What bounds the log lines that front-ends and drivers cause.
    pub(super) fn lines(&self) -> &Arc<LogLimit> {
        &self.lines
    }

    /// Logs what a front-end has caused, seldom enough that none fills a log.
    pub(super) fn note(&self, level: log::Level, what: fmt::Arguments<'_>) {
        match self.lines.take() {
            Some(0) => log::log!(level, "{}: {what}", self.name),
            Some(more) => log::log!(
                level,
                "{}: {what} ({more} lines about its front-ends were left out)",
                self.name
            ),
            None => log::debug!("{}: {what}", self.name),
        }
    }

    /// Notes that a front-end has connected.
    pub(super) fn connection(&self) -> Connection<'_> {
        self.connected.store(true, Ordering::Relaxed);
        Connection(&self.connected)
    }

    pub(super) fn queue_count(&self) -> u16 {
        self.queue_count
    }

    pub(super) fn queue_size(&self) -> u16 {
        self.queue_size
    }
}

/// A VM, where its front-end connects, and the session of the one that has.
struct Port {
    vm: Arc<Vm>,
    listener: Option<Listener>,
    session: Option<Session>,
}

struct Session {
    thread: JoinHandle<()>,
    stream: UnixStream,
}

/// Serves VMs until it is told to end.
pub struct Server {
    ports: Vec<Port>,
    epoll: Epoll,
    signals: SignalFd,
    ended: Receiver<usize>,
    notice: Notice,
    companions: Vec<Box<dyn Any>>,
}

/// Tells the main thread that a session has ended.
#[derive(Clone)]
struct Notice {
    ended: Sender<usize>,
    eventfd: Arc<EventFd>,
}

/// Gives notice when it is dropped, however the session ended.
struct EndNotice {
    notice: Notice,
    port: usize,
}

impl Drop for EndNotice {
    fn drop(&mut self) {
        // Both fail only when the main thread is gone, and nobody is left to tell.
        let _ = self.notice.ended.send(self.port);
        let _ = self.notice.eventfd.write(1);
    }
}

impl Server {
    /// A server without VMs. From now on SIGTERM and SIGINT are for [`Self::run`] to see, in this thread and in those
    /// that it starts: call this before any other thread is started.
    ///
    /// # Errors
    /// If the system lacks descriptors.
    pub fn new() -> Result<Self> {
        let fail = |error: Errno| Error::io("preparing to serve", error.into());
        let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
        mask.thread_block().map_err(fail)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags).map_err(fail)?;
        let eventfd =
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(fail)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(fail)?;
        let readable = |data| EpollEvent::new(EpollFlags::EPOLLIN, data);
        epoll.add(&signals, readable(SIGNALS)).map_err(fail)?;
        epoll.add(&eventfd, readable(SESSION_ENDED)).map_err(fail)?;
        let (sender, ended) = channel();
        let notice = Notice {
            ended: sender,
            eventfd: Arc::new(eventfd),
        };
        Ok(Self {
            ports: Vec::new(),
            epoll,
            signals,
            ended,
            notice,
            companions: Vec::new(),
        })
    }

    /// Adds a VM; it is served once [`Self::run`] is called.
    ///
    /// # Errors
    /// If its socket cannot be waited for.
    pub fn add(&mut self, vm: impl Into<Arc<Vm>>, endpoint: Endpoint) -> Result<()> {
        let vm = vm.into();
        let index = self.ports.len();
        let fail = |error: std::io::Error| {
            Error::io(format!("{}: waiting for a front-end", vm.name), error)
        };
        match endpoint {
            Endpoint::Listener(listener) => {
                listener.socket().set_nonblocking(true).map_err(fail)?;
                self.epoll
                    .add(listener.socket(), once(index))
                    .map_err(|error| fail(error.into()))?;
                self.ports.push(Port {
                    vm,
                    listener: Some(listener),
                    session: None,
                });
            }
            Endpoint::Connected(stream) => {
                self.ports.push(Port {
                    vm,
                    listener: None,
                    session: None,
                });
                self.start_session(index, stream)?;
            }
        }
        Ok(())
    }

    /// Drops `companion` when serving ends, before any disk is closed: what uses the disks beside the VMs.
    pub fn end_with(&mut self, companion: impl Any) {
        self.companions.push(Box::new(companion));
    }

    /// Serves until SIGTERM or SIGINT, or until no front-end can come any more; then ends all sessions.
    ///
    /// # Errors
    /// If waiting fails, if requests do not end in time, or if a disk cannot be flushed.
    pub fn run(mut self) -> Result<()> {
        while self
            .ports
            .iter()
            .any(|port| port.listener.is_some() || port.session.is_some())
        {
            let mut events = [EpollEvent::empty(); 16];
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(Error::io("waiting for front-ends", error.into())),
            };
            for event in &events[..count] {
                match event.data() {
                    SIGNALS => {
                        if let Ok(Some(signal)) = self.signals.read_signal() {
                            log::info!("ending on signal {}", signal.ssi_signo);
                            return self.end();
                        }
                    }
                    SESSION_ENDED => self.collect_ended(),
                    port => self.accept(usize::try_from(port).unwrap_or(usize::MAX)),
                }
            }
        }
        self.end()
    }

    fn accept(&mut self, index: usize) {
        let Some(Port {
            vm,
            listener: Some(listener),
            session: None,
        }) = self.ports.get(index)
        else {
            return;
        };
        let accepted = match listener.socket().accept() {
            Ok((stream, _)) => self.start_session(index, stream),
            Err(error)
                if matches!(
                    error.kind(),
                    IoErrorKind::WouldBlock | IoErrorKind::ConnectionAborted
                ) =>
            {
                self.listen_again(index);
                return;
            }
            Err(error) => Err(Error::io(
                format!("{}: accepting a front-end", vm.name),
                error,
            )),
        };
        if let Err(error) = accepted {
            log::error!("{error}");
            self.listen_again(index);
        }
    }

    fn start_session(&mut self, index: usize, stream: UnixStream) -> Result<()> {
        let vm = Arc::clone(&self.ports[index].vm);
        let describe = format!("{}: starting a session", vm.name);
        let fail = |error| Error::io(describe.as_str(), error);
        let own = stream.try_clone().map_err(fail)?;
        let notice = EndNotice {
            notice: self.notice.clone(),
            port: index,
        };
        let thread = Builder::new()
            .name(thread_name(&vm.name, ""))
            .spawn(move || {
                let _notice = notice;
                serve(&vm, stream);
            })
            .map_err(fail)?;
        self.ports[index].session = Some(Session {
            thread,
            stream: own,
        });
        Ok(())
    }

    /// Waits for the next front-end.
    fn listen_again(&self, index: usize) {
        let port = &self.ports[index];
        if let Some(listener) = &port.listener
            && let Err(error) = self.epoll.modify(listener.socket(), &mut once(index))
        {
            log::error!(
                "{}: no further front-end can connect: {error}",
                port.vm.name
            );
        }
    }

    fn collect_ended(&mut self) {
        // Fails when somebody has read it already, which is as good.
        let _ = self.notice.eventfd.read();
        while let Ok(index) = self.ended.try_recv() {
            self.join(index);
            self.listen_again(index);
        }
    }

    fn join(&mut self, index: usize) {
        let port = &mut self.ports[index];
        if let Some(session) = port.session.take()
            && session.thread.join().is_err()
        {
            log::error!("{}: the session has panicked", port.vm.name);
        }
    }

    /// Ends every session, makes every disk durable and removes the socket files.
    fn end(mut self) -> Result<()> {
        self.companions.clear();
        for port in &mut self.ports {
            port.listener = None;
            if let Some(session) = &port.session {
                // Fails when the front-end has left already.
                let _ = session.stream.shutdown(Shutdown::Both);
            }
        }
        let deadline = Instant::now() + SHUTDOWN_TIMEOUT;
        while let Some(waiting) = self.ports.iter().find(|port| port.session.is_some()) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.ended.recv_timeout(left) {
                Ok(index) => self.join(index),
                Err(_) => {
                    return Err(Error::new(
                        ErrorKind::Io,
                        format!(
                            "{}: requests under way have not ended within {} s; the disk is not flushed",
                            waiting.vm.name,
                            SHUTDOWN_TIMEOUT.as_secs()
                        ),
                    ));
                }
            }
        }
        let closed: Vec<Result<()>> = self.ports.iter().map(|port| close(&port.vm)).collect();
        closed.into_iter().collect()
    }
}

/// One event of a listener; the next comes after it has been asked for again.
fn once(index: usize) -> EpollEvent {
    let data = u64::try_from(index).expect("far fewer VMs than that");
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, data)
}
