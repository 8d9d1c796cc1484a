//! Image formats, and how one is chosen.
//!
//! # Invariants
//!
//! 1. Raw is never guessed: a guest writes the first bytes of a raw disk, and could make them those of another
//!    format with any file of the host as its backing file.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::header::MAGIC;

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk, byte for byte.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The name in options, listings and backing-format header extensions.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of the image `name` that begins with `start`, where nothing says what it is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] unless it is qcow2 (invariant 1).
    pub fn of_unnamed(name: &str, start: &[u8]) -> Result<Self> {
        if start.starts_with(&MAGIC) {
            return Ok(Self::Qcow2);
        }
        Err(Self::has_to_be_named(name))
    }

    /// What whoever opens the raw image `name` without saying that it is raw is told.
    pub(super) fn has_to_be_named(name: &str) -> Error {
        Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{name}: not known to be a qcow2 image; if it is a raw one, say so: the format raw is never guessed, \
                 since a guest can make its disk look like any other"
            ),
        )
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the format '{}' is not supported: it is raw or qcow2",
                    name.escape_debug()
                ),
            )),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_is_never_guessed() {
        assert_eq!(
            Format::of_unnamed("a", b"QFI\xfb\0\0\0\x03").unwrap(),
            Format::Qcow2
        );
        for start in [&b""[..], b"QFI", b"\0\0\0\0\0"] {
            let error = Format::of_unnamed("disk.img", start).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().starts_with("disk.img: "), "{error}");
        }
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        assert_eq!("raw".parse::<Format>().unwrap(), Format::Raw);
        let error = "vmdk".parse::<Format>().unwrap_err();
        assert!(error.to_string().contains("'vmdk'"));
    }
}
