//! `seethrough create`: a new, empty image, read as `qemu-img create` reads its arguments.
//!
//! The format is `-f`'s; without it qcow2 if there is a backing file or an option that only qcow2 has, and raw
//! otherwise.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::chain::backing::{agreed_format, resolve};
use crate::chain::create::{NewImage, create};
use crate::chain::format::Format;
use crate::chain::host::Locking;
use crate::chain::inspect::{Unnamed, inspect_chain};
use crate::chain::registry::file_id;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::qcow2::create::BackingReference;
use crate::sys::block_on;

use super::create_child::{ChildRequest, Report};
use super::creation_options::CreationOptions;
use super::options::{parse_format, parse_size};
use super::output;

/// Arguments of `create`.
#[derive(clap::Args)]
pub struct Create {
    /// The new image's format: raw or qcow2
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// The image to lie over, relative to the new image's directory
    #[arg(short = 'b', value_name = "BACKING")]
    backing: Option<OsString>,

    /// The backing image's format; it may be left out for a qcow2 image
    #[arg(short = 'F', value_name = "FORMAT", requires = "backing", value_parser = parse_format)]
    backing_format: Option<Format>,

    /// Options of the format, as key=value,key=value: compat, cluster_size, extended_l2, refcount_bits,
    /// lazy_refcounts, compression_type, preallocation, data_file, data_file_raw, size
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,

    /// Do not look at the backing image; needs a size and -F
    #[arg(short = 'u', requires = "backing_format")]
    unchecked: bool,

    /// Make a child of the backing image that owns this region of it; may be repeated
    #[arg(long = "region", value_name = "NAME", requires = "backing", conflicts_with_all = ["unchecked", "size"])]
    regions: Vec<String>,

    /// Give the child block groups of its own besides, behind the end of the base's filesystem: as many as make this
    /// size, with a suffix k, M, G, T, P or E if need be
    #[arg(long, value_name = "SIZE", requires = "regions", value_parser = parse_size)]
    grow: Option<u64>,

    /// Print nothing
    #[arg(short = 'q')]
    quiet: bool,

    /// The new image
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The virtual size, with a suffix k, M, G, T, P or E if need be; the backing image's by default
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
}

impl Create {
    /// Makes the image.
    ///
    /// # Errors
    /// What [`create`] and the look at the backing image may fail with.
    pub fn run(self) -> Result<()> {
        let (options, given) = CreationOptions::parse(&self.options)?;
        if let (Some(base), false) = (&self.backing, self.regions.is_empty()) {
            return self.run_child(base, options, &given);
        }
        let image = self.new_image(&options)?;
        block_on(create(&self.file, &image))?;
        if self.quiet {
            return Ok(());
        }
        output::print(&format!("Formatting '{}', {image}\n", self.file.display()))
    }

    fn run_child(&self, base: &OsStr, options: CreationOptions, given: &[String]) -> Result<()> {
        if self.format == Some(Format::Raw) {
            return Err(invalid("a child is a qcow2 image: leave -f out"));
        }
        if options.size.is_some() {
            return Err(invalid(
                "a child is as large as its base: leave the size out, or give it block groups of its own with --grow",
            ));
        }
        let report = if self.quiet {
            Report::None
        } else {
            Report::Formatting
        };
        let child = ChildRequest {
            file: &self.file,
            base,
            base_format: self.backing_format,
            regions: &self.regions,
            grow: self.grow,
            options: options.qcow2,
            given,
        };
        block_on(child.run(report))
    }

    fn new_image(&self, options: &CreationOptions) -> Result<NewImage> {
        let backing = self.backing()?;
        let size = self.size.or(options.size);
        let size = match (size, &backing) {
            (Some(size), _) => size,
            (None, Some((_, Some(size)))) => *size,
            (None, _) => {
                return Err(invalid(
                    "a new image needs a size, or a backing image that is looked at to take it from",
                ));
            }
        };
        let qcow2 = backing.is_some() || options.qcow2_key.is_some();
        let format = self
            .format
            .unwrap_or(if qcow2 { Format::Qcow2 } else { Format::Raw });
        options.image(format, size, backing.map(|(reference, _)| reference))
    }

    /// The backing image as the header shall name it, and its size if it was looked at.
    fn backing(&self) -> Result<Option<(BackingReference, Option<u64>)>> {
        let Some(name) = &self.backing else {
            return Ok(None);
        };
        let reference = |format: Format| BackingReference {
            file: name.clone(),
            format: format.name().to_owned(),
        };
        let format = agreed_format(&self.file, name, self.backing_format)?;
        if let (true, Some(format)) = (self.unchecked, format) {
            return Ok(Some((reference(format), None)));
        }
        let path = resolve(&self.file, name)?;
        if is_same_file(&path, &self.file) {
            return Err(invalid(format!("{}: an image cannot lie over itself", path.display())));
        }
        // The base may be in use by its VM: its size and format do not change under us.
        let chain = block_on(inspect_chain(
            &path,
            format,
            Unnamed::Refuse,
            Locking::ForceShare,
        ))
        .context(|| "the backing image (its format is given with -F)")?;
        let Some(top) = chain.first() else {
            return Ok(None);
        };
        if chain.iter().any(|layer| is_same_file(&layer.path, &self.file)) {
            return Err(invalid(format!(
                "{}: it is the backing image or lies behind it, and would become its own",
                self.file.display()
            )));
        }
        Ok(Some((reference(top.format), Some(top.virtual_size))))
    }
}

/// Whether both paths lead to one file; a file that is not there yet is no other's.
fn is_same_file(a: &Path, b: &Path) -> bool {
    matches!((file_id(a), file_id(b)), (Ok(a), Ok(b)) if a == b)
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
