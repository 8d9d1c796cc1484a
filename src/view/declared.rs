//! The declarations that images carry, and the views that follow from them.
//!
//! A qcow2 image carries its declaration in a header extension, so that it describes itself wherever it is copied.
//! A raw base has no room for one: it lies beside it, in a file with its name and `.seethrough` behind it.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::declaration::{
    BaseDeclaration, ChildDeclaration, Declaration, GroupList, MAX_DECLARATION_BYTES, Region,
};
use super::disk::View;
use super::lease::{Claimant, Keeper, check_settled};
use super::merged::Merged;
use super::open::{SharedBase, check_length, child_territory, open_base_through, open_holder};
use super::probe::Probe;
use super::refresh::{PinName, Policy, follow};
use super::region_change;
use super::regions::{Place, RegionUse, usage};
use crate::chain::backing::Backing;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, Locking, open_file};
use crate::chain::inspect::read_header;
use crate::chain::registry::{DiskRequest, OpenImage, Source};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image, ImageFuture, ReadOnlyImage};
use crate::jobs::convert::as_qcow2;
use crate::qcow2::OnlineQcow2;
use crate::qcow2::header::Header;
use crate::qcow2::header_extension::SEETHROUGH_EXTENSION;
use crate::qcow2::header_update::set_extension;
use crate::storage::{CacheMode, Storage};
use crate::sys::FileId;

/// The views of all VMs in this process: those of one base share it.
#[derive(Default)]
pub struct Views {
    bases: HashMap<FileId, Arc<SharedBase>>,
    /// The children that do not see their bases live, by their first pins.
    pinned: HashSet<PinName>,
}

/// What a VM is served.
pub enum Served {
    /// Its view of a disk that it shares.
    Shared(Arc<View>),
    /// The image as it is: it shares nothing.
    Alone(Arc<dyn Image>),
}

impl Served {
    /// The disk.
    #[must_use]
    pub fn image(&self) -> Arc<dyn Image> {
        match self {
            Self::Shared(view) => Arc::clone(view) as Arc<dyn Image>,
            Self::Alone(image) => Arc::clone(image),
        }
    }

    /// The view, if the disk is shared.
    #[must_use]
    pub fn view(&self) -> Option<&Arc<View>> {
        match self {
            Self::Shared(view) => Some(view),
            Self::Alone(_) => None,
        }
    }
}

impl Views {
    /// What a VM is served: its view of a shared disk, or the image as it is if it shares nothing. A child's view of
    /// its base moves as `policy` says.
    ///
    /// # Errors
    /// If a declaration cannot be read, or does not fit the disk: nothing is served then.
    pub async fn view_of(&mut self, vm: &str, disk: &OpenImage, policy: Policy) -> Result<Served> {
        let declaration = declaration_of(&disk.source)?;
        if policy != Policy::Live && !matches!(declaration, Some(Declaration::Child(_))) {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "refresh={policy} is for children, and {} is none: leave it out",
                    disk.source.path.display()
                ),
            ));
        }
        match declaration {
            None => Ok(Served::Alone(Arc::clone(&disk.image))),
            Some(Declaration::Base(declaration)) => {
                let image = Arc::clone(&disk.image);
                let stored = as_stored(&disk.image);
                let base = self.shared(&disk.source, stored, declaration).await?;
                let view = open_base_through(vm, &base, image).await?;
                Ok(Served::Shared(Arc::new(view)))
            }
            Some(Declaration::Child(child)) => {
                let (source, image, declaration) = base_of(disk)?;
                let stored = Arc::clone(&image);
                let base = self.shared(source, stored, declaration.clone());
                let base = base.await?;
                let overlay = Arc::clone(&disk.image);
                let claimant = Claimant {
                    name: file_name(&disk.source.path),
                    keeper: Arc::new(InImage::new(&disk.source, Arc::clone(&overlay))),
                };
                let view = open_holder(vm, overlay, &child, &base, &claimant).await?;
                let base = (source, image, declaration);
                let view = follow(vm, view, policy, disk, base, &mut self.pinned).await?;
                Ok(Served::Shared(Arc::new(view)))
            }
        }
    }

    async fn shared(
        &mut self,
        source: &Source,
        image: Arc<dyn Image>,
        declaration: BaseDeclaration,
    ) -> Result<Arc<SharedBase>> {
        if let Some(base) = self.bases.get(&source.id) {
            return Ok(Arc::clone(base));
        }
        let keeper: Arc<dyn Keeper> = Arc::new(InImage::new(source, Arc::clone(&image)));
        let base = SharedBase::open_kept(image, declaration, Some(keeper)).await?;
        let base = Arc::new(base);
        self.bases.insert(source.id, Arc::clone(&base));
        Ok(base)
    }
}

