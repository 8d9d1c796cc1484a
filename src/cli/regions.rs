//! `seethrough regions`: which regions there are, whose they are, and how full.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::options::parse_format;
use super::output::{self, OutputFormat, human_size};
use super::tool::{Sharing, open, reading};
use crate::chain::format::Format;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::storage::CacheMode;
use crate::sys::block_on;
use crate::view::declaration::{self, Extent};
use crate::view::declared::Declared;
use crate::view::regions::RegionUse;

/// Show which regions there are, whose they are and how full.
///
/// For a base: every region, as a new child would find it. For a child: its own. While a VM runs, what is shown is what
/// it has brought to its place.
#[derive(Debug, clap::Args)]
pub struct Regions {
    /// The images' format; without it, they have to be qcow2
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    #[command(flatten)]
    sharing: Sharing,

    /// Bases and children
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

/// One image's regions.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageRegions {
    filename: String,
    role: &'static str,
    /// Tells the base from every other one.
    base: String,
    regions: Vec<Row>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    directory: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    partition: Option<u32>,
    /// Where the children's writes are stored: `private` in their overlays, `shared` in the base.
    sharing: declaration::Sharing,
    /// Of a shared region: who holds it.
    #[serde(skip_serializing_if = "Option::is_none")]
    holder: Option<String>,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    free: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_inodes: Option<u32>,
    /// Of a base's region: those of the given children that own it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    users: Vec<String>,
}

impl Regions {
    /// Prints the regions.
    ///
    /// # Errors
    /// If an image cannot be opened or declares no regions.
    pub fn run(self) -> Result<()> {
        let mut images = Vec::new();
        for file in &self.files {
            let name = file.display().to_string();
            images.push(block_on(self.look_at(file)).context(|| name)?);
        }
        note_users(&mut images);
        match self.output {
            OutputFormat::Human => output::print(&human(&images)),
            OutputFormat::Json => output::print(&output::json(&images)?),
        }
    }

    async fn look_at(&self, file: &Path) -> Result<ImageRegions> {
        let registry = reading(self.sharing, CacheMode::Writeback);
        let disk = open(&registry, file, self.format, Access::ReadOnly).await?;
        let declared = Declared::of(&disk)?.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidConfig,
                "it declares no region: reserve one with `seethrough prepare`",
            )
        })?;
        let regions = declared.usage().await?;
        Ok(ImageRegions {
            filename: file.display().to_string(),
            role: if declared.is_child() { "child" } else { "base" },
            base: declared.base_id().to_owned(),
            regions: regions.into_iter().map(Row::of).collect(),
        })
    }
}

impl Row {
    fn of(used: RegionUse) -> Self {
        let mut row = Self {
            name: used.region.name,
            groups: None,
            directory: None,
            partition: None,
            sharing: used.region.sharing,
            holder: used.holder,
            size: used.size,
            free: used.free.map(|free| free.bytes),
            free_inodes: used.free.map(|free| free.inodes),
            users: Vec::new(),
        };
        match used.region.extent {
            Extent::Groups { list, directory, .. } => {
                row.groups = Some(list.to_string());
                row.directory = Some(directory);
            }
            Extent::Partition { number, .. } => row.partition = Some(number),
        }
        row
    }

    fn human(&self) -> String {
        let place = match (&self.groups, &self.directory, self.partition) {
            (Some(groups), Some(directory), _) => format!("groups {groups}, {directory}"),
            (_, _, Some(number)) => format!("partition {number}"),
            _ => String::new(),
        };
        let free = match (self.free, self.free_inodes) {
            (Some(bytes), Some(inodes)) => format!("{} and {inodes} inodes free", human_size(bytes)),
            _ => "contents unknown".to_owned(),
        };
        let sharing = match (self.sharing, &self.holder) {
            (declaration::Sharing::Private, _) => String::new(),
            (declaration::Sharing::Shared, None) => ", shared".to_owned(),
            (declaration::Sharing::Shared, Some(holder)) => format!(", shared and held by {holder}"),
        };
        let users = match self.users.as_slice() {
            [] => String::new(),
            users => format!("; of {}", users.join(", ")),
        };
        format!(
            "{name}: {place}{sharing}; {size}, {free}{users}",
            name = self.name,
            size = human_size(self.size)
        )
    }
}

/// Enters the children in their bases' regions.
fn note_users(images: &mut [ImageRegions]) {
    let owned: Vec<(String, String, String)> = images
        .iter()
        .filter(|image| image.role == "child")
        .flat_map(|image| {
            let row = |row: &Row| (image.base.clone(), row.name.clone(), image.filename.clone());
            image.regions.iter().map(row).collect::<Vec<_>>()
        })
        .collect();
    for base in images.iter_mut().filter(|image| image.role == "base") {
        for row in &mut base.regions {
            let users = owned
                .iter()
                .filter(|(id, region, _)| *id == base.base && *region == row.name);
            row.users = users.map(|(_, _, child)| child.clone()).collect();
        }
    }
}

fn human(images: &[ImageRegions]) -> String {
    let mut text = String::new();
    for image in images {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{} ({})", output::one_line(&image.filename), image.role);
        for row in &image.regions {
            let _ = writeln!(text, "  {}", output::one_line(&row.human()));
        }
    }
    text
}
