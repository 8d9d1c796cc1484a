//! A thread's ring and tasks: what makes its operations and futures go on.
//!
//! Every thread has at most one reactor, made when it is first asked for. There are two ways to drive it:
//! [`block_on`] for a thread that has nothing else to do, and [`Reactor::turn`] for a worker in an event loop
//! of someone else, which registers the reactor's descriptors ([`Reactor::sources`]) there:
//!
//! ```text
//! epoll: kick, or one of the reactor's descriptors
//!   └─ take requests off the queue ─ submit_fast(…), spawn_local(…)
//!        └─ turn(sink) ─ one io_uring_enter ─ sink(token, outcome) ─ tasks that are ready ─ … until nothing is
//! ```
//!
//! What is submitted, spawned or woken on the thread itself does not make the descriptor readable: a worker
//! turns before it sleeps.

use std::cell::OnceCell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use async_task::Task;

use super::executor::{MainWaker, Shared, Tasks};
use super::op::{Call, Owner};
use super::ring::Ring;
use super::{HostFile, IoBuf};
use crate::units::HostOffset;

/// Tasks that run between two looks at the ring.
const TASKS_PER_ROUND: usize = 64;
/// Rounds of a turn, after which the event loop gets a look at its other descriptors.
const ROUNDS_PER_TURN: usize = 32;

thread_local! {
    static CURRENT: OnceCell<Reactor> = const { OnceCell::new() };
}

/// Which way a worker's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

/// The ring and the tasks of one thread. Clones are the same reactor.
///
/// When its thread ends, the reactor drops its tasks and waits for what the kernel still works on.
#[derive(Clone)]
pub struct Reactor(Rc<Inner>);

struct Inner {
    tasks: Tasks,
    ring: Rc<Ring>,
    epoll: OwnedFd,
}

impl Reactor {
    /// The calling thread's reactor.
    ///
    /// # Errors
    /// When it cannot be made: the kernel does not let this process use io_uring, or descriptors have run out.
    pub fn current() -> io::Result<Self> {
        CURRENT
            .try_with(|current| {
                if let Some(reactor) = current.get() {
                    return Ok(reactor.clone());
                }
                let reactor = Self::new()?;
                Ok(current.get_or_init(|| reactor).clone())
            })
            .unwrap_or_else(|_| Err(io::Error::other("the thread is ending")))
    }

    /// The calling thread's reactor, if it is the one that owns `shared`.
    pub(super) fn of_this_thread(shared: &Arc<Shared>) -> Option<Self> {
        CURRENT
            .try_with(|current| {
                let reactor = current.get()?;
                Arc::ptr_eq(reactor.0.tasks.shared(), shared).then(|| reactor.clone())
            })
            .ok()
            .flatten()
    }

    fn new() -> io::Result<Self> {
        let ring = Ring::new().map_err(|error| explain(&error))?;
        let tasks = Tasks::new()?;
        let epoll = open_epoll(&[ring.raw_fd(), tasks.raw_fd()])?;
        Ok(Self(Rc::new(Inner {
            tasks,
            ring: Rc::new(ring),
            epoll,
        })))
    }

    pub(super) fn ring(&self) -> &Rc<Ring> {
        &self.0.ring
    }

    pub(super) fn tasks(&self) -> &Tasks {
        &self.0.tasks
    }

    /// Reads or writes all of `buf` at `at`; a later [`Self::turn`] gives `token` and the outcome to its sink.
    /// Reads past the end of the file give zeros. Everything is aligned to [`HostFile::alignment`].
    ///
    /// Allocates nothing, and hands nothing to the kernel before the turn.
    pub fn submit_fast(
        &self,
        file: &HostFile,
        direction: Direction,
        at: HostOffset,
        buf: IoBuf,
        token: u64,
    ) {
        let call = match direction {
            Direction::Read => Call::Read { at, buf },
            Direction::Write => Call::Write { at, buf },
        };
        self.0.ring.accept(file.clone(), call, Owner::Token(token));
    }

