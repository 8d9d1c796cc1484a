//! When has every I/O ended that may have looked up a mapping before a given moment?
//!
//! # Invariants
//!
//! 1. Whoever looks up a mapping takes a token *before* the lookup and keeps it until the I/O has ended.
//! 2. [`Grace::turn`] starts a new epoch; a token of the old one can no longer be taken once it has returned. So
//!    what was unlinked before the turn is only known to holders of tokens of that epoch or earlier ones.
//! 3. [`Epoch::has_ended`] is true only once all those tokens are gone.
//!
//! Tokens are handed out from several slots, one per thread as far as they go, so that threads do not fight for
//! one cache line on every request.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::image::InFlight;

const SLOTS: usize = 16;

/// Something to count references to.
#[derive(Debug)]
struct Token;

/// A slot on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Slot(RwLock<Arc<Token>>);

/// Hands out tokens of the present epoch.
#[derive(Debug)]
pub(super) struct Grace {
    slots: [Slot; SLOTS],
}

/// An epoch that is over: no token of it is handed out any more, but some may still be held.
#[derive(Debug)]
pub(super) struct Epoch {
    tokens: Vec<Arc<Token>>,
}

impl Default for Grace {
    fn default() -> Self {
        Self {
            slots: std::array::from_fn(|_| Slot(RwLock::new(Arc::new(Token)))),
        }
    }
}

impl Grace {
    /// A token of the present epoch: hold it from before the lookup until the I/O has ended.
    pub(super) fn enter(&self) -> InFlight {
        let slot = self.slots[own_slot()].0.read();
        let token = Arc::clone(&slot.unwrap_or_else(PoisonError::into_inner));
        InFlight::holding(token)
    }

    /// Starts a new epoch and returns the one that is over.
    pub(super) fn turn(&self) -> Epoch {
        let tokens = self
            .slots
            .iter()
            .map(|slot| {
                let mut token = slot.0.write().unwrap_or_else(PoisonError::into_inner);
                std::mem::replace(&mut *token, Arc::new(Token))
            })
            .collect();
        Epoch { tokens }
    }
}

impl Epoch {
    /// Whether every token of the epoch is gone.
    pub(super) fn has_ended(&self) -> bool {
        // The token's drop releases, `strong_count` is relaxed: the fence makes what its holder did visible.
        let ended = self
            .tokens
            .iter()
            .all(|token| Arc::strong_count(token) == 1);
        std::sync::atomic::fence(Ordering::Acquire);
        ended
    }
}

/// The calling thread's slot.
fn own_slot() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SLOTS;
    }
    OWN.with(|own| *own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_ends_when_its_tokens_are_gone_whatever_came_later() {
        let grace = Grace::default();
        let early = grace.enter();
        let other_thread =
            std::thread::scope(|scope| scope.spawn(|| grace.enter()).join().unwrap());
        let epoch = grace.turn();
        let late = grace.enter();
        assert!(!epoch.has_ended());
        drop(early);
        assert!(!epoch.has_ended());
        drop(other_thread);
        assert!(epoch.has_ended());
        drop(late);
    }
}
