//! The tasks of one thread: which of them are ready to run, and how other threads wake them.
//!
//! # Invariants
//!
//! 1. A task runs and is dropped on the thread that spawned it; other threads only put it into the shared list.
//! 2. `notified` says that the eventfd has been written and not read since: of several wake-ups from other
//!    threads only the first writes.
//! 3. A task has its entry in `active` for as long as its future lives.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

use async_task::{Runnable, Task};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Reactor;

/// What other threads reach.
pub(super) struct Shared {
    wakeups: Mutex<Wakeups>,
    eventfd: EventFd,
}

#[derive(Default)]
struct Wakeups {
    ready: Vec<Runnable>,
    notified: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wakeups> {
        self.wakeups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the reactor's descriptor readable, and gives it `runnable` to run if there is one.
    pub(super) fn notify(&self, runnable: Option<Runnable>) {
        let mut wakeups = self.lock();
        wakeups.ready.extend(runnable);
        let first = !std::mem::replace(&mut wakeups.notified, true);
        drop(wakeups);
        if first {
            // Fails only when the counter is about to overflow, and then the descriptor is readable anyway.
            let _ = self.eventfd.write(1);
        }
    }
}

/// Wakes the future that [`super::block_on`] drives.
pub(super) struct MainWaker {
    shared: Arc<Shared>,
    woken: AtomicBool,
}

impl MainWaker {
    /// A waker that counts as woken: the future has to be polled a first time.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            woken: AtomicBool::new(true),
        }
    }

    pub(super) fn is_woken(&self) -> bool {
        self.woken.load(Ordering::Acquire)
    }

    /// Whether there was a wake-up since the last call.
    pub(super) fn take(&self) -> bool {
        self.woken.swap(false, Ordering::AcqRel)
    }
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        if Reactor::of_this_thread(&self.shared).is_none() {
            self.shared.notify(None);
        }
    }
}

/// The wakers of all tasks whose future lives.
#[derive(Default)]
struct Active {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

/// A task's entry in [`Active`]; it goes with the future.
struct Entry {
    active: Rc<RefCell<Active>>,
    index: usize,
}

impl Entry {
    fn new(active: &Rc<RefCell<Active>>) -> Self {
        let mut list = active.borrow_mut();
        let index = list.free.pop().unwrap_or_else(|| {
            list.wakers.push(None);
            list.wakers.len() - 1
        });
        Self {
            active: Rc::clone(active),
            index,
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut list = self.active.borrow_mut();
        let waker = list.wakers[self.index].take();
        list.free.push(self.index);
        drop(list);
        drop(waker);
    }
}

/// The tasks that a thread has spawned.
pub(super) struct Tasks {
    shared: Arc<Shared>,
    ready: RefCell<VecDeque<Runnable>>,
    active: Rc<RefCell<Active>>,
}

impl Tasks {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self {
            shared: Arc::new(Shared {
                wakeups: Mutex::default(),
                eventfd: EventFd::from_flags(flags)?,
            }),
            ready: RefCell::default(),
            active: Rc::default(),
        })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The descriptor that becomes readable when another thread wakes something here.
    pub(super) fn raw_fd(&self) -> RawFd {
        self.shared.eventfd.as_raw_fd()
    }

    /// Tasks whose future lives.
    pub(super) fn count(&self) -> usize {
        let active = self.active.borrow();
        active.wakers.len() - active.free.len()
    }

    pub(super) fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Task<T> {
        let entry = Entry::new(&self.active);
        let index = entry.index;
        let shared = Arc::clone(&self.shared);
        let schedule = move |runnable| match Reactor::of_this_thread(&shared) {
            Some(reactor) => reactor.tasks().push(runnable),
            None => shared.notify(Some(runnable)),
        };
        let whole = async move {
            let _entry = entry;
            future.await
        };
        let (runnable, task) = async_task::spawn_local(whole, schedule);
        self.active.borrow_mut().wakers[index] = Some(runnable.waker());
        self.push(runnable);
        task
    }

    fn push(&self, runnable: Runnable) {
        self.ready.borrow_mut().push_back(runnable);
    }

    /// Runs at most `limit` tasks that are ready; returns how many it ran.
    pub(super) fn run_ready(&self, limit: usize) -> usize {
        self.collect();
        let mut count = 0;
        while count < limit {
            let Some(runnable) = self.ready.borrow_mut().pop_front() else {
                break;
            };
            runnable.run();
            count += 1;
        }
        count
    }

    /// Whether a task is known to be ready.
    pub(super) fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    /// Takes over what other threads have woken.
    fn collect(&self) {
        let mut wakeups = self.shared.lock();
        if wakeups.notified {
            wakeups.notified = false;
            // Empty at worst, which is what it shall be.
            let _ = self.shared.eventfd.read();
            self.ready.borrow_mut().extend(wakeups.ready.drain(..));
        }
    }

    /// Drops every task, wherever it is waiting.
    ///
    /// A task that another thread is just waking is on its way into the shared list: this waits for it, as the
    /// other thread must not be the one to drop it.
    pub(super) fn drop_all(&self) {
        while self.count() > 0 {
            let wakers: Vec<Waker> = {
                let active = self.active.borrow();
                active.wakers.iter().flatten().cloned().collect()
            };
            wakers.into_iter().for_each(Waker::wake);
            self.collect();
            let ready = std::mem::take(&mut *self.ready.borrow_mut());
            if ready.is_empty() {
                std::thread::yield_now();
            }
            drop(ready);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_wake_ups_only_the_first_writes() {
        let tasks = Tasks::new().unwrap();
        for _ in 0..3 {
            tasks.shared().notify(None);
        }
        assert_eq!(tasks.shared().eventfd.read(), Ok(1));
        tasks.shared().notify(None);
        assert!(
            tasks.shared().eventfd.read().is_err(),
            "nobody has looked yet"
        );
        tasks.collect();
        tasks.shared().notify(None);
        assert_eq!(tasks.shared().eventfd.read(), Ok(1));
    }
}
