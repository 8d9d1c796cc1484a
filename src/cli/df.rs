//! `seethrough df`: how full bases and children are, as their guests are told, region by region, and on the host.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::options::parse_format;
use super::output::{self, OutputFormat, human_size};
use super::tool::{Sharing, open, reading};
use crate::chain::format::Format;
use crate::chain::inspect::{Unnamed, inspect};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::jobs::figures::image_figures;
use crate::storage::CacheMode;
use crate::sys::block_on;
use crate::view::declared::Declared;
use crate::view::regions::RegionUse;
use crate::view::statfs::Statfs;

/// Show how full bases and children are.
///
/// Of each VM what `df` tells in its guest: what is free there are its own block groups. Below it each region, and what
/// its image takes on the host. While a VM runs, it is what that has committed.
#[derive(Debug, clap::Args)]
pub struct Df {
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

/// One VM. Sizes are bytes.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Vm {
    filename: String,
    role: &'static str,
    #[serde(flatten)]
    guest: Option<Guest>,
    /// What the host has allocated to the image.
    allocation: u64,
    regions: Vec<Region>,
}

/// What the guest is told.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Guest {
    size: u64,
    used: u64,
    available: u64,
    inodes: u32,
    free_inodes: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Region {
    name: String,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    free: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_inodes: Option<u32>,
}

impl Df {
    /// Prints how full the images are.
    ///
    /// # Errors
    /// If an image cannot be opened, declares no regions, or does not fit what it declares.
    pub fn run(self) -> Result<()> {
        let mut vms = Vec::new();
        for file in &self.files {
            vms.push(block_on(self.look_at(file)).context(|| file.display().to_string())?);
        }
        match self.output {
            OutputFormat::Human => output::print(&human(&vms)),
            OutputFormat::Json => output::print(&output::json(&vms)?),
        }
    }

    async fn look_at(&self, file: &Path) -> Result<Vm> {
        let registry = reading(self.sharing, CacheMode::Writeback);
        let disk = open(&registry, file, self.format, Access::ReadOnly).await?;
        let declared = Declared::of(&disk)?.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidConfig,
                "it declares no region: ask its guest, or reserve one with `seethrough prepare`",
            )
        })?;
        let room = declared.room().await?;
        let locking = self.sharing.locking();
        let inspected = inspect(file, self.format, Unnamed::Refuse, locking).await?;
        let files = image_figures(&inspected, locking).await?;
        Ok(Vm {
            filename: file.display().to_string(),
            role: if declared.is_child() { "child" } else { "base" },
            guest: room.statfs.map(|statfs| Guest::of(&statfs)),
            allocation: files.iter().map(|file| file.allocation).sum(),
            regions: room.regions.into_iter().map(Region::of).collect(),
        })
    }
}

impl Guest {
    fn of(statfs: &Statfs) -> Self {
        Self {
            size: statfs.size(),
            used: statfs.used(),
            available: statfs.available(),
            inodes: statfs.inodes,
            free_inodes: statfs.free_inodes,
        }
    }
}

impl Region {
    fn of(used: RegionUse) -> Self {
        Self {
            name: used.region.name,
            size: used.size,
            free: used.free.map(|free| free.bytes),
            free_inodes: used.free.map(|free| free.inodes),
        }
    }
}

/// The columns behind the name.
struct Columns {
    size: String,
    used: String,
    available: String,
    percent: String,
    free_inodes: String,
    host: String,
}

const UNKNOWN: &str = "-";

impl Columns {
    fn of_vm(vm: &Vm) -> Self {
        let shown = |value: fn(&Guest) -> u64| {
            vm.guest
                .as_ref()
                .map_or_else(|| UNKNOWN.to_owned(), |guest| human_size(value(guest)))
        };
        let guest = vm.guest.as_ref();
        Self {
            size: shown(|guest| guest.size),
            used: shown(|guest| guest.used),
            available: shown(|guest| guest.available),
            percent: guest.map_or_else(
                || UNKNOWN.to_owned(),
                |guest| percent(guest.used, guest.used.saturating_add(guest.available)),
            ),
            free_inodes: guest.map_or_else(|| UNKNOWN.to_owned(), |guest| guest.free_inodes.to_string()),
            host: human_size(vm.allocation),
        }
    }

    fn of_region(region: &Region) -> Self {
        let used = region.free.map(|free| region.size.saturating_sub(free));
        let unless_unknown = |text: Option<String>| text.unwrap_or_else(|| UNKNOWN.to_owned());
        Self {
            size: human_size(region.size),
            used: unless_unknown(used.map(human_size)),
            available: unless_unknown(region.free.map(human_size)),
            percent: unless_unknown(used.map(|used| percent(used, region.size))),
            free_inodes: unless_unknown(region.free_inodes.map(|free| free.to_string())),
            host: UNKNOWN.to_owned(),
        }
    }

    fn line(&self, name: &str, width: usize) -> String {
        let Self {
            size,
            used,
            available,
            percent,
            free_inodes,
            host,
        } = self;
        format!(
            "{name:<width$} {size:>9} {used:>9} {available:>9} {percent:>4} {free_inodes:>9} {host:>9}\n",
            name = output::one_line(name)
        )
    }
}

/// How much of `all` is in use, rounded up as `df` rounds it.
fn percent(used: u64, all: u64) -> String {
    let hundredfold = u128::from(used) * 100;
    match u128::from(all) {
        0 => UNKNOWN.to_owned(),
        all => format!("{}%", hundredfold.div_ceil(all)),
    }
}

fn human(vms: &[Vm]) -> String {
    let mut rows = vec![(
        "Image".to_owned(),
        Columns {
            size: "Size".into(),
            used: "Used".into(),
            available: "Avail".into(),
            percent: "Use%".into(),
            free_inodes: "IFree".into(),
            host: "On host".into(),
        },
    )];
    for vm in vms {
        rows.push((format!("{} ({})", vm.filename, vm.role), Columns::of_vm(vm)));
        for region in &vm.regions {
            rows.push((format!("  {}", region.name), Columns::of_region(region)));
        }
    }
    let width = rows.iter().map(|(name, _)| name.chars().count()).max();
    let mut text = String::new();
    for (name, columns) in rows {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}", columns.line(&name, width.unwrap_or(0)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_and_its_regions_are_lines_of_one_table() {
        let vm = Vm {
            filename: "tom\n.qcow2".into(),
            role: "child",
            guest: Some(Guest {
                size: 60 << 20,
                used: 50 << 20,
                available: 9 << 20,
                inodes: 1000,
                free_inodes: 12,
            }),
            allocation: 196_608,
            regions: vec![
                Region {
                    name: "local".into(),
                    size: 16 << 20,
                    free: Some(10 << 20),
                    free_inodes: Some(12),
                },
                Region {
                    name: "data".into(),
                    size: 1 << 30,
                    free: None,
                    free_inodes: None,
                },
            ],
        };
        let expected = "\
Image                   Size      Used     Avail Use%     IFree   On host
tom?.qcow2 (child)    60 MiB    50 MiB     9 MiB  85%        12   192 KiB
  local               16 MiB     6 MiB    10 MiB  38%        12         -
  data                 1 GiB         -         -    -         -         -
";
        assert_eq!(human(&[vm]), expected);
    }

    #[test]
    fn what_is_begun_counts_as_a_percent() {
        assert_eq!(percent(0, 7), "0%");
        assert_eq!(percent(1, 1000), "1%");
        assert_eq!(percent(1000, 1000), "100%");
        assert_eq!(percent(0, 0), "-");
    }
}
