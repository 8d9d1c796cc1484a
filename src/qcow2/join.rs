//! Running the independent pieces of one request at the same time, on the thread of the request.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use crate::error::Result;
use crate::storage::IoFuture;

/// A piece of a request: a storage operation, or several steps in a box.
pub(crate) type Piece<'a> = IoFuture<'a>;

/// Pieces under way at the same time; more of them would only fill the rings of others.
const WIDTH: usize = 16;

/// Runs all pieces to their end, several at a time.
///
/// A piece that fails does not stop those already begun: their I/O still touches the request's memory.
///
/// # Errors
/// The first failure; pieces not yet begun then stay undone.
pub(crate) async fn join_all<'a>(pieces: impl IntoIterator<Item = Piece<'a>>) -> Result<()> {
    let mut waiting = pieces.into_iter();
    let mut running: Vec<Piece<'a>> = Vec::new();
    let mut result = Ok(());
    poll_fn(|context| {
        loop {
            while running.len() < WIDTH && result.is_ok() {
                match waiting.next() {
                    Some(piece) => running.push(piece),
                    None => break,
                }
            }
            let before = running.len();
            running.retain_mut(|piece| match Pin::new(piece).poll(context) {
                Poll::Pending => true,
                Poll::Ready(done) => {
                    if result.is_ok() {
                        result = done;
                    }
                    false
                }
            });
            if running.is_empty() && before == 0 {
                return Poll::Ready(());
            }
            if running.len() == before {
                return Poll::Pending;
            }
        }
    })
    .await;
    result
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::sys::block_on;

    /// A piece that is pending `turns` times.
    fn piece<'a>(turns: u32, done: &'a Cell<u32>, outcome: Result<()>) -> Piece<'a> {
        IoFuture::boxed(async move {
            for _ in 0..turns {
                let mut first = true;
                poll_fn(|context| {
                    context.waker().wake_by_ref();
                    if std::mem::take(&mut first) {
                        Poll::Pending
                    } else {
                        Poll::Ready(())
                    }
                })
                .await;
            }
            done.set(done.get() + 1);
            outcome
        })
    }

    #[test]
    fn all_pieces_run_however_many_there_are() {
        let done = Cell::new(0);
        block_on(join_all((0..100).map(|i| piece(i % 7, &done, Ok(()))))).unwrap();
        assert_eq!(done.get(), 100);
        block_on(join_all([])).unwrap();
    }

    #[test]
    fn pieces_begun_end_before_a_failure_is_reported() {
        let done = Cell::new(0);
        let failure = || Err(Error::new(ErrorKind::Io, "no"));
        let pieces = [piece(0, &done, failure()), piece(9, &done, Ok(()))];
        assert_eq!(
            block_on(join_all(pieces)).unwrap_err().kind(),
            ErrorKind::Io
        );
        assert_eq!(done.get(), 2);
    }
}
