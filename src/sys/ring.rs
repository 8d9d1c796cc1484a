//! One io_uring and the operations under way on it.
//!
//! An operation is accepted into a slot, waits until the submission queue has room, and stays in its slot until
//! the kernel has said that it ended, whoever still waits for it.
//!
//! # Invariants
//!
//! 1. A slot that the kernel knows of is not freed or moved before its completion has been reaped: the slot
//!    owns the file, the buffer and its segment list.
//! 2. An accepted operation is in exactly one place: `waiting`, then `pushed` (in the submission queue, in the
//!    same order), then counted in `in_kernel`; a part that comes back short goes to `waiting` again.
//! 3. The kernel never has more operations than the completion queue has room for: no completion overflows.
//! 4. Nothing foreign (a waker, a sink) runs while the state is borrowed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::task::{Poll, Waker};

use io_uring::IoUring;

use super::HostFile;
use super::op::{Call, Op, Owner, Step};

/// Entries of the submission queue: what one `io_uring_enter` can take.
const SUBMISSIONS: u32 = 256;
/// Entries of the completion queue, and so the most operations that the kernel works on at once.
const COMPLETIONS: u32 = 2048;
/// Operations for which there is room from the start.
const SLOTS: usize = 256;

/// Names an accepted operation until its future has taken the outcome or is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot(u32);

/// A worker's operation that has ended: its token, and how.
pub(super) type Completion = (u64, io::Result<()>);

pub(super) struct Ring {
    state: RefCell<State>,
}

struct State {
    uring: IoUring,
    /// `None` is free.
    #[expect(
        clippy::vec_box,
        reason = "growing the list must not move what the kernel points to"
    )]
    slots: Vec<Box<Option<Op>>>,
    free: Vec<u32>,
    waiting: VecDeque<u32>,
    pushed: VecDeque<u32>,
    in_kernel: usize,
    completed: VecDeque<Completion>,
    woken: Vec<Waker>,
    /// The error after which the kernel takes nothing more.
    broken: Option<i32>,
}

impl Ring {
    pub(super) fn new() -> io::Result<Self> {
        let mut slots = Vec::with_capacity(SLOTS);
        slots.resize_with(SLOTS, || Box::new(None));
        let free = (0..u32::try_from(SLOTS).expect("a small constant")).rev();
        Ok(Self {
            state: RefCell::new(State {
                uring: open_uring()?,
                slots,
                free: free.collect(),
                waiting: VecDeque::with_capacity(SLOTS),
                pushed: VecDeque::with_capacity(SLOTS),
                in_kernel: 0,
                completed: VecDeque::with_capacity(SLOTS),
                woken: Vec::with_capacity(SLOTS),
                broken: None,
            }),
        })
    }

    /// The descriptor that becomes readable when an operation has ended.
    pub(super) fn raw_fd(&self) -> RawFd {
        self.state.borrow().uring.as_raw_fd()
    }

    /// Accepts an operation; it goes to the kernel with the next [`Self::enter`].
    pub(super) fn accept(&self, file: HostFile, call: Call, owner: Owner) -> Slot {
        let mut state = self.state.borrow_mut();
        let index = state.place(Op::new(file, call, owner));
        state.waiting.push_back(index);
        Slot(index)
    }

    /// The outcome of a future's operation; until there is one, `waker` is kept to be woken.
    pub(super) fn poll(&self, slot: Slot, waker: &Waker) -> Poll<io::Result<()>> {
        let mut state = self.state.borrow_mut();
        let Some(Op {
            owner:
                Owner::Future {
                    waker: kept,
                    outcome,
                },
            ..
        }) = state.slot(slot.0)
        else {
            return Poll::Ready(Err(io::Error::other("polled after the end")));
        };
        if let Some(outcome) = outcome.take() {
            state.release(slot.0);
            return Poll::Ready(outcome);
        }
        let stale = match kept {
            Some(kept) if kept.will_wake(waker) => None,
            kept => kept.replace(waker.clone()),
        };
        drop(state);
        drop(stale);
        Poll::Pending
    }

