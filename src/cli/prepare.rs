//! `seethrough prepare`: which parts of a base are its children's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::{parse_format, parse_size};
use super::output;
use super::prepare_plan::Plan;
use crate::chain::backing::Backing;
use crate::chain::data_file::open_data_file;
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
use crate::view::declaration::{BaseDeclaration, Declaration, Extent, Region, Sharing};
use crate::view::declared::{Declared, read_declaration, store_declaration};
use crate::view::prepare::Preparation;
use crate::view::lease::fresh_id;
use crate::view::region_change::{enlarge, evict, release};

/// Reserve block groups or partitions of a base for its children, enlarge what is reserved, or give it back.
///
/// The base must not be in use, and its filesystem must have been unmounted cleanly. Block groups must hold nothing
/// yet. Nothing is changed unless all of it can be done.
#[derive(Debug, clap::Args)]
pub struct Prepare {
    /// What to reserve: NAME=groups:8-15, NAME with a --size, or NAME=partition:2; may be repeated
    #[arg(long, value_name = "NAME[=WHAT]", required_unless_present_any = ["enlarge", "release", "evict", "adopt"])]
    pub(super) reserve: Vec<String>,

    /// A region of --reserve that its children write in the base itself, one at a time, so that all others read it;
    /// may be repeated
    #[arg(long, value_name = "NAME", requires = "reserve")]
    pub(super) shared: Vec<String>,

    /// Which region to enlarge, by NAME=groups:16-17 or NAME with a --size; may be repeated
    #[arg(long, value_name = "NAME[=WHAT]", conflicts_with = "adopt")]
    pub(super) enlarge: Vec<String>,

    /// A region that goes back to the base, which must not have used its groups; may be repeated
    #[arg(long, value_name = "NAME", conflicts_with = "adopt")]
    pub(super) release: Vec<String>,

    /// A shared region that is taken from a child which is lost, or was not closed cleanly; that child is refused from
    /// then on, and what it has not brought to its place is lost: run e2fsck on the base; may be repeated
    #[arg(long, value_name = "NAME", conflicts_with = "adopt")]
    pub(super) evict: Vec<String>,

    /// BASE is a child, which takes over what its base has added to its regions
    #[arg(long, conflicts_with = "reserve")]
    adopt: bool,

    /// How much to reserve or to add, in groups chosen by this program: one for each NAME without WHAT, in their order
    #[arg(long = "size", value_name = "SIZE", value_parser = parse_size)]
    pub(super) sizes: Vec<u64>,

    /// The new directory in the reserved block groups, like /local: one for each --reserve of groups, in their order
    #[arg(long = "dir", value_name = "PATH")]
    pub(super) directories: Vec<String>,

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
    /// Changes what the base gives up to its children.
    ///
    /// # Errors
    /// If it cannot be done, saying what to do; the base is unchanged then.
    pub fn run(self) -> Result<()> {
        let failed = || format!("cannot prepare {}", self.base.display());
        if self.adopt {
            let report = block_on(self.take_over()).context(failed)?;
            return output::print(&report);
        }
        let plan = Plan::of(&self)?;
        let (declaration, evicted) = block_on(self.prepare(&plan)).context(failed)?;
        for (name, holder) in &evicted {
            let holder = output::one_line(holder);
            output::print(&format!("region {name}: taken from {holder}; run e2fsck on the base\n"))?;
        }
        let reserved = plan.reserve.iter().map(|request| &request.name);
        let enlarged = plan.enlarge.iter().map(|(name, _)| name);
        for name in reserved.chain(enlarged) {
            output::print(&describe(declaration.region(name)?))?;
        }
        for name in &plan.release {
            output::print(&format!("region {name}: released\n"))?;
        }
        Ok(())
    }

    /// The base's lock is held from the first look to the last write.
    async fn prepare(&self, plan: &Plan) -> Result<(BaseDeclaration, Evicted)> {
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
        let mut evicted = Evicted::new();
        let declared = change_declared(&*image, declared, plan, &mut evicted).await?;
        let declaration = match (plan.reserve.as_slice(), declared) {
            ([], Some(declared)) => declared,
            (requests, declared) => {
                let id = fresh_id()?;
                let preparation =
                    Preparation::plan(&*image, declared, id, requests, self.partition).await?;
                // What cannot be stored is not begun.
                Declaration::Base(preparation.declaration().clone()).to_bytes()?;
                preparation.apply(&*image).await?;
                preparation.declaration().clone()
            }
        };
        image.close().await?;
        drop(image);
        let document = Declaration::Base(declaration.clone());
        store_declaration(&self.base, format, &*storage, &document).await?;
        Ok((declaration, evicted))
    }

    /// Lets a child take over what its base has added; what was done.
    async fn take_over(&self) -> Result<String> {
        let options = HostOptions::default();
        let request = DiskRequest {
            path: self.base.clone(),
            format: self.format,
            access: Access::ReadWrite,
        };
        let disk = Registry::new(options).open(&request).await?;
        let declared = Declared::of(&disk)?.ok_or_else(|| invalid("it is no child"))?;
        let (child, new) = declared.adopt().await?;
        drop((declared, disk));
        if new.count() == 0 {
            return Ok("the base has added nothing\n".to_owned());
        }
        let storage = open_file(&self.base, Access::ReadWrite, options)?;
        let document = Declaration::Child(child);
        store_declaration(&self.base, Format::Qcow2, &storage, &document).await?;
        Ok(format!("block groups {new} are the child's\n"))
    }
}

/// Regions that were taken from their holders, and who those are.
type Evicted = Vec<(String, String)>;

/// What the base declares after regions have been taken from their holders, released and enlarged.
async fn change_declared(
    disk: &dyn Image,
    declared: Option<BaseDeclaration>,
    plan: &Plan,
    evicted: &mut Evicted,
) -> Result<Option<BaseDeclaration>> {
    let Some(mut declared) = declared else {
        return if plan.release.is_empty() && plan.enlarge.is_empty() && plan.evict.is_empty() {
            Ok(None)
        } else {
            Err(invalid("it declares no region yet"))
        };
    };
    for name in &plan.evict {
        let (rest, holder) = evict(&declared, name)?;
        declared = rest;
        evicted.push((name.clone(), holder));
    }
    for name in &plan.release {
        declared = release(disk, &declared, name).await?;
    }
    for (name, groups) in &plan.enlarge {
        declared = enlarge(disk, &declared, name, groups).await?;
    }
    Ok(Some(declared))
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
    let access = Access::ReadWrite;
    let data = open_data_file(path, header, access, HostOptions::default()).await?;
    let image = Qcow2::open_with_data(storage, data, backing, access).await?;
    Ok(Arc::new(image))
}

fn describe(region: &Region) -> String {
    let name = &region.name;
    let place = match &region.extent {
        Extent::Groups {
            list, directory, ..
        } => format!("block groups {list}, directory {directory}"),
        Extent::Partition { number, length, .. } => {
            format!("partition {number}, {length} bytes")
        }
    };
    match region.sharing {
        Sharing::Private => format!("region {name}: {place}\n"),
        Sharing::Shared => format!("region {name}: {place}, shared\n"),
    }
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
