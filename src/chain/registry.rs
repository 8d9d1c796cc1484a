//! Every image that this process has open, each file once.
//!
//! # Invariants
//!
//! 1. There is one object for every host file, found by device and inode, whatever names it was opened by and
//!    whether it is a disk of its own, of several VMs, or behind others. (Two objects would cache the same metadata
//!    and overwrite each other's; and their locks would exclude each other.)
//! 2. An image that one VM writes to and that lies behind another's is open for writing; behind the other it is only
//!    read. So all disks of a family are opened together: an image that is open read-only cannot become writable.
//! 3. An object lives as long as someone holds its image; the registry itself keeps nothing open.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, Weak};

use async_lock::Mutex;

use super::backing::Backing;
use super::data_file::open_data_file;
use super::format::Format;
use super::host::{HostOptions, open_file};
use super::inspect::{Unnamed, check_depth, detect, read_header};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image, RawImage, ReadOnlyImage};
use crate::qcow2::cache_budget::{CacheBudget, CacheSize};
use crate::qcow2::header::Header;
use crate::qcow2::{OnlineQcow2, Qcow2};
use crate::storage::{FileStorage, Storage};
use crate::sys::FileId;

/// A disk that someone wants.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// The image's path.
    pub path: PathBuf,
    /// Its format; without one, it has to be qcow2.
    pub format: Option<Format>,
    /// Whether it shall be writable.
    pub access: Access,
}

/// Where an open image comes from.
#[derive(Debug)]
pub struct Source {
    /// The path it was first opened by.
    pub path: PathBuf,
    /// The host file.
    pub id: FileId,
    /// The format.
    pub format: Format,
    /// What the file is open for.
    pub access: Access,
    /// The header as it was when the image was opened, if it is qcow2.
    pub header: Option<Header>,
    /// The source of the backing image.
    pub backing: Option<Arc<Source>>,
}

/// An open image.
#[derive(Clone)]
pub struct OpenImage {
    /// The disk.
    pub image: Arc<dyn Image>,
    /// Where it comes from.
    pub source: Arc<Source>,
}

/// What is open, by host file.
type Open = HashMap<FileId, (Weak<dyn Image>, Arc<Source>)>;

/// The images that are open.
pub struct Registry {
    options: HostOptions,
    /// The memory that the metadata caches of all images share.
    metadata: Arc<CacheBudget>,
    open: Mutex<Open>,
    /// Files of which snapshots are going to be taken while they are open.
    with_snapshots: std::sync::Mutex<HashSet<FileId>>,
}

/// A file of a chain that is about to be opened as an image.
struct Layer {
    path: PathBuf,
    storage: FileStorage,
    data: Option<Arc<dyn Storage>>,
    format: Format,
    access: Access,
    header: Option<Header>,
}

impl Registry {
    /// A registry without images, which opens files with `options`.
    #[must_use]
    pub fn new(options: HostOptions) -> Self {
        Self::with_metadata_cache(options, CacheSize::default())
    }

    /// A registry whose images have metadata caches of this size, all together.
    #[must_use]
    pub fn with_metadata_cache(options: HostOptions, size: CacheSize) -> Self {
        Self {
            options,
            metadata: CacheBudget::new(size),
            open: Mutex::default(),
            with_snapshots: std::sync::Mutex::default(),
        }
    }

    /// Says that snapshots are going to be taken of the image at `path` while it is open. A qcow2 image that is opened
    /// for writing after that is an [`OnlineQcow2`].
    ///
    /// # Errors
    /// As [`file_id`].
    pub fn expect_snapshots(&self, path: &Path) -> Result<()> {
        let id = file_id(path)?;
        self.lock_with_snapshots().insert(id);
        Ok(())
    }

    fn lock_with_snapshots(&self) -> std::sync::MutexGuard<'_, HashSet<FileId>> {
        self.with_snapshots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens one disk with its backing chain.
    ///
    /// # Errors
    /// As [`Registry::open_family`].
    pub async fn open(&self, request: &DiskRequest) -> Result<OpenImage> {
        let mut open = self.open.lock().await;
        let writable = writable_files(std::slice::from_ref(request))?;
        self.open_disk(&mut open, &writable, request).await
    }

    /// Opens disks with their backing chains, in the order of the requests: all of them, or none.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] if another program has a file, or this one has it open in another way;
    /// [`ErrorKind::InvalidConfig`] where a raw image is not said to be one; [`ErrorKind::Unsupported`] and
    /// [`ErrorKind::Corrupt`] for images and chains that cannot be served.
    pub async fn open_family(&self, requests: &[DiskRequest]) -> Result<Vec<OpenImage>> {
        let mut open = self.open.lock().await;
        let writable = writable_files(requests)?;
        let mut disks = Vec::with_capacity(requests.len());
        for request in requests {
            disks.push(self.open_disk(&mut open, &writable, request).await?);
        }
        Ok(disks)
    }

