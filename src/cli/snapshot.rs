//! `seethrough snapshot`: internal snapshots, with the options of `qemu-img snapshot`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::SystemTime;

use super::options::parse_format;
use super::output::{self, OutputFormat};
use super::snapshot_list::{snapshots_human, snapshots_json};
use super::tool::Sharing;
use crate::chain::format::Format;
use crate::chain::host::HostOptions;
use crate::chain::inspect::{Unnamed, inspect};
use crate::chain::single::open_single;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Access;
use crate::qcow2::Qcow2;
use crate::sys::block_on;
use crate::view::declaration::Declaration;
use crate::view::declared::read_declaration;

/// Take, apply, delete or list the internal snapshots of a qcow2 image.
#[derive(Debug, clap::Args)]
pub struct Snapshot {
    /// The image's format: only qcow2 has snapshots
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// List the snapshots, which is what is done without any of these options
    #[arg(short = 'l', group = "action")]
    list: bool,

    /// Take a snapshot of the disk as it is now
    #[arg(short = 'c', value_name = "NAME", group = "action")]
    create: Option<OsString>,

    /// Make the disk what it was when this snapshot was taken; an ID goes before a name
    #[arg(short = 'a', value_name = "ID|NAME", group = "action")]
    apply: Option<OsString>,

    /// Delete this snapshot; a name goes before an ID
    #[arg(short = 'd', value_name = "NAME|ID", group = "action")]
    delete: Option<OsString>,

    /// How to print the list
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    #[command(flatten)]
    sharing: Sharing,

    /// Print nothing but the list
    #[arg(short = 'q')]
    quiet: bool,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Snapshot {
    /// Does what the options say.
    ///
    /// # Errors
    /// If the image is in use or broken, cannot have the snapshot, or does not have it.
    pub fn run(self) -> Result<()> {
        block_on(async {
            if self.format == Some(Format::Raw) {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "a raw image has no snapshots: only qcow2 images have",
                ));
            }
            match (&self.create, &self.apply, &self.delete) {
                (Some(name), ..) => {
                    let image = self.open().await?;
                    image.create_snapshot(name, SystemTime::now()).await?;
                }
                (_, Some(wanted), _) => {
                    self.refuse_holder().await?;
                    drop(self.open().await?.apply_snapshot(wanted).await?);
                }
                (.., Some(wanted)) => drop(self.open().await?.delete_snapshot(wanted).await?),
                (None, None, None) => self.show().await?,
            }
            Ok(())
        })
    }

    async fn open(&self) -> Result<Qcow2> {
        let options = HostOptions {
            locking: self.sharing.locking(),
            ..HostOptions::default()
        };
        open_single(&self.file, Access::ReadWrite, options).await
    }

    /// Refuses a child that writes shared regions: the journal in its past would undo what has been written there
    /// since.
    async fn refuse_holder(&self) -> Result<()> {
        let format = Some(Format::Qcow2);
        let locking = self.sharing.locking();
        let image = inspect(&self.file, format, Unnamed::Refuse, locking).await?;
        let declaration = read_declaration(&self.file, image.header.as_ref())?;
        match declaration {
            Some(Declaration::Child(child)) if child.shared_regions().next().is_some() => Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{}: it writes shared regions, where nothing goes back, and its journal must not: create the child \
                     anew",
                    self.file.display()
                ),
            )),
            _ => Ok(()),
        }
    }

    async fn show(&self) -> Result<()> {
        let locking = self.sharing.locking();
        let format = Some(Format::Qcow2);
        let image = inspect(&self.file, format, Unnamed::Refuse, locking).await?;
        let text = match self.output {
            OutputFormat::Human => snapshots_human(&image.snapshots),
            OutputFormat::Json => format!("{:#}\n", snapshots_json(&image.snapshots)),
        };
        output::print(&text)
    }
}
