//! Work in several lanes at once: some under way on each of several threads, so that both the host's queues and its
//! processors stay busy.
//!
//! # Invariants
//!
//! 1. A lane runs on one thread from its beginning to its end: I/O stays on the thread that began it.
//! 2. Once a lane has failed, the others are told to stop, and those that wait for their turn go on at once: no lane
//!    waits for one that has ended.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::thread;

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::join::join_all;
use crate::storage::IoFuture;
use crate::sys::block_on;

/// Whether the lanes are to go on.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    stopped: AtomicBool,
    turns: Turns,
}

/// Whose turn it is: the steps of a job take theirs in the order of their numbers.
#[derive(Debug, Default)]
struct Turns {
    state: Mutex<TurnState>,
}

#[derive(Debug, Default)]
struct TurnState {
    next: u64,
    /// Those that wait, by their number.
    waiting: BTreeMap<u64, Waker>,
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, TurnState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lanes {
    /// Runs `count` lanes, each of which is what `lane` makes, on as many threads as there are processors, and waits
    /// for all of them.
    ///
    /// # Errors
    /// The first failure of a lane.
    pub(super) fn run<'a, F>(&'a self, count: usize, lane: impl Fn() -> F + Sync) -> Result<()>
    where
        F: Future<Output = Result<()>> + 'a,
    {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let threads = processors.min(count).max(1);
        let lane = &lane;
        thread::scope(|scope| {
            let running: Vec<_> = (0..threads)
                .map(|number| {
                    let own = count.max(1) / threads + usize::from(number < count % threads);
                    scope.spawn(move || self.run_on_this_thread(own, lane))
                })
                .collect();
            let mut outcome = Ok(());
            for thread in running {
                let ended = thread.join().unwrap_or_else(|_| Err(lane_panicked()));
                outcome = outcome.and(ended);
            }
            outcome
        })
    }

    fn run_on_this_thread<'a, F>(&'a self, count: usize, lane: impl Fn() -> F) -> Result<()>
    where
        F: Future<Output = Result<()>> + 'a,
    {
        let lanes = (0..count).map(|_| {
            let work = lane();
            IoFuture::boxed(async move {
                let outcome = work.await;
                if outcome.is_err() {
                    self.stop();
                }
                outcome
            })
        });
        block_on(join_all(lanes))
    }

    /// Has all lanes end with what they are doing.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        let waiting = std::mem::take(&mut self.turns.lock().waiting);
        waiting.into_values().for_each(Waker::wake);
    }

    /// Whether the lanes are to end.
    #[must_use]
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Waits until all steps before `number` have [passed](Self::pass_turn), or the lanes are to end: whether it is
    /// the step's turn.
    pub(super) async fn take_turn(&self, number: u64) -> bool {
        poll_fn(|context| {
            let mut state = self.turns.lock();
            // Looked at with the lock held, which `stop` takes behind the change: no waker is left behind.
            if self.is_stopped() {
                return Poll::Ready(false);
            }
            if state.next == number {
                return Poll::Ready(true);
            }
            state.waiting.insert(number, context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Says that the step whose turn it is has passed.
    pub(super) fn pass_turn(&self) {
        let mut state = self.turns.lock();
        state.next += 1;
        let next = state.next;
        if let Some(waker) = state.waiting.remove(&next) {
            drop(state);
            waker.wake();
        }
    }
}

fn lane_panicked() -> Error {
    Error::new(ErrorKind::Io, "a thread of the job has ended early")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_lane_runs_once_whatever_their_number() {
        for count in [1, 2, 3, 8, 17] {
            let runs = AtomicU64::new(0);
            Lanes::default()
                .run(count, || async {
                    runs.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
                .unwrap();
            assert_eq!(runs.into_inner(), count as u64);
        }
    }

    #[test]
    fn steps_take_their_turns_in_order() {
        let lanes = Lanes::default();
        let numbers = AtomicU64::new(0);
        let order = Mutex::new(Vec::new());
        lanes
            .run(7, || async {
                loop {
                    let number = numbers.fetch_add(1, Ordering::SeqCst);
                    if number >= 100 {
                        return Ok(());
                    }
                    assert!(lanes.take_turn(number).await);
                    order.lock().unwrap().push(number);
                    lanes.pass_turn();
                }
            })
            .unwrap();
        assert!(order.into_inner().unwrap().into_iter().eq(0..100));
    }

    #[test]
    fn when_a_lane_fails_those_that_wait_for_their_turn_end_too() {
        let lanes = Lanes::default();
        let numbers = AtomicU64::new(0);
        let failed = lanes.run(6, || async {
            // Turn 0 never passes.
            match numbers.fetch_add(1, Ordering::SeqCst) {
                0 => Err(Error::new(ErrorKind::NoSpace, "full")),
                number => {
                    assert!(!lanes.take_turn(number).await);
                    Ok(())
                }
            }
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(lanes.is_stopped());
    }
}
