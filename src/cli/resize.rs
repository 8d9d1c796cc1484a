//! `seethrough resize`: another length for a disk, read as `qemu-img resize` reads its arguments.

use std::path::PathBuf;

use super::options::{parse_format, parse_size};
use super::output;
use crate::chain::create::resize_raw;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, open_file};
use crate::chain::inspect::{Unnamed, detect};
use crate::chain::single::open_with_backing;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image};
use crate::qcow2::preallocate::Preallocation;
use crate::storage::{FileStorage, Storage};
use crate::sys::block_on;

/// Make a disk longer or shorter. What is new reads as zeros; partitions and filesystems on it stay as they are.
#[derive(Debug, clap::Args)]
pub struct Resize {
    /// The image's format; it may be left out for a qcow2 image
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// Make the disk shorter, and lose what lies behind its new end
    #[arg(long)]
    shrink: bool,

    /// What of a longer disk is ready before it is written to: off, metadata, falloc or full
    #[arg(long, value_name = "MODE", value_parser = parse_preallocation, default_value = "off")]
    preallocation: Preallocation,

    /// Print nothing
    #[arg(short = 'q')]
    quiet: bool,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// The new size, or by how much to grow or to shrink; with a suffix k, M, G, T, P or E if need be
    #[arg(value_name = "[+|-]SIZE", value_parser = parse_new_size, allow_hyphen_values = true)]
    size: NewSize,
}

/// What size a disk shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NewSize {
    Bytes(u64),
    More(u64),
    Less(u64),
}

fn parse_preallocation(name: &str) -> Result<Preallocation, String> {
    Preallocation::named(name)
        .ok_or_else(|| format!("'{name}' is none of off, metadata, falloc and full"))
}

fn parse_new_size(text: &str) -> Result<NewSize, String> {
    let (make, digits): (fn(u64) -> NewSize, _) = match text.split_at_checked(1) {
        Some(("+", digits)) => (NewSize::More, digits),
        Some(("-", digits)) => (NewSize::Less, digits),
        _ => (NewSize::Bytes, text),
    };
    parse_size(digits).map(make)
}

impl NewSize {
    /// In bytes, for a disk that has `now`.
    fn of(self, now: u64) -> Result<u64> {
        let size = match self {
            Self::Bytes(size) => Some(size),
            Self::More(more) => now.checked_add(more),
            Self::Less(less) => now.checked_sub(less),
        };
        size.filter(|size| (1..=i64::MAX.unsigned_abs()).contains(size))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::OutOfBounds,
                    format!(
                        "the disk has {now} bytes, and its new size must be positive and below 8 EiB"
                    ),
                )
            })
    }
}

impl Resize {
    /// Changes the size.
    ///
    /// # Errors
    /// If the image is in use or broken, or cannot have the size.
    pub fn run(self) -> Result<()> {
        block_on(self.resize()).context(|| format!("cannot resize {}", self.file.display()))?;
        if self.quiet {
            return Ok(());
        }
        output::print("Image resized.\n")
    }

    async fn resize(&self) -> Result<()> {
        let options = HostOptions::default();
        let storage = open_file(&self.file, Access::ReadWrite, options)?;
        let format = match self.format {
            Some(format) => format,
            None => detect(&storage, Unnamed::Refuse).await?,
        };
        match format {
            Format::Raw => self.resize_raw(&storage).await,
            Format::Qcow2 => {
                drop(storage);
                let image = open_with_backing(&self.file, Access::ReadWrite, options).await?;
                let size = self.new_size(image.virtual_size())?;
                let resized = image.resize_preallocated(size, self.preallocation);
                resized.await.map(drop)
            }
        }
    }

    async fn resize_raw(&self, storage: &FileStorage) -> Result<()> {
        let size = self.new_size(storage.len())?;
        resize_raw(storage, size, self.preallocation).await
    }

    /// # Errors
    /// [`ErrorKind::OutOfBounds`] for a size that no disk has, [`ErrorKind::Unsupported`] for a shorter disk that
    /// nobody has asked for.
    fn new_size(&self, now: u64) -> Result<u64> {
        let size = self.size.of(now)?;
        if size < now && !self.shrink {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the disk has {now} bytes, and everything behind the first {size} would be lost: if nothing of it \
                     is needed, use --shrink"
                ),
            ));
        }
        if size <= now && self.preallocation != Preallocation::Off {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the disk has {now} bytes, and only one that becomes longer can be preallocated"),
            ));
        }
        Ok(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative_to_the_present_one() {
        let now = 10 << 20;
        for (text, size) in [
            ("4M", 4 << 20),
            ("+1k", now + 1024),
            ("-1M", 9 << 20),
            ("+0", now),
        ] {
            assert_eq!(parse_new_size(text).unwrap().of(now).unwrap(), size);
        }
        for text in ["-10M", "-11M", "0", "+9223372036854775807"] {
            assert!(parse_new_size(text).unwrap().of(now).is_err(), "{text}");
        }
        for text in ["", "+", "-", "--1", "+-1", "x"] {
            assert!(parse_new_size(text).is_err(), "{text}");
        }
    }
}
