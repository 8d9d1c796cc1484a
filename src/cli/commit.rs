//! `seethrough commit`: what an overlay holds goes into its backing image, read as `qemu-img commit` reads its
//! arguments.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::{parse_cache, parse_format};
use super::output;
use super::progress::ShowProgress;
use crate::chain::backing::resolve;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, Locking, open_file};
use crate::chain::inspect::{Inspected, Unnamed, inspect_chain};
use crate::chain::registry::{DiskRequest, Registry, file_id};
use crate::chain::single::open_with_backing;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::jobs::commit::{Afterwards, commit};
use crate::storage::{CacheMode, Storage};
use crate::sys::block_on;
use crate::view::declaration::Declaration;
use crate::view::declared::read_declaration;

/// Write what an overlay holds into its backing image, and empty the overlay.
///
/// A shorter backing image grows. Whatever else lies on it reads other data afterwards.
#[derive(Debug, clap::Args)]
pub struct Commit {
    /// The overlay's format, which is qcow2
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// Write into this image further down the chain; those between become useless, and the overlay stays as it is
    #[arg(short = 'b', value_name = "BASE")]
    base: Option<PathBuf>,

    /// Do not empty the overlay
    #[arg(short = 'd')]
    keep: bool,

    /// How the host caches the images: writeback or none
    #[arg(short = 't', value_name = "CACHE", value_parser = parse_cache, default_value = "writeback")]
    cache: CacheMode,

    #[command(flatten)]
    progress: ShowProgress,

    /// Print nothing
    #[arg(short = 'q')]
    quiet: bool,

    /// The overlay
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Commit {
    /// Commits.
    ///
    /// # Errors
    /// If an image is in use or cannot be read or written, or others would read other data that must not.
    pub fn run(self) -> Result<()> {
        self.commit()
            .context(|| format!("cannot commit {}", self.file.display()))?;
        if self.quiet {
            return Ok(());
        }
        output::print("Image committed.\n")
    }

    fn commit(&self) -> Result<()> {
        if self.format == Some(Format::Raw) {
            return Err(no_backing());
        }
        let chain = self.chain()?;
        let depth = self.depth_of_base(&chain)?;
        refuse_others(&chain, depth)?;
        let (Some(overlay), Some(base)) = (chain.first(), chain.get(depth)) else {
            return Err(no_backing());
        };
        if base.virtual_size < overlay.virtual_size {
            block_on(self.grow(base, overlay.virtual_size))
                .context(|| format!("growing {}", base.path.display()))?;
        }
        let request = |layer: &Inspected| DiskRequest {
            path: layer.path.clone(),
            format: Some(layer.format),
            access: Access::ReadWrite,
        };
        let registry = Registry::new(self.host_options());
        let opened = block_on(registry.open_family(&[request(overlay), request(base)]))?;
        let [overlay, base] = opened.as_slice() else {
            return Err(no_backing());
        };
        let afterwards = if self.keep || depth > 1 {
            Afterwards::Keep
        } else {
            Afterwards::Empty
        };
        let (overlay, base) = (Arc::clone(&overlay.image), Arc::clone(&base.image));
        self.progress
            .during(|progress| commit(&overlay, &base, afterwards, progress))
    }

    fn host_options(&self) -> HostOptions {
        HostOptions {
            cache: self.cache,
            locking: Locking::Lock,
        }
    }

    fn chain(&self) -> Result<Vec<Inspected>> {
        let format = Some(Format::Qcow2);
        block_on(inspect_chain(&self.file, format, Unnamed::Refuse, Locking::Lock))
    }

    /// How far down the chain the image to write to is.
    fn depth_of_base(&self, chain: &[Inspected]) -> Result<usize> {
        let Some(base) = &self.base else {
            return if chain.len() > 1 { Ok(1) } else { Err(no_backing()) };
        };
        let beside = resolve(&self.file, base.as_os_str())?;
        let ids: Vec<_> = [base.as_path(), &beside]
            .into_iter()
            .filter_map(|path| file_id(path).ok())
            .collect();
        let is_base = |path: &Path| file_id(path).is_ok_and(|id| ids.contains(&id));
        let found = chain.iter().skip(1).position(|layer| is_base(&layer.path));
        found.map(|behind| behind + 1).ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidConfig,
                format!("{} is not in its backing chain", base.display()),
            )
        })
    }

    async fn grow(&self, base: &Inspected, size: u64) -> Result<()> {
        match base.format {
            Format::Raw => {
                let storage = open_file(&base.path, Access::ReadWrite, self.host_options())?;
                storage.set_len(size).await?;
                storage.flush().await
            }
            Format::Qcow2 => {
                let options = self.host_options();
                let image = open_with_backing(&base.path, Access::ReadWrite, options).await?;
                image.resize(size).await.map(drop)
            }
        }
    }
}

/// Others that lie on the base must not come to read other data, as far as the images tell.
fn refuse_others(chain: &[Inspected], depth: usize) -> Result<()> {
    let snapshots = chain.first().and_then(|overlay| overlay.header.as_ref());
    if snapshots.is_some_and(|header| header.nb_snapshots > 0) {
        return Err(unsupported(
            "it has internal snapshots, which would read what is committed: delete them first",
        ));
    }
    for (number, layer) in chain.iter().enumerate().take(depth + 1) {
        let declared = read_declaration(&layer.path, layer.header.as_ref())?;
        match (number, declared) {
            (_, None) | (0, Some(Declaration::Base(_))) => {}
            (0, Some(Declaration::Child(_))) => {
                return Err(unsupported(
                    "it is a child: its base is not its own to change, and other children see it; \
                     `seethrough flatten` makes a disk of its own of a child",
                ));
            }
            (_, Some(_)) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{}: it declares regions: what is committed to it could overwrite what belongs to others",
                        layer.path.display()
                    ),
                ));
            }
        }
    }
    Ok(())
}

fn no_backing() -> Error {
    unsupported("it has no backing image")
}

fn unsupported(what: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}
