//! Opening one qcow2 file for work on its own tables, without what lies behind it.

use std::path::Path;
use std::sync::Arc;

use super::backing::Backing;
use super::data_file::open_data_file;
use super::host::{HostOptions, open_file};
use super::registry::{DiskRequest, Registry};
use crate::error::{Context, Result};
use crate::image::Access;
use crate::qcow2::Qcow2;
use crate::qcow2::header::Header;

/// Opens the image at `path` alone: what it does not hold itself must not be read through it.
///
/// # Errors
/// Those of [`open_file`], [`open_data_file`] and [`Qcow2::open`].
pub async fn open_single(path: &Path, access: Access, options: HostOptions) -> Result<Qcow2> {
    let storage = open_file(path, access, options)?;
    let header = Header::read(&storage)
        .await
        .context(|| path.display().to_string())?;
    let data = open_data_file(path, &header, access, options).await?;
    Qcow2::open_with_data(Arc::new(storage), data, None, access).await
}

/// Opens the image at `path` with all that lies behind it, as the only user of the one in this process.
///
/// # Errors
/// Those of [`open_file`], [`Registry::open`] and [`Qcow2::open`].
pub async fn open_with_backing(path: &Path, access: Access, options: HostOptions) -> Result<Qcow2> {
    let storage = open_file(path, access, options)?;
    let header = Header::read(&storage)
        .await
        .context(|| path.display().to_string())?;
    let backing = match Backing::of(path, &header)? {
        None => None,
        Some(backing) => {
            let request = DiskRequest {
                path: backing.path,
                format: Some(backing.format),
                access: Access::ReadOnly,
            };
            Some(Registry::new(options).open(&request).await?.image)
        }
    };
    let data = open_data_file(path, &header, access, options).await?;
    Qcow2::open_with_data(Arc::new(storage), data, backing, access).await
}
