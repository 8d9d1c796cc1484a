//! A front-end and a driver of our own making, which can do everything wrong.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use seethrough::error::Result;
use seethrough::image::Image;
use seethrough::vhost_user::{Endpoint, Server, Vm};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const QUEUE_SIZE: u16 = 64;
/// Where requests go.
pub(crate) const DATA: u64 = 0x10_0000;

const MEMORY_LEN: usize = 4 << 20;
/// Bytes that each ring has.
const RING_LEN: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
/// Where the front-end says that it has guest memory in its own address space.
const USER_BASE: u64 = 0x7000_0000_0000;
const DEADLINE_MS: i32 = 60_000;

/// A ring's eventfds, and how far its driver is.
pub(crate) struct Ring {
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    avail_idx: u16,
    seen_used: u16,
}

/// A front-end with its guest's memory, connected to a daemon in this process.
pub(crate) struct FrontEnd {
    pub(crate) protocol: Frontend,
    pub(crate) memory: GuestMemoryMmap,
    memory_file: Arc<File>,
    pub(crate) rings: Vec<Ring>,
    /// The connection, for messages that the protocol's code does not send.
    socket: UnixStream,
    server: JoinHandle<Result<()>>,
}

impl FrontEnd {
    /// Connects, with `queue_count` rings that run.
    pub(crate) fn new(disk: Arc<dyn Image>, queue_count: u16, features: u64) -> Self {
        let mut front_end = Self::connect(disk, queue_count, features);
        for index in 0..front_end.rings.len() {
            front_end.start(index, 0);
        }
        front_end
    }

