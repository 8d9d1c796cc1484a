//! Making new image files.

use std::ffi::OsStr;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::backing::resolve;
use super::data_file::{plain_path, resolve_data_file};
use super::host::{HostOptions, open_file};
use super::registry::file_id;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::{Access, Image};
use crate::qcow2::create::{CreateOptions, L2Entries, RefcountUpdates};
use crate::qcow2::data_file::Layout;
use crate::qcow2::header::Version;
use crate::qcow2::header_extension::ExtensionType;
use crate::qcow2::header_update::set_extension;
use crate::qcow2::preallocate::Preallocation;
use crate::qcow2::{self, Qcow2};
use crate::storage::{CacheMode, FileStorage, Storage, ZeroMode};
use crate::sys::IoBuf;
use crate::units::{GuestOffset, HostOffset, SECTOR_SIZE};

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewImage {
    /// A file of this many bytes, rounded up to a sector.
    Raw {
        /// The virtual size in bytes.
        size: u64,
        /// `preallocation`.
        preallocation: Preallocation,
    },
    /// A qcow2 image.
    Qcow2(CreateOptions),
}

/// Makes `path` a new image. An image that is there is replaced, unless somebody uses it.
///
/// # Errors
/// Those of the host, of [`open_file`] and of [`qcow2::create::create`]. A file that was not there before is gone
/// again.
pub async fn create(path: &Path, image: &NewImage) -> Result<()> {
    match image {
        NewImage::Raw {
            size,
            preallocation,
        } => {
            let file = NewFile::at(path)?;
            write_raw(&file.open()?, *size, *preallocation)
                .await
                .context(|| path.display().to_string())?;
            file.keep();
        }
        NewImage::Qcow2(options) => {
            let new = NewQcow2::at(path, options)?;
            new.write(options)
                .await
                .context(|| path.display().to_string())?;
            new.keep();
        }
    }
    Ok(())
}

/// Makes `path` a new qcow2 image over `backing`, lets `fill` write to the disk, and has it declare `extension` when
/// all of that is durable: an image whose creation was cut short declares nothing.
///
/// # Errors
/// As [`create`], and what `fill` fails with. A file that was not there before is gone again.
pub async fn create_filled(
    path: &Path,
    options: &CreateOptions,
    backing: Option<Arc<dyn Image>>,
    extension: (ExtensionType, &[u8]),
    fill: impl AsyncFnOnce(&dyn Image) -> Result<()>,
) -> Result<()> {
    let new = NewQcow2::at(path, options)?;
    let filled = async {
        new.write(options).await?;
        let disk = new.open(backing).await?;
        fill(&disk).await?;
        disk.close().await?;
        drop(disk);
        let (extension_type, data) = extension;
        set_extension(new.storage.as_ref(), extension_type, data).await
    };
    filled.await.context(|| path.display().to_string())?;
    new.keep();
    Ok(())
}

/// A qcow2 image in the making, with its data file if it is to have one.
struct NewQcow2<'a> {
    file: NewFile<'a>,
    storage: Arc<FileStorage>,
    data: Option<(NewFile<'a>, Arc<FileStorage>)>,
}

impl<'a> NewQcow2<'a> {
    /// Opens the files, and makes those that are not there yet.
    fn at(path: &'a Path, options: &'a CreateOptions) -> Result<Self> {
        options.check().context(|| path.display().to_string())?;
        refuse_own_backing(path, options)?;
        let file = NewFile::at(path)?;
        let storage = Arc::new(file.open()?);
        let data = match &options.data_file {
            Some(reference) => Some(new_data_file(path, &reference.file)?),
            None => None,
        };
        Ok(Self {
            file,
            storage,
            data,
        })
    }

    /// Makes the image, empty, as `options` say.
    async fn write(&self, options: &CreateOptions) -> Result<()> {
        let size = options.virtual_size()?;
        if let Some((_, data)) = &self.data {
            // Nothing of what it held may show, so it is empty before there is an image that leads to it.
            write_raw(data.as_ref(), size, Preallocation::Off).await?;
        }
        qcow2::create::create(self.storage.as_ref(), options).await?;
        if options.preallocation() == Preallocation::Off {
            return Ok(());
        }
        let image = self.open(None).await?;
        image
            .preallocate(GuestOffset(0), size, options.preallocation())
            .await?;
        image.flush().await
    }

