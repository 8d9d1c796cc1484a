//! A driver's side of one queue in plain memory, and disks that tell what they were asked, for the unit
//! tests of this module.

use std::future::ready;
use std::sync::{Arc, Mutex};

use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Device;
use crate::error::{Error, ErrorKind};
use crate::image::{Allocation, Image, ImageFuture, Limits, Mapped};
use crate::storage::{MemoryStorage, Storage, ZeroMode};
use crate::sys::IoBuf;
use crate::units::{GuestOffset, HostOffset};

const TABLE: u64 = 0x0;
const AVAIL: u64 = 0x4000;
const INDIRECT: u64 = 0x8000;
const SIZE: u16 = 256;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// Where tests may put requests.
pub(super) const DATA: u64 = 0x10000;

/// One descriptor: address and length.
#[derive(Clone, Copy)]
pub(super) enum Part {
    /// Read by the device.
    Out(u64, u32),
    /// Written by the device.
    In(u64, u32),
}

/// Guest memory with a ring at its start.
pub(super) struct Driver {
    memory: Arc<GuestMemoryMmap>,
}

impl Driver {
    pub(super) fn new() -> Self {
        let ranges = [(GuestAddress(0), 0x20_0000)];
        Self {
            memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
        }
    }

    pub(super) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    fn descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        let at = GuestAddress(table + u64::from(index) * 16);
        self.memory
            .write_obj(RawDescriptor::from(descriptor), at)
            .unwrap();
    }

    fn write_table(&self, table: u64, parts: &[Part]) {
        for (index, part) in parts.iter().enumerate() {
            let index = u16::try_from(index).unwrap();
            let next = if usize::from(index) + 1 < parts.len() {
                NEXT
            } else {
                0
            };
            let (address, len, write) = match *part {
                Part::Out(address, len) => (address, len, 0),
                Part::In(address, len) => (address, len, WRITE),
            };
            self.descriptor(
                table,
                index,
                Descriptor::new(address, len, next | write, index + 1),
            );
        }
    }

    fn head(&self) -> DescriptorChain<&GuestMemoryMmap> {
        let mut queue = Queue::new(SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(TABLE))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(AVAIL))
            .unwrap();
        queue.set_ready(true);
        self.memory
            .write_obj(1u16, GuestAddress(AVAIL + 2))
            .unwrap();
        self.memory
            .write_obj(0u16, GuestAddress(AVAIL + 4))
            .unwrap();
        queue.pop_descriptor_chain(&*self.memory).unwrap()
    }

    /// The chain of `parts`.
    pub(super) fn chain(&self, parts: &[Part]) -> DescriptorChain<&GuestMemoryMmap> {
        self.write_table(TABLE, parts);
        self.head()
    }

    /// The chain of `parts` through an indirect table.
    pub(super) fn indirect_chain(&self, parts: &[Part]) -> DescriptorChain<&GuestMemoryMmap> {
        self.write_table(INDIRECT, parts);
        let len = u32::try_from(parts.len() * 16).unwrap();
        self.descriptor(TABLE, 0, Descriptor::new(INDIRECT, len, INDIRECT_FLAG, 0));
        self.head()
    }

    pub(super) fn looping_chain(&self) -> DescriptorChain<&GuestMemoryMmap> {
        self.descriptor(TABLE, 0, Descriptor::new(DATA, 1, NEXT | WRITE, 0));
        self.head()
    }

    pub(super) fn indirect_in_nowhere(&self) -> DescriptorChain<&GuestMemoryMmap> {
        self.descriptor(TABLE, 0, Descriptor::new(1 << 40, 32, INDIRECT_FLAG, 0));
        self.head()
    }

    pub(super) fn nested_indirect(&self) -> DescriptorChain<&GuestMemoryMmap> {
        self.descriptor(INDIRECT, 0, Descriptor::new(INDIRECT, 32, INDIRECT_FLAG, 0));
        self.descriptor(TABLE, 0, Descriptor::new(INDIRECT, 32, INDIRECT_FLAG, 0));
        self.head()
    }

    /// Writes a request header at [`DATA`].
    pub(super) fn header(&self, kind: u32, sector: u64) {
        self.memory
            .write_obj(kind.to_le(), GuestAddress(DATA))
            .unwrap();
        self.memory.write_obj(0u32, GuestAddress(DATA + 4)).unwrap();
        self.memory
            .write_obj(sector.to_le(), GuestAddress(DATA + 8))
            .unwrap();
    }
}

/// What an image was asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call {
    Write(GuestOffset, u64),
    WriteZeroes(GuestOffset, u64, ZeroMode),
    Discard(GuestOffset, u64),
    Flush,
}

pub(super) type Calls = Arc<Mutex<Vec<Call>>>;

/// A disk in memory that notes what it was asked for, and fails if it is told to.
struct TestImage {
    disk: MemoryStorage,
    disk_len: u64,
    read_only: bool,
    fails: Option<ErrorKind>,
    calls: Calls,
}

impl TestImage {
    fn note<'a>(&self, call: Call, then: ImageFuture<'a>) -> ImageFuture<'a> {
        self.calls.lock().unwrap().push(call);
        match self.fails {
            Some(kind) => Box::pin(ready(Err(Error::new(kind, "told to fail")))),
            None => then,
        }
    }
}

impl Image for TestImage {
    fn virtual_size(&self) -> u64 {
        self.disk_len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block_size: 512,
            physical_block_size: 512,
            optimal_io_size: 4096,
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
        Box::pin(self.disk.readv(HostOffset(at.0), buf))
    }

    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        let call = Call::Write(at, u64::try_from(buf.len()).unwrap());
        let then = self.disk.writev(HostOffset(at.0), buf);
        self.note(call, Box::pin(then))
    }

    fn write_zeroes(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> ImageFuture<'_> {
        let then = self.disk.write_zeroes(HostOffset(at.0), len, mode);
        self.note(Call::WriteZeroes(at, len, mode), Box::pin(then))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_> {
        let then = self.disk.discard(HostOffset(at.0), len);
        self.note(Call::Discard(at, len), Box::pin(then))
    }

    fn flush(&self) -> ImageFuture<'_> {
        self.note(Call::Flush, Box::pin(self.disk.flush()))
    }

    fn allocation(&self, _at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        Box::pin(ready(Ok((Allocation::Data(None), len))))
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    fn name(&self) -> &str {
        "test image"
    }
}

fn build(disk_len: u64, read_only: bool, fails: Option<ErrorKind>) -> (Device, Calls) {
    let calls = Calls::default();
    let image = TestImage {
        disk: MemoryStorage::default(),
        disk_len,
        read_only,
        fails,
        calls: Arc::clone(&calls),
    };
    (
        Device::new(Arc::new(image), "serial", 1, 256).unwrap(),
        calls,
    )
}

/// A device with an empty disk.
pub(super) fn device(disk_len: u64) -> Device {
    build(disk_len, false, None).0
}

pub(super) fn read_only_device(disk_len: u64) -> Device {
    build(disk_len, true, None).0
}

pub(super) fn recorded_device(disk_len: u64) -> (Device, Calls) {
    build(disk_len, false, None)
}

pub(super) fn failing_device(kind: ErrorKind) -> Device {
    build(1 << 20, false, Some(kind)).0
}
