//! Disks as the files of a FUSE filesystem, served by this process: a loop device on such a file gives a kernel the
//! disk itself, request by request, as a guest's kernel has it.
//!
//! The protocol is the kernel's (`include/uapi/linux/fuse.h`), as far as a loop device needs it. Nothing is cached:
//! files are opened for direct I/O. A file without a disk answers every request with an I/O error, which is how
//! a VM is seen to lose its power.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::thread::JoinHandle;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use seethrough::error::Result;
use seethrough::image::Image;
use seethrough::storage::ZeroMode;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;

const HEADER: usize = 40;
const ROOT: u64 = 1;
/// The node of the first disk.
const FIRST: u64 = 2;
/// The longest request, in bytes.
const MAX_WRITE: u32 = 1 << 20;
const PAGE: u32 = 4096;
/// Answers stay true this long, in seconds: nothing but the disks' contents changes.
const FOREVER: u64 = 1 << 30;
const PUNCH_HOLE: u32 = 2;
const THREADS: usize = 2;

const EIO: i32 = 5;
const ENOENT: i32 = 2;
const ENOSYS: i32 = 38;

/// A disk, if there is one.
pub(crate) type Disk = Option<Arc<dyn Image>>;

/// The sockets that disks can be plugged into: one file each, named by its number.
pub(crate) struct Sockets {
    disks: RwLock<Vec<Disk>>,
    count: usize,
    /// The length of every disk, in bytes.
    size: u64,
}

impl Sockets {
    fn new(count: usize, size: u64) -> Self {
        let disks = RwLock::new((0..count).map(|_| None).collect());
        Self { disks, count, size }
    }

    /// The disks, to be exchanged: nothing is under way on any, and requests wait.
    pub(crate) fn pause(&self) -> RwLockWriteGuard<'_, Vec<Disk>> {
        self.disks.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn on_disk(&self, node: u64, request: impl FnOnce(&dyn Image) -> Result<()>) -> Answer {
        let number = usize::try_from(node - FIRST).unwrap();
        let disks = self.disks.read().unwrap_or_else(PoisonError::into_inner);
        match disks[number].as_deref().map(request) {
            Some(Ok(())) => Ok(Vec::new()),
            Some(Err(_)) | None => Err(EIO),
        }
    }

    fn answer(&self, request: &Request) -> Answer {
        let (node, body) = (request.node, request.body);
        match request.opcode {
            INIT => Ok(init(u32_at(body, 4))),
            LOOKUP => self.look_up(body),
            GETATTR => Ok([words(&[FOREVER, 0]), self.attributes(node)].concat()),
            OPEN => Ok([0u32, 0, DIRECT_IO, 0].map(u32::to_le_bytes).concat()),
            STATFS => Ok(statfs()),
            READ => {
                let buf = IoBuf::zeroed(u32_at(body, 16) as usize);
                let at = GuestOffset(u64_at(body, 8));
                self.on_disk(node, |disk| block_on(disk.read(at, buf.clone())))?;
                Ok(buf.to_vec())
            }
            WRITE => {
                let (at, len) = (GuestOffset(u64_at(body, 8)), u32_at(body, 16));
                let buf = IoBuf::from_bytes(&body[40..40 + len as usize]);
                self.on_disk(node, |disk| block_on(disk.write(at, buf)))?;
                Ok(words(&[u64::from(len)]))
            }
            FALLOCATE => {
                let (at, len) = (GuestOffset(u64_at(body, 8)), u64_at(body, 16));
                let mode = u32_at(body, 24);
                self.on_disk(node, |disk| {
                    if mode & PUNCH_HOLE != 0 {
                        // A hole is zeros, and what is discarded may stay; a loop device asks for both in this way.
                        block_on(disk.discard(at, len))?;
                        block_on(disk.write_zeroes(at, len, ZeroMode::MayUnmap))
                    } else {
                        block_on(disk.write_zeroes(at, len, ZeroMode::KeepAllocated))
                    }
                })
            }
            FSYNC => self.on_disk(node, |disk| block_on(disk.flush())),
            FLUSH | RELEASE => Ok(Vec::new()),
            _ => Err(ENOSYS),
        }
    }

