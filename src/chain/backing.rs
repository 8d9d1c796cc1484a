//! From the backing file name in a header to a path on this host, as stock QEMU goes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::format::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::header::Header;

/// The backing file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
}

impl Backing {
    /// What the header of the image at `overlay` says.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it names no format, or for a format or a kind of name that is not supported.
    pub fn of(overlay: &Path, header: &Header) -> Result<Option<Self>> {
        let Some(name) = &header.backing_file else {
            return Ok(None);
        };
        let path = resolve(overlay, name)?;
        let Some(format) = header.backing_format() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{overlay}: names the backing file {name:?} but not its format, which is never guessed: set it \
                     with `seethrough rebase -u -b {name:?} -F FORMAT {overlay}`",
                    overlay = overlay.display(),
                ),
            ));
        };
        let format = format
            .to_string_lossy()
            .parse::<Format>()
            .map_err(|error| {
                error.context(format!("{}: backing file {name:?}", overlay.display()))
            })?;
        Ok(Some(Self { path, format }))
    }
}

/// The path that the name of a backing file means in the image at `overlay`.
///
/// A name that begins with `file:` is relative to the working directory, any other to the directory of the overlay.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a name with another protocol.
pub fn resolve(overlay: &Path, name: &OsStr) -> Result<PathBuf> {
    let Some(protocol) = protocol(name) else {
        let directory = overlay.parent().unwrap_or(Path::new(""));
        return Ok(directory.join(name));
    };
    if protocol == b"file" {
        let path = name.as_bytes().get(b"file:".len()..).unwrap_or_default();
        return Ok(OsString::from_vec(path.to_vec()).into());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "{}: the backing file {name:?} is given as '{}:', and only files of this host are supported: name a path \
             with `seethrough rebase -u -b PATH -F FORMAT {}`",
            overlay.display(),
            String::from_utf8_lossy(protocol).escape_debug(),
            overlay.display()
        ),
    ))
}

/// What stands in front of the first colon, unless a slash comes earlier.
pub(super) fn protocol(name: &OsStr) -> Option<&[u8]> {
    let name = name.as_bytes();
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    let (protocol, rest) = name.split_at(end);
    rest.starts_with(b":").then_some(protocol)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Version;
    use crate::qcow2::header_extension::ExtensionType;

    fn resolved(name: &str) -> Result<PathBuf> {
        resolve(Path::new("/images/family/tom.qcow2"), name.as_ref())
    }

    #[test]
    fn names_are_relative_to_the_directory_of_the_overlay() {
        for (name, path) in [
            ("base.qcow2", "/images/family/base.qcow2"),
            ("../base.raw", "/images/family/../base.raw"),
            ("/other/base.raw", "/other/base.raw"),
            ("./odd:name", "/images/family/./odd:name"),
            ("file:/abs/base.raw", "/abs/base.raw"),
            ("file:base.raw", "base.raw"),
        ] {
            assert_eq!(resolved(name).unwrap(), PathBuf::from(path), "{name}");
        }
        let here = resolve(Path::new("tom.qcow2"), "base.raw".as_ref()).unwrap();
        assert_eq!(here, PathBuf::from("base.raw"));
    }

    #[test]
    fn names_that_are_no_files_are_refused_by_their_protocol() {
        for (name, protocol) in [
            ("json:{\"driver\":\"raw\"}", "'json:'"),
            ("nbd://host/export", "'nbd:'"),
            ("fat:rw:/etc", "'fat:'"),
        ] {
            let error = resolved(name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(protocol), "{error}");
        }
    }

    #[test]
    fn a_backing_file_without_a_format_is_refused_with_the_remedy() {
        let overlay = Path::new("tom.qcow2");
        let mut header = Header::new(Version::V3, 16, 0);
        assert_eq!(Backing::of(overlay, &header).unwrap(), None);
        header.backing_file = Some("base.img".into());
        let error = Backing::of(overlay, &header).unwrap_err().to_string();
        assert!(
            error.contains("seethrough rebase -u -b \"base.img\" -F FORMAT tom.qcow2"),
            "{error}"
        );
        header
            .extensions
            .set(ExtensionType::BACKING_FORMAT, b"vmdk".to_vec());
        assert!(Backing::of(overlay, &header).is_err());
        header
            .extensions
            .set(ExtensionType::BACKING_FORMAT, b"raw".to_vec());
        let backing = Backing::of(overlay, &header).unwrap().unwrap();
        assert_eq!(backing.format, Format::Raw);
    }
}
