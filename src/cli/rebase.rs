//! `seethrough rebase`: another backing image for an overlay, read as `qemu-img rebase` reads its arguments.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use super::options::{parse_cache, parse_format};
use super::progress::ShowProgress;
use super::tool::open;
use crate::chain::backing::{agreed_format, resolve};
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, Locking, open_file};
use crate::chain::inspect::{Inspected, Unnamed, inspect_chain};
use crate::chain::registry::{Registry, file_id};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::jobs::convert::as_qcow2;
use crate::jobs::rebase::absorb_difference;
use crate::qcow2::backing_update::{require_room, set_backing};
use crate::qcow2::create::BackingReference;
use crate::storage::CacheMode;
use crate::sys::block_on;
use crate::view::declaration::Declaration;
use crate::view::declared::declaration_of;

/// Give an overlay another backing image.
///
/// What the overlay reads does not change: where the old and the new backing image differ, the overlay takes the old
/// one's data in. With -u only the name in the overlay changes.
#[derive(Debug, clap::Args)]
pub struct Rebase {
    /// The overlay's format, which is qcow2
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// The new backing image, relative to the overlay's directory; "" for none
    #[arg(short = 'b', value_name = "BACKING")]
    backing: OsString,

    /// The new backing image's format; it may be left out for a qcow2 image
    #[arg(short = 'F', value_name = "FORMAT", value_parser = parse_format)]
    backing_format: Option<Format>,

    /// Change the name alone: the new backing image has the same contents as the old one
    #[arg(short = 'u')]
    unchecked: bool,

    /// How the host caches the images: writeback or none
    #[arg(short = 't', value_name = "CACHE", value_parser = parse_cache, default_value = "writeback")]
    cache: CacheMode,

    #[command(flatten)]
    progress: ShowProgress,

    /// Print nothing, which is all there is to print
    #[arg(short = 'q')]
    quiet: bool,

    /// The overlay
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Rebase {
    /// Rebases.
    ///
    /// # Errors
    /// If an image is in use or cannot be read or written, or what the overlay or others read would change.
    pub fn run(self) -> Result<()> {
        if self.format == Some(Format::Raw) {
            return Err(unsupported("a raw image has no backing image"));
        }
        let rebased = if self.unchecked {
            self.rename()
        } else {
            self.rebase()
        };
        rebased.context(|| format!("cannot rebase {}", self.file.display()))
    }

    /// Changes the name alone.
    fn rename(&self) -> Result<()> {
        let reference = match (&self.backing, self.backing_format) {
            (name, _) if name.is_empty() => None,
            (_, Some(format)) => Some(self.reference(format)),
            (_, None) => {
                let chain = self.chain_behind()?;
                chain.first().map(|top| self.reference(top.format))
            }
        };
        block_on(async {
            let storage = open_file(&self.file, Access::ReadWrite, self.host_options())?;
            set_backing(&storage, reference.as_ref()).await
        })
    }

    fn rebase(&self) -> Result<()> {
        let chain = if self.backing.is_empty() {
            Vec::new()
        } else {
            self.chain_behind()?
        };
        let own = file_id(&self.file)?;
        if let Some(layer) = chain.iter().find(|layer| file_id(&layer.path).is_ok_and(|id| id == own)) {
            return Err(invalid(format!(
                "{}: the overlay would become its own backing image",
                layer.path.display()
            )));
        }
        // One registry for all, so that a layer that the old and the new chain share is one image.
        let registry = Registry::new(self.host_options());
        let overlay = block_on(open(&registry, &self.file, Some(Format::Qcow2), Access::ReadWrite))?;
        let header = overlay.source.header.as_ref();
        if header.is_some_and(|header| header.nb_snapshots > 0) {
            return Err(unsupported(
                "it has internal snapshots, which read the backing image too: delete them, or use -u with a backing \
                 image of the same contents",
            ));
        }
        if let Some(Declaration::Child(_)) = declaration_of(&overlay.source)? {
            return Err(unsupported(
                "it is a child, which sees through to its base: it can follow a base that was moved with -u, or become \
                 a disk of its own with `seethrough flatten`",
            ));
        }
        let new = match chain.first() {
            None => None,
            Some(top) => {
                let opened = open(&registry, &top.path, Some(top.format), Access::ReadOnly);
                Some(block_on(opened)?.image)
            }
        };
        let Some(storage) = as_qcow2(&*overlay.image).map(|image| Arc::clone(image.storage())) else {
            return Err(unsupported("only qcow2 images have a backing image"));
        };
        let reference = chain.first().map(|top| self.reference(top.format));
        block_on(require_room(&*storage, reference.as_ref()))?;
        self.progress
            .during(|progress| absorb_difference(&overlay.image, new.as_ref(), progress))?;
        // Its lock stays with the storage.
        drop((overlay, new, registry));
        block_on(set_backing(&*storage, reference.as_ref()))
    }

    fn host_options(&self) -> HostOptions {
        HostOptions {
            cache: self.cache,
            locking: Locking::Lock,
        }
    }

    fn reference(&self, format: Format) -> BackingReference {
        BackingReference {
            file: self.backing.clone(),
            format: format.name().to_owned(),
        }
    }

    /// The new backing image and what lies behind it; never empty.
    fn chain_behind(&self) -> Result<Vec<Inspected>> {
        let path = resolve(&self.file, &self.backing)?;
        let format = agreed_format(&self.file, &self.backing, self.backing_format)?;
        let chain = inspect_chain(&path, format, Unnamed::Refuse, Locking::ForceShare);
        block_on(chain).context(|| "the new backing image (its format is given with -F)")
    }
}

fn unsupported(what: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
