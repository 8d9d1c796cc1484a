//! The worker of one running vring: takes requests off the ring, submits or runs them, and answers.
//!
//! # Invariants
//!
//! 1. A worker ends only when nothing that it has taken is under way (see the folder's invariant 1).
//! 2. Before it sleeps, the driver has been told to notify, and the ring has been looked at once more after that: no
//!    request is overlooked.
//! 3. The driver is notified at most once per round, after all that has ended is in the used ring; in the midst of a
//!    round only after so many bytes have been moved that it is worth its while to go on.
//! 4. On the fast path nothing is allocated and no lock is held; a request with more than a few segments spills its
//!    segment list to the heap.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::call::Call;
use super::pending::{Ended, PendingRequests, Reply};
use super::polling::{Advice, Polling};
use super::split_ring::{Areas, Broken, Chain, SplitRing};
use super::stop::Stop;
use crate::error::{Error, Result};
use crate::image::{InFlight, Mapped};
use crate::log_limit::LogLimit;
use crate::metrics::QueueCounters;
use crate::sys::{Direction, HostFile, IoBuf, Reactor};
use crate::units::HostOffset;
use crate::virtio_blk::{ChainReader, Device, Operation, Status, WriteCache, execute};

/// Requests taken from the ring between two looks at what has ended.
const BATCH: usize = 64;
/// Looks at an empty ring while there is nothing else to do, before the clock is looked at.
const LOOKS: usize = 8;
/// Bytes that are moved at once before the driver is told, so that it goes on meanwhile.
const TOLD_AFTER: u64 = 24 << 10;

/// What a vring's worker is given when it starts.
pub(super) struct Setup {
    /// For messages: the VM and the number of the vring.
    pub(super) name: String,
    /// The ring, which lies in `memory`.
    pub(super) ring: SplitRing,
    /// Its number of entries.
    pub(super) queue_size: u16,
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) device: Arc<Device>,
    pub(super) kick: Arc<File>,
    pub(super) call: Arc<Call>,
    pub(super) stop: Arc<Stop>,
    pub(super) counters: Arc<QueueCounters>,
    pub(super) lines: Arc<LogLimit>,
}

/// A worker; it lives on its thread.
pub(super) struct Worker {
    setup: Setup,
    reactor: Reactor,
    epoll: Epoll,
    reader: ChainReader,
    pending: PendingRequests,
    /// Requests that have ended and not been answered.
    ended: Rc<RefCell<VecDeque<Ended>>>,
    polling: Polling,
    /// The driver broke the rules of the ring: nothing more is taken from it.
    broken: bool,
    /// Chains given back that the driver has not been told of.
    untold: bool,
    /// Bytes moved at once since the driver was last told.
    moved: u64,
}

/// The straight way for a request.
enum Fast {
    /// Answered.
    Done,
    /// One extent of one host file.
    Submit {
        file: HostFile,
        direction: Direction,
        at: HostOffset,
        buf: IoBuf,
        guard: InFlight,
    },
    /// There is none.
    No(Operation),
}

impl Worker {
    /// A worker on the calling thread.
    ///
    /// # Errors
    /// If the thread gets no ring or no epoll instance, or the kick descriptor cannot be waited for.
    pub(super) fn new(setup: Setup) -> Result<Self> {
        let reactor = Reactor::current().map_err(|error| Error::io(setup.name.as_str(), error))?;
        let epoll = watch(&setup, &reactor)
            .map_err(|error| Error::io(format!("{}: waiting for kicks", setup.name), error))?;
        let size = setup.queue_size;
        Ok(Self {
            reader: ChainReader::new(setup.device.seg_max()),
            pending: PendingRequests::new(size),
            ended: Rc::new(RefCell::new(VecDeque::with_capacity(usize::from(size)))),
            polling: Polling::new(),
            broken: false,
            untold: false,
            moved: 0,
            setup,
            reactor,
            epoll,
        })
    }

    /// Serves the ring until it is told to stop, and then ends what is under way.
    ///
    /// Returns the index of the next request in the available ring.
    pub(super) fn run(mut self) -> u16 {
        self.suppress_kicks();
        while !self.setup.stop.is_requested() {
            let taken = self.take_requests();
            if self.is_busy() && self.turn() || taken {
                self.polling.worked();
            } else if self.polling.found_nothing(Instant::now()) == Advice::Sleep {
                self.sleep();
            } else {
                std::hint::spin_loop();
            }
        }
        self.drain();
        self.setup.ring.next_avail()
    }

    /// Takes what the driver has offered, a batch at most; whether there was anything.
    fn take_requests(&mut self) -> bool {
        let memory = Arc::clone(&self.setup.memory);
        let Some(areas) = self.areas(&memory) else {
            return false;
        };
        let mut taken = 0;
        let mut looks = LOOKS;
        while taken < BATCH && !self.broken && !self.pending.is_full() {
            match self.setup.ring.take(&areas) {
                Ok(Some((head, chain))) => self.take_request(head, chain, &memory, &areas),
                Ok(None) if taken > 0 || self.is_busy() || looks == 0 => break,
                Ok(None) => {
                    looks -= 1;
                    std::hint::spin_loop();
                    continue;
                }
                Err(broken) => self.give_up(broken),
            }
            taken += 1;
            if self.moved >= TOLD_AFTER {
                self.tell(&areas);
            }
        }
        taken > 0
    }

