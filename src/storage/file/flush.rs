//! Making writes durable.
//!
//! # Invariants
//!
//! 1. After one failed fdatasync every later flush fails: the kernel reports a lost write only once, and what
//!    was lost stays lost.
//! 2. A flush is answered by an fdatasync that began after the flush was asked for; several may share one.
//! 3. One fdatasync at a time: of two at once, only one would be told of a lost write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_lock::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::HostFile;

/// The flushes of one file.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    /// How many fdatasyncs have begun.
    begun: AtomicU64,
    /// The number of the last fdatasync that succeeded. Held while one is under way, by those who wait for it or
    /// for the next.
    turn: Mutex<u64>,
    has_failed: AtomicBool,
}

impl Flushes {
    /// Makes everything durable that was written before the call (invariant 2).
    pub(super) async fn flush(&self, file: &HostFile, name: &str) -> Result<()> {
        let begun_before = self.begun.load(Ordering::Acquire);
        let mut last_done = self.turn.lock().await;
        self.refuse_after_failure(name)?;
        if *last_done > begun_before {
            return Ok(());
        }
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let unknown = OutcomeUnknown(&self.has_failed);
        let outcome = file.data_sync().await;
        unknown.settle();
        if let Err(error) = outcome {
            self.has_failed.store(true, Ordering::Release);
            let context = format!("{name}: a flush failed, written data may be lost");
            return Err(Error::io(context, error));
        }
        *last_done = number;
        Ok(())
    }

    fn refuse_after_failure(&self, name: &str) -> Result<()> {
        if self.has_failed.load(Ordering::Acquire) {
            let context = format!(
                "{name}: an earlier flush failed and written data may be lost: check the host's disk, \
                 then the image, and open it again"
            );
            return Err(Error::new(ErrorKind::Poisoned, context));
        }
        Ok(())
    }
}

/// Dropped in the midst of an fdatasync, whose outcome nobody will see: it counts as failed.
struct OutcomeUnknown<'a>(&'a AtomicBool);

impl OutcomeUnknown<'_> {
    fn settle(self) {
        std::mem::forget(self);
    }
}

impl Drop for OutcomeUnknown<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::sys::block_on;

    fn file_that_cannot_sync() -> HostFile {
        let (reader, _writer) = std::io::pipe().unwrap();
        HostFile::new(OwnedFd::from(reader).into(), 0, 1)
    }

    fn good_file() -> HostFile {
        HostFile::new(tempfile::tempfile().unwrap(), 0, 1)
    }

    #[test]
    fn after_a_failed_flush_every_later_one_fails() {
        let flushes = Flushes::default();
        block_on(flushes.flush(&good_file(), "disk")).unwrap();
        let first = block_on(flushes.flush(&file_that_cannot_sync(), "disk")).unwrap_err();
        assert_eq!(first.kind(), ErrorKind::Io);
        let later = block_on(flushes.flush(&good_file(), "disk")).unwrap_err();
        assert_eq!(later.kind(), ErrorKind::Poisoned);
    }

    #[test]
    fn a_flush_dropped_in_the_midst_counts_as_failed() {
        let flushes = Flushes::default();
        let file = good_file();
        block_on(async {
            let mut flush = Box::pin(flushes.flush(&file, "disk"));
            std::future::poll_fn(|context| {
                assert!(flush.as_mut().poll(context).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
        });
        let later = block_on(flushes.flush(&file, "disk")).unwrap_err();
        assert_eq!(later.kind(), ErrorKind::Poisoned);
    }

    #[test]
    fn flushes_asked_for_before_a_sync_began_share_it() {
        let flushes = Flushes::default();
        let file = good_file();
        block_on(async {
            let mut pending: Vec<_> = (0..5)
                .map(|_| Box::pin(flushes.flush(&file, "disk")))
                .collect();
            for flush in &mut pending {
                // Asks, and waits: the first for its fdatasync, the others for the first.
                std::future::poll_fn(|context| {
                    assert!(flush.as_mut().poll(context).is_pending());
                    std::task::Poll::Ready(())
                })
                .await;
            }
            for flush in pending {
                flush.await.unwrap();
            }
        });
        // The first's had begun when the others asked, so that they needed a second, but only one.
        assert_eq!(flushes.begun.load(Ordering::Relaxed), 2);
    }
}
