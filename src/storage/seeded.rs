//! Repeatable chance for the test storages: the same seed gives the same choices on every machine.

use std::future::{Future, poll_fn};
use std::sync::{Mutex, PoisonError};
use std::task::Poll;

/// A small generator of pseudo-random numbers (the SplitMix64 sequence).
#[derive(Clone, Debug)]
pub(super) struct Seeded(u64);

impl Seeded {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(super) fn coin(&mut self) -> bool {
        self.next() & 1 == 1
    }
}

/// How long operations take, counted in turns that other tasks of the executor get meanwhile.
#[derive(Debug)]
pub struct Delays {
    longest: u64,
    seeded: Mutex<Seeded>,
}

impl Delays {
    /// Every operation ends when it is first polled.
    #[must_use]
    pub fn none() -> Self {
        Self::up_to(0, 0)
    }

    /// An operation lets others run up to `longest` times before it takes effect, and as often again before it
    /// ends: chosen by `seed`, so that operations that are under way together overtake each other.
    #[must_use]
    pub fn up_to(longest: u32, seed: u64) -> Self {
        Self {
            longest: u64::from(longest),
            seeded: Mutex::new(Seeded::new(seed)),
        }
    }

    /// Lets others run, as often as the next choice says.
    pub(super) fn pause(&self) -> impl Future<Output = ()> + 'static {
        let mut seeded = self.seeded.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = seeded.below(self.longest + 1);
        poll_fn(move |context| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }
}
