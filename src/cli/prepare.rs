//! `seethrough prepare`: reserves parts of a base for its children.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::parse_format;
use super::output;
use crate::chain::backing::Backing;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, open_file};
use crate::chain::inspect::{Unnamed, detect, read_header};
use crate::chain::registry::{DiskRequest, Registry};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image, RawImage};
use crate::qcow2::Qcow2;
use crate::qcow2::header::Header;
use crate::storage::{FileStorage, Storage};
use crate::sys::block_on;
use crate::view::declaration::{BaseDeclaration, Declaration, Extent};
use crate::view::declared::{read_declaration, store_declaration};
use crate::view::prepare::{Preparation, Request, Reserve};

/// Reserve block groups or partitions of a base for its children.
///
/// The base must not be in use, and its filesystem must have been unmounted cleanly. Block groups must hold nothing
/// yet. Nothing is changed unless all of it can be done.
#[derive(Debug, clap::Args)]
pub struct Prepare {
    /// What to reserve: NAME=groups:8-15 (with a --dir) or NAME=partition:2; may be repeated
    #[arg(long, value_name = "NAME=WHAT", required = true)]
    reserve: Vec<String>,

    /// The new directory in the reserved block groups, like /local: one for each --reserve of groups, in their order
    #[arg(long = "dir", value_name = "PATH")]
    directories: Vec<String>,

    /// The partition that holds the filesystem, if several do
    #[arg(long, value_name = "N")]
    partition: Option<u32>,

    /// The base's format; without it, the base has to be qcow2
    #[arg(short = 'f', long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// The base image
    #[arg(value_name = "BASE")]
    base: PathBuf,
}

impl Prepare {
    /// Reserves what is asked for.
    ///
    /// # Errors
    /// If it cannot be reserved, saying what to do; the base is unchanged then.
    pub fn run(self) -> Result<()> {
        let requests = self.requests()?;
        let declaration = block_on(self.prepare(&requests))
            .context(|| format!("cannot prepare {}", self.base.display()))?;
        for request in &requests {
            output::print(&describe(declaration.region(&request.name)?.extent.clone(), &request.name))?;
        }
        Ok(())
    }

    /// Pairs what is reserved with the directories.
    fn requests(&self) -> Result<Vec<Request>> {
        let mut directories = self.directories.iter();
        let mut requests = Vec::new();
        for text in &self.reserve {
            let wrong = || {
                invalid(format!(
                    "--reserve {text}: write NAME=groups:8-15 or NAME=partition:2"
                ))
            };
            let (name, what) = text.split_once('=').ok_or_else(wrong)?;
            let reserve = match what.split_once(':') {
                Some(("groups", list)) => Reserve::Groups {
                    list: list.parse()?,
                    directory: directories.next().cloned().ok_or_else(|| {
                        invalid(format!(
                            "--reserve {text} needs a directory for its children's files: add --dir /{name}"
                        ))
                    })?,
                },
                Some(("partition", number)) => {
                    Reserve::Partition(number.parse().map_err(|_| wrong())?)
                }
                _ => return Err(wrong()),
            };
            requests.push(Request {
                name: name.to_owned(),
                reserve,
            });
        }
        match directories.next() {
            Some(extra) => Err(invalid(format!(
                "--dir {extra} belongs to no --reserve of block groups"
            ))),
            None => Ok(requests),
        }
    }

    /// The base's lock is held from the first look to the last write.
    async fn prepare(&self, requests: &[Request]) -> Result<BaseDeclaration> {
        let storage = open_file(&self.base, Access::ReadWrite, HostOptions::default())?;
        let format = match self.format {
            Some(format) => format,
            None => detect(&storage, Unnamed::Refuse).await?,
        };
        let header = read_header(&storage, format).await?;
        let declared = match read_declaration(&self.base, header.as_ref())? {
            Some(Declaration::Base(declared)) => Some(declared),
            Some(Declaration::Child(_)) => {
                return Err(invalid("it is a child of another base"));
            }
            None => None,
        };
        let storage = Arc::new(storage);
        let image = open_image(&self.base, header.as_ref(), &storage).await?;
        let id = fresh_id()?;
        let preparation =
            Preparation::plan(&*image, declared, id, requests, self.partition).await?;
        let declaration = Declaration::Base(preparation.declaration().clone());
        // What cannot be stored is not begun.
        declaration.to_bytes()?;
        preparation.apply(&*image).await?;
        drop(image);
        store_declaration(&self.base, format, &*storage, &declaration).await?;
        Ok(preparation.declaration().clone())
    }
}

/// The disk in `storage`, with its backing chain if it has one.
async fn open_image(
    path: &Path,
    header: Option<&Header>,
    storage: &Arc<FileStorage>,
) -> Result<Arc<dyn Image>> {
    let storage: Arc<dyn Storage> = Arc::clone(storage) as _;
    let Some(header) = header else {
        return Ok(Arc::new(RawImage::new(storage, Access::ReadWrite)));
    };
    let backing = match Backing::of(path, header)? {
        Some(backing) => {
            let request = DiskRequest {
                path: backing.path,
                format: Some(backing.format),
                access: Access::ReadOnly,
            };
            let registry = Registry::new(HostOptions::default());
            Some(registry.open(&request).await?.image)
        }
        None => None,
    };
    let image = Qcow2::open(storage, backing, Access::ReadWrite).await?;
    Ok(Arc::new(image))
}

/// 32 random hexadecimal digits.
fn fresh_id() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context(|| "/dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn describe(extent: Extent, name: &str) -> String {
    match extent {
        Extent::Groups {
            list, directory, ..
        } => format!("region {name}: block groups {list}, directory {directory}\n"),
        Extent::Partition { number, length, .. } => {
            format!("region {name}: partition {number}, {length} bytes\n")
        }
    }
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
