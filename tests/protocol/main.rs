//! The device against front-ends and drivers that do what no well-behaved one does, and the promises of the
//! protocol that no guest would notice broken until it is too late.

mod disk;
mod front_end;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use disk::{Speed, TestDisk};
use front_end::{DATA, EVENT_IDX, FrontEnd, INDIRECT, NEXT, Place, QUEUE_SIZE, WRITE};
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::create::{CreateOptions, create};
use seethrough::storage::{Fault, FaultStorage, MemoryStorage, Operation, Storage, ZeroMode};
use seethrough::sys::block_on;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const DISK_LEN: usize = 1 << 20;
const READ: u32 = 0;
const WRITE_REQUEST: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const UNTOUCHED: u8 = 0xff;

fn disk(speed: Speed) -> Arc<TestDisk> {
    let bytes = (0..DISK_LEN).map(|i| u8::try_from(i / 512 % 251).expect("below 256"));
    Arc::new(TestDisk::new(bytes.collect(), speed))
}

fn immediate(features: u64) -> FrontEnd {
    FrontEnd::new(disk(Speed::Immediate), 1, features)
}

/// Offers the chain at descriptor 0, whose status byte would be at `place`'s; the used length and the status.
fn offer(front_end: &mut FrontEnd, place: Place) -> (u32, u8) {
    front_end
        .memory
        .write_obj(UNTOUCHED, place.status())
        .expect("guest memory");
    front_end.publish(0, 0);
    front_end.kick(0);
    let (head, len) = front_end.next_used(0);
    assert_eq!(head, 0, "another descriptor came back");
    (len, front_end.status(place))
}

#[test]
fn malformed_chains_return_their_descriptors_and_the_device_lives() {
    let mut f = immediate(EVENT_IDX);
    f.set_used_event(0, 0);
    let place = Place(DATA);
    let (data, status) = (place.data().0, place.status().0);
    let end_of_memory = 4 << 20;
    f.header(DATA, READ, 0);
    let follow = |f: &FrontEnd, used: u16| f.set_used_event(0, used);

    // No status byte at all.
    f.descriptor(0, 0, DATA, 16, 0, 0);
    assert_eq!(offer(&mut f, place), (0, UNTOUCHED));
    follow(&f, 1);
    // A status byte outside memory.
    f.descriptor(0, 0, DATA, 16, NEXT, 1);
    f.descriptor(0, 1, 1 << 40, 1, WRITE, 0);
    assert_eq!(offer(&mut f, place), (0, UNTOUCHED));
    follow(&f, 2);
    // A chain that never ends.
    f.descriptor(0, 0, status, 1, NEXT | WRITE, 0);
    assert_eq!(offer(&mut f, place), (0, UNTOUCHED));
    follow(&f, 3);
    // A link out of the table.
    f.descriptor(0, 0, DATA, 16, NEXT, QUEUE_SIZE);
    assert_eq!(offer(&mut f, place), (0, UNTOUCHED));
    follow(&f, 4);
    // An indirect table outside memory, of an odd length, and within another.
    for (at, len) in [(1 << 40, 32), (data, 17), (data, 0)] {
        f.descriptor(0, 0, at, len, INDIRECT, 0);
        assert_eq!(offer(&mut f, place), (0, UNTOUCHED));
        let used = f.used_idx(0);
        follow(&f, used);
    }
    f.descriptor(0, 0, data, 16, INDIRECT, 0);
    f.descriptor_at(data, data, 16, INDIRECT, 0);
    assert_eq!(offer(&mut f, place), (0, UNTOUCHED));
    follow(&f, 8);

    // From here on there is a status byte.
    let mut failing = |parts: &[(u64, u32, u16)], expected: u8| {
        for (number, (at, len, flags)) in (0u16..).zip(parts) {
            let last = usize::from(number) + 1 == parts.len();
            f.descriptor(
                0,
                number,
                *at,
                *len,
                flags | if last { 0 } else { NEXT },
                number + 1,
            );
        }
        assert_eq!(offer(&mut f, place), (1, expected), "{parts:?}");
        let used = f.used_idx(0);
        follow(&f, used);
    };
    let tail = (status, 1, WRITE);
    failing(&[(DATA, 15, 0), tail], IOERR); // a short header
    failing(&[(end_of_memory - 8, 16, 0), tail], IOERR); // a header over the end of memory
    failing(&[(DATA, 16, 0), (data, 511, WRITE), tail], IOERR); // no whole sectors
    failing(&[(DATA, 16, 0), (data, 512, 0), tail], IOERR); // a read that would write
    failing(&[tail, (DATA, 16, 0)], IOERR); // in the wrong order
    failing(&[(DATA, 16, 0), (1 << 40, 512, WRITE), tail], IOERR); // pages outside memory
    failing(
        &[(DATA, 16, 0), (end_of_memory - 256, 512, WRITE), tail],
        IOERR,
    ); // over the end of memory
    let mut too_many = vec![(DATA, 16, 0)];
    too_many.resize(usize::from(QUEUE_SIZE) - 1, (data, 8, WRITE));
    too_many.push(tail);
    failing(&too_many, IOERR);
    f.assert_alive(0);
    f.leave();
}