    async fn open_disk(
        &self,
        open: &mut Open,
        writable: &HashSet<FileId>,
        request: &DiskRequest,
    ) -> Result<OpenImage> {
        open.retain(|_, (image, _)| image.strong_count() > 0);
        let (mut layers, mut below) = self.descend(open, writable, request).await?;
        while let Some(layer) = layers.pop() {
            below = Some(self.build(open, layer, below).await?);
        }
        let disk = below
            .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, "a disk without any image"))?;
        match request.access {
            Access::ReadOnly if !disk.image.is_read_only() => Ok(OpenImage {
                image: Arc::new(ReadOnlyImage::new(disk.image)),
                source: disk.source,
            }),
            _ => Ok(disk),
        }
    }

    /// Opens the files from a disk downwards, topmost first, until one is open already or has nothing behind it.
    async fn descend(
        &self,
        open: &Open,
        writable: &HashSet<FileId>,
        request: &DiskRequest,
    ) -> Result<(Vec<Layer>, Option<OpenImage>)> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut next = Some((request.path.clone(), request.format));
        while let Some((path, format)) = next {
            let id = file_id(&path)?;
            if layers.iter().any(|layer| layer.storage.id() == id) {
                return Err(contains_itself(&path));
            }
            check_depth(&path, layers.len())?;
            let access = if writable.contains(&id) {
                Access::ReadWrite
            } else {
                Access::ReadOnly
            };
            if let Some(found) = find(open, id, &path, format, access)? {
                return Ok((layers, Some(found)));
            }
            let layer = self.open_layer(path, id, format, access).await?;
            next = layer
                .backing()?
                .map(|backing| (backing.path, Some(backing.format)));
            layers.push(layer);
        }
        Ok((layers, None))
    }

    async fn open_layer(
        &self,
        path: PathBuf,
        id: FileId,
        format: Option<Format>,
        access: Access,
    ) -> Result<Layer> {
        let storage = open_file(&path, access, self.options)?;
        if storage.id() != id {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "{}: the file was replaced while it was opened",
                    path.display()
                ),
            ));
        }
        let format = match format {
            Some(format) => format,
            None => detect(&storage, Unnamed::Refuse).await?,
        };
        let header = read_header(&storage, format).await?;
        let data = match &header {
            Some(header) => open_data_file(&path, header, access, self.options).await?,
            None => None,
        };
        Ok(Layer {
            path,
            storage,
            data,
            format,
            access,
            header,
        })
    }
}

impl Registry {
    /// Makes an image of an open file, and enters it in the registry.
    async fn build(
        &self,
        open: &mut Open,
        layer: Layer,
        below: Option<OpenImage>,
    ) -> Result<OpenImage> {
        let id = layer.storage.id();
        let (backing_image, backing_source) = below.map_or((None, None), |below| {
            (Some(below.image), Some(below.source))
        });
        let storage = Arc::new(layer.storage);
        let image: Arc<dyn Image> = match layer.format {
            Format::Raw => Arc::new(RawImage::new(storage, layer.access)),
            Format::Qcow2 => {
                let opened = Qcow2::open_sharing(
                    storage,
                    layer.data,
                    backing_image,
                    layer.access,
                    &self.metadata,
                );
                let opened = opened.await?;
                let has_snapshots = self.lock_with_snapshots().contains(&id);
                if has_snapshots && layer.access == Access::ReadWrite {
                    Arc::new(OnlineQcow2::new(opened))
                } else {
                    Arc::new(opened)
                }
            }
        };
        let source = Arc::new(Source {
            path: layer.path,
            id,
            format: layer.format,
            access: layer.access,
            header: layer.header,
            backing: backing_source,
        });
        open.insert(id, (Arc::downgrade(&image), Arc::clone(&source)));
        Ok(OpenImage { image, source })
    }
}

impl Layer {
    fn backing(&self) -> Result<Option<Backing>> {
        match &self.header {
            Some(header) => Backing::of(&self.path, header),
            None => Ok(None),
        }
    }
}

/// The files that somebody wants to write to.
fn writable_files(requests: &[DiskRequest]) -> Result<HashSet<FileId>> {
    requests
        .iter()
        .filter(|request| request.access == Access::ReadWrite)
        .map(|request| file_id(&request.path))
        .collect()
}

