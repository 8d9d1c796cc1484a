//! `seethrough create -b BASE --region NAME CHILD`: a child of a base that declares regions.

use std::ffi::OsStr;
use std::path::Path;

use super::output;
use crate::chain::backing::{agreed_format, resolve};
use crate::chain::create::{NewImage, create_filled};
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, Locking};
use crate::chain::registry::{DiskRequest, Registry, Source, file_id};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::qcow2::create::{BackingReference, CreateOptions, L2Entries};
use crate::qcow2::header::Version;
use crate::qcow2::header_extension::SEETHROUGH_EXTENSION;
use crate::storage::CacheMode;
use crate::view::declaration::Declaration;
use crate::view::declared::read_base_declaration;
use crate::view::new_child::NewChild;

/// Subclusters in a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;
/// The smallest cluster that can have them, in bytes.
const MIN_EXTENDED_CLUSTER: u64 = 16 << 10;

/// What the command line says of a child.
pub(super) struct ChildRequest<'a> {
    /// The new image.
    pub(super) file: &'a Path,
    /// The base, as the new image is to name it.
    pub(super) base: &'a OsStr,
    /// The base's format, if it is given.
    pub(super) base_format: Option<Format>,
    /// The regions that the child is to own.
    pub(super) regions: &'a [String],
    /// How much room the child is to have behind the end of the base's filesystem, in bytes.
    pub(super) grow: Option<u64>,
    /// The image's options, as far as they were given.
    pub(super) options: CreateOptions,
    /// The keys of the options that were given.
    pub(super) given: &'a [String],
}

impl ChildRequest<'_> {
    /// Makes the child; the base may be in use by its VM. Returns what was made.
    ///
    /// # Errors
    /// If the base declares no such region, or the options would make copy-on-write coarser than a block of the
    /// filesystem.
    pub(super) async fn create(&self) -> Result<NewImage> {
        let path = resolve(self.file, self.base)?;
        // What a child begins with depends only on what does not change while the base is in use.
        let registry = Registry::new(HostOptions {
            cache: CacheMode::Writeback,
            locking: Locking::ForceShare,
        });
        let base = registry
            .open(&DiskRequest {
                path: path.clone(),
                format: agreed_format(self.file, self.base, self.base_format)?,
                access: Access::ReadOnly,
            })
            .await
            .context(|| "the base (its format is given with -F)")?;
        self.refuse_own_base(&base.source)?;
        let declaration = read_base_declaration(&base.source.path, base.source.header.as_ref())?;
        let child = NewChild::plan_grown(&*base.image, &declaration, self.regions, self.grow)
            .await
            .context(|| path.display().to_string())?;
        let mut options = self.options_for(&child)?;
        options.backing = Some(BackingReference {
            file: self.base.to_owned(),
            format: base.source.format.name().to_owned(),
        });
        let document = Declaration::Child(child.declaration.clone()).to_bytes()?;
        create_filled(
            self.file,
            &options,
            Some(base.image),
            (SEETHROUGH_EXTENSION, &document),
            async |overlay| child.write_to(overlay).await,
        )
        .await?;
        Ok(NewImage::Qcow2(options))
    }

    /// A child that replaced its own base would leave nothing to see through to.
    fn refuse_own_base(&self, base: &Source) -> Result<()> {
        let Ok(file) = file_id(self.file) else {
            return Ok(());
        };
        let mut layer = Some(base);
        while let Some(source) = layer {
            if source.id == file {
                return Err(invalid(format!(
                    "{}: a child cannot replace its own base",
                    self.file.display()
                )));
            }
            layer = source.backing.as_deref();
        }
        Ok(())
    }

    /// The options, with subclusters of one block of the filesystem unless finer ones were asked for.
    fn options_for(&self, child: &NewChild) -> Result<CreateOptions> {
        let is_given = |key: &str| self.given.iter().any(|given| given == key);
        let mut options = self.options.clone();
        options.size = child.virtual_size;
        if options.version == Version::V2 {
            return Err(invalid("a child needs compat=1.1 or newer"));
        }
        if !is_given("extended_l2") {
            options.l2_entries = L2Entries::Extended;
        }
        if !is_given("cluster_size") {
            options.cluster_size = match options.l2_entries {
                L2Entries::Extended => child.cluster_size(),
                L2Entries::Standard => child.subcluster_size,
            };
        }
        let granularity = match options.l2_entries {
            L2Entries::Extended => options.cluster_size / SUBCLUSTERS,
            L2Entries::Standard => options.cluster_size,
        };
        if granularity > child.subcluster_size {
            return Err(invalid(format!(
                "with cluster_size={} the child would copy {granularity} bytes at once, more than the {} that have one \
                 owner: use extended_l2=on and a cluster_size of {MIN_EXTENDED_CLUSTER} to {}",
                options.cluster_size,
                child.subcluster_size,
                child.cluster_size()
            )));
        }
        Ok(options)
    }

    /// Makes the child and says so, unless `quiet`.
    ///
    /// # Errors
    /// As [`ChildRequest::create`].
    pub(super) async fn run(&self, report: Report) -> Result<()> {
        let image = self.create().await?;
        match report {
            Report::None => Ok(()),
            Report::Formatting => {
                let grow = self.grow.map(|bytes| format!(" grow={bytes}"));
                output::print(&format!(
                    "Formatting '{}', {image} region={}{}\n",
                    self.file.display(),
                    self.regions.join(","),
                    grow.unwrap_or_default()
                ))
            }
        }
    }
}

/// What to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// What was made.
    Formatting,
    /// Nothing.
    None,
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