#[test]
fn unknown_types_are_unsupported_and_wrong_sectors_fail() {
    let mut f = immediate(0);
    for (kind, sector, expected) in [
        (2, 0, UNSUPP),
        (9, 0, UNSUPP),
        (u32::MAX, 0, UNSUPP),
        (READ, u64::MAX, IOERR),
        (READ, u64::MAX / 512 + 1, IOERR),
        (READ, (DISK_LEN / 512) as u64, IOERR),
        (WRITE_REQUEST, (DISK_LEN / 512) as u64, IOERR),
        (READ, (DISK_LEN / 512) as u64 - 1, OK),
    ] {
        let place = f.request(0, 0, kind, sector, 512);
        f.kick(0);
        f.next_used(0);
        assert_eq!(f.status(place), expected, "type {kind}, sector {sector}");
    }
    f.assert_alive(0);
    f.leave();
}

#[test]
fn the_serial_is_read() {
    let mut f = immediate(0);
    let place = f.request(0, 0, GET_ID, 0, 20);
    f.kick(0);
    assert_eq!(f.next_used(0), (0, 21));
    let mut id = [0xee; 20];
    f.memory
        .read_slice(&mut id, place.data())
        .expect("guest memory");
    assert_eq!(&id, b"a serial\0\0\0\0\0\0\0\0\0\0\0\0");
    f.leave();
}

#[test]
fn several_segments_are_zeroed_each_with_its_flag() {
    let disk = disk(Speed::Immediate);
    let mut f = FrontEnd::new(Arc::clone(&disk) as _, 1, 0);
    let place = f.request(0, 0, WRITE_ZEROES, 0, 32);
    for (number, (sector, flags)) in [(8u64, 0u32), (64, 1)].into_iter().enumerate() {
        let at = GuestAddress(place.data().0 + 16 * number as u64);
        f.memory.write_obj(sector, at).expect("guest memory");
        f.memory
            .write_obj(4u32, GuestAddress(at.0 + 8))
            .expect("guest memory");
        f.memory
            .write_obj(flags, GuestAddress(at.0 + 12))
            .expect("guest memory");
    }
    f.kick(0);
    assert_eq!(f.next_used(0), (0, 1));
    assert_eq!(f.status(place), OK);
    let expected = [
        (4096, 2048, ZeroMode::KeepAllocated),
        (32768, 2048, ZeroMode::MayUnmap),
    ];
    assert_eq!(*disk.asked.zeroed.lock().expect("unpoisoned"), expected);
    f.leave();
}

#[test]
fn get_vring_base_answers_after_the_last_request_has_ended() {
    let mut f = FrontEnd::new(disk(Speed::Slow), 2, 0);
    let places: Vec<Place> = (0..4)
        .map(|i| f.request(0, i * 3, READ, u64::from(i), 512))
        .collect();
    f.kick(0);
    // Not before all have begun: those that have not are left in the ring, and rightly so.
    let base = wait_until_begun(&mut f, 4);
    assert_eq!(base, 4);
    assert_eq!(f.used_idx(0), 4, "answered with requests under way");
    assert!(places.iter().all(|place| f.status(*place) == OK));
    // From now on the ring is left alone.
    f.calls(0);
    let place = f.request(0, 12, READ, 0, 512);
    f.kick(0);
    f.assert_alive(1);
    assert_eq!(
        (f.used_idx(0), f.status(place), f.calls(0)),
        (4, UNTOUCHED, 0)
    );
    // Set up again, it goes on where it was.
    f.start(0, u16::try_from(base).expect("a ring index"));
    f.assert_used(0, &[0, 3, 6, 9, 12]);
    assert_eq!(f.status(place), OK);
    f.leave();
}

