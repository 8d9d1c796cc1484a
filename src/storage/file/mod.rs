//! A host file or block device, read and written through io_uring.
//!
//! `flush` makes writes durable, `bounce` serves what direct I/O does not take as it is, `zero` frees and zeroes,
//! `held` tells holes from data.

mod bounce;
mod flush;
mod held;
mod zero;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use flush::Flushes;

use super::RangeLock;
use super::future::Doing;
use super::{Held, IoFuture, LockRole, Storage, ZeroMode, lock};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, FileId, HostFile, IoBuf, Promptness};
use crate::units::HostOffset;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// Where the host keeps what was read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// In the host's page cache, until a flush (`--cache writeback`).
    Writeback,
    /// Nowhere: direct I/O (`--cache none`).
    None,
}

/// A host file or block device.
///
/// With [`CacheMode::None`] a write that grows the file grows it to a multiple of [`Storage::alignment`].
#[derive(Debug)]
pub struct FileStorage {
    file: HostFile,
    id: FileId,
    name: Box<str>,
    /// What offsets and lengths of discarded and zeroed ranges are multiples of.
    hole_alignment: u64,
    /// Blocks that a write is changing, under direct I/O or where ranges are zeroed in parts.
    ranges: RangeLock,
    flushes: Flushes,
    can_punch: AtomicBool,
    can_zero: AtomicBool,
}

impl FileStorage {
    /// Opens the existing file or block device at `path`.
    ///
    /// # Errors
    /// When it cannot be opened that way, or is a directory, a pipe or the like; `Unsupported` when direct I/O is
    /// asked of a filesystem that has none.
    pub fn open(path: &Path, access: Access, cache: CacheMode) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::ReadWrite);
        Self::with_options(path, options, cache)
    }

    /// Makes a new, empty file at `path`.
    ///
    /// # Errors
    /// When there is one already, or as [`Self::open`].
    pub fn create_new(path: &Path, cache: CacheMode) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        Self::with_options(path, options, cache)
    }

    fn with_options(path: &Path, mut options: OpenOptions, cache: CacheMode) -> Result<Self> {
        let name: Box<str> = path.display().to_string().into();
        let direct = match cache {
            CacheMode::Writeback => 0,
            CacheMode::None => libc::O_DIRECT,
        };
        // Not waiting for the other end, should it be a pipe; no meaning for files and block devices.
        options.custom_flags(direct | libc::O_NONBLOCK);
        let file = options.open(path).map_err(|error| {
            let refused = error.raw_os_error() == Some(libc::EINVAL) && direct != 0;
            if refused {
                no_direct_io(&name, error)
            } else {
                Error::io(format!("{name}: cannot be opened"), error)
            }
        })?;
        Self::new(file, name, cache)
    }

    fn new(file: File, name: Box<str>, cache: CacheMode) -> Result<Self> {
        let (id, len) = sys::identify(&file).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => {
                Error::new(ErrorKind::InvalidConfig, format!("{name}: {error}"))
            }
            _ => Error::io(format!("{name}: cannot be examined"), error),
        })?;
        let block_size = if id.is_block_device() {
            sys::logical_block_size(&file).context(|| format!("{name}: has no block size"))?
        } else {
            1
        };
        let alignment = match (cache, id.is_block_device()) {
            (CacheMode::Writeback, _) => 1,
            (CacheMode::None, true) => block_size,
            (CacheMode::None, false) => {
                sys::direct_io_alignment(&file).map_err(|error| no_direct_io(&name, error))?
            }
        };
        let promptness = match (cache, id.is_block_device()) {
            (CacheMode::None, _) => Promptness::Never,
            (CacheMode::Writeback, false) if sys::is_in_memory(&file).unwrap_or(false) => {
                Promptness::Always
            }
            (CacheMode::Writeback, _) => Promptness::CachedReads,
        };
        Ok(Self {
            file: HostFile::with_promptness(file, len, alignment, promptness),
            id,
            name,
            hole_alignment: u64::from(block_size),
            ranges: RangeLock::default(),
            flushes: Flushes::default(),
            can_punch: AtomicBool::new(true),
            can_zero: AtomicBool::new(true),
        })
    }

    /// Which file it is: the same for every name and every open file of it.
    #[must_use]
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Locks the file as stock QEMU does, until it is closed: to be done before anything is read from it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] if another process, or another open file of this one, uses it in a way that excludes
    /// `role`.
    pub fn lock(&self, role: LockRole) -> Result<()> {
        lock::lock(&self.file, &self.name, role)
    }

    fn doing(&self, verb: &'static str, at: HostOffset, len: u64) -> Doing<'_> {
        Doing {
            verb,
            at: at.0,
            len,
            name: &self.name,
        }
    }

    fn fail(&self, verb: &'static str, at: HostOffset, len: u64, error: io::Error) -> Error {
        Error::io(self.doing(verb, at, len).to_string(), error)
    }
}