    /// The future of this operation is gone: what the kernel already has runs to its end, the rest does not start.
    pub(super) fn abandon(&self, slot: Slot) {
        let mut state = self.state.borrow_mut();
        let Some(op) = state.slot(slot.0) else {
            return;
        };
        let owner = std::mem::replace(&mut op.owner, Owner::Nobody);
        let ended = matches!(
            owner,
            Owner::Future {
                outcome: Some(_),
                ..
            }
        );
        if ended {
            state.release(slot.0);
        }
        drop(state);
        drop(owner);
    }

    /// Gives the kernel what waits, takes what has ended and wakes whoever waits for it. Never blocks.
    ///
    /// Returns whether the kernel lacked the means to take what waits: to be tried again, and nothing will say when.
    pub(super) fn enter(&self) -> bool {
        let mut state = self.state.borrow_mut();
        loop {
            let progress = state.submit() + state.reap();
            if progress == 0 || !state.has_work() {
                break;
            }
        }
        let starved = state.has_work();
        let mut woken = std::mem::take(&mut state.woken);
        drop(state);
        for waker in woken.drain(..) {
            waker.wake();
        }
        // Keeps the list's room for the next time.
        let mut state = self.state.borrow_mut();
        if state.woken.is_empty() {
            state.woken = woken;
        }
        starved
    }

    /// Whether [`Self::enter`] would find something to do.
    pub(super) fn has_work(&self) -> bool {
        self.state.borrow_mut().has_work()
    }

    /// The next of the workers' operations that have ended.
    pub(super) fn next_completion(&self) -> Option<Completion> {
        self.state.borrow_mut().completed.pop_front()
    }

    /// Operations accepted that have not ended, and ended ones that no worker has been told of.
    pub(super) fn in_flight(&self) -> usize {
        let state = self.state.borrow();
        state.waiting.len() + state.pushed.len() + state.in_kernel + state.completed.len()
    }
}

impl State {
    fn slot(&mut self, index: u32) -> Option<&mut Op> {
        self.slots[index as usize].as_mut().as_mut()
    }

    fn place(&mut self, op: Op) -> u32 {
        if let Some(index) = self.free.pop() {
            *self.slots[index as usize] = Some(op);
            return index;
        }
        let index = u32::try_from(self.slots.len()).expect("operations are far fewer than 2^32");
        self.slots.push(Box::new(Some(op)));
        index
    }

    fn release(&mut self, index: u32) {
        *self.slots[index as usize] = None;
        self.free.push(index);
    }

    /// Whether there is anything to give to or to take from the kernel now.
    fn has_work(&mut self) -> bool {
        let can_push = !self.waiting.is_empty() && self.has_room();
        can_push || !self.pushed.is_empty() || self.kernel_has_news()
    }

    /// Whether one more operation fits into the completion queue (invariant 3).
    fn has_room(&self) -> bool {
        self.pushed.len() + self.in_kernel < COMPLETIONS as usize
    }