/// The image behind one that was opened read-only for one VM: others may write it.
fn as_stored(image: &Arc<dyn Image>) -> Arc<dyn Image> {
    let any: &dyn std::any::Any = &**image;
    match any.downcast_ref::<ReadOnlyImage>() {
        Some(read_only) => Arc::clone(read_only.writable()),
        None => Arc::clone(image),
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Keeps the declaration of an image that is open.
struct InImage {
    path: PathBuf,
    image: Arc<dyn Image>,
}

impl InImage {
    fn new(source: &Source, image: Arc<dyn Image>) -> Self {
        Self {
            path: source.path.clone(),
            image,
        }
    }
}

impl Keeper for InImage {
    fn keep<'a>(&'a self, declaration: &'a Declaration) -> ImageFuture<'a> {
        Box::pin(async move {
            let bytes = declaration.to_bytes()?;
            let any: &dyn std::any::Any = &*self.image;
            if let Some(online) = any.downcast_ref::<OnlineQcow2>() {
                return online.set_extension(SEETHROUGH_EXTENSION, &bytes).await;
            }
            match as_qcow2(&*self.image) {
                Some(qcow2) => qcow2.set_extension(SEETHROUGH_EXTENSION, &bytes).await,
                None => replace_sidecar(&self.path, &bytes),
            }
        })
    }
}

/// The bases that have to be open for writing because one of `requests` is a child that writes a shared region there.
///
/// # Errors
/// What reading the images' headers and declarations returns.
pub async fn bases_to_write(requests: &[DiskRequest]) -> Result<Vec<DiskRequest>> {
    let mut bases = Vec::new();
    for request in requests {
        let is_raw = request.format == Some(Format::Raw);
        if request.access == Access::ReadOnly || is_raw {
            continue;
        }
        let storage = open_file(&request.path, Access::ReadOnly, UNLOCKED)?;
        // What is no qcow2 image is found out, and told, when it is opened.
        let Ok(Some(header)) = read_header(&storage, Format::Qcow2).await else {
            continue;
        };
        let Some(Declaration::Child(child)) = read_declaration(&request.path, Some(&header))?
        else {
            continue;
        };
        if child.shared_regions().next().is_some()
            && let Some(backing) = Backing::of(&request.path, &header)?
        {
            bases.push(DiskRequest {
                path: backing.path,
                format: Some(backing.format),
                access: Access::ReadWrite,
            });
        }
    }
    Ok(bases)
}

/// How a file is opened to look what it is: whatever it says is read anew once it is locked.
pub(super) const UNLOCKED: HostOptions = HostOptions {
    cache: CacheMode::Writeback,
    locking: Locking::ForceShare,
};

/// An open image that declares regions, and its base: the image itself, or what lies behind a child.
pub struct Declared {
    pub(super) own: Arc<dyn Image>,
    pub(super) base: Arc<dyn Image>,
    pub(super) declaration: BaseDeclaration,
    pub(super) child: Option<ChildDeclaration>,
}

impl Declared {
    /// What `disk` declares, if it declares anything.
    ///
    /// # Errors
    /// As [`declaration_of`]; [`ErrorKind::InvalidConfig`] for a child without its base.
    pub fn of(disk: &OpenImage) -> Result<Option<Self>> {
        let own = Arc::clone(&disk.image);
        Ok(match declaration_of(&disk.source)? {
            None => None,
            Some(Declaration::Base(declaration)) => Some(Self {
                base: Arc::clone(&own),
                own,
                declaration,
                child: None,
            }),
            Some(Declaration::Child(child)) => {
                let (_, base, declaration) = base_of(disk)?;
                Some(Self {
                    own,
                    base,
                    declaration,
                    child: Some(child),
                })
            }
        })
    }

    /// Whether it is a child.
    #[must_use]
    pub fn is_child(&self) -> bool {
        self.child.is_some()
    }

    /// What tells its base from every other one.
    #[must_use]
    pub fn base_id(&self) -> &str {
        &self.declaration.id
    }

    /// The image's regions and how full they are.
    ///
    /// # Errors
    /// As [`usage`].
    pub async fn usage(&self) -> Result<Vec<RegionUse>> {
        let probe = self.probe(&*self.base).await?;
        let regions = self.regions(probe.as_ref());
        let place = Place {
            own: &*self.own,
            base: &*self.base,
            declaration: &self.declaration,
        };
        usage(&place, probe.as_ref(), &regions).await
    }

    /// The filesystem in `base`, which is the base's disk, as the image's VM has it.
    pub(super) async fn probe(&self, base: &dyn Image) -> Result<Option<Probe>> {
        match &self.child {
            Some(child) => Probe::of_child(base, &self.declaration, child).await,
            None => Probe::of_declared(base, &self.declaration).await,
        }
    }

    /// The image's regions, and the groups of `probe` that a child alone has as one more.
    pub(super) fn regions(&self, probe: Option<&Probe>) -> Vec<Region> {
        let Some(child) = &self.child else {
            return self.declaration.regions.clone();
        };
        let grown = probe.and_then(|probe| probe.grown_region(&child.regions));
        child.regions.iter().cloned().chain(grown).collect()
    }

    /// Takes over what the base has added to a child's regions; the overlay must be open for writing. Returns what the
    /// child is to declare from now on, and which groups are new.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is no child; and as [`region_change::adopt`].
    pub async fn adopt(&self) -> Result<(ChildDeclaration, GroupList)> {
        let child = self.child.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidConfig,
                "it is no child: there is no base to take anything over from",
            )
        })?;
        region_change::adopt(&*self.own, child, &*self.base, &self.declaration).await
    }
}

