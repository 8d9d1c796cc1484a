//! `seethrough convert`: a disk as another image, read as `qemu-img convert` reads its arguments.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;

use super::creation_options::CreationOptions;
use super::options::{parse_cache, parse_format, parse_size};
use super::progress::ShowProgress;
use super::tool::{Sharing, open, reading};
use crate::chain::backing::resolve;
use crate::chain::format::Format;
use crate::chain::host::Locking;
use crate::chain::inspect::{Unnamed, inspect};
use crate::chain::registry::OpenImage;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image};
use crate::jobs::convert::{Conversion, Encoding, Output, above_base, as_qcow2, convert};
use crate::jobs::copy::{Blank, Manner, Order, Zeros};
use crate::jobs::source::{Concatenation, Source};
use crate::qcow2::create::BackingReference;
use crate::qcow2::snapshot_table::{Snapshot, printable};
use crate::storage::CacheMode;
use crate::sys::block_on;
use crate::units::SECTOR_SIZE;
use crate::view::declared::declaration_of;

/// Arguments of `convert`.
#[derive(Debug, clap::Args)]
pub struct Convert {
    /// The sources' format; it may be left out for qcow2 images
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// The format of the output: raw or qcow2
    #[arg(short = 'O', value_name = "FORMAT", value_parser = parse_format, default_value = "raw")]
    output_format: Format,

    /// Options of the output, as for `create`
    #[arg(short = 'o', value_name = "OPTIONS", conflicts_with = "existing")]
    options: Vec<String>,

    /// Compress the data
    #[arg(short = 'c', conflicts_with = "out_of_order")]
    compress: bool,

    /// Make the output an overlay of this image, which has the contents of the source's backing image, and copy only
    /// what the source holds above it; relative to the output's directory
    #[arg(short = 'B', value_name = "BACKING", conflicts_with = "existing")]
    backing: Option<OsString>,

    /// The backing image's format; it may be left out for a qcow2 image
    #[arg(short = 'F', value_name = "FORMAT", requires = "backing", value_parser = parse_format)]
    backing_format: Option<Format>,

    /// Read the source as it was when this snapshot was taken: an ID or a name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', value_name = "SNAPSHOT", conflicts_with = "backing")]
    snapshot: Option<OsString>,

    /// Write into the output that is there
    #[arg(short = 'n')]
    existing: bool,

    /// The output that is there reads as zeros
    #[arg(long, requires = "existing")]
    target_is_zero: bool,

    /// Leave out runs of zeros of at least this many bytes; 0 writes all of them
    #[arg(short = 'S', value_name = "BYTES", value_parser = parse_size, default_value = "4k")]
    sparse: u64,

    /// Pieces under way at the same time, up to 16
    #[arg(short = 'm', value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=16))]
    lanes: u8,

    /// Write pieces as they come, rather than from the first byte to the last
    #[arg(short = 'W')]
    out_of_order: bool,

    /// How the host caches the output: writeback or none
    #[arg(short = 't', value_name = "CACHE", value_parser = parse_cache, default_value = "writeback")]
    cache: CacheMode,

    /// How the host caches the sources: writeback or none
    #[arg(short = 'T', value_name = "CACHE", value_parser = parse_cache, default_value = "writeback")]
    source_cache: CacheMode,

    #[command(flatten)]
    progress: ShowProgress,

    /// Print nothing, which is all there is to print
    #[arg(short = 'q')]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The sources, one behind the other, and the output
    #[arg(value_name = "FILE", num_args = 2.., required = true)]
    files: Vec<PathBuf>,
}

impl Convert {
    /// Converts.
    ///
    /// # Errors
    /// Those of opening the sources, and of [`convert`].
    pub fn run(self) -> Result<()> {
        let Some((output, sources)) = self.files.split_last() else {
            return Err(invalid("name the sources and the output"));
        };
        let registry = reading(self.sharing, self.source_cache);
        let mut disks = Vec::new();
        for path in sources {
            let disk = block_on(open(&registry, path, self.format, Access::ReadOnly));
            disks.push(disk.context(|| "the source (its format is given with -f)")?);
        }
        disks.iter().try_for_each(warn_of_regions)?;
        if let Some(wanted) = &self.snapshot {
            let [disk] = disks.as_mut_slice() else {
                return Err(invalid("-l makes sense for one source alone"));
            };
            disk.image = block_on(at_snapshot(&*disk.image, wanted))?;
        }
        let backing = self.backing_reference(output)?;
        let source = self.source(&disks, output)?;
        let conversion = Conversion {
            path: output,
            output: self.output(source.size(), backing)?,
            encoding: if self.compress {
                Encoding::Compressed
            } else {
                Encoding::Plain
            },
            manner: self.manner()?,
            cache: self.cache,
        };
        self.progress
            .during(|progress| convert(&*source, &conversion, progress))
    }

