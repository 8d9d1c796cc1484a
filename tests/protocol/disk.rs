//! A disk in memory that takes its time, and tells what it was asked.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use seethrough::error::Result;
use seethrough::image::{Allocation, Image, ImageFuture, Limits, Mapped};
use seethrough::storage::{MemoryStorage, Storage, ZeroMode};
use seethrough::sys::IoBuf;
use seethrough::units::{GuestOffset, HostOffset};

/// How slow a slow disk is: long against everything that a front-end could do instead of waiting.
const DELAY: Duration = Duration::from_millis(200);

/// What a disk did.
#[derive(Default)]
pub(crate) struct Asked {
    pub(crate) begun: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) sessions: AtomicU64,
    pub(crate) zeroed: Mutex<Vec<(u64, u64, ZeroMode)>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speed {
    Immediate,
    Slow,
}

pub(crate) struct TestDisk {
    storage: MemoryStorage,
    len: u64,
    speed: Speed,
    pub(crate) asked: Arc<Asked>,
}

impl TestDisk {
    pub(crate) fn new(bytes: Vec<u8>, speed: Speed) -> Self {
        let len = u64::try_from(bytes.len()).expect("a small disk");
        Self {
            storage: MemoryStorage::new(bytes),
            len,
            speed,
            asked: Arc::default(),
        }
    }

    async fn pause(&self) {
        self.asked.begun.fetch_add(1, Ordering::SeqCst);
        if self.speed == Speed::Slow {
            Delay::default().await;
        }
    }
}

/// Another thread ends it, as a host's kernel would.
#[derive(Default)]
struct Delay {
    over: Option<Arc<AtomicU64>>,
}

impl Future for Delay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if let Some(over) = &self.over {
            return if over.load(Ordering::SeqCst) == 1 {
                Poll::Ready(())
            } else {
                Poll::Pending
            };
        }
        let over = Arc::new(AtomicU64::new(0));
        self.over = Some(Arc::clone(&over));
        let waker = context.waker().clone();
        thread::spawn(move || {
            thread::sleep(DELAY);
            over.store(1, Ordering::SeqCst);
            waker.wake();
        });
        Poll::Pending
    }
}

impl Image for TestDisk {
    fn virtual_size(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 65536,
            discard_granularity: 4096,
        }
    }

    fn map_read(&self, _at: GuestOffset, _len: u64) -> Mapped {
        Mapped::Slow
    }

    fn map_write(&self, _at: GuestOffset, _len: u64) -> Mapped {
        Mapped::Slow
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move {
            self.pause().await;
            self.storage.readv(HostOffset(at.0), buf).await
        })
    }

    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move {
            self.pause().await;
            self.storage.writev(HostOffset(at.0), buf).await
        })
    }

    fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> ImageFuture<'_> {
        self.asked
            .zeroed
            .lock()
            .expect("no test panics in here")
            .push((at.0, len, mode));
        Box::pin(self.storage.write_zeroes(HostOffset(at.0), len, mode))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_> {
        Box::pin(self.storage.discard(HostOffset(at.0), len))
    }

    fn flush(&self) -> ImageFuture<'_> {
        self.asked.flushes.fetch_add(1, Ordering::SeqCst);
        Box::pin(self.storage.flush())
    }

    fn allocation(&self, _at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        Box::pin(async move { Result::Ok((Allocation::Data(None), len)) })
    }

    fn begin_session(&self) -> ImageFuture<'_> {
        self.asked.sessions.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    fn name(&self) -> &str {
        "test disk"
    }
}
