//! When has every I/O ended that may have looked up a mapping before a given moment?
//!
//! # Invariants
//!
//! 1. Whoever looks up a mapping takes a token *before* the lookup and keeps it until the I/O has ended.
//! 2. [`Grace::turn`] starts a new epoch; a token of the old one can no longer be taken once it has returned. So
//!    what was unlinked before the turn is only known to holders of tokens of that epoch or earlier ones.
//! 3. Every token holds its epoch's lock for reading. So [`Epoch::has_ended`] is true only once all those tokens are
//!    gone, and [`Grace::all_ended`] is ready once those of all epochs so far are.
//!
//! Tokens are handed out from several slots, one per thread as far as they go, so that threads do not fight for
//! one cache line on every request.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use async_lock::RwLockReadGuardArc;

use super::InFlight;

const SLOTS: usize = 16;

/// Held for reading by every token of an epoch.
type EpochLock = async_lock::RwLock<()>;

/// Something to count references to.
#[derive(Debug)]
struct Token {
    _epoch: RwLockReadGuardArc<()>,
}

impl Token {
    /// A token of the present epoch or of the one that comes next.
    fn of(epoch: &Arc<EpochLock>) -> Arc<Self> {
        let held = epoch.try_read_arc();
        Arc::new(Self {
            _epoch: held.expect("nobody waits for an epoch that is not over"),
        })
    }
}

/// A slot on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Slot(RwLock<Arc<Token>>);

/// Hands out tokens of the present epoch.
#[derive(Debug)]
pub(crate) struct Grace {
    slots: [Slot; SLOTS],
    epochs: Mutex<Epochs>,
}

#[derive(Debug)]
struct Epochs {
    present: Arc<EpochLock>,
    /// Those that are over, as far as tokens of them may still be held.
    past: Vec<Arc<EpochLock>>,
}

/// An epoch that is over: no token of it is handed out any more, but some may still be held.
#[derive(Debug)]
pub(crate) struct Epoch(Arc<EpochLock>);

impl Default for Grace {
    fn default() -> Self {
        let present = Arc::default();
        Self {
            slots: std::array::from_fn(|_| Slot(RwLock::new(Token::of(&present)))),
            epochs: Mutex::new(Epochs {
                present,
                past: Vec::new(),
            }),
        }
    }
}

impl Grace {
    /// A token of the present epoch: hold it from before the lookup until the I/O has ended.
    pub(crate) fn enter(&self) -> InFlight {
        let slot = self.slots[own_slot()].0.read();
        let token = Arc::clone(&slot.unwrap_or_else(PoisonError::into_inner));
        InFlight::holding(token)
    }

    /// Starts a new epoch and returns the one that is over.
    pub(crate) fn turn(&self) -> Epoch {
        let next = Arc::default();
        // Two that turn at once do so one after the other: all slots are of one epoch, then all of the next.
        let mut epochs = self.lock_epochs();
        for slot in &self.slots {
            let mut token = slot.0.write().unwrap_or_else(PoisonError::into_inner);
            *token = Token::of(&next);
        }
        let over = std::mem::replace(&mut epochs.present, next);
        epochs.past.retain(|epoch| epoch.try_write().is_none());
        epochs.past.push(Arc::clone(&over));
        Epoch(over)
    }

    /// Waits until all I/O has ended that began before.
    pub(crate) async fn all_ended(&self) {
        self.turn();
        let past = self.lock_epochs().past.clone();
        for epoch in past {
            drop(epoch.write().await);
        }
    }

    fn lock_epochs(&self) -> MutexGuard<'_, Epochs> {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Epoch {
    /// Whether every token of the epoch is gone. What their holders did is visible then.
    pub(crate) fn has_ended(&self) -> bool {
        self.0.try_write().is_some()
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
    use std::future::Future;

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

    #[test]
    fn waiting_for_all_io_ends_with_the_last_token_of_any_epoch_before() {
        let grace = Grace::default();
        let first = grace.enter();
        let epoch = grace.turn();
        let second = grace.enter();
        let mut ended = Box::pin(grace.all_ended());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(ended.as_mut().poll(&mut context).is_pending());
        let _late = grace.enter();
        drop(second);
        assert!(ended.as_mut().poll(&mut context).is_pending());
        std::thread::scope(|scope| {
            scope.spawn(move || drop(first));
            crate::sys::block_on(ended);
        });
        assert!(epoch.has_ended());
    }
}