    /// Runs `future` on this thread, along with whatever else it does. Dropping the task cancels it;
    /// [`Task::detach`] lets it run on its own.
    pub fn spawn_local<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Task<T> {
        self.0.tasks.spawn(future)
    }

    /// Hands the kernel what is queued, gives `sink` the outcome of every fast operation that has ended, and runs
    /// tasks, until nothing is ready. Never blocks.
    ///
    /// Returns whether anything is still under way. With a lot to do it returns early, and the reactor's descriptor
    /// is readable at once.
    pub fn turn(&self, sink: &mut dyn FnMut(u64, io::Result<()>)) -> bool {
        self.run(&mut |ring| {
            while let Some((token, outcome)) = ring.next_completion() {
                sink(token, outcome);
            }
        });
        self.in_flight() > 0 || self.task_count() > 0
    }

    /// Operations that have not ended, or whose sink has not been told.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.ring.in_flight()
    }

    /// Tasks that have not ended.
    #[must_use]
    pub fn task_count(&self) -> usize {
        self.0.tasks.count()
    }

    /// The descriptors of which one becomes readable when the reactor's own does, for an event loop that watches them
    /// itself: to be woken through a second epoll instance takes longer.
    #[must_use]
    pub fn sources(&self) -> [BorrowedFd<'_>; 2] {
        let fds = [self.0.ring.raw_fd(), self.0.tasks.raw_fd()];
        // SAFETY: the reactor keeps both open, and the borrow keeps the reactor.
        fds.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Sleeps until there is something to do for [`Self::turn`].
    pub fn wait(&self) {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 2];
        if let Err(error) = epoll::wait(self.as_raw_fd(), -1, &mut events)
            && error.kind() != io::ErrorKind::Interrupted
        {
            log::error!("waiting for I/O failed: {error}");
        }
    }

    fn run(&self, deliver: &mut dyn FnMut(&Ring)) {
        let Inner { ring, tasks, .. } = &*self.0;
        for _ in 0..ROUNDS_PER_TURN {
            let starved = ring.enter();
            deliver(ring);
            let ran = tasks.run_ready(TASKS_PER_ROUND);
            if starved {
                break;
            }
            if ran == 0 && !ring.has_work() {
                return;
            }
        }
        if ring.has_work() || tasks.has_ready() {
            tasks.shared().notify(None);
        }
    }

    fn drive<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let main = Arc::new(MainWaker::new(Arc::clone(self.0.tasks.shared())));
        let waker = Waker::from(Arc::clone(&main));
        let mut context = Context::from_waker(&waker);
        loop {
            if main.take()
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                return output;
            }
            self.run(&mut |_| {});
            if !main.is_woken() {
                self.wait();
            }
        }
    }
}

/// The descriptor that becomes readable when operations have ended or another thread has woken a task.
impl AsRawFd for Reactor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.epoll.as_raw_fd()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.drop_all();
    }
}

/// Runs `future` to its end on the calling thread, along with the tasks that the thread has spawned.
///
/// Works without a reactor too, where the kernel gives none; operations then fail with the reason.
pub fn block_on<F: Future>(future: F) -> F::Output {
    match Reactor::current() {
        Ok(reactor) => reactor.drive(future),
        Err(_) => park_on(future),
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn park_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        std::thread::park();
    }
}

fn open_epoll(watched: &[RawFd]) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is fresh, and nobody else knows it.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll::create(true)?) };
    for fd in watched {
        let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
        epoll::ctl(
            epoll.as_raw_fd(),
            epoll::ControlOptions::EPOLL_CTL_ADD,
            *fd,
            event,
        )?;
    }
    Ok(epoll)
}

