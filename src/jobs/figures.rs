//! The four figures of a disk's room on the host, of one image and of a family.
//!
//! - *capacity*: the size that the guest sees;
//! - *length*: where the file ends;
//! - *allocation*: the bytes that the host has allocated to it;
//! - *commitment*: the most that the allocation can come to, whatever the guest writes.
//!
//! What the host's filesystem adds on its own (blocks of its extent trees, speculative preallocation) is in the
//! allocation once it is there, and in no commitment before.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use crate::chain::data_file::data_file_path;
use crate::chain::host::{HostOptions, Locking, open_file};
use crate::chain::inspect::Inspected;
use crate::error::{Context, Error, Result};
use crate::image::Access;
use crate::qcow2::commitment::committed_length;
use crate::qcow2::header::Header;
use crate::storage::{FileStorage, Storage};
use crate::sys::FileId;

/// The most that a file's allocation can come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commitment {
    /// So many bytes.
    Bytes(u64),
    /// Without bound, since the image has internal snapshots and every further one keeps what it shows; so many
    /// bytes if no further one is made.
    Unbounded {
        /// With the snapshots that there are.
        as_is: u64,
    },
    /// The image does not tell, for this reason.
    Unknown(String),
}

impl Commitment {
    /// The bound, if there is one.
    #[must_use]
    pub fn bytes(&self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(*bytes),
            Self::Unbounded { .. } | Self::Unknown(_) => None,
        }
    }
}

/// The figures of one host file.
#[derive(Clone, Debug)]
pub struct FileFigures {
    /// The file.
    pub path: PathBuf,
    /// Which file that is.
    pub id: FileId,
    /// The size of the disk in it; the external data file of a qcow2 image has none of its own.
    pub capacity: Option<u64>,
    /// The file's length in bytes.
    pub length: u64,
    /// Bytes that the host has allocated to it.
    pub allocation: u64,
    /// The most that the allocation can come to.
    pub commitment: Commitment,
    /// Bytes that its filesystem has free; a block device has no filesystem to grow in.
    pub free: Option<u64>,
}

impl FileFigures {
    /// How much more the file may come to take.
    #[must_use]
    pub fn growth(&self) -> Option<u64> {
        let commitment = self.commitment.bytes()?;
        Some(commitment.saturating_sub(self.allocation))
    }
}

/// The figures of an image: of its file, and of its external data file if it has one.
///
/// # Errors
/// Those of opening and locking the files.
pub async fn image_figures(image: &Inspected, locking: Locking) -> Result<Vec<FileFigures>> {
    let file = open(&image.path, locking)?;
    let committed = match &image.header {
        Some(header) => qcow2_commitment(&file, header).await,
        None => Commitment::Bytes(image.virtual_size),
    };
    let mut files = vec![file_figures(
        &image.path,
        &file,
        Some(image.virtual_size),
        committed,
    )?];
    let data_file = match &image.header {
        Some(header) => data_file_path(&image.path, header)?,
        None => None,
    };
    if let Some(path) = data_file {
        let file = open(&path, locking)?;
        let committed = Commitment::Bytes(image.virtual_size);
        files.push(file_figures(&path, &file, None, committed)?);
    }
    Ok(files)
}

fn open(path: &Path, locking: Locking) -> Result<FileStorage> {
    let options = HostOptions {
        locking,
        ..HostOptions::default()
    };
    open_file(path, Access::ReadOnly, options)
}

async fn qcow2_commitment(file: &FileStorage, header: &Header) -> Commitment {
    match committed_length(file, header).await {
        Ok(bytes) if header.nb_snapshots == 0 => Commitment::Bytes(bytes),
        Ok(bytes) => Commitment::Unbounded { as_is: bytes },
        Err(error) => Commitment::Unknown(error.to_string()),
    }
}

/// `committed` is the length that the file can come to.
fn file_figures(
    path: &Path,
    file: &FileStorage,
    capacity: Option<u64>,
    committed: Commitment,
) -> Result<FileFigures> {
    let named = || path.display().to_string();
    let metadata = std::fs::metadata(path).context(named)?;
    let length = file.len();
    let mut figures = FileFigures {
        path: path.to_owned(),
        id: file.id(),
        capacity,
        length,
        allocation: metadata.blocks().saturating_mul(512),
        commitment: Commitment::Bytes(length),
        free: None,
    };
    if file.id().is_block_device() {
        return Ok(figures);
    }
    let filesystem =
        statvfs(path).map_err(|error| Error::io(named(), std::io::Error::from(error)))?;
    let block = filesystem.fragment_size().max(1);
    // The host allocates whole blocks. What it has allocated already it may keep.
    let whole_blocks = |bytes: u64| {
        let longest = bytes.max(length);
        let rounded = longest.checked_next_multiple_of(block).unwrap_or(longest);
        rounded.max(figures.allocation)
    };
    figures.commitment = match committed {
        Commitment::Bytes(bytes) => Commitment::Bytes(whole_blocks(bytes)),
        Commitment::Unbounded { as_is } => Commitment::Unbounded {
            as_is: whole_blocks(as_is),
        },
        unknown @ Commitment::Unknown(_) => unknown,
    };
    figures.free = Some(filesystem.blocks_available().saturating_mul(block));
    Ok(figures)
}