/// Asks for the base of ring 0 until all `count` requests were taken; they need not have ended.
fn wait_until_begun(f: &mut FrontEnd, count: u32) -> u32 {
    loop {
        let base = f.protocol.get_vring_base(0).expect("get_vring_base");
        assert_eq!(
            u32::from(f.used_idx(0)),
            base,
            "answered with requests under way"
        );
        if base >= count {
            return base;
        }
        f.start(0, u16::try_from(base).expect("a ring index"));
    }
}

#[test]
fn disabling_answers_after_the_last_request_has_ended() {
    let disk = disk(Speed::Slow);
    let mut f = FrontEnd::new(Arc::clone(&disk) as _, 2, 0);
    for i in 0..3 {
        f.request(0, i * 3, READ, 0, 512);
    }
    f.kick(0);
    while disk.asked.begun.load(Ordering::SeqCst) < 3 {
        std::thread::yield_now();
    }
    f.protocol
        .set_vring_enable(0, false)
        .expect("set_vring_enable");
    assert_eq!(f.used_idx(0), 3, "answered with requests under way");
    // What is offered meanwhile waits, and is found without a further kick.
    let place = f.request(0, 9, READ, 0, 512);
    f.kick(0);
    f.assert_alive(1);
    assert_eq!((f.used_idx(0), f.status(place)), (3, UNTOUCHED));
    f.protocol
        .set_vring_enable(0, true)
        .expect("set_vring_enable");
    f.assert_used(0, &[0, 3, 6, 9]);
    f.leave();
}

#[test]
fn a_front_end_that_leaves_has_its_requests_ended_and_flushed() {
    let disk = disk(Speed::Slow);
    let mut f = FrontEnd::new(Arc::clone(&disk) as _, 1, 0);
    let place = f.request(0, 0, WRITE_REQUEST, 0, 512);
    f.kick(0);
    while disk.asked.begun.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let memory = f.memory.clone();
    f.leave();
    assert_eq!(
        memory.read_obj::<u8>(place.status()).expect("guest memory"),
        OK
    );
    assert!(disk.asked.flushes.load(Ordering::SeqCst) > 0);
    assert_eq!(disk.asked.sessions.load(Ordering::SeqCst), 1);
}

#[test]
fn memory_is_removed_after_the_last_request_and_the_ring_returns_with_it() {
    let disk = disk(Speed::Slow);
    let mut f = FrontEnd::new(Arc::clone(&disk) as _, 1, 0);
    f.request(0, 0, READ, 0, 512);
    f.kick(0);
    while disk.asked.begun.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let region = f.region();
    f.protocol
        .remove_mem_region(&region)
        .expect("remove_mem_region");
    assert_eq!(f.used_idx(0), 1, "answered with a request under way");
    f.request(0, 3, READ, 0, 512);
    f.kick(0);
    f.protocol.add_mem_region(&region).expect("add_mem_region");
    assert_eq!(f.next_used(0).0, 0);
    assert_eq!(f.next_used(0).0, 3);
    f.assert_alive(0);
    f.leave();
}

#[test]
fn a_driver_is_notified_where_it_asked_and_nowhere_else() {
    let mut f = immediate(EVENT_IDX);
    f.set_used_event(0, 9);
    for i in 0..10 {
        f.request(0, i * 3, READ, 0, 512);
    }
    f.kick(0);
    assert_eq!(f.wait_for_call(0), 1);
    assert_eq!(f.used_idx(0), 10);
    // Not yet at the event: nothing to be told.
    f.set_used_event(0, 19);
    for i in 0..9 {
        f.request(0, i * 3, READ, 0, 512);
    }
    f.kick(0);
    while f.used_idx(0) < 19 {
        std::thread::yield_now();
    }
    f.protocol.get_vring_base(0).expect("get_vring_base");
    assert_eq!(f.calls(0), 0, "notified without need");
    f.leave();
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let mut f = immediate(0);
    f.calls(0);
    f.set_avail_flags(0, 1);
    f.request(0, 0, READ, 0, 512);
    f.kick(0);
    while f.used_idx(0) < 1 {
        std::thread::yield_now();
    }
    f.protocol.get_vring_base(0).expect("get_vring_base");
    assert_eq!(f.calls(0), 0);
    f.leave();
}

