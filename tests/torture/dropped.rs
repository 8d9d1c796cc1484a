//! Requests that are dropped before their end, as when the thread that runs them dies: what the kernel already has
//! runs on, nothing is leaked, and nothing is given to others too early.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use rand::RngExt;
use seethrough::error::{ErrorKind, Result};
use seethrough::image::{Access, Image, Mapped};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{IoFuture, MemoryStorage, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{GuestOffset, HostOffset};

use crate::engine::workload::{Operation, perform, random_range, read_range};
use crate::engine::{Allowed, check, for_each_seed, load, qemu_img, rng};
use crate::storage::Tearing;

const CLUSTER: u64 = 65536;

/// An image with so much room that no request has to wait for a flush: dropping that one forbids all further writes.
fn new_image(directory: &tempfile::TempDir, options: &str) -> Arc<MemoryStorage> {
    let name = directory.path().join("disk.qcow2").display().to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &name, "16M"]);
    load(directory.path().join("disk.qcow2").as_ref())
}

fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap()
}

fn judge(directory: &tempfile::TempDir, storage: &MemoryStorage) {
    let path = directory.path().join("disk.qcow2");
    std::fs::write(&path, storage.contents()).unwrap();
    check(&path, Allowed::Nothing).unwrap();
}

/// Polls a future some times and drops it; whether it has ended before.
fn poll_and_drop<T>(future: impl Future<Output = T>, polls: usize) -> bool {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    (0..polls).any(|_| future.as_mut().poll(&mut context).is_ready())
}

#[test]
fn requests_dropped_at_any_moment_leak_nothing_and_spoil_nothing_else() {
    for options in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=16k,extended_l2=on",
    ] {
        for_each_seed(12, options, |seed| {
            let mut rng = rng(seed);
            let directory = tempfile::tempdir().unwrap();
            let storage = new_image(&directory, options);
            let image = open(Arc::new(Tearing::new(
                Arc::clone(&storage) as Arc<dyn Storage>,
                seed,
            )));
            let mut others = vec![0; 1 << 19];
            for number in 0..60 {
                // The first half of the disk is theirs, the second half suffers.
                let range = random_range(&mut rng, 1 << 19..1 << 20, &[512, 4096]);
                let operation = match Operation::random(&mut rng, range.end - range.start) {
                    Operation::Flush => Operation::Discard,
                    other => other,
                };
                poll_and_drop(perform(&image, range, &operation), rng.random_range(1..60));
                let range = random_range(&mut rng, 0..1 << 19, &[512, 4096]);
                let (start, end) = (
                    usize::try_from(range.start).unwrap(),
                    usize::try_from(range.end).unwrap(),
                );
                others[start..end].fill(number + 1);
                block_on(perform(
                    &image,
                    range,
                    &Operation::Write(others[start..end].to_vec()),
                ))
                .unwrap();
                if rng.random_bool(0.2) {
                    block_on(image.flush()).unwrap();
                }
            }
            block_on(image.flush()).unwrap();
            assert!(read_range(&image, 0..1 << 19).unwrap() == others);
            judge(&directory, &storage);
        });
    }
}

#[test]
fn a_flush_dropped_at_any_moment_is_never_taken_for_one_that_succeeded() {
    let directory = tempfile::tempdir().unwrap();
    let fresh = new_image(&directory, "cluster_size=4k").contents();
    for polls in 1.. {
        let storage = Arc::new(MemoryStorage::new(fresh.clone()));
        let image = open(Arc::new(Tearing::new(
            Arc::clone(&storage) as Arc<dyn Storage>,
            7,
        )));
        block_on(image.write(GuestOffset(0), IoBuf::from_bytes(&[7; 8192]))).unwrap();
        if poll_and_drop(image.flush(), polls) {
            assert!(polls > 10, "a flush takes its time");
            return;
        }
        let error = block_on(image.flush()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Poisoned);
        assert!(error.to_string().contains("cut short"), "{error}");
        assert_eq!(read_range(&image, 0..8192).unwrap(), [7; 8192]);
        drop(image);
        std::fs::write(directory.path().join("disk.qcow2"), storage.contents()).unwrap();
        check(&directory.path().join("disk.qcow2"), Allowed::Leaks).unwrap();
    }
}