/// The figures of several images together, each file counted once.
#[derive(Clone, Debug)]
pub struct Family {
    /// Files that were counted.
    pub files: usize,
    /// The sizes of all disks.
    pub capacity: u64,
    /// The lengths of all files.
    pub length: u64,
    /// What the host has allocated.
    pub allocation: u64,
    /// The sum of the commitments, if every file has a bound.
    pub commitment: Option<u64>,
    /// Where the files lie.
    pub filesystems: Vec<Filesystem>,
}

/// What a filesystem has to hold for the files on it.
#[derive(Clone, Debug)]
pub struct Filesystem {
    /// One of the files on it.
    pub of: PathBuf,
    /// Bytes that are free.
    pub free: u64,
    /// How much more all files on it may come to take, if each has a bound.
    pub growth: Option<u64>,
}

impl Filesystem {
    /// Bytes that are missing if every file on it grows to its commitment.
    #[must_use]
    pub fn shortfall(&self) -> Option<u64> {
        Some(self.growth?.saturating_sub(self.free))
    }
}

/// Sums the figures of files up, each counted once however often it is there.
#[must_use]
pub fn family<'a>(files: impl IntoIterator<Item = &'a FileFigures>) -> Family {
    let distinct: BTreeMap<FileId, &FileFigures> =
        files.into_iter().map(|file| (file.id, file)).collect();
    let sum = |figure: fn(&FileFigures) -> Option<u64>| {
        distinct
            .values()
            .try_fold(0u64, |sum, file| Some(sum.saturating_add(figure(file)?)))
    };
    Family {
        files: distinct.len(),
        capacity: sum(|file| Some(file.capacity.unwrap_or(0))).unwrap_or(u64::MAX),
        length: sum(|file| Some(file.length)).unwrap_or(u64::MAX),
        allocation: sum(|file| Some(file.allocation)).unwrap_or(u64::MAX),
        commitment: sum(|file| file.commitment.bytes()),
        filesystems: filesystems(distinct.values().copied()),
    }
}

fn filesystems<'a>(files: impl Iterator<Item = &'a FileFigures>) -> Vec<Filesystem> {
    let mut by_device: BTreeMap<u64, Filesystem> = BTreeMap::new();
    for file in files {
        let (FileId::Regular { device, .. }, Some(free)) = (file.id, file.free) else {
            continue;
        };
        let filesystem = by_device.entry(device).or_insert_with(|| Filesystem {
            of: file.path.clone(),
            free,
            growth: Some(0),
        });
        filesystem.growth = filesystem
            .growth
            .zip(file.growth())
            .map(|(sum, more)| sum.saturating_add(more));
    }
    by_device.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(inode: u64, device: u64, allocation: u64, commitment: Commitment) -> FileFigures {
        FileFigures {
            path: format!("{device}/{inode}").into(),
            id: FileId::Regular { device, inode },
            capacity: Some(100),
            length: 10,
            allocation,
            commitment,
            free: Some(50),
        }
    }

    #[test]
    fn a_file_that_several_share_is_counted_once() {
        let base = file(1, 1, 20, Commitment::Bytes(60));
        let tom = file(2, 1, 5, Commitment::Bytes(25));
        let all = family([&tom, &base, &base, &tom]);
        assert_eq!((all.files, all.capacity, all.length), (2, 200, 20));
        assert_eq!((all.allocation, all.commitment), (25, Some(85)));
        let [filesystem] = all.filesystems.as_slice() else {
            panic!("{:?}", all.filesystems);
        };
        assert_eq!(filesystem.growth, Some(60));
        assert_eq!(filesystem.shortfall(), Some(10));
    }

    #[test]
    fn one_file_without_a_bound_leaves_none_to_its_filesystem_alone() {
        let files = [
            file(1, 1, 5, Commitment::Unbounded { as_is: 9 }),
            file(2, 2, 5, Commitment::Bytes(6)),
        ];
        let all = family(&files);
        assert_eq!(all.commitment, None);
        let shortfalls: Vec<_> = all.filesystems.iter().map(Filesystem::shortfall).collect();
        assert_eq!(shortfalls, [None, Some(0)]);
    }
}
