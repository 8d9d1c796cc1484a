//! The external data file of a qcow2 image: from its name in the header to the open, locked file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backing::protocol;
use super::host::{HostOptions, open_file};
use super::registry::file_id;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;
use crate::qcow2::header::Header;
use crate::qcow2::header_extension::ExtensionType;
use crate::storage::Storage;

/// Opens the data file of the image at `image`, if it has one, for the same access as the image and locked in the
/// same way.
///
/// # Errors
/// As [`data_file_path`] and [`open_file`]; [`ErrorKind::Corrupt`] if the image names itself.
pub async fn open_data_file(
    image: &Path,
    header: &Header,
    access: Access,
    options: HostOptions,
) -> Result<Option<Arc<dyn Storage>>> {
    let Some(path) = data_file_path(image, header)? else {
        return Ok(None);
    };
    if file_id(&path)? == file_id(image)? {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("{}: it names itself as its data file", image.display()),
        ));
    }
    let file = open_file(&path, access, options)
        .context(|| format!("the data file of {}", image.display()))?;
    Ok(Some(Arc::new(file)))
}

/// Where the image at `image` keeps its guest's data, if not in its own file.
///
/// # Errors
/// As [`resolve_data_file`]; [`ErrorKind::Corrupt`] if the image names no data file.
pub fn data_file_path(image: &Path, header: &Header) -> Result<Option<PathBuf>> {
    if !header.has_data_file() {
        return Ok(None);
    }
    let Some(name) = header.extension(ExtensionType::EXTERNAL_DATA_FILE_NAME) else {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{}: it keeps its data in another file, and does not say in which: name it with `qemu-img amend -o \
                 data_file=PATH`",
                image.display()
            ),
        ));
    };
    resolve_data_file(image, OsStr::from_bytes(name)).map(Some)
}

/// The existing file that the name of a data file means in the image at `image`.
///
/// Stock QEMU looks for a relative name in its working directory, and people expect the image's: whichever has such a
/// file is taken.
///
/// # Errors
/// The host's if neither has it; [`ErrorKind::InvalidConfig`] if the two have different ones;
/// [`ErrorKind::Unsupported`] for a name that is no path.
pub fn resolve_data_file(image: &Path, name: &OsStr) -> Result<PathBuf> {
    if let Some(protocol) = protocol(name).filter(|protocol| *protocol != b"file") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: the data file {name:?} is given as '{}:', and only files of this host are supported: name a path",
                image.display(),
                String::from_utf8_lossy(protocol).escape_debug(),
            ),
        ));
    }
    let here = plain_path(name);
    let beside = image.parent().unwrap_or(Path::new("")).join(here);
    match (file_id(&beside), file_id(here)) {
        (Ok(one), Ok(other)) if one != other => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{}: its data file {name:?} can be {} or that in the working directory: move the wrong one away",
                image.display(),
                beside.display()
            ),
        )),
        (Ok(_), _) => Ok(beside),
        (Err(_), Ok(_)) => Ok(here.to_owned()),
        (Err(error), Err(_)) => Err(error.context(format!(
            "{}: its data file is missing: put it back beside the image",
            image.display()
        ))),
    }
}

/// The name as stock QEMU takes it: a path, with or without a protocol in front.
#[must_use]
pub fn plain_path(name: &OsStr) -> &Path {
    let bytes = name.as_bytes();
    Path::new(OsStr::from_bytes(
        bytes.strip_prefix(b"file:").unwrap_or(bytes),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_file_is_found_beside_its_image_and_by_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.qcow2");
        let data = directory.path().join("data.raw");
        let missing = resolve_data_file(&image, "data.raw".as_ref()).unwrap_err();
        assert!(missing.to_string().contains("data.raw"), "{missing}");
        std::fs::write(&data, "").unwrap();
        for name in [OsStr::new("data.raw"), data.as_os_str()] {
            assert_eq!(resolve_data_file(&image, name).unwrap(), data);
        }
        let prefixed = format!("file:{}", data.display());
        assert_eq!(resolve_data_file(&image, prefixed.as_ref()).unwrap(), data);
        for name in ["nbd://host/export", "json:{}"] {
            let error = resolve_data_file(&image, name.as_ref()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{name}");
        }
    }

    #[test]
    fn a_name_that_means_two_files_is_refused() {
        // The working directory of tests has this file.
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.qcow2");
        std::fs::write(directory.path().join("Cargo.toml"), "").unwrap();
        let error = resolve_data_file(&image, "Cargo.toml".as_ref()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert_eq!(
            resolve_data_file(&image, "Cargo.lock".as_ref()).unwrap(),
            PathBuf::from("Cargo.lock")
        );
    }
}
