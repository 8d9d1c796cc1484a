//! A vhost-user-blk client: the `virtio-driver` crate, as libblkio uses it, with memory to do I/O in.
// Memory that is shared with another process is reached through raw pointers.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_driver::{
    EventFd, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// Bytes of memory for data, for each slot of a queue.
pub(crate) const SLOT_LEN: usize = 64 << 10;

/// How long a completion may take before the test fails.
const DEADLINE_MS: u16 = 60_000;

/// Every virtio feature that the crate knows what to do with.
pub(crate) fn all_features() -> u64 {
    (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits()
        | without_event_idx()
}

/// The same, with the simpler way to suppress notifications.
pub(crate) fn without_event_idx() -> u64 {
    VirtioFeatureFlags::VERSION_1.bits() | VirtioBlkFeatureFlags::all().bits()
}

/// A request, and the slot of memory that it uses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    Read { at: u64, len: usize },
    Write { at: u64, len: usize },
    Flush,
    Discard { at: u64, len: u64 },
    WriteZeroes { at: u64, len: u64, unmap: bool },
}

/// A connected front-end with queues.
pub(crate) struct Client {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    memory: MmapRegion,
    _memory_file: File,
    /// Dropped after the queues, which lie in its memory.
    transport: Box<VirtioBlkTransport>,
}

impl Client {
    pub(crate) fn connect(
        socket: &Path,
        queue_count: usize,
        queue_size: u16,
        features: u64,
    ) -> Self {
        let path = socket.to_str().expect("a socket's path is text");
        let vhost_user: VhostUser<VirtioBlkConfig, VirtioBlkReqBuf> =
            VhostUser::new(path, features).expect("the daemon is one for this client");
        let mut transport: Box<VirtioBlkTransport> = Box::new(vhost_user);
        let mut queues =
            VirtioBlkQueue::setup_queues(&mut *transport, queue_count, queue_size).expect("queues");
        queues
            .iter_mut()
            .for_each(|queue| queue.set_used_notif_enabled(true));

        let len = SLOT_LEN * usize::from(queue_size);
        let file = File::from(memfd_create(c"data", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        file.set_len(len as u64).expect("memory");
        let copy = file.try_clone().expect("a descriptor");
        let memory = MmapRegion::from_file(FileOffset::new(copy, 0), len).expect("memory");
        transport
            .map_mem_region(memory.as_ptr() as usize, len, file.as_raw_fd(), 0)
            .expect("the daemon takes memory");
        Self {
            queues,
            memory,
            _memory_file: file,
            transport,
        }
    }

    /// The device's configuration.
    pub(crate) fn config(&self) -> VirtioBlkConfig {
        self.transport.get_config().expect("configuration")
    }

    pub(crate) fn features(&self) -> u64 {
        self.transport.get_features()
    }

    /// Fills a slot.
    pub(crate) fn fill(&self, slot: usize, bytes: &[u8]) {
        let target = self
            .memory
            .get_slice(slot * SLOT_LEN, bytes.len())
            .expect("a slot");
        target.copy_from(bytes);
    }

    /// Reads a slot.
    pub(crate) fn slot(&self, slot: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .get_slice(slot * SLOT_LEN, len)
            .expect("a slot")
            .copy_to(&mut bytes[..]);
        bytes
    }

    /// Offers a request on a queue, without telling the device yet.
    pub(crate) fn offer(&mut self, queue: usize, slot: usize, request: Request) {
        let slot_start = self
            .memory
            .get_slice(slot * SLOT_LEN, SLOT_LEN)
            .expect("a slot")
            .ptr_guard_mut()
            .as_ptr();
        let queue = &mut self.queues[queue];
        let offered = match request {
            // SAFETY: the slot is mapped as long as the client, and nobody else uses it until the request has ended.
            Request::Read { at, len } => unsafe { queue.read_raw(at, slot_start, len, slot) },
            // SAFETY: as above.
            Request::Write { at, len } => unsafe { queue.write_raw(at, slot_start, len, slot) },
            Request::Flush => queue.flush(slot),
            Request::Discard { at, len } => queue.discard(at, len, slot),
            Request::WriteZeroes { at, len, unmap } => queue.write_zeroes(at, len, unmap, slot),
        };
        offered.expect("the queue has room");
    }

    /// Tells the device of what was offered, if it wants to know.
    pub(crate) fn kick(&mut self, queue: usize) {
        if self.queues[queue].avail_notif_needed() {
            let notifier = self.transport.get_submission_notifier(queue);
            notifier.notify().expect("the kick descriptor works");
        }
    }

    /// Waits for `count` requests of a queue to end; how each did, by slot: 0 or a negative error number.
    pub(crate) fn wait(&mut self, queue: usize, count: usize) -> HashMap<usize, i32> {
        let call = self.transport.get_completion_fd(queue);
        let mut ended = HashMap::new();
        loop {
            for completion in self.queues[queue].completions() {
                ended.insert(completion.context, completion.ret);
            }
            if ended.len() >= count {
                assert_eq!(ended.len(), count, "more requests ended than were offered");
                return ended;
            }
            wait_readable(&call);
            call.read().expect("the call descriptor works");
        }
    }

    /// One request from beginning to end.
    pub(crate) fn run(&mut self, request: Request) -> i32 {
        self.offer(0, 0, request);
        self.kick(0);
        self.wait(0, 1)[&0]
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.fill(0, bytes);
        assert_eq!(
            self.run(Request::Write {
                at,
                len: bytes.len()
            }),
            0,
            "write"
        );
    }

    pub(crate) fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        self.fill(0, &vec![0xee; len]);
        assert_eq!(self.run(Request::Read { at, len }), 0, "read");
        self.slot(0, len)
    }
}

fn wait_readable(call: &EventFd) {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    epoll
        .add(call, EpollEvent::new(EpollFlags::EPOLLIN, 0))
        .expect("epoll");
    let mut events = [EpollEvent::empty()];
    let count = epoll
        .wait(&mut events, EpollTimeout::from(DEADLINE_MS))
        .expect("epoll");
    assert_eq!(count, 1, "the daemon has not notified in time");
}
