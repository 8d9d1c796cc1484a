//! `seethrough flatten`: a child's true disk as a standalone image.

use std::path::PathBuf;
use std::sync::Arc;

use super::options::parse_format;
use crate::chain::create::{NewImage, create};
use crate::chain::format::Format;
use crate::chain::host::HostOptions;
use crate::chain::registry::{DiskRequest, Registry};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::qcow2::create::CreateOptions;
use crate::qcow2::preallocate::Preallocation;
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
        block_on(self.flatten()).context(|| format!("cannot flatten {}", self.child.display()))
    }

    async fn flatten(&self) -> Result<()> {
        if self.out.exists() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("{} exists already; choose another name", self.out.display()),
            ));
        }
        let registry = Registry::new(HostOptions::default());
        let child = registry
            .open(&DiskRequest {
                path: self.child.clone(),
                format: None,
                access: Access::ReadOnly,
            })
            .await?;
        let merged = merged_of(&child).await?;
        let size = merged.virtual_size();
        let format = self.output_format.unwrap_or(Format::Qcow2);
        let new = match format {
            Format::Raw => NewImage::Raw {
                size,
                preallocation: Preallocation::Off,
            },
            Format::Qcow2 => NewImage::Qcow2(CreateOptions::new(size)),
        };
        create(&self.out, &new).await?;
        let written = self.write(&registry, format, &merged).await;
        if written.is_err() {
            // The first error is the one to tell.
            let _ = std::fs::remove_file(&self.out);
        }
        written
    }

    async fn write(
        &self,
        registry: &Registry,
        format: Format,
        merged: &crate::view::merged::Merged,
    ) -> Result<()> {
        let out = registry
            .open(&DiskRequest {
                path: self.out.clone(),
                format: Some(format),
                access: Access::ReadWrite,
            })
            .await?;
        let image = Arc::clone(&out.image);
        merged.copy_to(&*image).await
    }
}
