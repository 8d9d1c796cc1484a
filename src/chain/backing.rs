//! From the backing file name in a header to a path on this host, as stock QEMU goes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::format::Format;
use super::json_name::JsonName;
use crate::error::{Context, Error, ErrorKind, Result};
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
    /// [`ErrorKind::Unsupported`] if it names no format, or for a format or a kind of name that is not supported;
    /// [`ErrorKind::Corrupt`] if it names two formats.
    pub fn of(overlay: &Path, header: &Header) -> Result<Option<Self>> {
        let Some(name) = &header.backing_file else {
            return Ok(None);
        };
        let Name { path, format } = parse(overlay, name)?;
        let of_header = match header.backing_format() {
            Some(format) => {
                let format = format.to_string_lossy().parse::<Format>();
                Some(format.context(|| format!("{}: backing file {name:?}", overlay.display()))?)
            }
            None => None,
        };
        let format = match (format, of_header) {
            (Some(one), Some(other)) if one != other => Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{overlay}: the backing file {name:?} is {one} by its name and {other} by the header: say which \
                     with `seethrough rebase -u -b PATH -F FORMAT {overlay}`",
                    overlay = overlay.display(),
                ),
            )),
            (named, of_header) => named.or(of_header).ok_or_else(|| {
                Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{overlay}: names the backing file {name:?} but not its format, which is never guessed: set \
                     it with `seethrough rebase -u -b {name:?} -F FORMAT {overlay}`",
                        overlay = overlay.display(),
                    ),
                )
            }),
        };
        Ok(Some(Self {
            path,
            format: format?,
        }))
    }
}

/// What the name of a backing file says.
struct Name {
    path: PathBuf,
    format: Option<Format>,
}

/// The path that the name of a backing file means in the image at `overlay`.
///
/// A name that begins with `file:` or `json:` is relative to the working directory, any other to the directory of the
/// overlay.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a name that is no file of this host.
pub fn resolve(overlay: &Path, name: &OsStr) -> Result<PathBuf> {
    parse(overlay, name).map(|name| name.path)
}

/// The format of a backing file: the one that is given for it, or that its name says.
///
/// # Errors
/// As [`resolve`]; [`ErrorKind::InvalidConfig`] if the two are different ones.
pub fn agreed_format(
    overlay: &Path,
    name: &OsStr,
    given: Option<Format>,
) -> Result<Option<Format>> {
    match (given, parse(overlay, name)?.format) {
        (Some(given), Some(named)) if given != named => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("the backing file {name:?} is {named} by its name, and -F says {given}"),
        )),
        (given, named) => Ok(given.or(named)),
    }
}

fn parse(overlay: &Path, name: &OsStr) -> Result<Name> {
    let plain = |path| Name { path, format: None };
    let Some(protocol) = protocol(name) else {
        let directory = overlay.parent().unwrap_or(Path::new(""));
        return Ok(plain(directory.join(name)));
    };
    let rest = name
        .as_bytes()
        .get(protocol.len() + 1..)
        .unwrap_or_default();
    let why = match protocol {
        b"file" => return Ok(plain(OsString::from_vec(rest.to_vec()).into())),
        b"json" => match JsonName::parse(rest) {
            Ok(JsonName { path, format }) => return Ok(Name { path, format }),
            Err(why) => why,
        },
        other => format!(
            "is given as '{}:', and only files of this host are supported",
            String::from_utf8_lossy(other).escape_debug()
        ),
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "{overlay}: the backing file {name:?} {why}: name a path with `seethrough rebase -u -b PATH -F FORMAT \
                     {overlay}`",
            overlay = overlay.display()
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
            (r#"json:{"file.filename":"base.raw"}"#, "base.raw"),
            (
                r#"json:{"driver":"raw","file":{"driver":"file","filename":"/abs/base"}}"#,
                "/abs/base",
            ),
        ] {
            assert_eq!(resolved(name).unwrap(), PathBuf::from(path), "{name}");
        }
        let here = resolve(Path::new("tom.qcow2"), "base.raw".as_ref()).unwrap();
        assert_eq!(here, PathBuf::from("base.raw"));
    }

    #[test]
    fn names_that_are_no_files_are_refused_by_their_protocol() {
        for (name, protocol) in [
            ("json:{\"driver\":\"raw\"}", "no \"file.filename\""),
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

    #[test]
    fn a_given_format_has_to_agree_with_the_name() {
        let name = OsStr::new(r#"json:{"driver":"raw","file.filename":"base"}"#);
        let agreed = |name, given| agreed_format(Path::new("tom.qcow2"), name, given);
        assert_eq!(agreed(name, None).unwrap(), Some(Format::Raw));
        assert_eq!(agreed(name, Some(Format::Raw)).unwrap(), Some(Format::Raw));
        assert!(agreed(name, Some(Format::Qcow2)).is_err());
        assert_eq!(agreed("base".as_ref(), None).unwrap(), None);
    }

    #[test]
    fn a_json_name_says_the_format_and_may_not_contradict_the_header() {
        let overlay = Path::new("tom.qcow2");
        let mut header = Header::new(Version::V3, 16, 0);
        header.backing_file = Some(r#"json:{"driver":"raw","file.filename":"base"}"#.into());
        let backing = Backing::of(overlay, &header).unwrap().unwrap();
        assert_eq!(backing.format, Format::Raw);
        header
            .extensions
            .set(ExtensionType::BACKING_FORMAT, b"qcow2".to_vec());
        let error = Backing::of(overlay, &header).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(
            error.to_string().contains("raw by its name and qcow2"),
            "{error}"
        );
    }
}
