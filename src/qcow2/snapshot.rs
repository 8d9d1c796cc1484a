//! Creating, applying and deleting internal snapshots (qcow2 specification, "Snapshots"), each as one new revision of
//! the image's metadata (`qcow2::revision`, which holds the crash order).
//!
//! # Invariants
//!
//! 1. A snapshot counts every cluster of its disk: it and the active disk share L2 tables and data, and neither has
//!    COPIED for what is shared, so that a write goes elsewhere.
//! 2. A snapshot's table and clusters are only read from then on, until it is deleted.
//! 3. A VM's state lies behind the disk in a snapshot's mapping. It goes with the snapshot alone: applying one leaves
//!    it out, so that it never becomes part of a disk that grows.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::bitmap::BitmapDirectory;
use super::engine::Qcow2;
use super::features::IncompatibleFeatures;
use super::header::{Header, Version};
use super::revision::{Counting, Revision};
use super::snapshot_table::{Snapshot, printable, read_snapshots};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Access;

/// What a name on the command line means first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Id,
    Name,
}

impl Qcow2 {
    /// The image's internal snapshots, in the order of their table.
    ///
    /// # Errors
    /// As [`read_snapshots`].
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let header = self.header.lock().await.clone();
        read_snapshots(self.storage.as_ref(), &header).await
    }

    /// The disk as it was when `snapshot` was taken, one of [`Qcow2::snapshots`]; read-only. The snapshot has to stay
    /// for as long as this is in use.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`] for an L1 table that cannot be one; the storage's.
    pub async fn at_snapshot(&self, snapshot: &Snapshot) -> Result<Self> {
        let header = snapshot.header(&*self.header.lock().await)?;
        let data = self.data_file.as_ref();
        Self::open_with_header(
            Arc::clone(&self.storage),
            data.map(|data| Arc::clone(data.storage())),
            self.backing.clone(),
            Access::ReadOnly,
            self.l2.budget(),
            header,
        )
        .await
        .context(|| {
            format!(
                "opening snapshot '{}' of {}",
                snapshot.label(),
                self.storage.name()
            )
        })
    }

    /// Takes a snapshot of the disk as it is now; the image is opened anew. Others may have the name already.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the image cannot have one, or a refcount's width cannot count it; nothing has
    /// changed then. [`ErrorKind::Corrupt`] for broken metadata, [`ErrorKind::NoSpace`], and the storage's.
    pub async fn create_snapshot(self, name: &OsStr, taken: SystemTime) -> Result<Self> {
        self.revise(async |revision| create(revision, name, taken).await)
            .await
    }

    /// Makes the disk what it was when a snapshot was taken: the one with the ID `wanted`, or else the first with that
    /// name. The image is opened anew, perhaps with another size.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] if there is none, and as [`Qcow2::create_snapshot`].
    pub async fn apply_snapshot(self, wanted: &OsStr) -> Result<Self> {
        self.revise(async |revision| apply(revision, wanted).await)
            .await
    }

    /// Deletes a snapshot: the first with the name `wanted`, or else the one with that ID. The image is opened anew.
    ///
    /// # Errors
    /// As [`Qcow2::apply_snapshot`].
    pub async fn delete_snapshot(self, wanted: &OsStr) -> Result<Self> {
        self.revise(async |revision| delete(revision, wanted).await)
            .await
    }
}

async fn create(revision: &mut Revision, name: &OsStr, taken: SystemTime) -> Result<Header> {
    require_snapshots(&revision.header)?;
    let size = revision.header.virtual_size();
    let mut l1 = revision.active_l1().await?;
    let mut shared = l1.clone();
    // Invariant 3: what lies behind the disk is a VM's state that was left there.
    shared.resize(revision.l1_entries_for(size)?, 0);
    revision.count(&shared, Counting::Add).await?;
    revision.refresh_copied(&mut shared, 2).await?;
    for (word, shared) in l1.iter_mut().zip(&shared) {
        *word = *shared;
    }
    let taken = taken.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let mut snapshots = known_sizes(revision);
    snapshots.push(Snapshot {
        l1_table_offset: revision.place_l1(&shared).await?,
        l1_size: entries(&shared),
        id: next_id(&snapshots),
        name: name.to_owned(),
        date_sec: u32::try_from(taken.as_secs()).unwrap_or(u32::MAX),
        date_nsec: taken.subsec_nanos(),
        vm_clock_nsec: 0,
        vm_state_size: 0,
        disk_size: Some(size),
        icount: Some(0),
        unknown_extra: Vec::new(),
    });
    let size = revision.header.size;
    replace(revision, &l1, &snapshots, size).await
}

async fn apply(revision: &mut Revision, wanted: &OsStr) -> Result<Header> {
    require_no_bitmaps(&revision.header)?;
    let index = find(&revision.snapshots, wanted, First::Id)?;
    let snapshots = known_sizes(revision);
    let size_now = revision.header.virtual_size();
    let Some(snapshot) = snapshots.get(index) else {
        return Err(no_such_snapshot(wanted));
    };
    let size = snapshot.disk_size(size_now);
    if size != size_now && revision.header.version == Version::V2 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "snapshot '{}' has a disk of {size} bytes and the image one of {size_now}, and a version 2 image with \
                 snapshots cannot change its size",
                snapshot.label()
            ),
        ));
    }
    let old = revision.active_l1().await?;
    let mut l1 = revision.snapshot_l1(snapshot).await?;
    // Invariant 3.
    l1.resize(revision.l1_entries_for(size)?, 0);
    // In this order no refcount passes a limit that it does not end above.
    revision.count(&old, Counting::Drop).await?;
    revision.count(&l1, Counting::Add).await?;
    revision.refresh_copied(&mut l1, 1).await?;
    replace(revision, &l1, &snapshots, size).await
}

