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
//! 6. A snapshot keeps the size of its disk, also where its entry does not tell it.

use super::bitmap::Change;
use super::data_file::Layout;
use super::engine::Qcow2;
use super::features::AutoclearFeatures;
use super::header::{Header, Version};
use super::mapping::ReadMapping;
use super::preallocate::Preallocation;
use super::revision::Revision;
use super::snapshot::known_sizes;
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
            let file_len = self.storage.len();
            let image = self
                .revise(async |revision| shrink(revision, size).await)
                .await?;
            image.set_data_file_len(size).await?;
            if image.storage.len() < file_len {
                return Ok(image);
            }
            // The new tables lie behind all that was in use before, where they alone keep the file long.
            image.with_metadata_before(file_len).await
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
    let mut header = replace_l1(revision, &l1).await?;
    header.size = size;
    Ok(header)
}

/// Puts an L1 table in place of the active one of a disk that changes its size: what snapshots leave to the size that
/// the disk has now, they say from here on (invariant 6).
async fn replace_l1(revision: &mut Revision, l1: &[u64]) -> Result<Header> {
    let mut header = revision.replace_l1(l1).await?;
    if revision
        .snapshots
        .iter()
        .any(|snapshot| snapshot.disk_size.is_none())
    {
        let snapshots = known_sizes(revision);
        header.snapshots_offset = revision.replace_snapshots(&snapshots).await?;
    }
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
    replace_l1(revision, &l1).await
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

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::sync::Arc;
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::image::{Access, Image};
    use crate::progress::Progress;
    use crate::qcow2::check::check;
    use crate::qcow2::create::{BackingReference, CreateOptions, DataFileReference, create};
    use crate::qcow2::features::IncompatibleFeatures;
    use crate::storage::{
        CrashStorage, Delays, Fault, FaultStorage, Lost, MemoryStorage, Operation, Storage,
    };
    use crate::sys::{IoBuf, block_on};
    use crate::units::HostOffset;

    const CLUSTER: usize = 4096;

    fn made(options: &CreateOptions) -> Vec<u8> {
        let storage = MemoryStorage::default();
        block_on(create(&storage, options)).unwrap();
        storage.contents()
    }

    fn empty(size: u64) -> Vec<u8> {
        made(&CreateOptions {
            cluster_size: CLUSTER as u64,
            ..CreateOptions::new(size)
        })
    }

    fn open(storage: Arc<dyn Storage>) -> Qcow2 {
        block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap()
    }

    fn fill(disk: &Qcow2, at: u64, byte: u8, len: usize) {
        block_on(disk.write(GuestOffset(at), IoBuf::from_bytes(&vec![byte; len]))).unwrap();
    }

    fn first_byte(disk: &Qcow2, at: u64) -> u8 {
        let buf = IoBuf::zeroed(512);
        block_on(disk.read(GuestOffset(at), buf.clone())).unwrap();
        buf.to_vec()[0]
    }

    fn snapshot(disk: Qcow2) -> Result<Qcow2> {
        block_on(disk.create_snapshot(OsStr::new("one"), UNIX_EPOCH))
    }

    fn is_clean(bytes: &[u8]) -> bool {
        let storage = MemoryStorage::new(bytes.to_vec());
        let report = block_on(check(&storage, &mut |_| (), &Progress::default()));
        report.unwrap().is_clean()
    }

    fn word(bytes: &[u8], at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn after_shrinking_the_file_ends_with_what_is_left_whenever_the_power_goes() {
        let storage = Arc::new(CrashStorage::new(empty(32 << 20), Delays::none()));
        let disk = open(Arc::clone(&storage) as Arc<dyn Storage>);
        // L2 tables map 2 MiB each: the last one is cut in the middle.
        fill(&disk, 0, 7, 5 << 20);
        fill(&disk, 5 << 20, 9, 20 << 20);
        block_on(disk.flush()).unwrap();
        let begin = storage.now();
        let disk = block_on(disk.resize(5 << 20)).unwrap();
        assert_eq!(first_byte(&disk, (5 << 20) - 512), 7);
        drop(disk);
        let len = storage.contents().len();
        assert!(len < 6 << 20, "{len}");
        assert!(is_clean(&storage.contents()));
        for cut in storage.moments().filter(|cut| *cut >= begin) {
            let left = storage.after_power_cut(cut, Lost::Some { seed: cut.0 });
            assert!(is_clean(&left), "{cut:?}");
            let disk = open(Arc::new(MemoryStorage::new(left)));
            assert_eq!(first_byte(&disk, (5 << 20) - 512), 7, "{cut:?}");
            let size = disk.virtual_size();
            assert!(size == 5 << 20 || size == 32 << 20 && first_byte(&disk, 6 << 20) == 9);
        }
    }

    #[test]
    fn what_a_shorter_disk_no_longer_has_is_punched_out_of_the_file() {
        let storage = Arc::new(CrashStorage::new(empty(8 << 20), Delays::none()));
        let disk = open(Arc::clone(&storage) as Arc<dyn Storage>);
        fill(&disk, 4 << 20, 9, 1 << 20);
        fill(&disk, 0, 7, 1 << 20);
        drop(block_on(disk.resize(1 << 20)).unwrap());
        let left = storage.contents();
        assert!(
            !left
                .chunks(512)
                .any(|sector| sector.iter().all(|byte| *byte == 9))
        );
        assert!(is_clean(&left));
    }

    #[test]
    fn a_revision_that_fails_leaves_the_file_as_long_as_it_was() {
        let memory = Arc::new(MemoryStorage::new(empty(8 << 20)));
        drop(snapshot(open(Arc::clone(&memory) as Arc<dyn Storage>)));
        let len = memory.len();
        let mut left = Vec::new();
        for nth in 0.. {
            let faulty = Arc::new(FaultStorage::new(Arc::clone(&memory) as Arc<dyn Storage>));
            let disk = open(Arc::clone(&faulty) as Arc<dyn Storage>);
            faulty.inject(Fault::nth(nth, ErrorKind::NoSpace).only(Operation::Write));
            if snapshot(disk).is_ok() {
                break;
            }
            left.push(memory.len());
        }
        // After the last one, the header's, it is not known which revision is in force.
        left.pop();
        assert!(
            left.len() > 3 && left.iter().all(|left| *left == len),
            "{left:?}"
        );
    }

    #[test]
    fn a_revision_begins_with_all_that_was_written_and_drops_unknown_autoclear_bits() {
        let mut bytes = empty(8 << 20);
        bytes[88] = 1;
        let storage = Arc::new(MemoryStorage::new(bytes));
        let disk = open(Arc::clone(&storage) as Arc<dyn Storage>);
        fill(&disk, 0, 7, CLUSTER);
        block_on(disk.flush()).unwrap();
        // Not flushed, in the same table.
        fill(&disk, 1 << 20, 7, CLUSTER);
        let disk = snapshot(disk).unwrap();
        assert_eq!(storage.contents()[88], 0);
        assert_eq!(first_byte(&disk, 1 << 20), 7);
    }

    #[test]
    fn a_revision_is_refused_where_refcounts_do_not_protect_what_is_in_force() {
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = empty(8 << 20);
            change(&mut bytes);
            let storage = Arc::new(MemoryStorage::new(bytes));
            let error = block_on(Revision::begin(storage)).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        };
        let count = |bytes: &[u8], cluster: u64| {
            let block = word(bytes, word(bytes, 48));
            usize::try_from(block + 2 * cluster).unwrap()
        };
        // The header, the refcount table, its block, the L1 table.
        for place in 0..4 {
            refused(&|bytes| {
                let table = word(bytes, 48);
                let at = [0, table, word(bytes, table), word(bytes, 40)][place];
                let at = count(bytes, at / CLUSTER as u64);
                bytes[at..at + 2].fill(0);
            });
        }
        refused(&|bytes| bytes[79] |= u8::try_from(IncompatibleFeatures::DIRTY.0).unwrap());
    }

    /// A disk with a snapshot whose entry has no extra data, and so does not tell its size.
    fn with_a_snapshot_of_no_size() -> Arc<MemoryStorage> {
        let storage = Arc::new(MemoryStorage::new(empty(8 << 20)));
        let disk = open(Arc::clone(&storage) as Arc<dyn Storage>);
        fill(&disk, 0, 7, CLUSTER);
        drop(snapshot(disk).unwrap());
        let bytes = storage.contents();
        let at = word(&bytes, 64);
        let start = usize::try_from(at).unwrap();
        let extra = usize::from(bytes[start + 39]);
        let mut entry = bytes[start..start + 40].to_vec();
        entry[39] = 0;
        entry.extend(&bytes[start + 40 + extra..][..32]);
        block_on(storage.writev(HostOffset(at), IoBuf::from_bytes(&entry))).unwrap();
        storage
    }

    #[test]
    fn a_snapshot_that_does_not_tell_its_size_keeps_it() {
        for size in [1 << 20, 16 << 20] {
            let storage = with_a_snapshot_of_no_size();
            let disk = open(Arc::clone(&storage) as Arc<dyn Storage>);
            assert_eq!(block_on(disk.snapshots()).unwrap()[0].disk_size, None);
            let disk = block_on(disk.resize(size)).unwrap();
            assert_eq!(
                block_on(disk.snapshots()).unwrap()[0].disk_size,
                Some(8 << 20)
            );
            let disk = block_on(disk.apply_snapshot(OsStr::new("one"))).unwrap();
            assert_eq!(disk.virtual_size(), 8 << 20);
        }
        let disk = open(with_a_snapshot_of_no_size());
        let disk = block_on(disk.create_snapshot(OsStr::new("two"), UNIX_EPOCH)).unwrap();
        assert_eq!(
            block_on(disk.snapshots()).unwrap()[0].disk_size,
            Some(8 << 20)
        );
    }

    #[test]
    fn an_applied_snapshot_brings_no_more_of_its_l1_table_than_its_disk_has() {
        let storage = Arc::new(MemoryStorage::new(empty(8 << 20)));
        let disk = snapshot(open(Arc::clone(&storage) as Arc<dyn Storage>)).unwrap();
        drop(disk);
        // As with a VM's state behind the disk; the rest of the cluster is zeros.
        let entry = word(&storage.contents(), 64);
        let l1_size = IoBuf::from_bytes(&100u32.to_be_bytes());
        block_on(storage.writev(HostOffset(entry + 8), l1_size)).unwrap();
        let disk = open(Arc::clone(&storage) as Arc<dyn Storage>);
        drop(block_on(disk.apply_snapshot(OsStr::new("one"))).unwrap());
        let header = block_on(Header::read(storage.as_ref())).unwrap();
        assert_eq!(header.l1_size, 4);
    }

    #[test]
    fn growing_hides_a_backing_image_of_which_nobody_knows_how_long_it_is() {
        let bytes = made(&CreateOptions {
            cluster_size: CLUSTER as u64,
            backing: Some(BackingReference {
                file: "base".into(),
                format: "raw".to_owned(),
            }),
            ..CreateOptions::new(1 << 20)
        });
        let storage = Arc::new(MemoryStorage::new(bytes));
        drop(block_on(open(Arc::clone(&storage) as Arc<dyn Storage>).resize(4 << 20)).unwrap());
        let base = open(Arc::new(MemoryStorage::new(empty(4 << 20))));
        fill(&base, 0, 9, 4 << 20);
        let backing = Some(Arc::new(base) as Arc<dyn Image>);
        let storage = storage as Arc<dyn Storage>;
        let disk = block_on(Qcow2::open(storage, backing, Access::ReadOnly)).unwrap();
        let found = [0, (1 << 20) - 512, 1 << 20, 3 << 20].map(|at| first_byte(&disk, at));
        assert_eq!(found, [9, 9, 0, 0]);
    }

    #[test]
    fn zeroes_that_keep_room_keep_none_that_a_snapshot_shares() {
        let storage = Arc::new(MemoryStorage::new(empty(1 << 20)));
        let disk = open(Arc::clone(&storage) as Arc<dyn Storage>);
        fill(&disk, 0, 7, 2 * CLUSTER);
        let disk = snapshot(disk).unwrap();
        fill(&disk, 0, 8, CLUSTER);
        block_on(disk.write_zeroes(GuestOffset(0), 2 * CLUSTER as u64, ZeroMode::KeepAllocated))
            .unwrap();
        block_on(disk.close()).unwrap();
        drop(disk);
        let bytes = storage.contents();
        let l2 = word(&bytes, word(&bytes, 40)) & !(1 << 63);
        assert!(word(&bytes, l2) > 1, "its own room stays");
        assert_eq!(word(&bytes, l2 + 8), 1, "the zero flag alone");
        assert!(is_clean(&bytes));
    }

    #[test]
    fn a_data_file_is_as_long_as_the_disk_and_shows_nothing_old_that_it_had_behind_it() {
        for layout in [Layout::Clusters, Layout::Raw] {
            let bytes = made(&CreateOptions {
                cluster_size: CLUSTER as u64,
                data_file: Some(DataFileReference {
                    file: "data".into(),
                    layout,
                }),
                ..CreateOptions::new(1 << 20)
            });
            let storage = Arc::new(MemoryStorage::new(bytes));
            let data = Arc::new(MemoryStorage::new(vec![9; 4 << 20]));
            let open = || {
                let storage = Arc::clone(&storage) as Arc<dyn Storage>;
                let data = Some(Arc::clone(&data) as Arc<dyn Storage>);
                block_on(Qcow2::open_with_data(
                    storage,
                    data,
                    None,
                    Access::ReadWrite,
                ))
                .unwrap()
            };
            let disk = block_on(open().resize(2 << 20)).unwrap();
            assert_eq!(data.len(), 2 << 20);
            assert_eq!(first_byte(&disk, 1 << 20), 0);
            assert!(data.contents()[1 << 20..].iter().all(|byte| *byte == 0));
            if layout == Layout::Raw {
                // Others write to it, too.
                let written = IoBuf::from_bytes(&[5; 512]);
                block_on(data.writev(HostOffset(1 << 20), written)).unwrap();
                assert_eq!(first_byte(&disk, 1 << 20), 5);
            }
            drop(disk);
            drop(block_on(open().resize(512 << 10)).unwrap());
            assert_eq!(data.len(), 512 << 10);
            assert!(is_clean(&storage.contents()));
        }
    }

    #[test]
    fn a_size_of_half_a_sector_is_refused() {
        let disk = open(Arc::new(MemoryStorage::new(empty(1 << 20))));
        let error = block_on(disk.resize((1 << 20) + 256))
            .map(drop)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}
