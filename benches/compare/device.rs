//! A disk as a driver sees it: the queues of one vhost-user-blk device, and memory for their requests.
// Memory that is shared with another process is reached through raw pointers.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

use crate::Result;
use crate::daemon::{DEADLINE, Daemon};
use crate::stamp::{BLOCK, STAMP_LEN};

/// What a device is connected with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) queues: usize,
    /// Requests under way in each queue.
    pub(crate) depth: usize,
    /// The most bytes of a request.
    pub(crate) slot_len: usize,
}

/// A request; a slot is its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    Read { at: u64, len: usize },
    Write { at: u64, len: usize },
    Flush,
}

/// Whether completions raise interrupts: the call eventfd is written, as often as `VIRTIO_F_EVENT_IDX` wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    Interrupts,
    Polling,
}

/// A connected device.
pub(crate) struct Device {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    notifiers: Vec<Box<dyn QueueNotifier>>,
    calls: Vec<Arc<EventFd>>,
    memory: MmapRegion,
    shape: Shape,
    /// Dropped after the queues, which lie in its memory.
    _transport: Box<VirtioBlkTransport>,
}

impl Device {
    /// Connects as soon as the daemon listens.
    pub(crate) fn connect(
        daemon: &mut Daemon,
        socket: &Path,
        shape: Shape,
        waiting: Waiting,
    ) -> Result<Self> {
        let mut transport = connect(daemon, socket)?;
        let entries = u16::try_from(ring_entries(shape.depth))
            .map_err(|_| "a queue that deep has too many entries")?;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, shape.queues, entries)
            .map_err(|error| format!("queues: {error}"))?;
        for queue in &mut queues {
            queue.set_used_notif_enabled(waiting == Waiting::Interrupts);
        }
        let memory =
            share_memory(&mut *transport, shape).map_err(|error| format!("memory: {error}"))?;
        let numbers = 0..shape.queues;
        Ok(Self {
            queues,
            notifiers: numbers
                .clone()
                .map(|queue| transport.get_submission_notifier(queue))
                .collect(),
            calls: numbers
                .map(|queue| transport.get_completion_fd(queue))
                .collect(),
            memory,
            shape,
            _transport: transport,
        })
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// Offers a request on the slot's queue; [`Self::kick`] tells the device.
    pub(crate) fn offer(&mut self, slot: usize, request: Request) -> Result<()> {
        let start = self.slot_start(slot);
        let queue = &mut self.queues[slot / self.shape.depth];
        let offered = match request {
            Request::Read { at, len } => {
                assert!(len <= self.shape.slot_len, "a request fits its slot");
                // SAFETY: the slot is mapped as long as the device, holds `len` bytes, and nobody else uses it until
                // the request has ended.
                unsafe { queue.read_raw(at, start, len, slot) }
            }
            Request::Write { at, len } => {
                assert!(len <= self.shape.slot_len, "a request fits its slot");
                // SAFETY: as above.
                unsafe { queue.write_raw(at, start, len, slot) }
            }
            Request::Flush => queue.flush(slot),
        };
        offered.map_err(|error| format!("a request was not taken: {error}"))
    }

    /// Tells the device of what was offered, if it wants to know.
    pub(crate) fn kick(&mut self, queue: usize) -> Result<()> {
        if self.queues[queue].avail_notif_needed() {
            self.notifiers[queue]
                .notify()
                .map_err(|error| format!("kick: {error}"))?;
        }
        Ok(())
    }

    /// The slot of the next request that has ended.
    pub(crate) fn next_ended(&mut self, queue: usize) -> Result<Option<usize>> {
        match self.queues[queue].completions().next() {
            Some(ended) if ended.ret == 0 => Ok(Some(ended.context)),
            Some(ended) => Err(format!(
                "a request failed: {}",
                std::io::Error::from_raw_os_error(-ended.ret)
            )),
            None => Ok(None),
        }
    }

    /// The descriptor that is written when a request has ended.
    pub(crate) fn call(&self, queue: usize) -> &EventFd {
        &self.calls[queue]
    }

    /// The stamp of a block in a slot.
    pub(crate) fn stamp(&self, slot: usize, block: usize) -> [u8; STAMP_LEN] {
        let mut bytes = [0; STAMP_LEN];
        let from = self.block_start(slot, block);
        // SAFETY: the block lies in the slot, which is mapped; the daemon is done with it.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), STAMP_LEN) };
        bytes
    }

    /// Puts a stamp on a block in a slot.
    pub(crate) fn set_stamp(&mut self, slot: usize, block: usize, stamp: [u8; STAMP_LEN]) {
        let to = self.block_start(slot, block);
        // SAFETY: as above.
        unsafe { to.copy_from_nonoverlapping(stamp.as_ptr(), STAMP_LEN) };
    }

    fn block_start(&self, slot: usize, block: usize) -> *mut u8 {
        assert!(
            (block + 1) * BLOCK <= self.shape.slot_len,
            "the block is in the slot"
        );
        self.slot_start(slot).wrapping_add(block * BLOCK)
    }

    fn slot_start(&self, slot: usize) -> *mut u8 {
        assert!(
            slot < self.shape.queues * self.shape.depth,
            "the slot is there"
        );
        self.memory
            .as_ptr()
            .wrapping_add(slot * self.shape.slot_len)
    }
}

/// Entries of a ring with room for `depth` requests, of three descriptors each: header, data, status. At least as many
/// as a kernel's driver is usually given.
pub(crate) fn ring_entries(depth: usize) -> usize {
    (depth * 3).next_power_of_two().max(256)
}

fn connect(daemon: &mut Daemon, socket: &Path) -> Result<Box<VirtioBlkTransport>> {
    let path = socket.to_str().ok_or("the socket's path is no text")?;
    let features = (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits()
        | VirtioBlkFeatureFlags::all().bits();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let attempt: std::io::Result<VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>> =
            VhostUser::new(path, features);
        match attempt {
            Ok(transport) => return Ok(Box::new(transport)),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) =>
            {
                daemon.check_alive()?;
                if Instant::now() > deadline {
                    return Err(format!("does not listen: {error}"));
                }
                // It is starting; what it says of that is its end, if it fails.
                daemon.wait_for_end(1)?;
            }
            Err(error) => return Err(format!("refuses this client: {error}")),
        }
    }
}

/// Memory for every slot, shared with the daemon, and touched.
fn share_memory(transport: &mut VirtioBlkTransport, shape: Shape) -> std::io::Result<MmapRegion> {
    let len = shape.queues * shape.depth * shape.slot_len;
    let file = File::from(memfd_create(c"data", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(len as u64)?;
    let memory = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), len)
        .map_err(std::io::Error::other)?;
    // SAFETY: the region is mapped, that long, and nobody else's yet.
    unsafe { memory.as_ptr().write_bytes(0x5a, len) };
    transport.map_mem_region(memory.as_ptr() as usize, len, file.as_raw_fd(), 0)?;
    Ok(memory)
}