#[test]
fn a_replaced_call_descriptor_is_used_at_once() {
    let mut f = immediate(0);
    f.assert_alive(0);
    let call = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    f.protocol.set_vring_call(0, &call).expect("set_vring_call");
    let old = std::mem::replace(&mut f.rings[0].call, call);
    // Completions of just before may have gone to the old one.
    assert_eq!(f.calls(0), 1);
    let _ = old.read();
    f.assert_alive(0);
    assert!(old.read().is_err(), "the old descriptor is still used");
    f.leave();
}

#[test]
fn a_full_call_counter_keeps_nobody_waiting() {
    let shared = disk(Speed::Immediate);
    let mut f = FrontEnd::new(shared.clone(), 2, 0);
    let mut sibling = FrontEnd::new(shared, 1, 0);
    let call = EventFd::new(0).expect("an eventfd that blocks");
    f.protocol.set_vring_call(0, &call).expect("set_vring_call");
    call.read().expect("the driver was told at once");
    call.write(u64::MAX - 1).expect("an empty counter");
    let deadline = Instant::now() + Duration::from_secs(60);
    for i in 0..10 {
        f.request(0, i * 3, READ, 0, 512);
        f.kick(0);
        while f.used_idx(0) <= i {
            assert!(Instant::now() < deadline, "the worker waits");
            std::thread::yield_now();
        }
    }
    f.assert_alive(1);
    sibling.assert_alive(0);
    f.leave();
    sibling.leave();
    assert!(call.read().expect("an eventfd") >= u64::MAX - 1);
}

#[test]
fn a_call_descriptor_that_is_no_eventfd_ends_the_session_and_no_other_one() {
    let shared = disk(Speed::Immediate);
    let mut sibling = FrontEnd::new(shared.clone(), 1, 0);
    let (_reader, pipe) = std::io::pipe().expect("a pipe");
    let device = std::fs::File::open("/dev/null").expect("a device");
    for refused in [pipe.as_raw_fd(), device.as_raw_fd()] {
        let mut f = FrontEnd::new(shared.clone(), 1, 0);
        assert_eq!(f.set_call(&EventFd::new(0).expect("an eventfd")), 0);
        assert_ne!(f.set_call(&refused), 0);
        f.leave();
        sibling.assert_alive(0);
    }
    sibling.leave();
}

#[test]
fn a_replaced_kick_descriptor_is_listened_to() {
    let mut f = immediate(0);
    f.assert_alive(0);
    f.rings[0].kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    f.protocol
        .set_vring_kick(0, &f.rings[0].kick)
        .expect("set_vring_kick");
    f.assert_alive(0);
    f.leave();
}

#[test]
fn a_ring_whose_driver_broke_it_stops_alone_and_can_be_set_up_anew() {
    let mut f = FrontEnd::new(disk(Speed::Immediate), 2, 0);
    f.assert_alive(0);
    f.claim_avail_idx(0, 30_000);
    f.kick(0);
    f.assert_alive(1);
    let base = f.protocol.get_vring_base(0).expect("get_vring_base");
    assert_eq!(base, 1);
    f.claim_avail_idx(0, 1);
    f.start(0, 1);
    f.assert_alive(0);
    f.leave();
}

#[test]
fn a_descriptor_offered_more_often_than_the_ring_has_entries_waits() {
    let disk = disk(Speed::Slow);
    let mut f = FrontEnd::new(Arc::clone(&disk) as _, 1, 0);
    f.request(0, 0, READ, 0, 512);
    for _ in 1..QUEUE_SIZE {
        f.publish(0, 0);
    }
    f.kick(0);
    while disk.asked.begun.load(Ordering::SeqCst) < u64::from(QUEUE_SIZE) {
        std::thread::yield_now();
    }
    f.publish(0, 0);
    f.kick(0);
    for _ in 0..=QUEUE_SIZE {
        assert_eq!(f.next_used(0), (0, 513));
    }
    f.leave();
}