    /// Whether there is anything for [`Self::turn`] to do now or later.
    fn is_busy(&self) -> bool {
        self.untold
            || self.reactor.in_flight() > 0
            || self.reactor.task_count() > 0
            || !self.ended.borrow().is_empty()
    }

    /// Where the ring lies; `None` once it is broken.
    fn areas<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Option<Areas<'m>> {
        if self.broken {
            return None;
        }
        let areas = self.setup.ring.areas(memory);
        areas.map_err(|broken| self.give_up(broken)).ok()
    }

    fn take_request(
        &mut self,
        head: u16,
        chain: Chain<'_>,
        memory: &Arc<GuestMemoryMmap>,
        areas: &Areas<'_>,
    ) {
        match self.reader.parse(chain, memory, &self.setup.device) {
            Ok(request) => self.begin(head, request.status_at, request.operation, areas),
            Err(rejection) => {
                let reply = Reply {
                    head,
                    status_at: rejection.status_at,
                    written_len: 0,
                };
                self.answer(&reply, rejection.status, areas);
            }
        }
    }

    fn begin(
        &mut self,
        head: u16,
        status_at: GuestAddress,
        operation: Operation,
        areas: &Areas<'_>,
    ) {
        let reply = Reply {
            head,
            status_at: Some(status_at),
            written_len: operation.written_len(),
        };
        let counters = &self.setup.counters;
        match fast_path(&self.setup.device, operation) {
            Fast::Done => {
                counters.immediate.increment();
                self.answer(&reply, Status::Ok, areas);
            }
            Fast::Submit {
                file,
                direction,
                mut at,
                mut buf,
                guard,
            } => {
                counters.fast.increment();
                let len = byte_count(&buf);
                if let Some(outcome) = file.attempt(direction, &mut at, &mut buf) {
                    self.moved += len;
                    let status = status_of(&self.setup.device, outcome);
                    return self.answer(&reply, status, areas);
                }
                let token = self.pending.begin(reply, guard);
                self.reactor.submit_fast(&file, direction, at, buf, token);
            }
            Fast::No(operation) => {
                counters.slow.increment();
                let token = self.pending.begin(reply, InFlight::none());
                let device = Arc::clone(&self.setup.device);
                let ended = Rc::clone(&self.ended);
                let task = async move {
                    let status = execute(&device, operation).await;
                    ended.borrow_mut().push_back(Ended { token, status });
                };
                self.reactor.spawn_local(task).detach();
            }
        }
    }

    /// Lets everything under way go on, and answers what has ended; whether anything has.
    fn turn(&mut self) -> bool {
        let Self {
            reactor,
            ended,
            setup,
            ..
        } = self;
        reactor.turn(&mut |token, outcome| {
            let status = status_of(&setup.device, outcome);
            ended.borrow_mut().push_back(Ended { token, status });
        });
        if !self.untold && self.ended.borrow().is_empty() {
            return false;
        }
        let memory = Arc::clone(&self.setup.memory);
        let Some(areas) = self.areas(&memory) else {
            return self.forget_ended();
        };
        let answered = self.answer_ended(&areas);
        self.tell(&areas);
        answered
    }

    /// Answers what has ended; whether anything has.
    fn answer_ended(&mut self, areas: &Areas<'_>) -> bool {
        let mut answered = false;
        loop {
            let Some(Ended { token, status }) = self.ended.borrow_mut().pop_front() else {
                return answered;
            };
            if let Some(reply) = self.pending.end(token) {
                self.answer(&reply, status, areas);
                answered = true;
            }
        }
    }

    /// Ends requests of a broken ring, which nobody waits for; whether there were any.
    fn forget_ended(&mut self) -> bool {
        self.untold = false;
        let mut ended = self.ended.borrow_mut();
        let any = !ended.is_empty();
        for Ended { token, .. } in ended.drain(..) {
            self.pending.end(token);
        }
        any
    }

    /// Gives a request's descriptor back with its status.
    fn answer(&mut self, reply: &Reply, status: Status, areas: &Areas<'_>) {
        if status != Status::Ok {
            self.setup.counters.failed.increment();
        }
        let mut len = 0;
        if let Some(at) = reply.status_at
            && write_status(&self.setup.memory, at, status).is_some()
        {
            len = reply.written_len.saturating_add(1);
        }
        match self.setup.ring.give_back(areas, reply.head, len) {
            Ok(()) => self.untold = true,
            Err(broken) => self.give_up(broken),
        }
    }

    /// Notifies the driver of what was given back, unless it does not want to know.
    fn tell(&mut self, areas: &Areas<'_>) {
        self.moved = 0;
        if !std::mem::take(&mut self.untold) {
            return;
        }
        // In doubt the driver is told: a notification too many does no harm.
        if self.setup.ring.needs_notification(areas).unwrap_or(true) {
            self.setup.counters.notifications.increment();
            self.setup.call.notify();
        }
    }

    /// Takes nothing more from a ring whose driver broke its rules, until it is set up anew.
    fn give_up(&mut self, broken: Broken) {
        if !std::mem::replace(&mut self.broken, true) && self.setup.lines.take().is_some() {
            log::error!(
                "{}: the driver broke its ring, which stops until it is set up anew: {broken}",
                self.setup.name
            );
        }
    }

    fn suppress_kicks(&mut self) {
        let memory = Arc::clone(&self.setup.memory);
        if let Some(areas) = self.areas(&memory)
            && let Err(broken) = self.setup.ring.suppress_kicks(&areas)
        {
            self.give_up(broken);
        }
    }

    /// Asks to be kicked; whether there is nothing to take.
    fn request_kicks(&mut self) -> bool {
        if self.pending.is_full() {
            // There is no room: what ends first wakes the worker.
            return true;
        }
        let memory = Arc::clone(&self.setup.memory);
        let Some(areas) = self.areas(&memory) else {
            return true;
        };
        let is_empty = self.setup.ring.request_kicks(&areas);
        is_empty.unwrap_or_else(|broken| {
            self.give_up(broken);
            true
        })
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self) {
        // A descriptor of the reactor's that is readable for what has been done meanwhile would end the sleep at once.
        self.turn();
        if !self.request_kicks() {
            self.suppress_kicks();
            self.polling.worked();
            return;
        }
        self.setup.counters.sleeps.increment();
        let start = Instant::now();
        self.wait_for_events();
        self.polling.slept(start.elapsed());
        self.suppress_kicks();
    }

    fn wait_for_events(&mut self) {
        let mut events = [EpollEvent::empty(); 4];
        match self.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                log::error!("{}: waiting for kicks failed: {error}", self.setup.name);
                self.setup.stop.request();
            }
        }
    }

    /// Ends everything under way, tasks that requests have left behind among it.
    fn drain(&mut self) {
        loop {
            self.turn();
            if self.pending.count() == 0
                && self.reactor.task_count() == 0
                && self.reactor.in_flight() == 0
            {
                return;
            }
            self.reactor.wait();
        }
    }
}