/// The image of a file that is open already.
fn find(
    open: &Open,
    id: FileId,
    path: &Path,
    format: Option<Format>,
    access: Access,
) -> Result<Option<OpenImage>> {
    let Some((image, source)) = open.get(&id) else {
        return Ok(None);
    };
    let Some(image) = image.upgrade() else {
        return Ok(None);
    };
    if format.is_some_and(|format| format != source.format) {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{}: it is in use as {} already, and cannot be of another format at the same time",
                path.display(),
                source.format
            ),
        ));
    }
    if format.is_none() && source.format == Format::Raw {
        return Err(Format::has_to_be_named(&path.display().to_string()));
    }
    if access == Access::ReadWrite && source.access == Access::ReadOnly {
        return Err(Error::new(
            ErrorKind::InUse,
            format!(
                "{}: it is open read-only already: open all disks that use it together",
                path.display()
            ),
        ));
    }
    Ok(Some(OpenImage {
        image,
        source: Arc::clone(source),
    }))
}

/// Which file a path leads to.
///
/// # Errors
/// The host's, if it leads nowhere.
pub fn file_id(path: &Path) -> Result<FileId> {
    let metadata = std::fs::metadata(path).context(|| path.display().to_string())?;
    Ok(if metadata.file_type().is_block_device() {
        FileId::BlockDevice {
            device: metadata.rdev(),
        }
    } else {
        FileId::Regular {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    })
}

fn contains_itself(path: &Path) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "{}: the backing chain contains itself: name another backing file with `seethrough rebase -u`",
            path.display()
        ),
    )
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::create::{NewImage, create};
    use crate::chain::host::Locking;
    use crate::qcow2::create::{BackingReference, CreateOptions};
    use crate::sys::{IoBuf, block_on};
    use crate::units::GuestOffset;

    struct Directory(tempfile::TempDir);

    impl Directory {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn raw(&self, name: &str) {
            std::fs::write(self.path(name), vec![7; 4096]).unwrap();
        }

        fn overlay(&self, name: &str, backing: &str, format: &str) {
            let options = CreateOptions {
                backing: Some(BackingReference {
                    file: backing.into(),
                    format: format.to_owned(),
                }),
                ..CreateOptions::new(4096)
            };
            block_on(create(&self.path(name), &NewImage::Qcow2(options))).unwrap();
        }

        fn request(&self, name: &str, access: Access) -> DiskRequest {
            DiskRequest {
                path: self.path(name),
                format: Some(name.rsplit('.').next().unwrap().parse().unwrap()),
                access,
            }
        }
    }

    fn family(registry: &Registry, requests: &[DiskRequest]) -> Result<Vec<OpenImage>> {
        block_on(registry.open_family(requests))
    }

    fn registry() -> Registry {
        Registry::new(HostOptions::default())
    }

    fn first_byte(image: &Arc<dyn Image>) -> u8 {
        let buf = IoBuf::zeroed(1);
        block_on(image.read(GuestOffset(0), buf.clone())).unwrap();
        buf.to_vec()[0]
    }

    #[test]
    fn a_file_is_one_object_however_it_is_reached() {
        let directory = Directory::new();
        directory.raw("base.raw");
        directory.overlay("tom.qcow2", "base.raw", "raw");
        directory.overlay("ann.qcow2", "./base.raw", "raw");
        std::os::unix::fs::symlink("base.raw", directory.path("link.raw")).unwrap();
        let registry = registry();
        // The overlays come first: the base is opened for writing behind them, since the third disk writes.
        let disks = family(
            &registry,
            &[
                directory.request("tom.qcow2", Access::ReadWrite),
                directory.request("ann.qcow2", Access::ReadWrite),
                directory.request("link.raw", Access::ReadWrite),
            ],
        )
        .unwrap();
        let base = &disks[2].image;
        assert!(!base.is_read_only());
        for disk in &disks[..2] {
            assert!(Arc::ptr_eq(disk.image.backing().unwrap(), base));
            let source = disk.source.backing.as_ref().unwrap();
            assert!(Arc::ptr_eq(source, &disks[2].source));
        }
        block_on(base.write(GuestOffset(0), IoBuf::from_bytes(&[9]))).unwrap();
        assert_eq!(first_byte(&disks[0].image), 9);
        let again = block_on(registry.open(&directory.request("tom.qcow2", Access::ReadWrite)));
        assert!(Arc::ptr_eq(&again.unwrap().image, &disks[0].image));
    }

    #[test]
    fn a_base_that_nobody_writes_to_is_open_read_only_and_cannot_become_writable() {
        let directory = Directory::new();
        directory.raw("base.raw");
        directory.overlay("tom.qcow2", "base.raw", "raw");
        let registry = registry();
        let tom = family(
            &registry,
            &[directory.request("tom.qcow2", Access::ReadWrite)],
        )
        .unwrap();
        assert!(tom[0].image.backing().unwrap().is_read_only());
        let writable = [directory.request("base.raw", Access::ReadWrite)];
        let error = family(&registry, &writable).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InUse);
        drop(tom);
        family(&registry, &writable).unwrap();
    }

    #[test]
    fn a_disk_that_is_wanted_read_only_stays_so_when_another_writes_to_it() {
        let directory = Directory::new();
        directory.raw("base.raw");
        let disks = family(
            &registry(),
            &[
                directory.request("base.raw", Access::ReadOnly),
                directory.request("base.raw", Access::ReadWrite),
            ],
        )
        .unwrap();
        assert!(disks[0].image.is_read_only());
        assert!(!disks[1].image.is_read_only());
        block_on(
            disks[1]
                .image
                .write(GuestOffset(0), IoBuf::from_bytes(&[9])),
        )
        .unwrap();
        assert_eq!(first_byte(&disks[0].image), 9);
    }

    #[test]
    fn a_file_cannot_have_two_formats_at_once() {
        let directory = Directory::new();
        directory.raw("base.raw");
        directory.overlay("a.qcow2", "base.raw", "raw");
        directory.overlay("b.qcow2", "a.qcow2", "raw");
        let requests = [
            directory.request("a.qcow2", Access::ReadOnly),
            directory.request("b.qcow2", Access::ReadOnly),
        ];
        let error = family(&registry(), &requests).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("a.qcow2"), "{error}");
    }

    #[test]
    fn a_chain_that_contains_itself_is_refused() {
        let directory = Directory::new();
        directory.overlay("a.qcow2", "b.qcow2", "qcow2");
        directory.overlay("b.qcow2", "a.qcow2", "qcow2");
        directory.overlay("self.qcow2", "self.qcow2", "qcow2");
        for name in ["a.qcow2", "self.qcow2"] {
            let error = family(&registry(), &[directory.request(name, Access::ReadOnly)])
                .err()
                .unwrap();
            assert!(error.to_string().contains("contains itself"), "{error}");
        }
    }

    #[test]
    fn what_one_registry_writes_to_no_other_opens_unless_by_force() {
        let directory = Directory::new();
        directory.raw("base.raw");
        directory.overlay("tom.qcow2", "base.raw", "raw");
        let disk = registry();
        let disk = family(&disk, &[directory.request("tom.qcow2", Access::ReadWrite)]).unwrap();
        for (name, access) in [
            ("tom.qcow2", Access::ReadOnly),
            ("tom.qcow2", Access::ReadWrite),
            ("base.raw", Access::ReadWrite),
        ] {
            let error = family(&registry(), &[directory.request(name, access)])
                .err()
                .unwrap();
            assert_eq!(error.kind(), ErrorKind::InUse, "{name} {access:?}");
            assert!(error.to_string().contains(name), "{error}");
        }
        let by_force = Registry::new(HostOptions {
            locking: Locking::ForceShare,
            ..HostOptions::default()
        });
        family(
            &by_force,
            &[directory.request("tom.qcow2", Access::ReadOnly)],
        )
        .unwrap();
        let writer = [directory.request("tom.qcow2", Access::ReadWrite)];
        assert_eq!(
            family(&by_force, &writer).err().unwrap().kind(),
            ErrorKind::InvalidConfig
        );
        family(
            &registry(),
            &[directory.request("base.raw", Access::ReadOnly)],
        )
        .unwrap();
        drop(disk);
        family(
            &registry(),
            &[directory.request("base.raw", Access::ReadWrite)],
        )
        .unwrap();
    }

    #[test]
    fn a_raw_disk_has_to_be_said_to_be_one_also_when_it_is_open_already() {
        let directory = Directory::new();
        directory.raw("base.raw");
        let registry = registry();
        let unnamed = DiskRequest {
            format: None,
            ..directory.request("base.raw", Access::ReadOnly)
        };
        assert!(block_on(registry.open(&unnamed)).is_err());
        let named = directory.request("base.raw", Access::ReadOnly);
        let _open = block_on(registry.open(&named)).unwrap();
        let error = block_on(registry.open(&unnamed)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }

    #[test]
    fn when_one_disk_of_a_family_cannot_be_opened_none_stays_open() {
        let directory = Directory::new();
        directory.raw("base.raw");
        let registry = registry();
        let error = family(
            &registry,
            &[
                directory.request("base.raw", Access::ReadOnly),
                directory.request("missing.raw", Access::ReadOnly),
            ],
        )
        .err()
        .unwrap();
        assert!(error.to_string().contains("missing.raw"), "{error}");
        family(
            &registry,
            &[directory.request("base.raw", Access::ReadWrite)],
        )
        .unwrap();
    }
}