    async fn open(&self, backing: Option<Arc<dyn Image>>) -> Result<Qcow2> {
        let storage = Arc::clone(&self.storage) as Arc<dyn Storage>;
        let data = self.data.as_ref();
        let data = data.map(|(_, data)| Arc::clone(data) as Arc<dyn Storage>);
        Qcow2::open_with_data(storage, data, backing, Access::ReadWrite).await
    }

    fn keep(self) {
        self.file.keep();
        if let Some((file, _)) = self.data {
            file.keep();
        }
    }
}

/// The file of this name, made if need be, as the image at `path` will find it.
fn new_data_file<'a>(path: &Path, name: &'a OsStr) -> Result<(NewFile<'a>, Arc<FileStorage>)> {
    let of = || format!("the data file of {}", path.display());
    let file = NewFile::at(plain_path(name)).context(of)?;
    let found = resolve_data_file(path, name)?;
    if file_id(&found)? != file_id(file.path)? || file_id(&found)? == file_id(path)? {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{}: it is the image itself, or another of its name is beside it: name another",
                of()
            ),
        ));
    }
    let storage = Arc::new(file.open().context(of)?);
    Ok((file, storage))
}

/// Making an image in place of its own backing image would destroy that.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if `options` name the file at `path`.
pub fn refuse_own_backing(path: &Path, options: &CreateOptions) -> Result<()> {
    let Some(backing) = &options.backing else {
        return Ok(());
    };
    let backing = resolve(path, &backing.file)?;
    match (file_id(path), file_id(&backing)) {
        (Ok(new), Ok(old)) if new == old => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{}: an image cannot lie over itself: give the new image another name",
                path.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// A file that goes again unless it is kept, or was there before.
struct NewFile<'a> {
    path: &'a Path,
    remove: bool,
}

impl<'a> NewFile<'a> {
    fn at(path: &'a Path) -> Result<Self> {
        let remove = !path.exists();
        if remove {
            FileStorage::create_new(path, CacheMode::Writeback)?;
        }
        Ok(Self { path, remove })
    }

    fn open(&self) -> Result<FileStorage> {
        open_file(self.path, Access::ReadWrite, HostOptions::default())
    }

    fn keep(mut self) {
        self.remove = false;
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if self.remove {
            // The failure that led here is the one to tell.
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// Makes `storage` a disk of zeros.
async fn write_raw(storage: &dyn Storage, size: u64, preallocation: Preallocation) -> Result<()> {
    storage.set_len(0).await?;
    resize_raw(storage, size.next_multiple_of(SECTOR_SIZE), preallocation).await
}

/// Makes the raw disk in `storage` `size` bytes long; what is new reads as zeros.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for metadata, which a raw image has none of; the storage's. The disk is as long as it
/// was then.
pub async fn resize_raw(
    storage: &dyn Storage,
    size: u64,
    preallocation: Preallocation,
) -> Result<()> {
    if preallocation == Preallocation::Metadata {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            "preallocation=metadata: a raw image has no metadata, use falloc or full",
        ));
    }
    let old_size = storage.len();
    let grown = async {
        storage.set_len(size).await?;
        match preallocation {
            _ if size <= old_size => {}
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => {
                let (at, len) = (HostOffset(old_size), size - old_size);
                let keep = ZeroMode::KeepAllocated;
                storage.write_zeroes(at, len, keep).await?;
            }
            Preallocation::Full => write_zeros(storage, old_size..size).await?,
        }
        storage.flush().await
    };
    let grown = grown.await;
    if grown.is_err() {
        // The failure that led here is the one to tell.
        let _ = storage.set_len(old_size).await;
    }
    grown
}

async fn write_zeros(storage: &dyn Storage, range: Range<u64>) -> Result<()> {
    const PIECE: usize = 1 << 20;
    let zeros = IoBuf::zeroed(PIECE);
    let end = range.end;
    for at in range.step_by(PIECE) {
        let len = usize::try_from(end - at).map_or(PIECE, |left| left.min(PIECE));
        storage.writev(HostOffset(at), zeros.slice(0..len)).await?;
    }
    Ok(())
}

/// The options as `qemu-img create` prints them.
impl fmt::Display for NewImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options = match self {
            Self::Raw {
                size,
                preallocation,
            } => {
                write!(f, "fmt=raw size={size}")?;
                return write_preallocation(f, *preallocation);
            }
            Self::Qcow2(options) => options,
        };
        let switch = |on: bool| if on { "on" } else { "off" };
        write!(
            f,
            "fmt=qcow2 cluster_size={} extended_l2={}",
            options.cluster_size,
            switch(options.l2_entries == L2Entries::Extended),
        )?;
        write_preallocation(f, options.preallocation)?;
        write!(
            f,
            " compression_type={} size={}",
            options.compression_type.name(),
            options.size,
        )?;
        if let Some(backing) = &options.backing {
            write!(
                f,
                " backing_file={} backing_fmt={}",
                backing.file.display(),
                backing.format
            )?;
        }
        if let Some(data) = &options.data_file {
            write!(f, " data_file={}", data.file.display())?;
            if data.layout == Layout::Raw {
                f.write_str(" data_file_raw=on")?;
            }
        }
        if options.version == Version::V2 {
            f.write_str(" compat=0.10")?;
        }
        write!(
            f,
            " lazy_refcounts={} refcount_bits={}",
            switch(options.refcount_updates == RefcountUpdates::Lazy),
            options.refcount_bits
        )
    }
}

