//! Storage that makes concurrency show: one that tears requests, and one that waits for company.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;

use seethrough::storage::{IoFuture, Storage, ZeroMode};
use seethrough::sys::IoBuf;
use seethrough::units::HostOffset;

/// Moves data sector by sector, in random order and with others in between: no more is atomic on a disk.
pub struct Tearing {
    inner: Arc<dyn Storage>,
    state: AtomicU64,
}

/// What is moved at once.
const SECTOR: usize = 512;

/// Pieces of one operation at most.
const PIECES: usize = 4;

impl Tearing {
    pub fn new(inner: Arc<dyn Storage>, seed: u64) -> Self {
        Self {
            inner,
            state: AtomicU64::new(seed << 1 | 1),
        }
    }

    fn random(&self, below: usize) -> usize {
        let next = |state: u64| {
            state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407)
        };
        let state = self
            .state
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
                Some(next(state))
            });
        let state = state.unwrap_or_else(|state| state);
        usize::try_from(state >> 33).expect("31 bits") % below
    }

    /// Lets others go first, 0 to 3 times.
    async fn pause(&self) {
        let mut turns = self.random(4);
        poll_fn(|context| {
            if turns == 0 {
                return Poll::Ready(());
            }
            turns -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// The parts of a buffer that belongs at `at`, in random order.
    fn pieces(&self, at: HostOffset, buf: &IoBuf) -> Vec<(HostOffset, IoBuf)> {
        let first = SECTOR - usize::try_from(at.0 % SECTOR as u64).expect("small");
        let boundaries: Vec<usize> = (first..buf.len()).step_by(SECTOR).collect();
        let mut cuts = Vec::new();
        if !boundaries.is_empty() {
            cuts.extend((1..PIECES).map(|_| boundaries[self.random(boundaries.len())]));
        }
        cuts.extend([0, buf.len()]);
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces: Vec<_> = cuts
            .windows(2)
            .map(|cut| (HostOffset(at.0 + cut[0] as u64), buf.slice(cut[0]..cut[1])))
            .collect();
        for index in (1..pieces.len()).rev() {
            pieces.swap(index, self.random(index + 1));
        }
        pieces
    }
}

impl Storage for Tearing {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            for (at, part) in self.pieces(at, &buf) {
                self.pause().await;
                self.inner.readv(at, part).await?;
            }
            self.pause().await;
            Ok(())
        })
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            for (at, part) in self.pieces(at, &buf) {
                self.pause().await;
                self.inner.writev(at, part).await?;
            }
            self.pause().await;
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            self.pause().await;
            self.inner.flush().await?;
            self.pause().await;
            Ok(())
        })
    }

    /// What is discarded reads as anything: here as something that shows.
    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        let inside = self.len().min(at.0 + len).saturating_sub(at.0);
        self.writev(
            at,
            IoBuf::from_bytes(&vec![0xdb; usize::try_from(inside).expect("small")]),
        )
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            self.pause().await;
            self.inner.write_zeroes(at, len, mode).await
        })
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        self.inner.set_len(len)
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn alignment(&self) -> u32 {
        self.inner.alignment()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

/// Memory whose writes end only when so many of them are under way at the same time.
pub struct Company {
    inner: Arc<dyn Storage>,
    wanted: usize,
    present: AtomicUsize,
}

impl Company {
    pub fn new(inner: Arc<dyn Storage>, wanted: usize) -> Self {
        Self {
            inner,
            wanted,
            present: AtomicUsize::new(0),
        }
    }

    /// Ready when enough have come, for good.
    async fn wait(&self) {
        self.present.fetch_add(1, Ordering::SeqCst);
        poll_fn(|context| {
            if self.present.load(Ordering::SeqCst) >= self.wanted {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
}

impl Storage for Company {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.inner.readv(at, buf)
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        IoFuture::boxed(async move {
            self.wait().await;
            self.inner.writev(at, buf).await
        })
    }

    fn flush(&self) -> IoFuture<'_> {
        self.inner.flush()
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        self.inner.discard(at, len)
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        self.inner.write_zeroes(at, len, mode)
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        self.inner.set_len(len)
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn alignment(&self) -> u32 {
        self.inner.alignment()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}
