//! Changing the length of a disk (qcow2 specification, "Header": `size`, `l1_size`).
//!
//! # Invariants
//!
//! 1. Shrinking is one new revision of the metadata (`qcow2::revision`): the disk has its old length with all its
//!    bytes, or the new one, and what lay behind it is free.
//! 2. Growing writes the larger L1 table first, then whatever keeps old bytes from showing, and once that is durable
//!    the size: the disk has its old length, or the new one with zeros behind the old.
//! 3. New bytes read as zeros, whatever lay there: the rest of the last cluster, a VM's state, or a backing image that
//!    is longer than the disk was.
//! 4. An external data file is as long as the disk, or longer where a crash has come between.
//! 5. Persistent bitmaps are as large as the disk was: before anything else, all are marked as ones that nobody may
//!    trust.

use super::bitmap::Change;
use super::data_file::Layout;
use super::engine::Qcow2;
use super::features::AutoclearFeatures;
use super::header::{Header, Version};
use super::mapping::ReadMapping;
use super::preallocate::Preallocation;
use super::revision::Revision;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::ZeroMode;
use crate::units::{GuestOffset, SECTOR_SIZE};

impl Qcow2 {
    /// Makes the disk `size` bytes long; the image is opened anew. What a shorter disk no longer has is gone.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the image cannot change its size, or not to this one, or it is no multiple of
    /// 512; [`ErrorKind::Corrupt`] for broken metadata, [`ErrorKind::NoSpace`], and the storage's. The disk then has
    /// its old length.
    pub async fn resize(self, size: u64) -> Result<Self> {
        self.resize_preallocated(size, Preallocation::Off).await
    }

    /// As [`Qcow2::resize`]; of a disk that becomes longer, what is new has a place as `preallocation` says.
    ///
    /// # Errors
    /// As [`Qcow2::resize`]; [`ErrorKind::InvalidConfig`] where preallocation would hide the backing image.
    pub async fn resize_preallocated(
        self,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<Self> {
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("a disk of {size} bytes: the size must be a multiple of {SECTOR_SIZE}"),
            ));
        }
        require_resizable(&*self.header.lock().await)?;
        self.disown_bitmaps_of_old_size().await?;
        if size < self.virtual_size {
            let image = self
                .revise(async |revision| shrink(revision, size).await)
                .await?;
            image.set_data_file_len(size).await?;
            Ok(image)
        } else {
            self.grow(size, preallocation).await
        }
    }

    /// Invariant 5.
    async fn disown_bitmaps_of_old_size(&self) -> Result<()> {
        let bitmaps = self.disown_bitmaps(Change::Size).await?;
        let kept = bitmaps.with(self.kept_by_data_file());
        self.update_header(|header| {
            header.autoclear_features = AutoclearFeatures(header.autoclear_features.0 & kept.0);
        })
        .await?;
        self.storage.flush().await
    }

    /// Invariant 2.
    async fn grow(self, size: u64, preallocation: Preallocation) -> Result<Self> {
        let old_size = self.virtual_size;
        let mut image = self
            .revise(async |revision| grow_l1(revision, size).await)
            .await?;
        // In memory alone so far: the header still has the old size.
        image.virtual_size = size;
        image.begin_writing().await?;
        // What may lie behind the disk goes first.
        image.set_data_file_len(old_size).await?;
        image.set_data_file_len(size).await?;
        image.hide_old_bytes(old_size).await?;
        let preallocation = match (preallocation, image.data_layout()) {
            // Others write to a raw data file: what they write has to be read.
            (Preallocation::Off, Some(Layout::Raw)) => Preallocation::Metadata,
            (asked, _) => asked,
        };
        image
            .preallocate(GuestOffset(old_size), size - old_size, preallocation)
            .await?;
        image.flush_all().await?;
        image.update_header(|header| header.size = size).await?;
        image.storage.flush().await?;
        image.reopened().await
    }

    /// Makes the external data file `size` bytes long, if there is one (invariant 4).
    async fn set_data_file_len(&self, size: u64) -> Result<()> {
        if self.geometry.has_data_file() {
            self.data().set_len(size).await?;
            self.flush_data_file().await?;
        }
        Ok(())
    }

    /// Makes everything from `old_size` to the end of the disk read as zeros (invariant 3); behind the last cluster
    /// of the old disk, only a backing image can have other bytes.
    async fn hide_old_bytes(&self, old_size: u64) -> Result<()> {
        let last_cluster_end = old_size.next_multiple_of(self.geometry.cluster_size());
        let mut at = old_size;
        while at < last_cluster_end.min(self.virtual_size) {
            let left = last_cluster_end.min(self.virtual_size) - at;
            let (mapping, run) = self.find_read(GuestOffset(at), left).await?;
            if matches!(mapping, ReadMapping::Data(_) | ReadMapping::Compressed(_)) {
                self.zero_range(GuestOffset(at), run, ZeroMode::MayUnmap)
                    .await?;
            }
            at += run;
        }
        let backed_to = match &self.backing {
            Some(backing) => backing.virtual_size(),
            // It is not known how long the backing image is.
            None if self.has_backing => u64::MAX,
            None => 0,
        };
        let hidden = backed_to.min(self.virtual_size);
        match hidden.checked_sub(old_size) {
            None | Some(0) => Ok(()),
            Some(len) => {
                self.zero_range(GuestOffset(old_size), len, ZeroMode::MayUnmap)
                    .await
            }
        }
    }
}

async fn shrink(revision: &mut Revision, size: u64) -> Result<Header> {
    let mut l1 = revision.active_l1().await?;
    revision.cut(&mut l1, size).await?;
    l1.truncate(revision.l1_entries_for(size)?);
    let mut header = revision.replace_l1(&l1).await?;
    header.size = size;
    Ok(header)
}

/// Makes room in the L1 table for a disk of `size` bytes, which does not have its new length yet.
async fn grow_l1(revision: &mut Revision, size: u64) -> Result<Header> {
    let mut l1 = revision.active_l1().await?;
    // What lies behind the disk is a VM's state that was left there: it must not become part of the disk.
    let old_size = revision.header.virtual_size();
    revision.cut(&mut l1, old_size).await?;
    let needed = revision.l1_entries_for(size)?;
    l1.resize(needed.max(l1.len()), 0);
    revision.replace_l1(&l1).await
}

/// Whether the format lets the image change its size.
fn require_resizable(header: &Header) -> Result<()> {
    if header.version == Version::V2 && header.nb_snapshots > 0 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "a version 2 image with snapshots cannot change its size: delete them first, with \
             `seethrough snapshot -d NAME IMAGE`",
        ));
    }
    Ok(())
}
