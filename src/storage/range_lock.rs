//! Locks on ranges of numbers (bytes of a file, clusters, blocks) that futures wait for: two that overlap are
//! never held at once.
//!
//! # Invariants
//!
//! 1. No two held ranges overlap.
//! 2. Whoever asked first for overlapping ranges gets its range first: nobody starves.
//!
//! A range may be held across I/O. The mutex in here is held for list operations only.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// The ranges of one kind of number that are locked or waited for.
#[derive(Debug, Default)]
pub(crate) struct RangeLock {
    /// Oldest first. Those that do not overlap an older one are held.
    claims: Mutex<Claims>,
}

#[derive(Debug, Default)]
struct Claims {
    next_id: u64,
    list: VecDeque<Claim>,
}

#[derive(Debug)]
struct Claim {
    id: u64,
    range: Range<u64>,
    waker: Option<Waker>,
}

/// A range that is held (or, before [`RangeLock::lock`] is ready, waited for); dropping it lets others go on.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl RangeLock {
    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes its place in the queue for `range` at once, and is ready when the range is held.
    pub(crate) fn lock(&self, range: Range<u64>) -> Locking<'_> {
        let mut claims = self.claims();
        let id = claims.next_id;
        claims.next_id += 1;
        claims.list.push_back(Claim {
            id,
            range,
            waker: None,
        });
        drop(claims);
        Locking(Some(RangeGuard { lock: self, id }))
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut claims = self.lock.claims();
        let Some(at) = claims.list.iter().position(|claim| claim.id == self.id) else {
            return;
        };
        let freed = claims.list.remove(at);
        let Some(freed) = freed else {
            return;
        };
        let woken: Vec<Waker> = claims
            .list
            .iter_mut()
            .skip(at)
            .filter(|claim| overlap(&claim.range, &freed.range))
            .filter_map(|claim| claim.waker.take())
            .collect();
        drop(claims);
        woken.into_iter().for_each(Waker::wake);
    }
}

/// The wait for a range.
#[must_use = "the range is held once this has been awaited"]
pub(crate) struct Locking<'a>(Option<RangeGuard<'a>>);

impl<'a> Future for Locking<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let guard = self.0.as_ref().expect("not polled after it was ready");
        let mut claims = guard.lock.claims();
        let own = claims
            .list
            .iter()
            .position(|claim| claim.id == guard.id)
            .expect("a claim stays in the list until its guard is dropped");
        let range = claims.list[own].range.clone();
        let is_blocked = claims
            .list
            .iter()
            .take(own)
            .any(|older| overlap(&older.range, &range));
        if is_blocked {
            claims.list[own].waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        drop(claims);
        Poll::Ready(self.0.take().expect("looked at above"))
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::block_on;

    fn poll_now<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn overlapping_ranges_wait_in_the_order_of_asking_and_others_do_not() {
        let lock = RangeLock::default();
        let first = block_on(lock.lock(0..10));
        let mut second = lock.lock(5..20);
        let mut third = lock.lock(15..30);
        assert!(poll_now(&mut third).is_pending(), "the second asked first");
        assert!(poll_now(&mut second).is_pending());
        drop(block_on(lock.lock(30..40)));
        drop(first);
        let Poll::Ready(second) = poll_now(&mut second) else {
            panic!("nobody holds 5..20");
        };
        assert!(poll_now(&mut third).is_pending());
        drop(second);
        assert!(poll_now(&mut third).is_ready());
    }

    #[test]
    fn giving_up_a_wait_lets_the_next_go_on() {
        let lock = RangeLock::default();
        let held = block_on(lock.lock(0..10));
        let gives_up = lock.lock(0..100);
        let mut last = lock.lock(50..60);
        assert!(poll_now(&mut last).is_pending());
        drop(gives_up);
        assert!(poll_now(&mut last).is_ready());
        drop(held);
    }
}
