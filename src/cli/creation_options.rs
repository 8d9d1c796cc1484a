//! The options of a new image, as `-o` gives them to every verb that makes one.

use super::options::{parse_key_values, parse_size, parse_switch};
use crate::chain::create::NewImage;
use crate::chain::format::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::create::{
    BackingReference, CreateOptions, DataFileReference, L2Entries, RefcountUpdates,
};
use crate::qcow2::data_file::Layout;
use crate::qcow2::header::{CompressionType, Version};
use crate::qcow2::preallocate::Preallocation;

/// What `-o` says.
pub(super) struct CreationOptions {
    /// The virtual size, if it is given there.
    pub(super) size: Option<u64>,
    /// What is ready before it is written to.
    preallocation: Preallocation,
    /// What is only for qcow2.
    pub(super) qcow2: CreateOptions,
    /// An option that only qcow2 has.
    pub(super) qcow2_key: Option<String>,
    /// `data_file_raw`.
    raw_data_file: bool,
}

impl Default for CreationOptions {
    fn default() -> Self {
        Self {
            size: None,
            preallocation: Preallocation::Off,
            qcow2: CreateOptions::new(0),
            qcow2_key: None,
            raw_data_file: false,
        }
    }
}

impl CreationOptions {
    /// What the lists of several `-o` say together; and which keys they have.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] and [`ErrorKind::Unsupported`], by the name of the option.
    pub(super) fn parse(lists: &[String]) -> Result<(Self, Vec<String>)> {
        let mut options = Self::default();
        let mut given = Vec::new();
        for list in lists {
            for (key, value) in parse_key_values(list)? {
                options.set(&key, &value)?;
                given.push(key);
            }
        }
        options.finish()?;
        Ok((options, given))
    }

    /// A new image of this format and size, with these options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for what a raw image does not have.
    pub(super) fn image(
        &self,
        format: Format,
        size: u64,
        backing: Option<BackingReference>,
    ) -> Result<NewImage> {
        match (format, backing, &self.qcow2_key) {
            (Format::Qcow2, backing, _) => Ok(NewImage::Qcow2(CreateOptions {
                size,
                backing,
                ..self.qcow2.clone()
            })),
            (Format::Raw, Some(_), _) => {
                Err(invalid("a raw image has no backing image: make it qcow2"))
            }
            (Format::Raw, None, Some(key)) => Err(invalid(format!(
                "raw images have no option '{key}': make it qcow2"
            ))),
            (Format::Raw, None, None) => Ok(NewImage::Raw {
                size,
                preallocation: self.preallocation,
            }),
        }
    }

    /// Puts together what several keys say.
    fn finish(&mut self) -> Result<()> {
        self.qcow2.preallocation = self.preallocation;
        match (&mut self.qcow2.data_file, self.raw_data_file) {
            (Some(file), true) => file.layout = Layout::Raw,
            (None, true) => return Err(invalid("data_file_raw=on needs a data_file")),
            (_, false) => {}
        }
        Ok(())
    }

    /// Takes one option in.
    ///
    /// # Errors
    /// As [`CreationOptions::parse`].
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let wrong = || invalid(format!("'{key}={value}': no such value"));
        let number = || parse_size(value).map_err(|error| invalid(format!("{key}: {error}")));
        match key {
            "size" => {
                self.size = Some(number()?);
                return Ok(());
            }
            "preallocation" => {
                self.preallocation = Preallocation::named(value).ok_or_else(wrong)?;
                return Ok(());
            }
            "data_file" => {
                self.qcow2.data_file = Some(DataFileReference {
                    file: value.into(),
                    layout: Layout::Clusters,
                });
            }
            "data_file_raw" => self.raw_data_file = parse_switch(key, value)?,
            "compat" => {
                self.qcow2.version = match value {
                    "0.10" | "v2" => Version::V2,
                    "1.1" | "v3" => Version::V3,
                    _ => return Err(wrong()),
                };
            }
            "cluster_size" => self.qcow2.cluster_size = number()?,
            "extended_l2" => {
                self.qcow2.l2_entries = if parse_switch(key, value)? {
                    L2Entries::Extended
                } else {
                    L2Entries::Standard
                };
            }
            "refcount_bits" => self.qcow2.refcount_bits = number()?,
            "lazy_refcounts" => {
                self.qcow2.refcount_updates = if parse_switch(key, value)? {
                    RefcountUpdates::Lazy
                } else {
                    RefcountUpdates::Eager
                };
            }
            "compression_type" => {
                self.qcow2.compression_type = match value {
                    "zlib" => CompressionType::Deflate,
                    "zstd" => CompressionType::Zstd,
                    _ => return Err(wrong()),
                };
            }
            _ => return Err(unknown_option(key)),
        }
        self.qcow2_key = Some(key.to_owned());
        Ok(())
    }
}

fn unknown_option(key: &str) -> Error {
    match key {
        "backing_file" => invalid("name the backing image with -b, not with -o backing_file"),
        "backing_fmt" => {
            invalid("name the backing image's format with -F, not with -o backing_fmt")
        }
        "encryption" | "nocow" | "extent_size_hint" => Error::new(
            ErrorKind::Unsupported,
            format!("the option '{key}' is not supported"),
        ),
        _ if key.starts_with("encrypt.") => Error::new(
            ErrorKind::Unsupported,
            format!("'{key}': encrypted images are not supported"),
        ),
        _ => invalid(format!("there is no option '{key}'")),
    }
}

fn invalid(what: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, what)
}
