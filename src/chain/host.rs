//! Opening and locking the host files of images.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Access;
use crate::storage::{CacheMode, FileStorage, LockRole};

/// Whether an image is protected from other programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Locked as stock QEMU locks it: other programs cannot change it, nor use it while it is being changed here.
    #[default]
    Lock,
    /// Read whatever others do to it meanwhile, as with `qemu-img -U`.
    ForceShare,
}

/// How files are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Where the host keeps what was read and written.
    pub cache: CacheMode,
    /// Whether images are protected from other programs.
    pub locking: Locking,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            cache: CacheMode::Writeback,
            locking: Locking::Lock,
        }
    }
}

/// Opens the existing file at `path`.
///
/// # Errors
/// Those of the host; [`ErrorKind::InUse`] if another program uses the image in a way that excludes this one.
pub fn open_file(path: &Path, access: Access, options: HostOptions) -> Result<FileStorage> {
    if options.locking == Locking::ForceShare && access == Access::ReadWrite {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{}: only an image that is opened read-only can be shared by force",
                path.display()
            ),
        ));
    }
    let storage = FileStorage::open(path, access, options.cache)?;
    if options.locking == Locking::Lock {
        storage.lock(match access {
            Access::ReadOnly => LockRole::Reader,
            Access::ReadWrite => LockRole::Writer,
        })?;
    }
    Ok(storage)
}
