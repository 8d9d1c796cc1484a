//! Which images can be used: unsupported features are refused by name, with a remedy.

use super::features::{FeatureType, IncompatibleFeatures};
use super::header::Header;
use crate::error::{Error, ErrorKind, Result};

impl Header {
    /// Whether the image's data can be read.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the name of what is not supported.
    pub fn require_readable(&self) -> Result<()> {
        match self.crypt_method {
            0 => {}
            1 => return unsupported("the image is encrypted with AES", PLAIN_COPY),
            2 => return unsupported("the image is encrypted with LUKS", PLAIN_COPY),
            other => {
                return unsupported(
                    &format!("the image is encrypted with the unknown method {other}"),
                    PLAIN_COPY,
                );
            }
        }
        self.require_checkable()
    }

    /// Whether the image's tables can be understood, wherever they lead.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the name of what is not known.
    pub fn require_checkable(&self) -> Result<()> {
        let unknown: Vec<String> = self
            .incompatible_features
            .unknown()
            .bits()
            .map(|bit| {
                self.extensions
                    .feature_name(FeatureType::Incompatible, bit)
                    .map_or_else(
                        || format!("bit {bit}"),
                        |name| format!("'{name}' (bit {bit})"),
                    )
            })
            .collect();
        if !unknown.is_empty() {
            return unsupported(
                &format!(
                    "the image uses incompatible features that are not known: {}",
                    unknown.join(", ")
                ),
                "make a copy without them, with the program that made the image",
            );
        }
        Ok(())
    }

    /// Whether the image can be written to, which includes that it can be read.
    ///
    /// # Errors
    /// As [`Header::require_readable`]; and [`ErrorKind::Corrupt`] if the image is marked as damaged.
    pub fn require_writable(&self) -> Result<()> {
        self.require_readable()?;
        if self
            .incompatible_features
            .contains(IncompatibleFeatures::CORRUPT)
        {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the image is marked as corrupt and cannot be written: repair it with `seethrough check -r all \
                 IMAGE`, or open it read-only",
            ));
        }
        Ok(())
    }
}

const PLAIN_COPY: &str = "make an unencrypted copy with `qemu-img convert`";

fn unsupported(what: &str, remedy: &str) -> Result<()> {
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("{what}, and that is not supported: {remedy}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Version;
    use crate::qcow2::header_extension::{ExtensionType, feature_name_table};

    fn header() -> Header {
        Header::new(Version::V3, 16, 1 << 30)
    }

    fn refusal(header: &Header) -> String {
        let error = header.require_readable().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        error.to_string()
    }

    #[test]
    fn encryption_is_refused_by_name() {
        for (method, name) in [(1, "AES"), (2, "LUKS"), (9, "method 9")] {
            let mut header = header();
            header.crypt_method = method;
            assert!(refusal(&header).contains(name), "{}", refusal(&header));
        }
    }

    #[test]
    fn unsupported_features_are_refused_by_name() {
        let mut unknown = header();
        unknown.incompatible_features = IncompatibleFeatures(1 << 9 | 1 << 10 | 1);
        let table = feature_name_table([(FeatureType::Incompatible, 9, "time travel")]);
        unknown
            .extensions
            .set(ExtensionType::FEATURE_NAME_TABLE, table);
        assert!(refusal(&unknown).contains("'time travel' (bit 9), bit 10"));
    }

    #[test]
    fn a_corrupt_image_may_be_read_but_not_written() {
        let mut header = header();
        header.incompatible_features =
            IncompatibleFeatures::CORRUPT.with(IncompatibleFeatures::DIRTY);
        header.require_readable().unwrap();
        assert_eq!(
            header.require_writable().unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }
}