    fn connect(disk: Arc<dyn Image>, queue_count: u16, features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let vm = Vm::new("test", disk, "a serial", queue_count, QUEUE_SIZE).expect("a device");
        let server = thread::spawn(move || {
            let mut server = Server::new()?;
            server.add(vm, Endpoint::Connected(theirs))?;
            server.run()
        });
        let socket = ours.try_clone().expect("a socket");
        let mut protocol = Frontend::from_stream(ours, u64::from(queue_count));
        protocol.set_owner().expect("set_owner");
        let offered = protocol.get_features().expect("get_features");
        let wanted = VERSION_1 | PROTOCOL_FEATURES | features;
        assert_eq!(offered & wanted, wanted, "features that are not offered");
        protocol.set_features(wanted).expect("set_features");
        let needed = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let offered = protocol
            .get_protocol_features()
            .expect("get_protocol_features");
        assert!(offered.contains(needed));
        protocol
            .set_protocol_features(needed)
            .expect("set_protocol_features");
        protocol.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);

        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
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
            seen_used: 0,
        };
        let rings = (0..queue_count).map(|_| ring()).collect();
        let front_end = Self {
            protocol,
            memory,
            memory_file,
            rings,
            socket,
            server,
        };
        front_end
            .protocol
            .set_mem_table(&[front_end.region()])
            .expect("set_mem_table");
        front_end
    }

    /// The whole guest memory.
    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_LEN as u64,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.memory_file.as_raw_fd(),
        }
    }

    /// Sets a ring up from the available index `base`, and lets it run.
    pub(crate) fn start(&mut self, index: usize, base: u16) {
        let (protocol, ring) = (&mut self.protocol, &self.rings[index]);
        let at = ring_start(index);
        protocol
            .set_vring_num(index, QUEUE_SIZE)
            .expect("set_vring_num");
        protocol
            .set_vring_base(index, base)
            .expect("set_vring_base");
        let addresses = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: USER_BASE + at,
            avail_ring_addr: USER_BASE + at + AVAIL,
            used_ring_addr: USER_BASE + at + USED,
            log_addr: None,
        };
        protocol
            .set_vring_addr(index, &addresses)
            .expect("set_vring_addr");
        protocol
            .set_vring_kick(index, &ring.kick)
            .expect("set_vring_kick");
        protocol
            .set_vring_call(index, &ring.call)
            .expect("set_vring_call");
        protocol
            .set_vring_enable(index, true)
            .expect("set_vring_enable");
    }

    /// Writes a descriptor of a ring's table.
    pub(crate) fn descriptor(
        &self,
        index: usize,
        number: u16,
        at: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        self.descriptor_at(
            ring_start(index) + u64::from(number) * 16,
            at,
            len,
            flags,
            next,
        );
    }

    /// Writes a descriptor anywhere.
    pub(crate) fn descriptor_at(&self, place: u64, at: u64, len: u32, flags: u16, next: u16) {
        let raw = RawDescriptor::from(Descriptor::new(at, len, flags, next));
        self.memory
            .write_obj(raw, GuestAddress(place))
            .expect("guest memory");
    }

    /// Makes the chain at `head` available; the driver's next kick tells of it.
    pub(crate) fn publish(&mut self, index: usize, head: u16) {
        let ring = &mut self.rings[index];
        let avail = ring_start(index) + AVAIL;
        let slot = avail + 4 + u64::from(ring.avail_idx % QUEUE_SIZE) * 2;
        self.memory
            .write_obj(head, GuestAddress(slot))
            .expect("guest memory");
        let avail_idx = ring.avail_idx.wrapping_add(1);
        ring.avail_idx = avail_idx;
        self.store(avail + 2, avail_idx);
    }

    /// Makes the available ring claim something else.
    pub(crate) fn claim_avail_idx(&mut self, index: usize, avail_idx: u16) {
        self.rings[index].avail_idx = avail_idx;
        self.store(ring_start(index) + AVAIL + 2, avail_idx);
    }

    /// Asks to be notified once the used index passes `value` (with `EVENT_IDX`).
    pub(crate) fn set_used_event(&self, index: usize, value: u16) {
        self.store(
            ring_start(index) + AVAIL + 4 + u64::from(QUEUE_SIZE) * 2,
            value,
        );
    }

    /// Sets the available ring's flags (without `EVENT_IDX`).
    pub(crate) fn set_avail_flags(&self, index: usize, flags: u16) {
        self.store(ring_start(index) + AVAIL, flags);
    }

    fn store(&self, at: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(at), Ordering::SeqCst)
            .expect("guest memory");
    }

    pub(crate) fn used_idx(&self, index: usize) -> u16 {
        let at = GuestAddress(ring_start(index) + USED + 2);
        self.memory
            .load::<u16>(at, Ordering::SeqCst)
            .expect("guest memory")
    }

    pub(crate) fn kick(&self, index: usize) {
        self.rings[index].kick.write(1).expect("an eventfd");
    }

    /// Waits for the next used element: its head and length.
    pub(crate) fn next_used(&mut self, index: usize) -> (u16, u32) {
        while self.used_idx(index) == self.rings[index].seen_used {
            self.wait_for_call(index);
        }
        let ring = &mut self.rings[index];
        let at = ring_start(index) + USED + 4 + u64::from(ring.seen_used % QUEUE_SIZE) * 8;
        ring.seen_used = ring.seen_used.wrapping_add(1);
        let head: u32 = self
            .memory
            .read_obj(GuestAddress(at))
            .expect("guest memory");
        let len = self
            .memory
            .read_obj(GuestAddress(at + 4))
            .expect("guest memory");
        (u16::try_from(head).expect("heads are small"), len)
    }

    /// Waits until the device has notified; how often it had.
    pub(crate) fn wait_for_call(&self, index: usize) -> u64 {
        let call = &self.rings[index].call;
        let epoll = Epoll::new().expect("epoll");
        let readable = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, call.as_raw_fd(), readable)
            .expect("epoll");
        let ready = epoll.wait(DEADLINE_MS, &mut [EpollEvent::default()]);
        assert_eq!(
            ready.expect("epoll"),
            1,
            "the device has not notified in time"
        );
        call.read().expect("an eventfd")
    }

    /// How often the device has notified since the last look; does not wait.
    pub(crate) fn calls(&self, index: usize) -> u64 {
        self.rings[index].call.read().unwrap_or(0)
    }

    /// Writes a request's header.
    pub(crate) fn header(&self, at: u64, kind: u32, sector: u64) {
        self.memory
            .write_obj(kind.to_le(), GuestAddress(at))
            .expect("guest memory");
        self.memory
            .write_obj(0u32, GuestAddress(at + 4))
            .expect("guest memory");
        self.memory
            .write_obj(sector.to_le(), GuestAddress(at + 8))
            .expect("guest memory");
    }

    /// Makes a well-formed request available: three descriptors from `first` on, data at `DATA + first * 0x2000`.
    pub(crate) fn request(
        &mut self,
        index: usize,
        first: u16,
        kind: u32,
        sector: u64,
        len: u32,
    ) -> Place {
        let place = Place(DATA + u64::from(first) * 0x2000);
        let data_flags = if kind == 0 || kind == 8 {
            NEXT | WRITE
        } else {
            NEXT
        };
        self.header(place.0, kind, sector);
        self.memory
            .write_obj(0xffu8, place.status())
            .expect("guest memory");
        self.descriptor(index, first, place.0, 16, NEXT, first + 1);
        self.descriptor(index, first + 1, place.data().0, len, data_flags, first + 2);
        self.descriptor(index, first + 2, place.status().0, 1, WRITE, 0);
        self.publish(index, first);
        place
    }

    pub(crate) fn status(&self, place: Place) -> u8 {
        self.memory.read_obj(place.status()).expect("guest memory")
    }

    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let buf = vec![0; len as usize];
        self.protocol
            .get_config(offset, len, flags, &buf)
            .expect("get_config")
            .1
    }

    /// Waits for as many used elements as there are `heads`, which come in any order.
    pub(crate) fn assert_used(&mut self, index: usize, heads: &[u16]) {
        let mut used: Vec<u16> = heads.iter().map(|_| self.next_used(index).0).collect();
        used.sort_unstable();
        assert_eq!(used, heads);
    }

    /// Proves that the ring serves requests.
    pub(crate) fn assert_alive(&mut self, index: usize) {
        let place = self.request(index, 60, 0, 0, 512);
        self.kick(index);
        assert_eq!(self.next_used(index), (60, 513));
        assert_eq!(self.status(place), 0);
    }

    /// Sends any descriptor as the call descriptor of ring 0; the answer, which is 0 for success.
    pub(crate) fn set_call(&mut self, call: &impl AsRawFd) -> u64 {
        const SET_VRING_CALL: u32 = 13;
        const VERSION_1_NEED_REPLY: u32 = 1 | 1 << 3;
        let header = [SET_VRING_CALL, VERSION_1_NEED_REPLY, 8].map(u32::to_le_bytes);
        let message = [&header.concat()[..], &0u64.to_le_bytes()].concat();
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&message)],
            &[ControlMessage::ScmRights(&[call.as_raw_fd()])],
            MsgFlags::empty(),
            None,
        );
        assert_eq!(sent.expect("a connection"), message.len());
        let mut reply = [0; 20];
        self.socket.read_exact(&mut reply).expect("an answer");
        u64::from_le_bytes(reply[12..].try_into().expect("8 bytes"))
    }

    /// Leaves; the server must end well.
    pub(crate) fn leave(self) {
        self.end().expect("the server ends well");
    }

    /// Leaves; how the server has ended.
    pub(crate) fn end(self) -> Result<()> {
        let Self {
            protocol,
            socket,
            server,
            ..
        } = self;
        drop((protocol, socket));
        server.join().expect("the server does not panic")
    }
}

/// Where a request lies: header, data, status.
#[derive(Clone, Copy)]
pub(crate) struct Place(pub(crate) u64);

impl Place {
    pub(crate) fn data(self) -> GuestAddress {
        GuestAddress(self.0 + 0x400)
    }

    pub(crate) fn status(self) -> GuestAddress {
        GuestAddress(self.0 + 0x1fff)
    }
}

fn ring_start(index: usize) -> u64 {
    RING_LEN * u64::try_from(index).expect("few rings")
}
