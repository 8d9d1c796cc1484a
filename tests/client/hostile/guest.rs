//! A guest that owns its whole ring, and the front-end with it: whatever can be written there, it may write.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const QUEUES: usize = 4;
/// Requests that a queue has room for at a time.
pub(crate) const SLOTS: usize = 16;
/// Bytes of data of a request.
pub(crate) const DATA_LEN: usize = 64 << 10;

pub(crate) const READ: u32 = 0;
pub(crate) const WRITE: u32 = 1;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

const QUEUE_SIZE: u16 = 64;
const RING_LEN: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SLOT_LEN: u64 = 0x11000;
const SLOTS_START: u64 = 0x20000;
const MEMORY_LEN: usize = 8 << 20;
const USER_BASE: u64 = 0x7000_0000_0000;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_BLK_F_FLUSH`, `_MQ`, `_DISCARD`, `_WRITE_ZEROES`.
const BLOCK_FEATURES: u64 = 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14;
const DEADLINE: Duration = Duration::from_secs(60);

/// A place in guest memory that holds one value at one moment and another at the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flicker {
    pub(crate) at: u64,
    pub(crate) values: [u64; 2],
}

/// Changes guest memory for as long as it lives.
struct Racer {
    stop: Arc<AtomicBool>,
    flickers: Arc<Mutex<Vec<Flicker>>>,
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Racer {
    fn new(memory: GuestMemoryMmap) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let flickers = Arc::new(Mutex::new(Vec::<Flicker>::new()));
        let rounds = Arc::new(AtomicU64::new(0));
        let (stopped, shared, counted) = (
            Arc::clone(&stop),
            Arc::clone(&flickers),
            Arc::clone(&rounds),
        );
        let thread = thread::spawn(move || {
            let mut turn = 0;
            while !stopped.load(Ordering::Relaxed) {
                let now = shared.lock().expect("nobody panics").clone();
                for _ in 0..64 {
                    turn ^= 1;
                    for flicker in &now {
                        memory
                            .store(
                                flicker.values[turn],
                                GuestAddress(flicker.at),
                                Ordering::Relaxed,
                            )
                            .expect("guest memory");
                    }
                }
                counted.fetch_add(1, Ordering::SeqCst);
                if now.is_empty() {
                    thread::park();
                }
            }
        });
        Self {
            stop,
            flickers,
            rounds,
            thread: Some(thread),
        }
    }
}

impl Racer {
    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Changes `flickers` from now on, and nothing else any more.
    fn set(&self, flickers: Vec<Flicker>) {
        *self.flickers.lock().expect("nobody panics") = flickers;
        let before = self.rounds.load(Ordering::SeqCst);
        // The round under way may be the last one with what was there before.
        while self.rounds.load(Ordering::SeqCst) < before + 2 {
            self.wake();
            thread::yield_now();
        }
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Ring {
    kick: EventFd,
    call: EventFd,
    avail_idx: u16,
    /// The used index at which all that was offered has come back.
    expected: u16,
}

/// A connected guest.
pub(crate) struct Guest {
    socket: PathBuf,
    /// None while there is no connection: the daemon serves one front-end at a time.
    protocol: Option<Frontend>,
    memory: GuestMemoryMmap,
    memory_file: Arc<File>,
    rings: Vec<Ring>,
    racer: Racer,
}

impl Guest {
    pub(crate) fn connect(socket: &Path) -> Self {
        let file = File::from(memfd_create(c"hostile", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        file.set_len(MEMORY_LEN as u64).expect("memory");
        let memory_file = Arc::new(file);
        let mapped = Some(FileOffset::from_arc(Arc::clone(&memory_file), 0));
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY_LEN, mapped)])
                .expect("memory");
        let ring = || Ring {
            kick: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
            call: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
            avail_idx: 0,
            expected: 0,
        };
        let mut guest = Self {
            socket: socket.to_owned(),
            protocol: Some(handshake(socket)),
            racer: Racer::new(memory.clone()),
            memory,
            memory_file,
            rings: (0..QUEUES).map(|_| ring()).collect(),
        };
        guest.start_all();
        guest
    }

    /// Leaves, whatever is under way, and comes back.
    pub(crate) fn reconnect(&mut self) {
        self.calm();
        self.protocol = None;
        self.protocol = Some(handshake(&self.socket));
        self.start_all();
    }

    fn protocol(&self) -> &Frontend {
        self.protocol.as_ref().expect("connected")
    }

    fn start_all(&mut self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_LEN as u64,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.memory_file.as_raw_fd(),
        };
        self.protocol()
            .set_mem_table(&[region])
            .expect("set_mem_table");
        for queue in 0..QUEUES {
            self.start(queue);
        }
    }

    /// Starts a ring anew.
    fn start(&mut self, queue: usize) {
        let at = ring_start(queue);
        let zeros = vec![0; usize::try_from(RING_LEN).expect("small")];
        self.memory
            .write_slice(&zeros, GuestAddress(at))
            .expect("guest memory");
        let ring = &mut self.rings[queue];
        (ring.avail_idx, ring.expected) = (0, 0);
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: USER_BASE + at,
            avail_ring_addr: USER_BASE + at + AVAIL,
            used_ring_addr: USER_BASE + at + USED,
            log_addr: None,
        };
        let protocol = self.protocol.as_mut().expect("connected");
        protocol
            .set_vring_num(queue, QUEUE_SIZE)
            .expect("set_vring_num");
        protocol.set_vring_base(queue, 0).expect("set_vring_base");
        protocol
            .set_vring_addr(queue, &addresses)
            .expect("set_vring_addr");
        protocol
            .set_vring_call(queue, &ring.call)
            .expect("set_vring_call");
        protocol
            .set_vring_kick(queue, &ring.kick)
            .expect("set_vring_kick");
        protocol
            .set_vring_enable(queue, true)
            .expect("set_vring_enable");
    }

    /// Stops a ring, which waits for what is under way, and starts it anew.
    pub(crate) fn reset(&mut self, queue: usize) {
        self.protocol()
            .get_vring_base(queue)
            .expect("get_vring_base");
        self.start(queue);
    }

    /// Where a slot's header is.
    pub(crate) fn header_at(queue: usize, slot: usize) -> u64 {
        SLOTS_START + SLOT_LEN * u64::try_from(queue * SLOTS + slot).expect("small")
    }

    /// Where a slot's data are.
    pub(crate) fn data_at(queue: usize, slot: usize) -> u64 {
        Self::header_at(queue, slot) + 0x1000
    }

    /// Where a slot's descriptor of its data is.
    pub(crate) fn descriptor_at(queue: usize, slot: usize) -> u64 {
        ring_start(queue) + u64::try_from(slot * 3 + 1).expect("small") * 16
    }

    /// Offers a request of `len` bytes; `data` is written to its buffer first.
    pub(crate) fn offer(
        &mut self,
        (queue, slot): (usize, usize),
        kind: u32,
        sector: u64,
        data: &[u8],
        len: usize,
    ) {
        let header = Self::header_at(queue, slot);
        let put = |at: u64, bytes: &[u8]| {
            self.memory
                .write_slice(bytes, GuestAddress(at))
                .expect("guest memory");
        };
        put(header, &kind.to_le_bytes());
        put(header + 4, &[0; 4]);
        put(header + 8, &sector.to_le_bytes());
        put(header + 0x800, &[0xff]);
        put(header + 0x1000, data);
        let first = u16::try_from(slot * 3).expect("small");
        let to_guest = if kind == READ { 2 } else { 0 };
        let len = u32::try_from(len).expect("small");
        self.descriptor(queue, first, Descriptor::new(header, 16, 1, first + 1));
        self.descriptor(
            queue,
            first + 1,
            Descriptor::new(header + 0x1000, len, 1 | to_guest, first + 2),
        );
        self.descriptor(queue, first + 2, Descriptor::new(header + 0x800, 1, 2, 0));
        self.publish(queue, first);
    }

    /// Writes any descriptor.
    pub(crate) fn descriptor(&self, queue: usize, number: u16, descriptor: Descriptor) {
        let at = ring_start(queue) + u64::from(number) * 16;
        let raw = RawDescriptor::from(descriptor);
        self.memory
            .write_obj(raw, GuestAddress(at))
            .expect("guest memory");
    }

    /// The link in the descriptor at `at`.
    pub(crate) fn link(&self, at: u64) -> u16 {
        let next: u16 = self
            .memory
            .read_obj(GuestAddress(at + 14))
            .expect("guest memory");
        u16::from_le(next)
    }

    /// Makes the chain at `head` available.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let avail = ring_start(queue) + AVAIL;
        let slot = avail + 4 + u64::from(ring.avail_idx % QUEUE_SIZE) * 2;
        self.memory
            .write_obj(head, GuestAddress(slot))
            .expect("guest memory");
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        ring.expected = ring.expected.wrapping_add(1);
        let index = ring.avail_idx.to_le();
        self.memory
            .store(index, GuestAddress(avail + 2), Ordering::SeqCst)
            .expect("guest memory");
    }

    /// Makes the available ring claim what is not so.
    pub(crate) fn claim(&mut self, queue: usize, avail_idx: u16) {
        let at = GuestAddress(ring_start(queue) + AVAIL + 2);
        self.memory
            .store(avail_idx.to_le(), at, Ordering::SeqCst)
            .expect("guest memory");
        self.kick(queue);
    }

    pub(crate) fn kick(&self, queue: usize) {
        // Full counters have kicked already.
        let _ = self.rings[queue].kick.write(1);
    }

    /// Lets memory flicker until [`Self::calm`].
    pub(crate) fn race(&self, flickers: Vec<Flicker>) {
        self.racer.set(flickers);
    }

    pub(crate) fn calm(&self) {
        self.racer.set(Vec::new());
    }

    /// Waits until all that was offered has come back.
    pub(crate) fn settle(&self, queue: usize) {
        let ring = &self.rings[queue];
        let used = GuestAddress(ring_start(queue) + USED + 2);
        let epoll = Epoll::new().expect("epoll");
        let readable = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, ring.call.as_raw_fd(), readable)
            .expect("epoll");
        let deadline = Instant::now() + DEADLINE;
        loop {
            let _ = ring.call.read();
            let index: u16 = self
                .memory
                .load(used, Ordering::SeqCst)
                .expect("guest memory");
            if u16::from_le(index) == ring.expected {
                return;
            }
            assert!(Instant::now() < deadline, "requests do not come back");
            let _ = epoll.wait(1000, &mut [EpollEvent::default()]);
        }
    }

    /// The status of a request that has come back.
    pub(crate) fn status(&self, (queue, slot): (usize, usize)) -> u8 {
        let at = GuestAddress(Self::header_at(queue, slot) + 0x800);
        self.memory.read_obj(at).expect("guest memory")
    }

    /// What a request has read.
    pub(crate) fn data(&self, (queue, slot): (usize, usize), len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let at = GuestAddress(Self::data_at(queue, slot));
        self.memory
            .read_slice(&mut bytes, at)
            .expect("guest memory");
        bytes
    }

    /// Reads a stretch of the disk.
    pub(crate) fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let part = DATA_LEN.min(len - bytes.len());
            let sector = (at + u64::try_from(bytes.len()).expect("small")) / 512;
            self.offer((0, 0), READ, sector, &[], part);
            self.kick(0);
            self.settle(0);
            assert_eq!(
                self.status((0, 0)),
                0,
                "read of {part} bytes at sector {sector}"
            );
            bytes.extend(self.data((0, 0), part));
        }
        bytes
    }

    /// Writes to the disk; the status.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> u8 {
        self.offer((0, 0), WRITE, at / 512, bytes, bytes.len());
        self.kick(0);
        self.settle(0);
        self.status((0, 0))
    }

    /// Takes the memory away from under the daemon, and has it looked at. It cannot be used from here any more, either.
    pub(crate) fn lose_memory(&mut self) {
        self.memory_file.set_len(0).expect("memory");
        for (queue, ring) in self.rings.iter().enumerate() {
            let _ = ring.kick.write(1);
            self.protocol()
                .get_vring_base(queue)
                .expect("get_vring_base");
            self.protocol()
                .set_vring_kick(queue, &ring.kick)
                .expect("set_vring_kick");
        }
    }
}

fn handshake(socket: &Path) -> Frontend {
    let mut protocol = Frontend::connect(socket, QUEUES as u64).expect("the daemon listens");
    protocol.set_owner().expect("set_owner");
    protocol.get_features().expect("get_features");
    protocol
        .set_features(VERSION_1 | PROTOCOL_FEATURES | BLOCK_FEATURES)
        .expect("set_features");
    protocol
        .get_protocol_features()
        .expect("get_protocol_features");
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    protocol
        .set_protocol_features(wanted)
        .expect("set_protocol_features");
    protocol.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    protocol
}

fn ring_start(queue: usize) -> u64 {
    RING_LEN * u64::try_from(queue).expect("small")
}