impl Storage for FileStorage {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        if buf.is_empty() {
            IoFuture::ready(Ok(()))
        } else if self.file.takes(at, &buf) {
            let doing = self.doing("reading", at, len_of(&buf));
            IoFuture::ring(self.file.read(at, buf), doing)
        } else {
            IoFuture::boxed(self.read_bounced(at, buf))
        }
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        if buf.is_empty() {
            IoFuture::ready(Ok(()))
        } else if self.file.alignment() == 1 {
            let doing = self.doing("writing", at, len_of(&buf));
            IoFuture::ring(self.file.write(at, buf), doing)
        } else {
            IoFuture::boxed(self.write_direct(at, buf))
        }
    }

    fn flush(&self) -> IoFuture<'_> {
        IoFuture::boxed(self.flushes.flush(&self.file, &self.name))
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        IoFuture::boxed(self.punch(at, len))
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        IoFuture::boxed(self.zero(at, len, mode))
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        IoFuture::boxed(self.resize(len))
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn held(&self, at: HostOffset, len: u64) -> (Held, u64) {
        self.held_on_host(at, len)
    }

    fn bytes_on_host(&self) -> Option<u64> {
        sys::bytes_on_host(&self.file).ok()
    }

    fn alignment(&self) -> u32 {
        self.file.alignment()
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn host_file(&self) -> Option<&HostFile> {
        Some(&self.file)
    }
}

fn no_direct_io(name: &str, error: io::Error) -> Error {
    let context = format!("{name}: no direct I/O there: use the page cache (--cache writeback)");
    Error::with_source(ErrorKind::Unsupported, context, error)
}

fn out_of_range(name: &str) -> Error {
    let context = format!("{name}: the range ends beyond what a file can hold");
    Error::new(ErrorKind::OutOfBounds, context)
}