async fn delete(revision: &mut Revision, wanted: &OsStr) -> Result<Header> {
    let index = find(&revision.snapshots, wanted, First::Name)?;
    let mut snapshots = known_sizes(revision);
    let snapshot = snapshots.remove(index);
    let dropped = revision.snapshot_l1(&snapshot).await?;
    revision.count(&dropped, Counting::Drop).await?;
    let (at, len) = (snapshot.l1_table_offset, dropped.len() as u64 * 8);
    revision.release(at, len).await?;
    let mut l1 = revision.active_l1().await?;
    revision.refresh_copied(&mut l1, 1).await?;
    let size = revision.header.size;
    replace(revision, &l1, &snapshots, size).await
}

/// The header that leads to another active L1 table and another snapshot table.
async fn replace(
    revision: &mut Revision,
    l1: &[u64],
    snapshots: &[Snapshot],
    size: u64,
) -> Result<Header> {
    let mut header = revision.replace_l1(l1).await?;
    header.size = size;
    header.snapshots_offset = revision.replace_snapshots(snapshots).await?;
    header.nb_snapshots = u32::try_from(snapshots.len()).expect("at most 65536 are encoded");
    Ok(header)
}

/// The snapshots in force, each with the size of its disk: an entry that does not tell it means the present one.
pub(super) fn known_sizes(revision: &Revision) -> Vec<Snapshot> {
    let now = revision.header.virtual_size();
    let known = |snapshot: &Snapshot| Snapshot {
        disk_size: Some(snapshot.disk_size(now)),
        ..snapshot.clone()
    };
    revision.snapshots.iter().map(known).collect()
}

fn entries(l1: &[u64]) -> u32 {
    u32::try_from(l1.len()).expect("an L1 table has at most 4 Mi entries")
}

/// The number behind the largest that is an ID.
fn next_id(snapshots: &[Snapshot]) -> OsString {
    let numbers = snapshots
        .iter()
        .filter_map(|snapshot| snapshot.id.to_str()?.parse::<u64>().ok());
    numbers
        .max()
        .unwrap_or(0)
        .saturating_add(1)
        .to_string()
        .into()
}

/// Which snapshot is meant.
fn find(snapshots: &[Snapshot], wanted: &OsStr, first: First) -> Result<usize> {
    let by_id = || snapshots.iter().position(|snapshot| snapshot.id == wanted);
    let by_name = || {
        snapshots
            .iter()
            .position(|snapshot| snapshot.name == wanted)
    };
    let found = match first {
        First::Id => by_id().or_else(by_name),
        First::Name => by_name().or_else(by_id),
    };
    found.ok_or_else(|| no_such_snapshot(wanted))
}

fn no_such_snapshot(wanted: &OsStr) -> Error {
    Error::new(
        ErrorKind::OutOfBounds,
        format!(
            "there is no snapshot '{}': `seethrough snapshot -l` lists those there are",
            printable(wanted)
        ),
    )
}

/// Whether the format lets the image have snapshots.
fn require_snapshots(header: &Header) -> Result<()> {
    let external = IncompatibleFeatures::EXTERNAL_DATA_FILE;
    if !header.incompatible_features.contains(external) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        "an image with an external data file cannot have internal snapshots: make a copy without one",
    ))
}

/// Whether there are no bitmaps that a change of the whole disk would pass by. Stock QEMU refuses, too.
fn require_no_bitmaps(header: &Header) -> Result<()> {
    if BitmapDirectory::place(header)?.is_none() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        "the image has persistent bitmaps, which would not tell what a snapshot changes when it is applied: remove \
         them first with `qemu-img bitmap --remove IMAGE NAME`",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::HostOffset;

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            l1_table_offset: HostOffset(0x1_0000),
            l1_size: 1,
            id: id.into(),
            name: name.into(),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: None,
            icount: None,
            unknown_extra: Vec::new(),
        }
    }

    #[test]
    fn an_external_data_file_is_refused_by_name() {
        let mut header = Header::new(Version::V3, 16, 1 << 20);
        require_snapshots(&header).unwrap();
        header.incompatible_features = IncompatibleFeatures::EXTERNAL_DATA_FILE;
        let error = require_snapshots(&header).unwrap_err();
        assert!(error.to_string().contains("external data file"), "{error}");
    }

    #[test]
    fn ids_count_on_from_the_largest_number() {
        assert_eq!(next_id(&[]), "1");
        let some = [snapshot("7", "a"), snapshot("x", "b"), snapshot("2", "9")];
        assert_eq!(next_id(&some), "8");
        assert_eq!(
            next_id(&[snapshot(&u64::MAX.to_string(), "")]),
            u64::MAX.to_string().as_str()
        );
    }

    #[test]
    fn applying_goes_by_id_first_and_deleting_by_name_first_as_in_stock_qemu() {
        let two = [snapshot("1", "2"), snapshot("2", "1")];
        assert_eq!(find(&two, OsStr::new("2"), First::Id).unwrap(), 1);
        assert_eq!(find(&two, OsStr::new("2"), First::Name).unwrap(), 0);
        let named = [snapshot("1", "a"), snapshot("2", "b"), snapshot("3", "b")];
        for first in [First::Id, First::Name] {
            assert_eq!(find(&named, OsStr::new("b"), first).unwrap(), 1);
            assert_eq!(find(&named, OsStr::new("3"), first).unwrap(), 2);
            assert!(find(&named, OsStr::new("4"), first).is_err());
        }
    }
}
