//! What an image says of itself, without opening it as a disk.

use std::path::{Path, PathBuf};

use super::backing::Backing;
use super::format::Format;
use super::host::{HostOptions, Locking, open_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::qcow2::bitmap::{Bitmap, BitmapDirectory};
use crate::qcow2::header::{Header, MAGIC};
use crate::qcow2::snapshot_table::{Snapshot, read_snapshots};
use crate::storage::{FileStorage, Storage};
use crate::sys::IoBuf;
use crate::units::{HostOffset, SECTOR_SIZE};

/// Images in a chain, at most: stock tools choke on fewer.
pub const MAX_CHAIN_DEPTH: usize = 200;

/// How the format of an image is decided where nobody says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnamed {
    /// An image that is not qcow2 is refused, for whoever goes on to use what the image says.
    Refuse,
    /// An image that is not qcow2 is raw, for whoever only shows it.
    Raw,
}

/// What is known of an image.
#[derive(Clone, Debug)]
pub struct Inspected {
    /// Its path as it was given.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its header, if it is qcow2.
    pub header: Option<Header>,
    /// Its internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Its persistent bitmaps; none if their directory is broken.
    pub bitmaps: Vec<Bitmap>,
    /// The disk's length in bytes.
    pub virtual_size: u64,
}

impl Inspected {
    /// The backing file that it names.
    ///
    /// # Errors
    /// As [`Backing::of`].
    pub fn backing(&self) -> Result<Option<Backing>> {
        match &self.header {
            Some(header) => Backing::of(&self.path, header),
            None => Ok(None),
        }
    }
}

/// Reads what the image at `path` says of itself.
///
/// # Errors
/// Those of opening and locking the file, of [`Header::parse`] and of [`read_snapshots`].
pub async fn inspect(
    path: &Path,
    format: Option<Format>,
    unnamed: Unnamed,
    locking: Locking,
) -> Result<Inspected> {
    let options = HostOptions {
        locking,
        ..HostOptions::default()
    };
    let storage = open_file(path, Access::ReadOnly, options)?;
    let format = match format {
        Some(format) => format,
        None => detect(&storage, unnamed).await?,
    };
    let header = read_header(&storage, format).await?;
    let virtual_size = match &header {
        Some(header) => header.virtual_size(),
        None => storage.len().next_multiple_of(SECTOR_SIZE),
    };
    let snapshots = match &header {
        Some(header) => read_snapshots(&storage, header)
            .await
            .context(|| path.display().to_string())?,
        None => Vec::new(),
    };
    let bitmaps = match &header {
        Some(header) => read_bitmaps(&storage, header).await,
        None => Vec::new(),
    };
    Ok(Inspected {
        path: path.to_owned(),
        format,
        header,
        snapshots,
        bitmaps,
        virtual_size,
    })
}

/// What bitmaps an image has is no reason not to show the rest of it.
async fn read_bitmaps(storage: &FileStorage, header: &Header) -> Vec<Bitmap> {
    match BitmapDirectory::read(storage, header).await {
        Ok(directory) => directory.map_or_else(Vec::new, |directory| directory.bitmaps),
        Err(error) => {
            log::warn!("{}: {error}", storage.name());
            Vec::new()
        }
    }
}

/// The image at `path` and everything behind it, topmost first.
///
/// # Errors
/// As [`inspect`]; and [`ErrorKind::Corrupt`] for a chain that contains itself or is too long.
pub async fn inspect_chain(
    path: &Path,
    format: Option<Format>,
    unnamed: Unnamed,
    locking: Locking,
) -> Result<Vec<Inspected>> {
    let mut chain: Vec<Inspected> = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((path, format)) = next {
        check_depth(&path, chain.len())?;
        let inspected = inspect(&path, format, unnamed, locking).await?;
        next = inspected
            .backing()?
            .map(|backing| (backing.path, Some(backing.format)));
        chain.push(inspected);
    }
    Ok(chain)
}

/// # Errors
/// [`ErrorKind::Corrupt`] if `depth` images above `path` are too many, as there are in a chain that contains
/// itself.
pub(super) fn check_depth(path: &Path, depth: usize) -> Result<()> {
    if depth < MAX_CHAIN_DEPTH {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!(
            "{}: the backing chain above it has {MAX_CHAIN_DEPTH} images: it contains itself, or has to be shortened \
             with `seethrough rebase`",
            path.display()
        ),
    ))
}

/// The format of an image of which nobody says it.
///
/// # Errors
/// As [`Format::of_unnamed`], and the storage's.
pub async fn detect(storage: &FileStorage, unnamed: Unnamed) -> Result<Format> {
    let start = IoBuf::zeroed(MAGIC.len());
    storage.readv(HostOffset(0), start.clone()).await?;
    match (Format::of_unnamed(storage.name(), &start.to_vec()), unnamed) {
        (Err(_), Unnamed::Raw) => Ok(Format::Raw),
        (found, _) => found,
    }
}

/// The header of an image, if its format has one.
///
/// # Errors
/// As [`Header::read`].
pub async fn read_header(storage: &FileStorage, format: Format) -> Result<Option<Header>> {
    match format {
        Format::Raw => Ok(None),
        Format::Qcow2 => Header::read(storage)
            .await
            .map(Some)
            .context(|| storage.name().to_owned()),
    }
}
