//! The fast path's costs, by count: allocations, system calls and copies. Times differ from run to run; these do not, so
//! whatever makes the fast path longer fails here.

// Disks of tests are small, and what stands in for the C library casts as it does.
#![allow(clippy::unwrap_used)]
#![allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]

mod counting;
#[path = "../client/driver.rs"]
#[allow(dead_code)]
mod driver;
mod vring;

use counting::own_allocations;
use seethrough::storage::{Access, CacheMode, FileStorage, Storage};
use seethrough::sys::{Direction, IoBuf, Reactor};
use seethrough::units::HostOffset;

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
    let before = own_allocations();
    for _ in 0..10 {
        run(Direction::Read);
        run(Direction::Write);
    }
    assert_eq!(own_allocations() - before, 0);
}