/// Memory whose writes, when told to be slow, go on after their futures were dropped, as the kernel's do.
struct Kernel {
    inner: Arc<MemoryStorage>,
    is_slow: AtomicBool,
    under_way: Mutex<Vec<(HostOffset, IoBuf)>>,
}

impl Kernel {
    fn new(inner: Arc<MemoryStorage>) -> Self {
        Self {
            inner,
            is_slow: AtomicBool::new(false),
            under_way: Mutex::default(),
        }
    }

    /// Ends what is under way; how many writes that was.
    fn finish(&self) -> usize {
        let under_way = std::mem::take(&mut *self.under_way.lock().unwrap());
        let count = under_way.len();
        for (at, buf) in under_way {
            block_on(self.inner.writev(at, buf)).unwrap();
        }
        count
    }
}

impl Storage for Kernel {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.inner.readv(at, buf)
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        if !self.is_slow.load(Ordering::SeqCst) {
            return self.inner.writev(at, buf);
        }
        let mut buf = Some(buf);
        IoFuture::boxed(poll_fn(move |_| -> Poll<Result<()>> {
            if let Some(buf) = buf.take() {
                self.under_way.lock().unwrap().push((at, buf));
            }
            Poll::Pending
        }))
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
        1
    }

    fn name(&self) -> &str {
        "memory behind a kernel"
    }
}

fn host_of(image: &Qcow2, at: u64) -> HostOffset {
    match image.map_read(GuestOffset(at), 512) {
        Mapped::Extent { at, .. } => at,
        _ => panic!("{at} is not mapped"),
    }
}

/// Begins a write that the kernel has not ended when its future is dropped.
fn write_and_drop(kernel: &Kernel, image: &Qcow2, at: u64) -> HostOffset {
    kernel.is_slow.store(true, Ordering::SeqCst);
    let buf = IoBuf::from_bytes(&[0xee; 512]);
    assert!(!poll_and_drop(image.write(GuestOffset(at), buf), 3));
    kernel.is_slow.store(false, Ordering::SeqCst);
    let under_way = kernel.under_way.lock().unwrap();
    let (at, _) = under_way.first().expect("the kernel has it");
    HostOffset(at.0 / CLUSTER * CLUSTER)
}

#[test]
fn clusters_of_a_dropped_write_are_not_given_to_others_before_the_kernel_is_done_with_them() {
    for was_allocated in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let memory = new_image(&directory, "cluster_size=64k");
        let kernel = Arc::new(Kernel::new(Arc::clone(&memory)));
        let image = open(Arc::clone(&kernel) as Arc<dyn Storage>);
        let write = |at: u64| {
            block_on(image.write(GuestOffset(at), IoBuf::from_bytes(&[1; 65536]))).unwrap();
        };
        if was_allocated {
            write(0);
        }
        let host = write_and_drop(&kernel, &image, 0);
        // The cluster has no owner any more.
        block_on(image.discard(GuestOffset(0), CLUSTER)).unwrap();
        for number in 1..4 {
            block_on(image.flush()).unwrap();
            write(number * CLUSTER);
            assert_ne!(
                host_of(&image, number * CLUSTER),
                host,
                "the kernel still writes there"
            );
        }
        assert!(kernel.finish() > 0);
        block_on(image.flush()).unwrap();
        write(4 * CLUSTER);
        assert_eq!(host_of(&image, 4 * CLUSTER), host, "its room is used again");
        for number in 1..5 {
            assert_eq!(
                read_range(&image, number * CLUSTER..(number + 1) * CLUSTER).unwrap(),
                [1; 65536]
            );
        }
        block_on(image.flush()).unwrap();
        judge(&directory, &memory);
    }
}
