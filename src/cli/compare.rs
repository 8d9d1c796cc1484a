//! `seethrough compare`: whether two disks have the same contents, with the words and exit codes of
//! `qemu-img compare`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::options::{parse_cache, parse_format};
use super::output;
use super::progress::ShowProgress;
use super::tool::{Sharing, open, reading};
use crate::chain::format::Format;
use crate::chain::registry::{OpenImage, Registry};
use crate::error::{Error, Result};
use crate::image::Access;
use crate::jobs::compare::{Difference, Failure, Strictness, compare};
use crate::storage::CacheMode;
use crate::sys::block_on;

/// The disks differ.
const DIFFERENT: u8 = 1;
/// An image cannot be opened.
const CANNOT_OPEN: u8 = 2;
/// What a disk holds cannot be told.
const CANNOT_ASK: u8 = 3;
/// A disk cannot be read.
const CANNOT_READ: u8 = 4;

/// Tell whether two images have the same contents.
///
/// The exit code is 0 if they have, 1 if they have not, 2 if one cannot be opened, 3 if its metadata and 4 if its data
/// cannot be read.
#[derive(Debug, clap::Args)]
pub struct Compare {
    /// The first image's format; it may be left out for a qcow2 image
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    first_format: Option<Format>,

    /// The second image's format; it may be left out for a qcow2 image
    #[arg(short = 'F', value_name = "FORMAT", value_parser = parse_format)]
    second_format: Option<Format>,

    /// Tell of another size and of another allocation, too
    #[arg(short = 's')]
    strict: bool,

    /// How the host caches the images: writeback or none
    #[arg(short = 'T', value_name = "CACHE", value_parser = parse_cache, default_value = "writeback")]
    cache: CacheMode,

    #[command(flatten)]
    progress: ShowProgress,

    /// Print nothing
    #[arg(short = 'q')]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The first image
    #[arg(value_name = "FILE1")]
    first: PathBuf,

    /// The second image
    #[arg(value_name = "FILE2")]
    second: PathBuf,
}

impl Compare {
    /// Compares, and prints the outcome.
    ///
    /// # Errors
    /// If standard output does not take it; the failures of a comparison are exit codes.
    pub fn run(self) -> Result<ExitCode> {
        let registry = reading(self.sharing, self.cache);
        let first = open_one(&registry, &self.first, self.first_format);
        let disks = first.and_then(|first| {
            let second = open_one(&registry, &self.second, self.second_format)?;
            Ok([first, second])
        });
        match disks {
            Ok(disks) => self.compare(&disks),
            Err(error) => Ok(fails(&error, CANNOT_OPEN)),
        }
    }

    fn compare(&self, disks: &[OpenImage; 2]) -> Result<ExitCode> {
        let [first, second] = disks;
        let sizes = [first.image.virtual_size(), second.image.virtual_size()];
        let same_size = sizes[0] == sizes[1];
        if self.strict && !same_size {
            self.print("Strict mode: Image size mismatch!\n")?;
            return Ok(ExitCode::from(DIFFERENT));
        }
        let strictness = if self.strict {
            Strictness::Allocation
        } else {
            Strictness::Contents
        };
        let images = [&first.image, &second.image];
        let compared = self
            .progress
            .during(|progress| compare(images, strictness, progress));
        let difference = match compared {
            Ok(difference) => difference,
            Err(Failure::Allocation(error)) => return Ok(fails(&error, CANNOT_ASK)),
            Err(Failure::Read(error)) => return Ok(fails(&error, CANNOT_READ)),
        };
        let shorter = sizes[0].min(sizes[1]);
        let reached = match difference {
            Some(Difference::Contents(at) | Difference::Allocation(at)) => at.0,
            None => u64::MAX,
        };
        if !same_size && reached >= shorter {
            self.print("Warning: Image size mismatch!\n")?;
        }
        match difference {
            None => {
                self.print("Images are identical.\n")?;
                Ok(ExitCode::SUCCESS)
            }
            Some(Difference::Contents(at)) => {
                self.print(&format!("Content mismatch at offset {at}!\n"))?;
                Ok(ExitCode::from(DIFFERENT))
            }
            Some(Difference::Allocation(at)) => {
                self.print(&format!("Strict mode: Offset {at} block status mismatch!\n"))?;
                Ok(ExitCode::from(DIFFERENT))
            }
        }
    }

    fn print(&self, text: &str) -> Result<()> {
        if self.quiet {
            return Ok(());
        }
        output::print(text)
    }
}

fn open_one(registry: &Registry, path: &Path, format: Option<Format>) -> Result<OpenImage> {
    block_on(open(registry, path, format, Access::ReadOnly))
}

/// Tells of a failure that has an exit code of its own.
fn fails(error: &Error, code: u8) -> ExitCode {
    eprintln!("seethrough: {error}");
    ExitCode::from(code)
}