/// Writes a request's status byte, if it lies in guest memory.
fn write_status(memory: &GuestMemoryMmap, at: GuestAddress, status: Status) -> Option<()> {
    let byte = memory.get_slice(at, 1).ok()?;
    byte.store(status.to_byte(), 0, Ordering::Relaxed).ok()
}

/// What to tell of I/O on the fast path.
fn status_of(device: &Device, outcome: io::Result<()>) -> Status {
    match outcome {
        Ok(()) => Status::Ok,
        Err(error) => device.io_failed(error),
    }
}

/// Finds the straight way for `operation`, if memory alone tells that there is one.
fn fast_path(device: &Device, operation: Operation) -> Fast {
    let (direction, at, buf) = match operation {
        Operation::Read { at, into } if !into.is_empty() => (Direction::Read, at, into),
        Operation::Write { at, from }
            if !from.is_empty() && device.write_cache() == WriteCache::WriteBack =>
        {
            (Direction::Write, at, from)
        }
        other => return Fast::No(other),
    };
    let mapped = match direction {
        Direction::Read => device.image().map_read(at, byte_count(&buf)),
        Direction::Write => device.image().map_write(at, byte_count(&buf)),
    };
    match mapped {
        Mapped::Extent { storage, at, guard } => {
            if let Some(file) = storage.host_file()
                && file.takes(at, &buf)
            {
                let file = file.clone();
                return Fast::Submit {
                    file,
                    direction,
                    at,
                    buf,
                    guard,
                };
            }
        }
        Mapped::Zeroes if direction == Direction::Read => {
            buf.zero(0..buf.len());
            return Fast::Done;
        }
        Mapped::Zeroes | Mapped::Slow => {}
    }
    Fast::No(match direction {
        Direction::Read => Operation::Read { at, into: buf },
        Direction::Write => Operation::Write { at, from: buf },
    })
}

fn byte_count(buf: &IoBuf) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

/// Watches for all that ends a worker's sleep.
fn watch(setup: &Setup, reactor: &Reactor) -> io::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
    // Every kick is an edge, so that nobody has to read the counter: the descriptor belongs to the front-end, which
    // may have made reading it block, or may have sent something else than an eventfd.
    let kicked = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
    epoll.add(&*setup.kick, kicked)?;
    epoll.add(setup.stop.as_fd(), readable)?;
    for source in reactor.sources() {
        epoll.add(source, readable)?;
    }
    Ok(epoll)
}
