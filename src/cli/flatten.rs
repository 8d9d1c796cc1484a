//! `seethrough flatten`: a child's true disk as a standalone image.

use std::path::PathBuf;

use super::options::parse_format;
use super::progress::ShowProgress;
use super::tool::open;
use crate::chain::create::NewImage;
use crate::chain::format::Format;
use crate::chain::host::HostOptions;
use crate::chain::registry::Registry;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::jobs::convert::{Conversion, Encoding, Output, convert};
use crate::jobs::copy::Manner;
use crate::qcow2::create::CreateOptions;
use crate::qcow2::preallocate::Preallocation;
use crate::storage::CacheMode;
use crate::sys::block_on;
use crate::view::declared::merged_of;

/// Make a standalone image of what a child and its base are together.
///
/// The filesystems of both must have been unmounted cleanly. Every block group is as its owner left it: no file is
/// immutable in the result, and e2fsck finds it clean.
#[derive(Debug, clap::Args)]
pub struct Flatten {
    /// The new image's format, raw or qcow2 [default: qcow2]
    #[arg(short = 'O', value_name = "FORMAT", value_parser = parse_format)]
    output_format: Option<Format>,

    #[command(flatten)]
    progress: ShowProgress,

    /// The child
    #[arg(value_name = "CHILD")]
    child: PathBuf,

    /// The new image
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

impl Flatten {
    /// Makes the image.
    ///
    /// # Errors
    /// If the child or its base is in use or not clean, or the new image exists or cannot be written.
    pub fn run(self) -> Result<()> {
        self.flatten()
            .context(|| format!("cannot flatten {}", self.child.display()))
    }

    fn flatten(&self) -> Result<()> {
        if self.out.exists() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("{} exists already; choose another name", self.out.display()),
            ));
        }
        let registry = Registry::new(HostOptions::default());
        let merged = block_on(async {
            let child = open(&registry, &self.child, None, Access::ReadOnly).await?;
            merged_of(&child).await
        })?;
        let size = merged.virtual_size();
        let new = match self.output_format.unwrap_or(Format::Qcow2) {
            Format::Raw => NewImage::Raw {
                size,
                preallocation: Preallocation::Off,
            },
            Format::Qcow2 => NewImage::Qcow2(CreateOptions::new(size)),
        };
        let conversion = Conversion {
            path: &self.out,
            output: Output::New(new),
            encoding: Encoding::Plain,
            manner: Manner::new(),
            cache: CacheMode::Writeback,
        };
        self.progress
            .during(|progress| convert(&merged, &conversion, progress))
    }
}
