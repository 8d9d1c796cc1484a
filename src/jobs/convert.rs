//! Converting disks: into a new image, which gets its name when it is whole, or into one that is there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::copy::{Blank, Manner, Target, copy};
use super::source::{Chain, Source};
use crate::chain::create::{NewImage, create, refuse_own_backing};
use crate::chain::data_file::plain_path;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, Locking};
use crate::chain::part_file::PartFile;
use crate::chain::registry::{DiskRequest, OpenImage, Registry, file_id};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image};
use crate::progress::Progress;
use crate::qcow2::Qcow2;
use crate::storage::CacheMode;
use crate::sys::block_on;

/// Where the disk goes.
#[derive(Clone, Debug)]
pub enum Output {
    /// A new image.
    New(NewImage),
    /// An image that is there, of this format.
    Existing(Format),
}

/// How data is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Plain,
    /// Compressed, which only qcow2 can do.
    Compressed,
}

/// A conversion.
#[derive(Debug)]
pub struct Conversion<'a> {
    /// The image to write to.
    pub path: &'a Path,
    /// What it is.
    pub output: Output,
    /// How data is stored in it.
    pub encoding: Encoding,
    /// How it is written.
    pub manner: Manner,
    /// Where the host keeps what is written.
    pub cache: CacheMode,
}

impl Conversion<'_> {
    fn format(&self) -> Format {
        match &self.output {
            Output::New(NewImage::Raw { .. }) | Output::Existing(Format::Raw) => Format::Raw,
            Output::New(NewImage::Qcow2(_)) | Output::Existing(Format::Qcow2) => Format::Qcow2,
        }
    }
}

/// Copies `source`. Whatever interrupts that, a new image is there whole or not at all; one that was there before is
/// left as far as it was written.
///
/// # Errors
/// Those of [`PartFile`], [`create`], [`Registry::open`] and [`copy`]; [`ErrorKind::Unsupported`] for compressed data
/// in a raw image; [`ErrorKind::InvalidConfig`] if the existing image is too small.
pub fn convert(source: &dyn Source, conversion: &Conversion, progress: &Progress) -> Result<()> {
    if conversion.encoding == Encoding::Compressed && conversion.format() == Format::Raw {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "raw images have no compressed data: convert to qcow2",
        ));
    }
    let converted = match &conversion.output {
        Output::New(image) => convert_to_new(source, conversion, image, progress),
        Output::Existing(_) => write_to(conversion.path, source, conversion, progress),
    };
    converted.context(|| format!("converting to {}", conversion.path.display()))
}

fn convert_to_new(
    source: &dyn Source,
    conversion: &Conversion,
    image: &NewImage,
    progress: &Progress,
) -> Result<()> {
    let mut manner = conversion.manner;
    manner.blank = Blank::Zeros;
    if let NewImage::Qcow2(options) = image {
        refuse_own_backing(conversion.path, options)?;
        if options.backing.is_some() {
            manner.blank = Blank::Unknown;
        }
    }
    let data_file = NewDataFile::of(image);
    data_file.refuse_image(conversion.path)?;
    let file = PartFile::begin(conversion.path)?;
    block_on(create(file.part(), image))?;
    // It would be replaced by the image. The name has a file only now if both are new.
    data_file.refuse_image(conversion.path)?;
    let conversion = Conversion {
        output: conversion.output.clone(),
        manner,
        ..*conversion
    };
    write_to(file.part(), source, &conversion, progress)?;
    data_file.keep();
    file.finish()
}

/// The data file of an image in the making: it goes again if the image is not finished, unless it was there before.
struct NewDataFile {
    path: Option<PathBuf>,
    is_ours: bool,
}

impl NewDataFile {
    fn of(image: &NewImage) -> Self {
        let path = match image {
            NewImage::Qcow2(options) => options.data_file.as_ref(),
            NewImage::Raw { .. } => None,
        };
        let path = path.map(|data| plain_path(&data.file).to_owned());
        // Nothing is removed that cannot be told to be new.
        let is_ours = path.as_ref().is_some_and(|path| {
            path.try_exists().is_ok_and(|exists| !exists) && !path.is_symlink()
        });
        Self { path, is_ours }
    }

    fn refuse_image(&self, image: &Path) -> Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        match (file_id(path), file_id(image)) {
            (Ok(data), Ok(image)) if data == image => Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "{}: an image cannot be its own data file: give the data file another name",
                    path.display()
                ),
            )),
            _ => Ok(()),
        }
    }

    fn keep(mut self) {
        self.is_ours = false;
    }
}

impl Drop for NewDataFile {
    fn drop(&mut self) {
        if let (Some(path), true) = (&self.path, self.is_ours) {
            // The failure that led here is the one to tell.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn write_to(
    path: &Path,
    source: &dyn Source,
    conversion: &Conversion,
    progress: &Progress,
) -> Result<()> {
    let registry = Registry::new(HostOptions {
        cache: conversion.cache,
        locking: Locking::Lock,
    });
    let request = DiskRequest {
        path: path.to_owned(),
        format: Some(conversion.format()),
        access: Access::ReadWrite,
    };
    let image = block_on(registry.open(&request))?.image;
    if image.virtual_size() < source.size() {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "the image has {} bytes and the source {}: make it larger with `seethrough resize`",
                image.virtual_size(),
                source.size()
            ),
        ));
    }
    let target = match (conversion.encoding, as_qcow2(&*image)) {
        (Encoding::Compressed, Some(qcow2)) => Target::Compressed(qcow2),
        _ => Target::Plain(&*image),
    };
    copy(source, &target, conversion.manner, progress)
}

/// The image as the qcow2 image that it is.
#[must_use]
pub fn as_qcow2(image: &dyn Image) -> Option<&Qcow2> {
    let any: &dyn std::any::Any = image;
    any.downcast_ref()
}

/// What `disk` holds above the image at `base`, which is to be the backing file of a copy: the layers above that
/// image if it lies in the disk's chain, or else the topmost alone, whose own backing image has the same contents.
#[must_use]
pub fn above_base(disk: &OpenImage, base: &Path) -> Chain {
    let base = file_id(base).ok();
    let mut image = &disk.image;
    let mut source = &disk.source;
    while let (Some(below), Some(below_source)) = (image.backing(), &source.backing) {
        if Some(below_source.id) == base {
            return Chain::above(Arc::clone(&disk.image), Arc::clone(below));
        }
        (image, source) = (below, below_source);
    }
    match disk.image.backing() {
        Some(backing) => Chain::above(Arc::clone(&disk.image), Arc::clone(backing)),
        None => Chain::whole(Arc::clone(&disk.image)),
    }
}
