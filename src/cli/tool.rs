//! What the tools for whole images have in common: how they open what they read.

use std::path::Path;

use crate::chain::format::Format;
use crate::chain::host::{HostOptions, Locking};
use crate::chain::registry::{DiskRequest, OpenImage, Registry};
use crate::error::Result;
use crate::image::Access;
use crate::storage::CacheMode;

/// The option to look at an image in use.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Sharing {
    /// Look at the image while others write to it
    #[arg(short = 'U', long)]
    force_share: bool,
}

impl Sharing {
    /// How files are to be locked.
    pub(super) fn locking(self) -> Locking {
        if self.force_share {
            Locking::ForceShare
        } else {
            Locking::Lock
        }
    }
}

/// How a verb opens the images that it reads.
pub(super) fn reading(sharing: Sharing, cache: CacheMode) -> Registry {
    Registry::new(HostOptions {
        cache,
        locking: sharing.locking(),
    })
}

/// Opens an image with all that lies behind it.
///
/// # Errors
/// Those of [`Registry::open`].
pub(super) async fn open(
    registry: &Registry,
    path: &Path,
    format: Option<Format>,
    access: Access,
) -> Result<OpenImage> {
    registry
        .open(&DiskRequest {
            path: path.to_owned(),
            format,
            access,
        })
        .await
}
