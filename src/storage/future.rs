//! A storage operation under way, without an allocation where the ring or memory does all the work.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::error::{Error, Result};
use crate::sys::RingOp;

/// A storage operation under way. It starts when it is first polled, and stays on the thread that does so.
///
/// Dropped before its end, it may or may not take effect.
#[must_use = "an operation starts when it is awaited"]
pub struct IoFuture<'a>(Kind<'a>);

enum Kind<'a> {
    Ready(Option<Result<()>>),
    Ring(RingOp, Doing<'a>),
    Boxed(Pin<Box<dyn Future<Output = Result<()>> + 'a>>),
}

/// What an operation does, for the message of its error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Doing<'a> {
    pub(super) verb: &'static str,
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) name: &'a str,
}

impl fmt::Display for Doing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            verb,
            at,
            len,
            name,
        } = self;
        write!(f, "{name}: {verb} {len} bytes at {at}")
    }
}

impl<'a> IoFuture<'a> {
    /// An operation that has ended already.
    pub fn ready(outcome: Result<()>) -> Self {
        Self(Kind::Ready(Some(outcome)))
    }

    /// An operation in several steps.
    pub fn boxed(future: impl Future<Output = Result<()>> + 'a) -> Self {
        Self(Kind::Boxed(Box::pin(future)))
    }

    /// An operation that is one call of the kernel.
    pub(super) fn ring(op: RingOp, doing: Doing<'a>) -> Self {
        Self(Kind::Ring(op, doing))
    }
}

impl Future for IoFuture<'_> {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Kind::Ready(outcome) => Poll::Ready(outcome.take().unwrap_or(Ok(()))),
            Kind::Ring(op, doing) => Pin::new(op)
                .poll(context)
                .map_err(|error| Error::io(doing.to_string(), error)),
            Kind::Boxed(future) => future.as_mut().poll(context),
        }
    }
}
