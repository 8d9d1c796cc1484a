//! What a batch of requests costs that a driver offers by one kick: a worker in this process, a driver beside it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use seethrough::chain::format::Format;
use seethrough::chain::host::HostOptions;
use seethrough::chain::registry::{DiskRequest, Registry};
use seethrough::image::Access;
use seethrough::sys::block_on;
use seethrough::vhost_user::{Endpoint, Server, Vm};

use crate::counting::{Counts, VM, counts, difference, wait_until_asleep};
use crate::driver::{Client, Request, all_features};

const BATCH: usize = 32;
const BLOCK: usize = 4096;
const DISK_LEN: usize = 16 << 20;

/// A batch of reads that the page cache has: each ends in a call of its own, and none goes through the ring; the driver
/// is told, and the worker sleeps.
const READS: Counts = Counts {
    submissions: 0,
    submitted: 0,
    prompt_reads: BATCH,
    reaping: 0,
    notifications: 1,
    sleeps: 1,
    others: 0,
    allocations: 0,
    copies: 0,
};

/// Serves an image from this process, to this client; until the process ends.
fn serve(image: &Path, format: Format) -> Client {
    let socket = image.with_file_name(format!("{format:?}.sock"));
    let request = DiskRequest {
        path: image.to_owned(),
        format: Some(format),
        access: Access::ReadWrite,
    };
    let endpoint = Endpoint::listen(&socket).unwrap();
    thread::spawn(move || {
        let registry = Registry::new(HostOptions::default());
        let disk = block_on(registry.open(&request)).unwrap();
        let mut server = Server::new().unwrap();
        let vm = Vm::new(VM, disk.image, "", 1, 256).unwrap();
        server.add(vm, endpoint).unwrap();
        server.run().unwrap();
    });
    Client::connect(&socket, 1, 128, all_features())
}

/// Offers a batch by one kick; what it cost until the worker slept again.
fn cost(client: &mut Client, request: impl Fn(u64) -> Request) -> Counts {
    wait_until_asleep();
    let before = counts();
    for (slot, number) in (0..BATCH).zip(0..) {
        client.offer(0, slot, request(number * BLOCK as u64));
    }
    client.kick(0);
    let ended = client.wait(0, BATCH);
    assert!(ended.values().all(|outcome| *outcome == 0), "{ended:?}");
    wait_until_asleep();
    difference(before, counts())
}

fn read(at: u64) -> Request {
    Request::Read { at, len: BLOCK }
}

fn write(at: u64) -> Request {
    Request::Write { at, len: BLOCK }
}

/// A batch of writes, as far as that is exact: one call hands all of them to the kernel.
const WRITES: Counts = Counts {
    submissions: 1,
    submitted: BATCH,
    prompt_reads: 0,
    ..READS
};

/// How often the driver may be told of a batch of reads: whenever this many have been served, so that it can go on, and at
/// the end. A driver that has not looked since it was last told is not told again, so this is the most.
const TOLD_AFTER: usize = 6;

fn assert_cost_of_reads(cost: Counts, format: Format) {
    assert!(
        (1..=BATCH.div_ceil(TOLD_AFTER)).contains(&cost.notifications),
        "{format:?}: {cost:?}"
    );
    let exact = Counts {
        notifications: 1,
        ..cost
    };
    assert_eq!(exact, READS, "{format:?}");
}

/// Writes end when the filesystem's workers have done them, so how often the driver is told varies. So does how often a
/// turn that finds more and more ended gives way to other events: it writes its own descriptor, and reads it when it is
/// back. The rest is exact.
fn assert_cost_of_writes(cost: Counts) {
    assert!((1..=BATCH).contains(&cost.notifications), "{cost:?}");
    assert!(cost.others.is_multiple_of(2), "{cost:?}");
    let exact = Counts {
        notifications: 1,
        reaping: 0,
        sleeps: 1,
        others: 0,
        ..cost
    };
    assert_eq!(exact, WRITES);
}

fn check(image: &Path, format: Format) {
    let mut client = serve(image, format);
    for _ in 0..3 {
        cost(&mut client, write);
        cost(&mut client, read);
    }
    for _ in 0..20 {
        assert_cost_of_reads(cost(&mut client, read), format);
        assert_cost_of_writes(cost(&mut client, write));
    }
}

fn raw_disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.raw");
    std::fs::write(&path, vec![7; DISK_LEN]).unwrap();
    path
}

/// One after the other, because one worker is watched.
#[test]
fn a_batch_costs_one_call_for_each_read_or_one_for_all_writes_and_few_notifications() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let raw = raw_disk(dir.path());
    let qcow2 = dir.path().join("disk.qcow2");
    let status = Command::new(env!("CARGO_BIN_EXE_seethrough"))
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status();
    assert!(status.unwrap().success());
    check(&raw, Format::Raw);
    check(&qcow2, Format::Qcow2);
}
