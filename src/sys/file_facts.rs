//! What the host says about an open file: which one it is, how long, and what direct I/O on it has to look like.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::unistd::{Whence, lseek};

use super::IoBuf;

/// Which file it is, whatever name it was opened by: device and inode, or the device itself for a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileId {
    /// A file of a filesystem.
    Regular {
        /// The filesystem's device number.
        device: u64,
        /// The file's inode number.
        inode: u64,
    },
    /// A block device, through whichever node.
    BlockDevice {
        /// Its device number.
        device: u64,
    },
}

impl FileId {
    /// Whether it is a block device.
    #[must_use]
    pub fn is_block_device(self) -> bool {
        matches!(self, Self::BlockDevice { .. })
    }
}

/// Identity and length in bytes of `file`.
///
/// # Errors
/// Of kind `InvalidInput` if it is neither a regular file nor a block device.
pub fn identify(file: &File) -> io::Result<(FileId, u64)> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        let id = FileId::Regular {
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        Ok((id, metadata.len()))
    } else if metadata.file_type().is_block_device() {
        let id = FileId::BlockDevice {
            device: metadata.rdev(),
        };
        let mut file = file;
        Ok((id, file.seek(SeekFrom::End(0))?))
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a regular file nor a block device",
        ))
    }
}

/// The logical block size of the block device `file`, in bytes.
///
/// # Errors
/// As ioctl(2).
pub fn logical_block_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int, into `size`, which outlives the call.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    u32::try_from(size).map_err(io::Error::other)
}

/// What offsets, lengths and addresses of direct I/O on the regular file `file`, opened with O_DIRECT, are multiples
/// of, in bytes.
///
/// # Errors
/// Of kind `Unsupported` if the filesystem has no direct I/O for it.
pub fn direct_io_alignment(file: &File) -> io::Result<u32> {
    match stated_alignment(file) {
        Some(0) => Err(io::ErrorKind::Unsupported.into()),
        Some(alignment) => Ok(alignment),
        None => probed_alignment(file),
    }
}

/// What statx(2) says, from Linux 6.1 on; 0 for no direct I/O at all.
fn stated_alignment(file: &File) -> Option<u32> {
    // SAFETY: statx is plain integers, for which zero is a value.
    let mut facts: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, and `facts` outlives the call.
    let status = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut facts,
        )
    };
    if status < 0 || facts.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    if facts.stx_dio_offset_align == 0 {
        return Some(0);
    }
    Some(facts.stx_dio_offset_align.max(facts.stx_dio_mem_align))
}

/// The smallest size of a block at the start of the file that can be read directly.
fn probed_alignment(file: &File) -> io::Result<u32> {
    const CANDIDATES: [u32; 4] = [512, 1024, 2048, 4096];
    const SAFE: u32 = 4096;
    if file.metadata()?.len() == 0 {
        return Ok(SAFE);
    }
    let buf = IoBuf::zeroed(2 * SAFE as usize);
    let fd = file.as_raw_fd();
    for size in CANDIDATES {
        let memory = buf.slice(size as usize..2 * size as usize);
        let [segment] = memory.iovecs() else {
            continue;
        };
        // SAFETY: the segment is memory of `buf`, which outlives the call.
        let count = unsafe { libc::pread(fd, segment.iov_base, segment.iov_len, 0) };
        if count >= 0 {
            return Ok(size);
        }
    }
    Ok(SAFE)
}

/// The first byte at `at` or behind that `file` holds data for; `None` if there is none. The file's position, which
/// nothing here relies on, moves.
///
/// # Errors
/// As lseek(2), if the filesystem does not tell.
pub fn next_data(file: &impl AsFd, at: u64) -> io::Result<Option<u64>> {
    seek(file, at, Whence::SeekData)
}

/// The first byte at `at` or behind that is in a hole of `file`, whose end counts as one; `None` behind that.
///
/// # Errors
/// As [`next_data`].
pub fn next_hole(file: &impl AsFd, at: u64) -> io::Result<Option<u64>> {
    seek(file, at, Whence::SeekHole)
}

fn seek(file: &impl AsFd, at: u64, whence: Whence) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(io::Error::other)?;
    match lseek(file, at, whence) {
        Ok(found) => u64::try_from(found).map(Some).map_err(io::Error::other),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether the regular file `file` lies in memory alone: on tmpfs or ramfs.
///
/// # Errors
/// As fstatfs(2).
pub fn is_in_memory(file: &impl AsFd) -> io::Result<bool> {
    const RAMFS: nix::sys::statfs::FsType = nix::sys::statfs::FsType(0x8584_58f6);
    let kind = nix::sys::statfs::fstatfs(file)?.filesystem_type();
    Ok(kind == nix::sys::statfs::TMPFS_MAGIC || kind == RAMFS)
}

/// Bytes that `file` takes up on its filesystem.
///
/// # Errors
/// As fstat(2).
pub fn bytes_on_host(file: &impl AsFd) -> io::Result<u64> {
    const BLOCK: u64 = 512;
    let facts = nix::sys::stat::fstat(file)?;
    let blocks = u64::try_from(facts.st_blocks).map_err(io::Error::other)?;
    Ok(blocks.saturating_mul(BLOCK))
}
