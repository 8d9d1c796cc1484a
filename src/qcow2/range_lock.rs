//! Exclusive use of ranges of numbers: guest clusters with an allocation in flight, L1 entries whose table is
//! being made, tables being loaded.
//!
//! # Invariants
//!
//! 1. Ranges held at the same time never overlap.
//! 2. Whoever waits, waits for a range that overlaps its own, and is woken when that is released.
//!
//! Lock order: the mutex in here is held for map operations only; a holder of a range may acquire ranges of
//! another [`RangeLocks`], in the order that `qcow2::image` names, but no second one of the same.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// The ranges that are held, by their start.
#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    held: Mutex<BTreeMap<u64, Held>>,
}

#[derive(Debug)]
struct Held {
    end: u64,
    waiting: Vec<Waker>,
}

/// A range held; dropping it releases the range.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    start: u64,
}

impl RangeLocks {
    /// Waits until no one holds any part of `range`, which is not empty, and holds it.
    pub(super) async fn acquire(&self, range: Range<u64>) -> RangeGuard<'_> {
        poll_fn(|context| {
            let mut held = self.lock();
            // Ranges do not overlap (invariant 1), so only the last one that starts before our end can be in the
            // way from the left; all that start inside are.
            match held.range_mut(..range.end).next_back() {
                Some((_, other)) if other.end > range.start => {
                    if !other.waiting.iter().any(|w| w.will_wake(context.waker())) {
                        other.waiting.push(context.waker().clone());
                    }
                    Poll::Pending
                }
                _ => {
                    held.insert(
                        range.start,
                        Held {
                            end: range.end,
                            waiting: Vec::new(),
                        },
                    );
                    Poll::Ready(())
                }
            }
        })
        .await;
        RangeGuard {
            locks: self,
            start: range.start,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let released = self.locks.lock().remove(&self.start);
        for waker in released.into_iter().flat_map(|held| held.waiting) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::Context;

    use super::*;
    use crate::sys::block_on;

    fn is_ready<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        future.poll(&mut context).is_ready()
    }

    #[test]
    fn overlapping_ranges_wait_and_others_do_not() {
        let locks = RangeLocks::default();
        let first = block_on(locks.acquire(10..20));
        let second = block_on(locks.acquire(30..40));
        assert!(is_ready(pin!(locks.acquire(20..30))));
        assert!(is_ready(pin!(locks.acquire(0..10))));
        for range in [0..11, 19..20, 12..13, 15..35, 0..100] {
            assert!(!is_ready(pin!(locks.acquire(range.clone()))), "{range:?}");
        }
        drop(second);
        assert!(is_ready(pin!(locks.acquire(30..40))));
        drop(first);
        assert!(is_ready(pin!(locks.acquire(0..100))));
    }

    #[test]
    fn a_release_wakes_those_who_wait_for_it() {
        let locks = RangeLocks::default();
        let held = block_on(locks.acquire(0..4));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| drop(block_on(locks.acquire(2..6))));
            drop(held);
            waiter.join().unwrap();
        });
    }
}