    fn kernel_has_news(&mut self) -> bool {
        if !self.uring.completion().is_empty() {
            return true;
        }
        let queue = self.uring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Fills the submission queue and hands it to the kernel, which also lets it finish deferred work. Returns how
    /// many operations the kernel took, or that failed for good.
    fn submit(&mut self) -> usize {
        if let Some(error) = self.broken {
            return self.fail_all(error);
        }
        self.push_waiting();
        let news = {
            let queue = self.uring.submission();
            queue.taskrun() || queue.cq_overflow()
        };
        if self.pushed.is_empty() && !news {
            return 0;
        }
        match self.uring.submit() {
            Ok(taken) => self.taken(taken),
            Err(error) => match error.raw_os_error() {
                // The kernel lacks memory for requests, or was disturbed: the queue keeps.
                Some(libc::EAGAIN | libc::EBUSY | libc::EINTR) => 0,
                other => {
                    log::error!("io_uring takes no more operations: {error}");
                    self.broken = Some(other.unwrap_or(libc::EIO));
                    1
                }
            },
        }
    }

    fn taken(&mut self, count: usize) -> usize {
        let count = count.min(self.pushed.len());
        self.pushed.drain(..count);
        self.in_kernel += count;
        count
    }

    fn push_waiting(&mut self) {
        while self.has_room() {
            let Some(&index) = self.waiting.front() else {
                return;
            };
            let Some(op) = self.slots[index as usize].as_ref().as_ref() else {
                self.waiting.pop_front();
                continue;
            };
            if matches!(op.owner, Owner::Nobody) {
                self.waiting.pop_front();
                self.release(index);
                continue;
            }
            let entry = op.entry().user_data(u64::from(index));
            // SAFETY: the entry points to the slot's file, buffer and segment list, which stay where they are
            // until its completion has been reaped (invariant 1).
            if unsafe { self.uring.submission().push(&entry) }.is_err() {
                return;
            }
            self.waiting.pop_front();
            self.pushed.push_back(index);
        }
    }

    /// Takes every completion that is there; returns how many.
    fn reap(&mut self) -> usize {
        let mut count = 0;
        while let Some((index, answer)) = self.next_answer() {
            count += 1;
            self.in_kernel = self.in_kernel.saturating_sub(1);
            let Some(op) = self.slot(index) else {
                continue;
            };
            match op.advance(answer) {
                Step::Again => self.waiting.push_back(index),
                Step::Done(outcome) => self.finish(index, outcome),
            }
        }
        count
    }

    fn next_answer(&mut self) -> Option<(u32, i32)> {
        let entry = self.uring.completion().next()?;
        let index = u32::try_from(entry.user_data()).expect("only slot numbers are submitted");
        Some((index, entry.result()))
    }

    fn finish(&mut self, index: u32, result: io::Result<()>) {
        let Some(op) = self.slot(index) else {
            return;
        };
        match &mut op.owner {
            Owner::Token(token) => {
                let token = *token;
                self.completed.push_back((token, result));
                self.release(index);
            }
            Owner::Future { waker, outcome } => {
                *outcome = Some(result);
                let waker = waker.take();
                self.woken.extend(waker);
            }
            Owner::Nobody => self.release(index),
        }
    }

    /// Ends everything that the kernel does not have; returns how much that was.
    fn fail_all(&mut self, error: i32) -> usize {
        let mut failed = std::mem::take(&mut self.pushed);
        failed.append(&mut self.waiting);
        for index in &failed {
            self.finish(*index, Err(io::Error::from_raw_os_error(error)));
        }
        failed.len()
    }

    /// Waits until the kernel touches none of the memory in the slots.
    fn settle(&mut self) -> io::Result<()> {
        self.waiting.clear();
        if let Some(error) = self.broken
            && self.in_kernel > 0
        {
            // Another call would submit entries whose slots are free.
            return Err(io::Error::from_raw_os_error(error));
        }
        while self.in_kernel > 0 || !self.pushed.is_empty() {
            match self.uring.submit_and_wait(1) {
                Ok(taken) => {
                    self.taken(taken);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            self.reap();
            self.waiting.clear();
        }
        Ok(())
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            log::error!("io_uring did not end its operations, their memory is kept: {error}");
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// Opens a ring with as much of what makes it cheap as the kernel knows.
///
/// Not with deferred task work: completions that are deferred until the next `io_uring_enter` do not make the
/// descriptor readable for an epoll that sleeps on it.
fn open_uring() -> io::Result<IoUring> {
    let newest = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .setup_submit_all()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(SUBMISSIONS);
    if !is_unknown(&newest) {
        return newest;
    }
    IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .build(SUBMISSIONS)
}

fn is_unknown(ring: &io::Result<IoUring>) -> bool {
    matches!(ring, Err(error) if error.raw_os_error() == Some(libc::EINVAL))
}