#[test]
fn without_the_write_cache_writes_are_flushed_before_they_complete() {
    let disk = disk(Speed::Immediate);
    let mut f = FrontEnd::new(Arc::clone(&disk) as _, 1, 1 << 9 | 1 << 11);
    let flushes_of_a_write = |f: &mut FrontEnd| {
        let before = disk.asked.flushes.load(Ordering::SeqCst);
        let place = f.request(0, 0, WRITE_REQUEST, 0, 512);
        f.kick(0);
        f.next_used(0);
        assert_eq!(f.status(place), OK);
        disk.asked.flushes.load(Ordering::SeqCst) - before
    };
    assert_eq!(flushes_of_a_write(&mut f), 0);
    assert_eq!(f.config(32, 1), [1]);
    f.protocol
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[0])
        .expect("set_config");
    assert_eq!(f.config(32, 1), [0]);
    assert_eq!(flushes_of_a_write(&mut f), 1);
    f.protocol
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[1])
        .expect("set_config");
    assert_eq!(flushes_of_a_write(&mut f), 0);
    let place = f.request(0, 0, FLUSH, 0, 0);
    f.kick(0);
    f.next_used(0);
    assert_eq!(f.status(place), OK);
    f.leave();
}

/// What the guest is told of a barrier that failed on the host: that it failed, and from then on that nothing can
/// be written, from whichever session, until the image is opened anew. What was acknowledged is there then.
#[test]
fn after_a_failed_barrier_guests_get_errors_until_the_image_is_opened_anew() {
    let memory = Arc::new(MemoryStorage::default());
    block_on(create(memory.as_ref(), &CreateOptions::new(1 << 20))).expect("an image");
    let faults = Arc::new(FaultStorage::new(Arc::clone(&memory) as Arc<dyn Storage>));
    let open = |storage: Arc<dyn Storage>| {
        let image = block_on(Qcow2::open(storage, None, Access::ReadWrite));
        Arc::new(image.expect("the image opens")) as Arc<dyn Image>
    };
    let statuses = |image: &Arc<dyn Image>, requests: &[(u32, u64)]| {
        let mut f = FrontEnd::new(Arc::clone(image), 1, 1 << 9);
        let requests = requests.iter().map(|(kind, sector)| {
            let len = if *kind == FLUSH { 0 } else { 512 };
            let place = f.request(0, 0, *kind, *sector, len);
            f.kick(0);
            f.next_used(0);
            f.status(place)
        });
        let statuses: Vec<u8> = requests.collect();
        (statuses, f.end().map_err(|error| error.kind()))
    };

    let image = open(Arc::clone(&faults) as Arc<dyn Storage>);
    let requests = [(WRITE_REQUEST, 0), (FLUSH, 0), (WRITE_REQUEST, 8)];
    assert_eq!(statuses(&image, &requests), (vec![OK; 3], Ok(())));
    faults.inject(Fault::nth(0, ErrorKind::Io).only(Operation::Flush));
    let requests = [(FLUSH, 0), (FLUSH, 0), (WRITE_REQUEST, 0), (READ, 0)];
    let refused = (vec![IOERR, IOERR, IOERR, OK], Err(ErrorKind::Poisoned));
    assert_eq!(statuses(&image, &requests), refused);
    assert_eq!(statuses(&image, &requests), refused, "in another session");
    drop(image);
    let image = open(memory as Arc<dyn Storage>);
    assert_eq!(statuses(&image, &requests), (vec![OK; 4], Ok(())));
}

#[test]
fn configuration_is_answered_in_the_size_asked_for() {
    let mut f = immediate(0);
    let whole = f.config(0, 60);
    assert_eq!(whole[..8], ((DISK_LEN / 512) as u64).to_le_bytes());
    for (offset, len) in [
        (0, 36),
        (0, 48),
        (0, 57),
        (0, 96),
        (20, 4),
        (59, 1),
        (60, 100),
    ] {
        let answer = f.config(offset, len);
        assert_eq!(answer.len(), len as usize);
        let expected = whole
            .iter()
            .skip(offset as usize)
            .copied()
            .chain(std::iter::repeat(0));
        assert!(
            answer.into_iter().eq(expected.take(len as usize)),
            "{len} bytes at {offset}"
        );
    }
    f.leave();
}

#[test]
fn nonsense_from_a_front_end_is_refused() {
    let f = immediate(0);
    assert!(f.protocol.set_features(u64::MAX).is_err());
    // The refusal ends the session; the server goes on until the stream is closed.
    f.leave();
}