    fn look_up(&self, name: &[u8]) -> Answer {
        let name = std::str::from_utf8(&name[..name.len() - 1]).map_err(|_| ENOENT)?;
        let number: usize = name.parse().map_err(|_| ENOENT)?;
        if number >= self.count {
            return Err(ENOENT);
        }
        let node = FIRST + number as u64;
        Ok([
            words(&[node, 0, FOREVER, FOREVER, 0]),
            self.attributes(node),
        ]
        .concat())
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, size): (u32, u64) = if node == ROOT {
            (0o040_755, 0)
        } else {
            (0o100_600, self.size)
        };
        let times = [0; 3];
        let long = words(&[node, size, size / 512, times[0], times[1], times[2]]);
        let short = [0u32, 0, 0, mode, 1, 0, 0, 0, PAGE, 0];
        [long, short.map(u32::to_le_bytes).concat()].concat()
    }
}

type Answer = std::result::Result<Vec<u8>, i32>;

/// The flag of an open file that nothing of it is to be cached.
const DIRECT_IO: u32 = 1;

struct Request<'a> {
    opcode: u32,
    unique: u64,
    node: u64,
    body: &'a [u8],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The answer to a kernel with the minor version `minor` of protocol 7.
fn init(minor: u32) -> Vec<u8> {
    const ASYNC_READ: u32 = 1;
    const BIG_WRITES: u32 = 1 << 5;
    const ASYNC_DIRECT_IO: u32 = 1 << 15;
    const MAX_PAGES: u32 = 1 << 22;
    let flags = ASYNC_READ | BIG_WRITES | ASYNC_DIRECT_IO | MAX_PAGES;
    let mut bytes = [7, minor.min(31), 0, flags].map(u32::to_le_bytes).concat();
    bytes.extend([16u16, 12].map(u16::to_le_bytes).concat());
    bytes.extend([MAX_WRITE, 1].map(u32::to_le_bytes).concat());
    let pages = u16::try_from(MAX_WRITE / PAGE).unwrap();
    bytes.extend([pages, 0].map(u16::to_le_bytes).concat());
    bytes.resize(64, 0);
    bytes
}

fn statfs() -> Vec<u8> {
    let mut bytes = words(&[0; 5]);
    bytes.extend([PAGE, 255, PAGE].map(u32::to_le_bytes).concat());
    bytes.resize(80, 0);
    bytes
}

/// A mounted filesystem of disks; unmounted when this is dropped, before which no loop device may be left on it.
pub(crate) struct Disks {
    pub(crate) sockets: Arc<Sockets>,
    directory: PathBuf,
    threads: Vec<JoinHandle<()>>,
}

impl Disks {
    /// Mounts, at `directory`, a filesystem with `count` disks of `size` bytes.
    pub(crate) fn mount(directory: &Path, count: usize, size: u64) -> Self {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("disks", directory, "fuse", flags, options.as_c_str()).unwrap();
        let sockets = Arc::new(Sockets::new(count, size));
        let device = Arc::new(device);
        let serve = |_| {
            let (device, sockets) = (Arc::clone(&device), Arc::clone(&sockets));
            std::thread::spawn(move || serve(&device, &sockets))
        };
        Self {
            threads: (0..THREADS).map(serve).collect(),
            sockets,
            directory: directory.to_owned(),
        }
    }

    /// The file of disk `number`.
    pub(crate) fn file(&self, number: usize) -> PathBuf {
        self.directory.join(number.to_string())
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        // What is left on it loses its power.
        self.sockets.pause().fill(None);
        if unmount(&self.directory, UnmountFlags::empty()).is_err() {
            // A test that fails may leave something open; its threads end when that is closed.
            let _ = unmount(&self.directory, UnmountFlags::DETACH);
            return;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Answers requests until the filesystem is unmounted.
fn serve(device: &File, sockets: &Sockets) {
    let mut buffer = vec![0; MAX_WRITE as usize + PAGE as usize];
    loop {
        let mut reader = device;
        let len = match reader.read(&mut buffer) {
            Ok(len) => len,
            // A request was withdrawn before it was read, or a signal came.
            Err(error) if matches!(error.raw_os_error(), Some(ENOENT | 4)) => continue,
            Err(_) => return,
        };
        let request = Request {
            opcode: u32_at(&buffer, 4),
            unique: u64_at(&buffer, 8),
            node: u64_at(&buffer, 16),
            body: &buffer[HEADER..len],
        };
        if matches!(request.opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            continue;
        }
        let (error, body) = match sockets.answer(&request) {
            Ok(body) => (0, body),
            Err(error) => (-error, Vec::new()),
        };
        let mut reply = u32::try_from(16 + body.len())
            .unwrap()
            .to_le_bytes()
            .to_vec();
        reply.extend(error.to_le_bytes());
        reply.extend(request.unique.to_le_bytes());
        reply.extend(body);
        let mut writer = device;
        // Nobody may wait for the answer any more.
        let _ = writer.write_all(&reply);
    }
}
