//! How large an image would be that does not exist yet, as `qemu-img measure` reckons it: what a copy of another image
//! needs at once, and what it needs when it is full.

use std::sync::Arc;

use super::extents::Extents;
use crate::chain::create::NewImage;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::qcow2::commitment::{committed_length_of_new, full_length};
use crate::qcow2::create::CreateOptions;
use crate::units::{GuestOffset, SECTOR_SIZE};

/// The size of an image that does not exist yet, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// With what it holds at first.
    pub required: u64,
    /// With everything allocated.
    pub fully_allocated: u64,
    /// The most that its file can come to, made and written by this program.
    pub commitment: u64,
}

/// What a new image holds at first.
pub enum Contents<'a> {
    /// Nothing: it is empty.
    Nothing,
    /// What this disk holds.
    Of(&'a Arc<dyn Image>),
    /// Every byte, as with `preallocation=full`.
    Everything,
}

/// Measures an image that is to be.
///
/// # Errors
/// Those of [`Image::allocation`]; [`ErrorKind::InvalidConfig`] for options that contradict each other or a limit of
/// the format.
pub async fn measure(new: &NewImage, contents: Contents<'_>) -> Result<Measured> {
    match new {
        NewImage::Raw { size, .. } => {
            let size = size
                .checked_next_multiple_of(SECTOR_SIZE)
                .ok_or_else(|| too_large(*size))?;
            Ok(Measured {
                required: size,
                fully_allocated: size,
                commitment: size,
            })
        }
        NewImage::Qcow2(options) => measure_qcow2(options, contents).await,
    }
}

async fn measure_qcow2(options: &CreateOptions, contents: Contents<'_>) -> Result<Measured> {
    // First, since it looks at the options.
    let commitment = committed_length_of_new(options)?;
    let disk = options
        .size
        .checked_next_multiple_of(options.cluster_size)
        .ok_or_else(|| too_large(options.size))?;
    let fully_allocated = full_length(options)?;
    let data = match contents {
        Contents::Nothing => 0,
        Contents::Of(image) => data_in(image, options.cluster_size).await?,
        Contents::Everything => disk,
    };
    Ok(Measured {
        required: fully_allocated - disk + data.min(disk),
        fully_allocated,
        commitment,
    })
}

/// Bytes of clusters that hold data.
async fn data_in(image: &Arc<dyn Image>, cluster_size: u64) -> Result<u64> {
    let mut extents = Extents::new(image);
    let end = image.virtual_size();
    let mut data = 0u64;
    let mut at = 0;
    while at < end {
        let extent = extents.next(GuestOffset(at), end).await?;
        let mut until = extent.end().0;
        if extent.is_data() && !extent.is_zero() {
            // The rest of its last cluster is needed too, and is not to be counted again.
            until = until.next_multiple_of(cluster_size);
            data += until - at + at % cluster_size;
        }
        at = until;
    }
    Ok(data)
}

fn too_large(size: u64) -> Error {
    Error::new(
        ErrorKind::InvalidConfig,
        format!("a disk of {size} bytes is beyond 63 bits"),
    )
}
