//! A disk that contenders serve: its images, and what its blocks hold.

use std::path::{Path, PathBuf};

/// An image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An image of a chain.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
}

impl Layer {
    pub(crate) fn raw(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            format: Format::Raw,
        }
    }

    pub(crate) fn qcow2(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            format: Format::Qcow2,
        }
    }
}

/// A disk.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// The images of its chain, the one on top first.
    pub(crate) layers: Vec<Layer>,
    /// The disk's length in bytes.
    pub(crate) len: u64,
    /// The bytes that a load uses: where they begin, and how many there are.
    pub(crate) start: u64,
    pub(crate) room: u64,
    /// Which generation of stamp a block was prepared with; `None` if earlier measurements may have written it.
    pub(crate) generation_of: fn(u64) -> Option<u32>,
}

impl Disk {
    /// A disk of `len` bytes, all of which a load may use.
    pub(crate) fn new(layers: Vec<Layer>, len: u64) -> Self {
        Self {
            layers,
            len,
            start: 0,
            room: len,
            generation_of: |_| Some(0),
        }
    }

    pub(crate) fn top(&self) -> &Layer {
        &self.layers[0]
    }
}