fn write_preallocation(f: &mut fmt::Formatter<'_>, preallocation: Preallocation) -> fmt::Result {
    match preallocation {
        Preallocation::Off => Ok(()),
        asked => write!(f, " preallocation={}", asked.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::RawImage;
    use crate::qcow2::create::BackingReference;
    use crate::qcow2::header::Header;
    use crate::qcow2::header_extension::SEETHROUGH_EXTENSION;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    fn overlay() -> CreateOptions {
        CreateOptions {
            backing: Some(BackingReference {
                file: "base.raw".into(),
                format: "raw".to_owned(),
            }),
            ..CreateOptions::new(1 << 20)
        }
    }

    fn base() -> Arc<dyn Image> {
        let storage = MemoryStorage::new(vec![7; 1 << 20]);
        Arc::new(RawImage::new(Arc::new(storage), Access::ReadOnly))
    }

    #[test]
    fn a_filled_image_holds_what_was_written_and_declares_its_extension() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tom.qcow2");
        let extension = (SEETHROUGH_EXTENSION, b"{}".as_slice());
        block_on(create_filled(
            &path,
            &overlay(),
            Some(base()),
            extension,
            async |disk| {
                disk.write(GuestOffset(4096), IoBuf::from_bytes(&[9; 512]))
                    .await
            },
        ))
        .unwrap();
        let storage = FileStorage::open(&path, Access::ReadOnly, CacheMode::Writeback).unwrap();
        let header = block_on(Header::read(&storage)).unwrap();
        assert_eq!(
            header.extension(SEETHROUGH_EXTENSION),
            Some(b"{}".as_slice())
        );
        assert_eq!(header.backing_file.as_deref(), Some("base.raw".as_ref()));
        let disk = Qcow2::open(Arc::new(storage), Some(base()), Access::ReadOnly);
        let disk = block_on(disk).unwrap();
        let buf = IoBuf::zeroed(1024);
        block_on(disk.read(GuestOffset(4096 - 512), buf.clone())).unwrap();
        assert_eq!(buf.to_vec(), [[7; 512], [9; 512]].concat());
    }

    #[test]
    fn an_image_is_never_made_in_place_of_what_it_lies_over() {
        let directory = tempfile::tempdir().unwrap();
        let base_path = directory.path().join("base.raw");
        std::fs::write(&base_path, b"precious").unwrap();
        std::fs::hard_link(&base_path, directory.path().join("link")).unwrap();
        for name in ["base.raw", "link"] {
            let path = directory.path().join(name);
            let error = block_on(create(&path, &NewImage::Qcow2(overlay()))).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            let extension = (SEETHROUGH_EXTENSION, b"{}".as_slice());
            let nothing = async |_: &dyn Image| Ok(());
            let options = overlay();
            let filled = create_filled(&path, &options, Some(base()), extension, nothing);
            block_on(filled).unwrap_err();
        }
        assert_eq!(std::fs::read(&base_path).unwrap(), b"precious");
    }

    #[test]
    fn a_creation_that_fails_leaves_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tom.qcow2");
        let extension = (SEETHROUGH_EXTENSION, b"{}".as_slice());
        let failing = async |_: &dyn Image| Err(Error::new(ErrorKind::Io, "the host is on fire"));
        let failed = block_on(create_filled(
            &path,
            &overlay(),
            Some(base()),
            extension,
            failing,
        ));
        assert!(failed.unwrap_err().to_string().contains("on fire"));
        assert!(!path.exists());
        let impossible = CreateOptions {
            cluster_size: 5,
            ..overlay()
        };
        block_on(create(&path, &NewImage::Qcow2(impossible))).unwrap_err();
        assert!(!path.exists());
    }
}
