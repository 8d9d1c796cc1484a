//! The future of one operation on the calling thread's ring.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::op::{Call, Owner};
use super::ring::{Ring, Slot};
use super::{HostFile, Reactor};

/// An operation on a host file. It starts when it is first polled, on the ring of the thread that polls it, or ends
/// then where the file is [prompt](super::Promptness).
///
/// Dropped before its end, it may or may not take effect; its buffer stays with the ring until the kernel is
/// done with it.
#[must_use = "an operation starts when it is awaited"]
pub struct RingOp(State);

enum State {
    Idle(Option<(HostFile, Call)>),
    Accepted { ring: Rc<Ring>, slot: Slot },
    Ended,
}

impl RingOp {
    pub(super) fn new(file: HostFile, call: Call) -> Self {
        Self(State::Idle(Some((file, call))))
    }
}

impl Future for RingOp {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let State::Idle(call) = &mut self.0
            && let Some((file, mut call)) = call.take()
        {
            if let Some(outcome) = call.attempt(&file) {
                self.0 = State::Ended;
                return Poll::Ready(outcome);
            }
            let reactor = match Reactor::current() {
                Ok(reactor) => reactor,
                Err(error) => return Poll::Ready(Err(error)),
            };
            let owner = Owner::Future {
                waker: None,
                outcome: None,
            };
            let ring = Rc::clone(reactor.ring());
            let slot = ring.accept(file, call, owner);
            self.0 = State::Accepted { ring, slot };
        }
        let State::Accepted { ring, slot } = &self.0 else {
            return Poll::Ready(Err(io::Error::other("polled after the end")));
        };
        let outcome = ring.poll(*slot, context.waker());
        if outcome.is_ready() {
            self.0 = State::Ended;
        }
        outcome
    }
}

impl Drop for RingOp {
    fn drop(&mut self) {
        if let State::Accepted { ring, slot } = &self.0 {
            ring.abandon(*slot);
        }
    }
}