/// Says what to do about a ring that cannot be opened.
fn explain(error: &io::Error) -> io::Error {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOSYS) => "the kernel has no io_uring: Linux 5.10 or newer is needed",
        Some(libc::EPERM | libc::EACCES) => {
            "io_uring is forbidden: look at the sysctl kernel.io_uring_disabled and at the \
             container's seccomp profile"
        }
        Some(libc::ENOMEM) => {
            "io_uring got no memory: raise the limit of locked memory (ulimit -l)"
        }
        _ => "io_uring cannot be opened",
    };
    io::Error::new(error.kind(), format!("{remedy}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs::File;
    use std::io::Write;
    use std::sync::Weak;
    use std::sync::mpsc;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    fn temporary_file() -> HostFile {
        HostFile::new(tempfile::tempfile().unwrap(), 0, 1)
    }

    /// A file whose reads stay in the kernel until something is written to the other end.
    fn slow_file() -> (HostFile, io::PipeWriter) {
        let (reader, writer) = io::pipe().unwrap();
        (
            HostFile::new(File::from(OwnedFd::from(reader)), 0, 1),
            writer,
        )
    }

    /// Drives until every fast operation has ended; returns tokens and outcomes.
    fn drain(reactor: &Reactor) -> Vec<(u64, io::Result<()>)> {
        let mut ended = Vec::new();
        while reactor.turn(&mut |token, outcome| ended.push((token, outcome))) {
            reactor.wait();
        }
        ended
    }

    async fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        std::future::poll_fn(|context| Poll::Ready(std::pin::Pin::new(&mut *future).poll(context)))
            .await
    }

    #[test]
    fn more_fast_operations_than_any_queue_holds_all_end_with_their_data() {
        const COUNT: u64 = 6000;
        let reactor = Reactor::current().unwrap();
        let file = temporary_file();
        for i in 0..COUNT {
            let bytes = i.to_le_bytes();
            let buf = IoBuf::from_bytes(&bytes);
            reactor.submit_fast(&file, Direction::Write, HostOffset(i * 8), buf, i);
        }
        let mut tokens: Vec<u64> = drain(&reactor)
            .into_iter()
            .map(|(token, outcome)| outcome.map(|()| token).unwrap())
            .collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..COUNT).collect::<Vec<_>>());
        assert_eq!(file.len(), COUNT * 8);

        let buffers: Vec<IoBuf> = (0..COUNT).map(|_| IoBuf::zeroed(8)).collect();
        for (i, buf) in (0..COUNT).zip(&buffers) {
            reactor.submit_fast(&file, Direction::Read, HostOffset(i * 8), buf.clone(), i);
        }
        assert_eq!(drain(&reactor).len(), buffers.len());
        for (i, buf) in (0..COUNT).zip(&buffers) {
            assert_eq!(buf.to_vec(), i.to_le_bytes());
        }
        assert_eq!(reactor.in_flight(), 0);
    }

    #[test]
    fn a_failed_fast_operation_tells_its_token() {
        let reactor = Reactor::current().unwrap();
        let read_only = File::open("/dev/null").unwrap();
        let file = HostFile::new(read_only, 0, 1);
        reactor.submit_fast(&file, Direction::Write, HostOffset(0), IoBuf::zeroed(1), 42);
        let ended = drain(&reactor);
        let [(42, Err(error))] = ended.as_slice() else {
            panic!("{ended:?}");
        };
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn dropping_a_future_keeps_its_buffer_until_the_kernel_is_done() {
        let reactor = Reactor::current().unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let memory = Arc::new(memory);
        let alive: Weak<_> = Arc::downgrade(&memory);
        let buf = IoBuf::from_guest(&memory, [(GuestAddress(0), 4)]).unwrap();
        drop(memory);
        let (file, mut writer) = slow_file();
        block_on(async {
            let mut read = file.read(HostOffset(0), buf);
            assert!(poll_once(&mut read).await.is_pending());
            reactor.turn(&mut |_, _| {});
            drop(read);
        });
        reactor.turn(&mut |_, _| {});
        assert_eq!(reactor.in_flight(), 1);
        assert!(
            alive.upgrade().is_some(),
            "the kernel may still write there"
        );
        writer.write_all(b"late").unwrap();
        drain(&reactor);
        assert!(alive.upgrade().is_none(), "the slot is free again");
    }

    #[test]
    fn a_future_dropped_before_the_kernel_has_its_operation_does_nothing() {
        let reactor = Reactor::current().unwrap();
        let file = temporary_file();
        block_on(async {
            let mut write = file.write(HostOffset(0), IoBuf::from_bytes(b"never"));
            assert!(poll_once(&mut write).await.is_pending());
        });
        drain(&reactor);
        assert_eq!(file.len(), 0);
        assert_eq!(reactor.in_flight(), 0);
    }

    #[test]
    fn the_descriptor_becomes_readable_when_an_operation_ends() {
        let reactor = Reactor::current().unwrap();
        let (file, mut writer) = slow_file();
        reactor.submit_fast(&file, Direction::Read, HostOffset(0), IoBuf::zeroed(4), 1);
        assert!(reactor.turn(&mut |_, _| panic!("nothing has ended")));
        assert!(!is_readable(&reactor));
        writer.write_all(b"data").unwrap();
        reactor.wait();
        let mut ended = 0;
        assert!(!reactor.turn(&mut |_, _| ended += 1));
        assert_eq!(ended, 1);
        assert!(!is_readable(&reactor));
    }

    fn is_readable(reactor: &Reactor) -> bool {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0); 2];
        epoll::wait(reactor.as_raw_fd(), 0, &mut events).unwrap() > 0
    }

    #[test]
    fn a_short_read_goes_on_where_it_ended() {
        let (file, mut writer) = slow_file();
        let buf = IoBuf::zeroed(6);
        block_on(async {
            let reactor = Reactor::current().unwrap();
            writer.write_all(b"abc").unwrap();
            let mut read = file.read(HostOffset(0), buf.clone());
            assert!(poll_once(&mut read).await.is_pending());
            reactor.turn(&mut |_, _| {});
            assert!(poll_once(&mut read).await.is_pending());
            writer.write_all(b"def").unwrap();
            read.await.unwrap();
        });
        assert_eq!(buf.to_vec(), b"abcdef");
    }

    #[test]
    fn wake_ups_from_other_threads_reach_tasks_and_the_main_future() {
        block_on(async {
            let reactor = Reactor::current().unwrap();
            let event = Arc::new(async_lock::Semaphore::new(0));
            let tasks: Vec<_> = (0..50)
                .map(|_| {
                    let event = Arc::clone(&event);
                    reactor.spawn_local(async move { event.acquire().await.forget() })
                })
                .collect();
            let waker = std::thread::spawn({
                let event = Arc::clone(&event);
                move || event.add_permits(51)
            });
            event.acquire().await.forget();
            for task in tasks {
                task.await;
            }
            waker.join().unwrap();
        });
    }

    #[test]
    fn a_thread_that_ends_drops_its_tasks_and_finishes_its_operations() {
        let file = temporary_file();
        let (sender, receiver) = mpsc::channel::<()>();
        let on_thread = file.clone();
        std::thread::spawn(move || {
            let reactor = Reactor::current().unwrap();
            reactor
                .spawn_local(async move {
                    let _sender = sender;
                    std::future::pending::<()>().await;
                })
                .detach();
            let buf = IoBuf::from_bytes(&[5; 65536]);
            reactor.submit_fast(&on_thread, Direction::Write, HostOffset(0), buf, 1);
            reactor.turn(&mut |_, _| {});
        })
        .join()
        .unwrap();
        assert!(receiver.recv().is_err(), "the task is dropped");
        assert_eq!(file.len(), 65536);
    }

    #[test]
    fn a_task_that_never_waits_does_not_keep_a_turn_from_ending() {
        let reactor = Reactor::current().unwrap();
        let polls = Rc::new(Cell::new(0));
        let counted = Rc::clone(&polls);
        let task = reactor.spawn_local(std::future::poll_fn(move |context| {
            counted.set(counted.get() + 1);
            context.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        assert!(reactor.turn(&mut |_, _| {}));
        assert!(polls.get() > 1);
        assert!(is_readable(&reactor), "there is more to do");
        drop(task);
        assert!(!reactor.turn(&mut |_, _| {}));
    }
}
