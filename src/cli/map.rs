//! `seethrough map`: what holds each range of a disk, in the words and JSON fields of `qemu-img map`; with `--groups`,
//! who writes each block group of a shared filesystem.

use std::fmt::Write;
use std::path::PathBuf;

use super::group_map::{Document, Shown};
use super::options::{parse_format, parse_size};
use super::output;
use super::tool::{Sharing, open, reading};
use crate::chain::format::Format;
use crate::chain::registry::OpenImage;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::jobs::map::{MapEntry, map};
use crate::storage::CacheMode;
use crate::sys::block_on;
use crate::view::declared::Declared;

/// How much is printed at a time, in bytes.
const CHUNK: usize = 64 << 10;

/// Arguments of `map`.
#[derive(Debug, clap::Args)]
pub struct Map {
    /// The image's format; it may be left out for a qcow2 image
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// How to print: for people, of ranges only what is not known to be zeros
    #[arg(long, value_enum, default_value_t = MapFormat::Human)]
    output: MapFormat,

    /// Show who writes each block group of a base or a child, and how full it is
    #[arg(long)]
    groups: bool,

    /// Where on the disk to begin
    #[arg(long, value_name = "OFFSET", value_parser = parse_size, default_value = "0", conflicts_with = "groups")]
    start_offset: u64,

    /// How far to go on, in bytes [default: to the disk's end]
    #[arg(long, value_name = "LENGTH", value_parser = parse_size, conflicts_with = "groups")]
    max_length: Option<u64>,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// How a map is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum MapFormat {
    /// For people
    Human,
    /// For programs
    Json,
    /// As a picture, of block groups
    Svg,
}

impl Map {
    /// Prints the map.
    ///
    /// # Errors
    /// Those of opening the image and of [`map`]; [`ErrorKind::Unsupported`] for compressed data in a map for
    /// people; [`ErrorKind::InvalidConfig`] for groups of an image that declares no regions.
    pub fn run(self) -> Result<()> {
        block_on(async {
            let registry = reading(self.sharing, CacheMode::Writeback);
            let disk = open(&registry, &self.file, self.format, Access::ReadOnly).await?;
            if self.groups {
                return self.show_groups(&disk).await;
            }
            if self.output == MapFormat::Svg {
                return Err(invalid("only block groups are drawn: add --groups"));
            }
            let start = self.start_offset;
            let end = self
                .max_length
                .map_or(u64::MAX, |length| start.saturating_add(length));
            let mut lines = Lines::new(self.output);
            map(&disk.image, start, end, |entry| lines.show(entry)).await?;
            lines.finish()
        })
    }

    async fn show_groups(&self, disk: &OpenImage) -> Result<()> {
        let declared = Declared::of(disk)?.ok_or_else(|| {
            invalid(format!(
                "{} declares no region: reserve one with `seethrough prepare`",
                self.file.display()
            ))
        })?;
        let map = declared.group_map().await.context(|| self.file.display().to_string())?;
        let filename = self.file.display().to_string();
        let shown = Shown {
            filename: &filename,
            is_child: declared.is_child(),
            map: &map,
        };
        match self.output {
            MapFormat::Human => output::print(&shown.text()),
            MapFormat::Json => output::print(&output::json(&Document::of(&shown))?),
            MapFormat::Svg => output::print(&shown.svg()),
        }
    }
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}

/// The lines to print.
struct Lines {
    format: MapFormat,
    text: String,
    is_first: bool,
}

impl Lines {
    fn new(format: MapFormat) -> Self {
        let text = match format {
            MapFormat::Human | MapFormat::Svg => {
                format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to")
            }
            MapFormat::Json => "[".to_owned(),
        };
        Self {
            format,
            text,
            is_first: true,
        }
    }

    fn show(&mut self, entry: &MapEntry) -> Result<()> {
        match self.format {
            MapFormat::Human | MapFormat::Svg => self.show_human(entry)?,
            MapFormat::Json => {
                if !std::mem::take(&mut self.is_first) {
                    self.text.push_str(",\n");
                }
                self.text.push_str(&json(entry));
            }
        }
        if self.text.len() >= CHUNK {
            output::print(&std::mem::take(&mut self.text))?;
        }
        Ok(())
    }

    fn show_human(&mut self, entry: &MapEntry) -> Result<()> {
        if !entry.data || entry.zero {
            return Ok(());
        }
        let Some((offset, file)) = &entry.place else {
            output::print(&std::mem::take(&mut self.text))?;
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the data at {:#x} is compressed and lies nowhere as it is: use --output json",
                    entry.start
                ),
            ));
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            self.text,
            "{:<#16x}{:<#16x}{offset:<#16x}{file}",
            Hex(entry.start),
            Hex(entry.length),
            offset = Hex(*offset),
        );
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        if self.format == MapFormat::Json {
            self.text.push_str("]\n");
        }
        output::print(&self.text)
    }
}

/// A number in hexadecimal digits, 0 as it is.
struct Hex(u64);

impl std::fmt::LowerHex for Hex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.pad("0"),
            number => f.pad(&format!("{number:#x}")),
        }
    }
}

fn json(entry: &MapEntry) -> String {
    let MapEntry {
        start,
        length,
        depth,
        present,
        zero,
        data,
        compressed,
        place,
    } = entry;
    let offset = match place {
        Some((offset, _)) => format!(", \"offset\": {offset}"),
        None => String::new(),
    };
    format!(
        "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{offset}}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> MapEntry {
        MapEntry {
            start: 0,
            length: 65536,
            depth: 1,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            place: Some((0x5_0000, "a.qcow2".into())),
        }
    }

    #[test]
    fn people_see_where_data_lies_and_nothing_of_zeros() {
        let mut lines = Lines::new(MapFormat::Human);
        lines.show(&entry()).unwrap();
        let zero = MapEntry {
            zero: true,
            ..entry()
        };
        lines.show(&zero).unwrap();
        let expected = "Offset          Length          Mapped to       File\n\
                        0               0x10000         0x50000         a.qcow2\n";
        assert_eq!(lines.text, expected);
        let compressed = MapEntry {
            compressed: true,
            place: None,
            ..entry()
        };
        assert!(lines.show(&compressed).is_err());
    }

    #[test]
    fn programs_get_the_fields_of_qemu_img() {
        let mut lines = Lines::new(MapFormat::Json);
        lines.show(&entry()).unwrap();
        let unplaced = MapEntry {
            place: None,
            ..entry()
        };
        lines.show(&unplaced).unwrap();
        let one = "{ \"start\": 0, \"length\": 65536, \"depth\": 1, \"present\": true, \"zero\": false, \
                   \"data\": true, \"compressed\": false";
        assert_eq!(lines.text, format!("[{one}, \"offset\": 327680}},\n{one}}}"));
    }
}
