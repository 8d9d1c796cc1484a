//! Making new image files.

use std::fmt;
use std::path::Path;

use super::host::{HostOptions, open_file};
use crate::error::{Context, Result};
use crate::image::Access;
use crate::qcow2::create::{CreateOptions, L2Entries, RefcountUpdates};
use crate::qcow2::header::Version;
use crate::qcow2::{self};
use crate::storage::{CacheMode, FileStorage, Storage};
use crate::units::SECTOR_SIZE;

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewImage {
    /// A file of this many bytes, rounded up to a sector.
    Raw {
        /// The virtual size in bytes.
        size: u64,
    },
    /// A qcow2 image.
    Qcow2(CreateOptions),
}

/// Makes `path` a new image. An image that is there is replaced.
///
/// # Errors
/// Those of the host, of [`open_file`] and of [`qcow2::create::create`]. A file that was not there before is gone
/// again.
pub async fn create(path: &Path, image: &NewImage) -> Result<()> {
    let existed = path.exists();
    if !existed {
        FileStorage::create_new(path, CacheMode::Writeback)?;
    }
    let written = write(path, image).await;
    if written.is_err() && !existed {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(path);
    }
    written
}

async fn write(path: &Path, image: &NewImage) -> Result<()> {
    let storage = open_file(path, Access::ReadWrite, HostOptions::default())?;
    match image {
        NewImage::Raw { size } => {
            storage.set_len(0).await?;
            storage.set_len(size.next_multiple_of(SECTOR_SIZE)).await?;
            storage.flush().await
        }
        NewImage::Qcow2(options) => qcow2::create::create(&storage, options)
            .await
            .context(|| path.display().to_string()),
    }
}

/// The options as `qemu-img create` prints them.
impl fmt::Display for NewImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = match self {
            Self::Raw { size } => return write!(f, "fmt=raw size={size}"),
            Self::Qcow2(options) => options,
        };
        let switch = |on: bool| if on { "on" } else { "off" };
        write!(
            f,
            "fmt=qcow2 cluster_size={} extended_l2={} compression_type={} size={}",
            options.cluster_size,
            switch(options.l2_entries == L2Entries::Extended),
            options.compression_type.name(),
            options.size,
        )?;
        if let Some(backing) = &options.backing {
            write!(
                f,
                " backing_file={} backing_fmt={}",
                backing.file.display(),
                backing.format
            )?;
        }
        if options.version == Version::V2 {
            f.write_str(" compat=0.10")?;
        }
        write!(
            f,
            " lazy_refcounts={} refcount_bits={}",
            switch(options.refcount_updates == RefcountUpdates::Lazy),
            options.refcount_bits
        )
    }
}
