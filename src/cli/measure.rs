//! `seethrough measure`: how large an image would be, in the words and JSON fields of `qemu-img measure`.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::creation_options::CreationOptions;
use super::options::{parse_format, parse_key_values, parse_size};
use super::output::{self, OutputFormat};
use super::tool::{Sharing, open, reading};
use crate::chain::create::NewImage;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, open_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::jobs::measure::{Contents, measure};
use crate::qcow2::bitmap::BitmapDirectory;
use crate::qcow2::create::CreateOptions;
use crate::qcow2::header::{Header, Version};
use crate::storage::CacheMode;
use crate::sys::block_on;

/// Arguments of `measure`.
#[derive(Debug, clap::Args)]
pub struct Measure {
    /// The format of FILE; it may be left out for a qcow2 image
    #[arg(short = 'f', value_name = "FORMAT", requires = "file", value_parser = parse_format)]
    format: Option<Format>,

    /// The new image's format: raw or qcow2
    #[arg(short = 'O', value_name = "FORMAT", value_parser = parse_format, default_value = "raw")]
    output_format: Format,

    /// Options of the new image, as `create` takes them
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,

    /// The virtual size of a new, empty image
    #[arg(long, value_name = "N", conflicts_with = "file", required_unless_present = "file", value_parser = parse_size)]
    size: Option<u64>,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    #[command(flatten)]
    sharing: Sharing,

    /// The image of which the new one would be a copy
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

/// The figures, with the field names of QEMU's `BlockMeasureInfo`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
    commitment: u64,
}

impl Measure {
    /// Prints the figures.
    ///
    /// # Errors
    /// Those of opening the image and of [`measure`].
    pub fn run(self) -> Result<()> {
        let report = block_on(self.report())?;
        output::print(&match self.output {
            OutputFormat::Human => report.human(),
            OutputFormat::Json => output::json(&report)?,
        })
    }

    async fn report(&self) -> Result<Report> {
        let mut options = CreationOptions::default();
        let mut everything = false;
        for list in &self.options {
            for (key, value) in parse_key_values(list)? {
                if key == "preallocation" {
                    everything = is_full(&value)?;
                } else {
                    options.set(&key, &value)?;
                }
            }
        }
        if options.size.is_some() {
            return Err(invalid("name the size with --size, not with -o size"));
        }
        let disk = match &self.file {
            Some(file) => {
                let registry = reading(self.sharing, CacheMode::Writeback);
                Some(open(&registry, file, self.format, Access::ReadOnly).await?)
            }
            None => None,
        };
        let size = match &disk {
            Some(disk) => disk.image.virtual_size(),
            None => self.size.unwrap_or(0),
        };
        let new = options.image(self.output_format, size, None)?;
        let contents = match &disk {
            _ if everything => Contents::Everything,
            Some(disk) => Contents::Of(&disk.image),
            None => Contents::Nothing,
        };
        let measured = measure(&new, contents).await?;
        let bitmaps = match (&new, &self.file, disk) {
            (NewImage::Qcow2(options), Some(file), Some(disk)) => {
                let header = disk.source.header.as_ref();
                self.bitmaps(file, header, options, size).await?
            }
            _ => None,
        };
        Ok(Report {
            bitmaps,
            required: measured.required,
            fully_allocated: measured.fully_allocated,
            commitment: measured.commitment,
        })
    }

    /// What copies of the bitmaps of `file` would take, if both images can have any.
    async fn bitmaps(
        &self,
        file: &Path,
        header: Option<&Header>,
        options: &CreateOptions,
        size: u64,
    ) -> Result<Option<u64>> {
        let Some(header) = header.filter(|header| header.version == Version::V3) else {
            return Ok(None);
        };
        if options.version == Version::V2 {
            return Ok(None);
        }
        let host = HostOptions {
            locking: self.sharing.locking(),
            ..HostOptions::default()
        };
        let storage = open_file(file, Access::ReadOnly, host)?;
        let directory = BitmapDirectory::read(&storage, header)
            .await
            .context(|| file.display().to_string())?;
        Ok(Some(directory.map_or(0, |directory| {
            directory.full_length(size, options.cluster_size)
        })))
    }
}

impl Report {
    fn human(&self) -> String {
        let mut text = format!(
            "required size: {}\nfully allocated size: {}\n",
            self.required, self.fully_allocated
        );
        if let Some(bitmaps) = self.bitmaps {
            text.push_str(&format!("bitmaps size: {bitmaps}\n"));
        }
        text.push_str(&format!("commitment: {}\n", self.commitment));
        text
    }
}

/// Whether a mode of preallocation takes the room of all data at once.
fn is_full(mode: &str) -> Result<bool> {
    match mode {
        "off" | "metadata" => Ok(false),
        "falloc" | "full" => Ok(true),
        _ => Err(invalid(&format!("'preallocation={mode}': no such value"))),
    }
}

fn invalid(why: &str) -> Error {
    Error::new(ErrorKind::InvalidConfig, why)
}