fn len_of(buf: &IoBuf) -> u64 {
    u64::try_from(buf.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::sys::{Reactor, block_on};

    const BOTH: [CacheMode; 2] = [CacheMode::Writeback, CacheMode::None];

    /// A directory on a filesystem with direct I/O, which /tmp may not have.
    fn scratch() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    fn new_file(dir: &tempfile::TempDir, cache: CacheMode) -> FileStorage {
        FileStorage::create_new(&dir.path().join(format!("{cache:?}")), cache).unwrap()
    }

    async fn read_back(storage: &FileStorage, at: u64, len: usize) -> Vec<u8> {
        let buf = IoBuf::from_bytes(&vec![0xee; len]);
        storage.readv(HostOffset(at), buf.clone()).await.unwrap();
        buf.to_vec()
    }

    #[test]
    fn random_operations_leave_what_a_byte_vector_would_hold() {
        for (cache, seed) in [(BOTH[0], 1), (BOTH[1], 2)] {
            println!("{cache:?}, seed {seed}");
            let mut random = StdRng::seed_from_u64(seed);
            let dir = scratch();
            let storage = new_file(&dir, cache);
            let mut model = vec![0u8; 1 << 17];
            block_on(async {
                for _ in 0..400 {
                    let at = random.random_range(0..model.len() - 9000);
                    let len = random.random_range(0..9000);
                    let range = at..at + len;
                    let at = HostOffset(at as u64);
                    match random.random_range(0..5) {
                        0 | 1 => {
                            let mut bytes = vec![0u8; len];
                            random.fill(&mut bytes[..]);
                            let split = len / 3;
                            let buf = IoBuf::concat([
                                IoBuf::from_bytes(&bytes[..split]),
                                IoBuf::from_bytes(&bytes[split..]),
                            ]);
                            storage.writev(at, buf).await.unwrap();
                            model[range].copy_from_slice(&bytes);
                        }
                        2 => {
                            let mode = [ZeroMode::MayUnmap, ZeroMode::KeepAllocated]
                                [random.random_range(0..2)];
                            storage.write_zeroes(at, len as u64, mode).await.unwrap();
                            model[range].fill(0);
                        }
                        3 => storage.flush().await.unwrap(),
                        _ => assert_eq!(read_back(&storage, at.0, len).await, model[range]),
                    }
                }
                assert_eq!(read_back(&storage, 0, model.len()).await, model);
            });
        }
    }

    #[test]
    fn writes_at_once_to_parts_of_one_block_lose_no_byte() {
        for cache in BOTH {
            let dir = scratch();
            let storage = std::sync::Arc::new(new_file(&dir, cache));
            block_on(async {
                let reactor = Reactor::current().unwrap();
                let writes: Vec<_> = (0..200u8)
                    .map(|i| {
                        let storage = std::sync::Arc::clone(&storage);
                        reactor.spawn_local(async move {
                            let at = HostOffset(u64::from(i) * 100);
                            storage
                                .writev(at, IoBuf::from_bytes(&[i; 100]))
                                .await
                                .unwrap();
                        })
                    })
                    .collect();
                for write in writes {
                    write.await;
                }
                let bytes = read_back(&storage, 0, 20_000).await;
                for (i, piece) in bytes.chunks(100).enumerate() {
                    assert_eq!(piece, [u8::try_from(i).unwrap(); 100], "{cache:?} {i}");
                }
            });
        }
    }

    #[test]
    fn reading_past_the_end_gives_zeros() {
        for cache in BOTH {
            let dir = scratch();
            std::fs::write(dir.path().join("short"), [7u8; 1000]).unwrap();
            let path = dir.path().join("short");
            let storage = FileStorage::open(&path, Access::ReadOnly, cache).unwrap();
            assert_eq!(storage.len(), 1000);
            block_on(async {
                for (at, len, sevens) in [
                    (0, 8192, 1000),
                    (990, 20, 10),
                    (1000, 5, 0),
                    (1 << 30, 4096, 0),
                ] {
                    let bytes = read_back(&storage, at, len).await;
                    assert_eq!(bytes[..sevens], vec![7; sevens]);
                    assert_eq!(bytes[sevens..], vec![0; len - sevens], "{cache:?} at {at}");
                }
            });
        }
    }

    #[test]
    fn lists_longer_than_the_kernel_takes_go_in_pieces() {
        let dir = scratch();
        let storage = new_file(&dir, CacheMode::Writeback);
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i % 251) as u8).collect();
        let scattered = IoBuf::from_bytes(&bytes);
        let scattered = IoBuf::concat((0..bytes.len()).map(|i| scattered.slice(i..i + 1)));
        block_on(async {
            storage
                .writev(HostOffset(3), scattered.clone())
                .await
                .unwrap();
            assert_eq!(storage.len(), 5003);
            assert_eq!(read_back(&storage, 3, 5000).await, bytes);
            scattered.zero(0..5000);
            storage
                .readv(HostOffset(3), scattered.clone())
                .await
                .unwrap();
            assert_eq!(scattered.to_vec(), bytes);
        });
    }

    #[test]
    fn unmapping_zeroes_give_room_back_and_keeping_ones_do_not() {
        use std::os::unix::fs::MetadataExt;
        for cache in BOTH {
            let dir = scratch();
            let path = dir.path().join("disk");
            let storage = FileStorage::create_new(&path, cache).unwrap();
            let sectors = || std::fs::metadata(&path).unwrap().blocks();
            block_on(async {
                let ones = IoBuf::from_bytes(&vec![1; 1 << 20]);
                storage.writev(HostOffset(0), ones).await.unwrap();
                storage.flush().await.unwrap();
                let full = sectors();
                let half = 1 << 19;
                storage
                    .write_zeroes(HostOffset(0), half, ZeroMode::KeepAllocated)
                    .await
                    .unwrap();
                assert_eq!(sectors(), full, "{cache:?}");
                storage
                    .write_zeroes(HostOffset(0), half, ZeroMode::MayUnmap)
                    .await
                    .unwrap();
                assert!(sectors() <= full - 1000, "{cache:?}");
                storage.discard(HostOffset(half), half).await.unwrap();
                assert!(sectors() <= full - 2000, "{cache:?}");
                assert_eq!(storage.len(), 1 << 20);
            });
        }
    }

    #[test]
    fn zeroes_beyond_the_end_and_set_len_change_the_length() {
        for cache in BOTH {
            for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
                let dir = scratch();
                let storage = new_file(&dir, cache);
                block_on(async {
                    storage
                        .write_zeroes(HostOffset(4096), 8192, mode)
                        .await
                        .unwrap();
                    assert_eq!(storage.len(), 12288);
                    storage.set_len(4096).await.unwrap();
                    assert_eq!(storage.len(), 4096);
                    storage.set_len(1 << 40).await.unwrap();
                    assert_eq!(storage.len(), 1 << 40);
                    let on_disk = sys_len(&storage);
                    assert_eq!(on_disk, 1 << 40);
                });
            }
        }
    }

    fn sys_len(storage: &FileStorage) -> u64 {
        std::fs::metadata(storage.name()).unwrap().len()
    }

    #[test]
    fn one_file_by_two_names_has_one_identity() {
        let dir = scratch();
        let storage = new_file(&dir, CacheMode::Writeback);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(storage.name(), &link).unwrap();
        let other = FileStorage::open(&link, Access::ReadOnly, CacheMode::Writeback).unwrap();
        assert_eq!(storage.id(), other.id());
        let third = FileStorage::create_new(&dir.path().join("third"), CacheMode::Writeback);
        assert_ne!(storage.id(), third.unwrap().id());
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let dir = scratch();
        let error =
            FileStorage::open(dir.path(), Access::ReadOnly, CacheMode::Writeback).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        let missing = dir.path().join("missing");
        let error = FileStorage::open(&missing, Access::ReadOnly, CacheMode::None).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }

    #[test]
    fn a_range_beyond_what_a_file_can_hold_is_an_error() {
        let dir = scratch();
        for cache in BOTH {
            let storage = new_file(&dir, cache);
            block_on(async {
                let at = HostOffset(u64::MAX - 4095);
                let zeros = storage.write_zeroes(at, 8192, ZeroMode::MayUnmap).await;
                assert_eq!(zeros.unwrap_err().kind(), ErrorKind::OutOfBounds);
                storage.writev(at, IoBuf::zeroed(4096)).await.unwrap_err();
                storage.readv(at, IoBuf::zeroed(4096)).await.unwrap_err();
            });
        }
    }
}
