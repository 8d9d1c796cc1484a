//! A value that many threads use and that is exchanged now and then, such as an image that is opened anew while VMs
//! are served from it.
//!
//! # Invariants
//!
//! 1. Who uses the value holds one slot's lock for reading; who exchanges it holds all of them for writing. So nobody
//!    uses the old value any more when the new one comes, and nobody sees both.
//! 2. Every slot holds the same value, or, if an exchange was cut short, none.
//!
//! There are several slots, one per thread as far as they go, so that threads do not fight for one cache line on
//! every use. A use may last across I/O; an exchange waits for it, and whoever comes later waits for the exchange.
//!
//! Lock order: whoever uses one value may wait for another; who exchanges one holds nothing else that a user waits for.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_lock::{RwLock, RwLockReadGuard, RwLockWriteGuard};

const SLOTS: usize = 16;

/// A slot on cache lines of its own.
#[repr(align(128))]
struct Slot<T>(RwLock<Option<Arc<T>>>);

/// A value that can be exchanged while it is used.
pub(crate) struct Swappable<T> {
    slots: [Slot<T>; SLOTS],
}

/// A use of the value, which stays the one in force until the use ends.
pub(crate) struct Using<'a, T>(RwLockReadGuard<'a, Option<Arc<T>>>);

/// The time in which nobody uses the value.
pub(crate) struct Exchange<'a, T> {
    slots: Vec<RwLockWriteGuard<'a, Option<Arc<T>>>>,
}

impl<T> Swappable<T> {
    /// Holds `value` first.
    pub(crate) fn new(value: T) -> Self {
        let value = Arc::new(value);
        Self {
            slots: std::array::from_fn(|_| Slot(RwLock::new(Some(Arc::clone(&value))))),
        }
    }

    /// The value, unless that takes waiting, or there is none.
    pub(crate) fn try_use(&self) -> Option<Using<'_, T>> {
        let using = self.own_slot().try_read()?;
        using.is_some().then_some(Using(using))
    }

    /// The value, after an exchange under way; `None` if one was cut short.
    pub(crate) async fn use_now(&self) -> Option<Using<'_, T>> {
        let using = self.own_slot().read().await;
        using.is_some().then_some(Using(using))
    }

    /// Waits until nobody uses the value; who wants to, waits from now on.
    pub(crate) async fn exchange(&self) -> Exchange<'_, T> {
        let mut slots = Vec::with_capacity(SLOTS);
        // All in the same order, so that two of these never wait for each other.
        for slot in &self.slots {
            slots.push(slot.0.write().await);
        }
        Exchange { slots }
    }

    fn own_slot(&self) -> &RwLock<Option<Arc<T>>> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static OWN: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SLOTS;
        }
        let index = OWN.with(|own| *own);
        &self.slots.get(index).expect("the index is below SLOTS").0
    }
}

impl<T> Deref for Using<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only a slot with a value is used")
    }
}

impl<T> Exchange<'_, T> {
    /// The value in force; `None` if an exchange was cut short.
    pub(crate) fn value(&self) -> Option<&T> {
        self.slots.first()?.as_deref()
    }

    /// Takes the value out. Whoever comes now finds none, unless another is put in its place.
    pub(crate) fn take(&mut self) -> Option<T> {
        let mut last = None;
        for slot in &mut self.slots {
            last = slot.take();
        }
        // Invariant 1: nobody but the slots holds it.
        last.and_then(Arc::into_inner)
    }

    /// Puts a value in the place of the one that there was.
    pub(crate) fn put(&mut self, value: T) {
        let value = Arc::new(value);
        for slot in &mut self.slots {
            **slot = Some(Arc::clone(&value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::block_on;

    #[test]
    fn an_exchange_waits_for_those_who_use_the_old_value() {
        let value = Swappable::new(1);
        let using = value.try_use().unwrap();
        let exchanged = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                block_on(async {
                    let mut exchange = value.exchange().await;
                    let old = exchange.take();
                    exchange.put(2);
                    old
                })
            });
            // Only once the other waits is the value refused to those who do not.
            while value.try_use().is_some() {
                std::thread::yield_now();
            }
            assert_eq!(*using, 1);
            drop(using);
            other.join().unwrap()
        });
        assert_eq!(exchanged, Some(1));
        assert_eq!(*block_on(value.use_now()).unwrap(), 2);
    }

    #[test]
    fn an_exchange_that_is_cut_short_leaves_no_value() {
        let value = Swappable::new(1);
        assert_eq!(block_on(value.exchange()).take(), Some(1));
        assert!(value.try_use().is_none());
        assert!(block_on(value.use_now()).is_none());
        block_on(value.exchange()).put(3);
        assert_eq!(*value.try_use().unwrap(), 3);
    }
}
