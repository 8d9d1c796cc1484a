//! Opening one qcow2 file for work on its own tables, without what lies behind it.

use std::path::Path;
use std::sync::Arc;

use super::host::{HostOptions, open_file};
use crate::error::Result;
use crate::image::Access;
use crate::qcow2::Qcow2;

/// Opens the image at `path` alone: what it does not hold itself must not be read through it.
///
/// # Errors
/// Those of [`open_file`] and [`Qcow2::open`].
pub async fn open_single(path: &Path, access: Access, options: HostOptions) -> Result<Qcow2> {
    let storage = open_file(path, access, options)?;
    Qcow2::open(Arc::new(storage), None, access).await
}
