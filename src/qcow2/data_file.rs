//! The external data file (qcow2 specification, "Header", incompatible feature bit 2 and autoclear feature bit 1):
//! guest clusters lie in a file of their own, each at its guest offset; the image itself has metadata alone.
//!
//! # Invariants
//!
//! 1. The host offset of a guest cluster is its guest offset, and no other entry can refer to it: it has no refcount,
//!    and whoever holds the entry may write to it.
//! 2. Nothing is written to the data file behind the disk's end: its length is the disk's.
//! 3. A raw data file (autoclear bit 1) holds the disk's bytes whatever the entries say. So zeros are always written
//!    to it, and entries are changed by allocation alone.
//! 4. Room is given back at once, as zeros: the cluster may be used again before the next flush, and at no other
//!    place.

use std::ops::Range;
use std::sync::Arc;

use super::engine::Qcow2;
use super::features::AutoclearFeatures;
use super::header::Header;
use super::join::join_all;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::{Storage, ZeroMode};
use crate::units::{GuestOffset, HostOffset};

/// Whether the data file is a copy of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// What is not allocated is anything.
    Clusters,
    /// Every byte is the disk's.
    Raw,
}

/// An open data file.
pub(super) struct DataFile {
    storage: Arc<dyn Storage>,
    layout: Layout,
}

impl DataFile {
    /// Takes the data file that the header asks for.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it asks for one and there is none, or the other way round;
    /// [`ErrorKind::Corrupt`] if it is raw and there is a backing file too.
    pub(super) fn new(header: &Header, storage: Option<Arc<dyn Storage>>) -> Result<Option<Self>> {
        let is_raw = header.has_raw_data_file();
        if is_raw && header.backing_file.is_some() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the image has both a raw data file and a backing file, and one of them hides the other: take the \
                 backing file out with `seethrough rebase -u -b \"\" IMAGE`",
            ));
        }
        match (storage, header.has_data_file()) {
            (None, false) => Ok(None),
            (Some(storage), true) => Ok(Some(Self {
                storage,
                layout: if is_raw {
                    Layout::Raw
                } else {
                    Layout::Clusters
                },
            })),
            (None, true) => Err(Error::new(
                ErrorKind::InvalidConfig,
                "the image keeps its data in another file, and is opened without it",
            )),
            (Some(_), false) => Err(Error::new(
                ErrorKind::InvalidConfig,
                "the image keeps its data itself, and is opened with a data file",
            )),
        }
    }
}

impl DataFile {
    /// The file.
    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The file, to open the image anew with it.
    pub(super) fn into_storage(self) -> Arc<dyn Storage> {
        self.storage
    }
}

impl Header {
    /// Whether that file reads as the raw disk.
    #[must_use]
    pub fn has_raw_data_file(&self) -> bool {
        self.has_data_file()
            && self
                .autoclear_features
                .contains(AutoclearFeatures::RAW_EXTERNAL_DATA)
    }
}

impl Qcow2 {
    /// What holds the guest's data.
    pub(super) fn data(&self) -> &Arc<dyn Storage> {
        match &self.data_file {
            Some(file) => &file.storage,
            None => &self.storage,
        }
    }

    /// How the data file is laid out, if there is one.
    pub(super) fn data_layout(&self) -> Option<Layout> {
        self.data_file.as_ref().map(|file| file.layout)
    }

    /// The autoclear bit whose promise is kept by writing as invariant 3 says.
    pub(super) fn kept_by_data_file(&self) -> AutoclearFeatures {
        match self.data_layout() {
            Some(Layout::Raw) => AutoclearFeatures::RAW_EXTERNAL_DATA,
            _ => AutoclearFeatures::default(),
        }
    }

    /// The part of a range that the data file may have (invariant 2); all of it where there is none.
    pub(super) fn writable_part(&self, range: Range<u64>) -> Range<u64> {
        match &self.data_file {
            Some(_) => {
                let end = range.end.min(self.virtual_size);
                range.start.min(end)..end
            }
            None => range,
        }
    }

    /// Makes durable what was written to the data file before, if there is one.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn flush_data_file(&self) -> Result<()> {
        match &self.data_file {
            Some(file) => file.storage.flush().await,
            None => Ok(()),
        }
    }

    /// Makes durable what was written before, to both files.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn flush_files(&self) -> Result<()> {
        match &self.data_file {
            Some(file) => join_all([file.storage.flush(), self.storage.flush()]).await,
            None => self.storage.flush().await,
        }
    }

    /// Makes a range of a raw data file read as zeros (invariant 3).
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn zero_raw(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<()> {
        self.data().write_zeroes(HostOffset(at.0), len, mode).await
    }

    /// Gives the room of clusters back whose entries, held by the caller, will no longer refer to it (invariant 4).
    /// Without a data file, `qcow2::quarantine` does that.
    pub(super) async fn free_in_data_file(&self, clusters: impl Iterator<Item = Range<u64>>) {
        let Some(file) = &self.data_file else {
            return;
        };
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in clusters.map(|cluster| self.writable_part(cluster)) {
            match runs.last_mut() {
                Some(last) if last.end == cluster.start => last.end = cluster.end,
                _ => runs.push(cluster),
            }
        }
        let frees = runs.into_iter().map(|run| {
            let len = run.end - run.start;
            file.storage
                .write_zeroes(HostOffset(run.start), len, ZeroMode::MayUnmap)
        });
        // The entries hide the room whether it was given back or not.
        if let Err(error) = join_all(frees).await {
            log::debug!("{}: cannot free clusters: {error}", file.storage.name());
        }
    }
}