    fn source(&self, disks: &[OpenImage], output: &std::path::Path) -> Result<Box<dyn Source>> {
        match (&self.backing, disks) {
            (Some(name), [disk]) => Ok(Box::new(above_base(disk, &resolve(output, name)?))),
            (Some(_), _) => Err(invalid("-B makes sense for one source alone")),
            (None, disks) => {
                let images = disks.iter().map(|disk| disk.image.clone());
                Ok(Box::new(Concatenation::new(images)))
            }
        }
    }

    /// The backing file of the output, which is there and of the format that it is said to be.
    fn backing_reference(&self, output: &std::path::Path) -> Result<Option<BackingReference>> {
        let Some(name) = &self.backing else {
            return Ok(None);
        };
        let found = block_on(inspect(
            &resolve(output, name)?,
            self.backing_format,
            Unnamed::Refuse,
            Locking::ForceShare,
        ))
        .context(|| "the backing image (its format is given with -F)")?;
        Ok(Some(BackingReference {
            file: name.clone(),
            format: found.format.name().to_owned(),
        }))
    }

    fn output(&self, size: u64, backing: Option<BackingReference>) -> Result<Output> {
        if self.existing {
            return Ok(Output::Existing(self.output_format));
        }
        let (options, _) = CreationOptions::parse(&self.options)?;
        let size = match options.size {
            Some(given) if given < size => {
                return Err(invalid(format!("size={given} is less than the {size} bytes of the source")));
            }
            given => given.unwrap_or(size),
        };
        let image = options.image(self.output_format, size, backing)?;
        Ok(Output::New(image))
    }

    fn manner(&self) -> Result<Manner> {
        let zeros = match self.sparse {
            0 => Zeros::Written,
            bytes if bytes.is_multiple_of(SECTOR_SIZE) => Zeros::Found(bytes),
            bytes => return Err(invalid(format!("-S {bytes}: it is a multiple of {SECTOR_SIZE}, or 0"))),
        };
        Ok(Manner {
            lanes: self.lanes.into(),
            zeros,
            order: if self.out_of_order {
                Order::Any
            } else {
                Order::Sequential
            },
            blank: if self.target_is_zero {
                Blank::Zeros
            } else {
                Blank::Unknown
            },
        })
    }
}

/// The disk as it was when the snapshot was taken that `wanted` names.
async fn at_snapshot(image: &dyn Image, wanted: &OsStr) -> Result<Arc<dyn Image>> {
    let Some(image) = as_qcow2(image) else {
        return Err(invalid("-l: a raw image has no snapshots: only qcow2 images have"));
    };
    let snapshots = image.snapshots().await?;
    let found = find_snapshot(&snapshots, wanted)?.ok_or_else(|| {
        Error::new(
            ErrorKind::OutOfBounds,
            format!(
                "there is no snapshot '{}': `seethrough snapshot -l` lists those there are",
                printable(wanted)
            ),
        )
    })?;
    Ok(Arc::new(image.at_snapshot(found).await?))
}

/// The snapshot that `wanted` names as `qemu-img convert -l` reads it: an ID goes before a name, and where both are
/// given by their keys, both have to be its own.
fn find_snapshot<'a>(snapshots: &'a [Snapshot], wanted: &OsStr) -> Result<Option<&'a Snapshot>> {
    let text = wanted.to_string_lossy();
    if !text.starts_with("snapshot.") {
        let by_id = snapshots.iter().find(|snapshot| snapshot.id == wanted);
        return Ok(by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == wanted)));
    }
    let (mut id, mut name) = (None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value),
            Some(("snapshot.name", value)) => name = Some(value),
            _ => return Err(invalid(format!("-l: '{part}' is neither snapshot.id=ID nor snapshot.name=NAME"))),
        }
    }
    let is_wanted = |snapshot: &&Snapshot| {
        id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name)
    };
    Ok(snapshots.iter().find(is_wanted))
}

/// A copy declares nothing, and shows of a child what stock tools do.
fn warn_of_regions(disk: &OpenImage) -> Result<()> {
    if declaration_of(&disk.source)?.is_some() {
        log::warn!(
            "{}: it declares regions, which a copy does not; a child's disk as its VM sees it is made by \
             `seethrough flatten`",
            disk.source.path.display()
        );
    }
    Ok(())
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