/// The disk that a child and its base make together.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if the image is no child; and as [`Merged::open`].
pub async fn merged_of(disk: &OpenImage) -> Result<Merged> {
    let child = child_declaration(disk)?;
    let (_, base, declaration) = base_of(disk)?;
    check_settled(&declaration, &child)?;
    let territory = child_territory(&*base, &declaration, &child).await?;
    check_length(&*disk.image, &territory)?;
    Merged::open(Arc::clone(&disk.image), base, territory).await
}

fn child_declaration(disk: &OpenImage) -> Result<ChildDeclaration> {
    match declaration_of(&disk.source)? {
        Some(Declaration::Child(child)) => Ok(child),
        _ => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{} is no child of a base with regions; use `seethrough convert` for other images",
                disk.source.path.display()
            ),
        )),
    }
}

/// A child's base, as it is stored, and what it declares.
fn base_of(disk: &OpenImage) -> Result<(&Source, Arc<dyn Image>, BaseDeclaration)> {
    let path = disk.source.path.display();
    let (Some(image), Some(source)) = (disk.image.backing(), &disk.source.backing) else {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{path} is a child, but has no backing image; give it its base again with `seethrough rebase -u`"
            ),
        ));
    };
    match declaration_of(source)? {
        Some(Declaration::Base(declaration)) => Ok((source, Arc::clone(image), declaration)),
        _ => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{path} is a child, but its backing image {} declares no regions; give it its base again with \
                 `seethrough rebase -u`",
                source.path.display()
            ),
        )),
    }
}

/// What an open image declares.
///
/// # Errors
/// As [`Declaration::parse`], naming the image.
pub fn declaration_of(source: &Source) -> Result<Option<Declaration>> {
    read_declaration(&source.path, source.header.as_ref())
}

/// What the image at `path` declares, whose header is `header` if it is qcow2.
///
/// # Errors
/// As [`Declaration::parse`], naming the image.
pub fn read_declaration(path: &Path, header: Option<&Header>) -> Result<Option<Declaration>> {
    let bytes = match header {
        Some(header) => header.extension(SEETHROUGH_EXTENSION).map(<[u8]>::to_vec),
        None => read_sidecar(path)?,
    };
    bytes
        .map(|bytes| Declaration::parse(&bytes).context(|| path.display().to_string()))
        .transpose()
}

/// What the base at `path` declares.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if it declares nothing, or is a child itself.
pub fn read_base_declaration(path: &Path, header: Option<&Header>) -> Result<BaseDeclaration> {
    match read_declaration(path, header)? {
        Some(Declaration::Base(declaration)) => Ok(declaration),
        Some(Declaration::Child(_)) => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("{} is itself a child; name its base", path.display()),
        )),
        None => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{} declares no region; reserve one with `seethrough prepare`",
                path.display()
            ),
        )),
    }
}

/// Stores what the image at `path`, of the given format and in `storage`, declares from now on; durably. Nobody may
/// have the image open.
///
/// # Errors
/// What writing the header or the sidecar file returns.
pub async fn store_declaration(
    path: &Path,
    format: Format,
    storage: &dyn Storage,
    declaration: &Declaration,
) -> Result<()> {
    let bytes = declaration.to_bytes()?;
    match format {
        Format::Qcow2 => set_extension(storage, SEETHROUGH_EXTENSION, &bytes).await,
        Format::Raw => replace_sidecar(path, &bytes),
    }
}

fn replace_sidecar(path: &Path, bytes: &[u8]) -> Result<()> {
    let sidecar = sidecar_of(path)?;
    replace_file(&sidecar, bytes).context(|| sidecar.display().to_string())
}

/// The file beside a raw image, whatever name the image is called by.
fn sidecar_of(path: &Path) -> Result<PathBuf> {
    let real = fs::canonicalize(path).context(|| path.display().to_string())?;
    let mut name: OsString = real.into_os_string();
    name.push(".seethrough");
    Ok(name.into())
}

fn read_sidecar(path: &Path) -> Result<Option<Vec<u8>>> {
    let sidecar = sidecar_of(path)?;
    let file = match File::open(&sidecar) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(sidecar.display().to_string(), error)),
    };
    let mut bytes = Vec::new();
    let limit = MAX_DECLARATION_BYTES as u64 + 1;
    file.take(limit)
        .read_to_end(&mut bytes)
        .context(|| sidecar.display().to_string())?;
    Ok(Some(bytes))
}

/// Replaces a file as a whole: a power cut leaves the old one or the new one.
fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}
