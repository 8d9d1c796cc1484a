//! The fast path allocates nothing: from accepting a request to telling its end.

// Counting allocations takes an allocator of our own.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use seethrough::storage::{Access, CacheMode, FileStorage, Storage};
use seethrough::sys::{Direction, IoBuf, Reactor};
use seethrough::units::HostOffset;

/// The system's allocator, which counts what the calling thread allocates.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of this same method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn fast_reads_and_writes_allocate_nothing() {
    const QUEUE: u64 = 64;
    let file = tempfile::NamedTempFile::new().unwrap();
    let storage = FileStorage::open(file.path(), Access::ReadWrite, CacheMode::Writeback).unwrap();
    let host_file = storage.host_file().unwrap();
    let reactor = Reactor::current().unwrap();
    let buffers: Vec<IoBuf> = (0..QUEUE).map(|_| IoBuf::zeroed(4096)).collect();
    let run = |direction| {
        let mut ended = 0;
        for (token, buf) in (0..).zip(&buffers) {
            let at = HostOffset(token * 4096);
            reactor.submit_fast(host_file, direction, at, buf.clone(), token);
        }
        while reactor.turn(&mut |_, outcome| {
            outcome.unwrap();
            ended += 1;
        }) {
            reactor.wait();
        }
        assert_eq!(ended, buffers.len());
    };
    run(Direction::Write);
    let before = ALLOCATIONS.get();
    for _ in 0..10 {
        run(Direction::Read);
        run(Direction::Write);
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
