//! Checking an image for contradictions, and repairing it.
//!
//! A check counts how often everything in the image refers to each host cluster, and compares that with the
//! refcounts and with the COPIED flags that follow from them. It finds what `qemu-img check` finds.
//!
//! ```text
//! header ─┬─ active L1 ───┬─ L2 ── clusters, compressed ones with all that they touch
//!         ├─ snapshots ───┘                                              walk, snapshots, entries
//!         ├─ bitmaps: directory, tables, clusters                        bitmaps
//!         ├─ encryption header
//!         └─ refcount table ── refcount blocks ─── compared with the counts: refcounts, then: copied
//! ```
//!
//! # Memory
//!
//! 1.25 bytes for each host cluster around those in use, so 20 MiB for 1 TiB of clusters of 64 KiB; see
//! [`counts`]. Beyond [`MEMORY`] the file is checked window by window, each with a pass through all tables.
//!
//! # Invariants
//!
//! 1. A check writes nothing; a repair is in [`repair`](mod@repair).
//! 2. Whatever an image holds, a check ends, and needs no more memory than said above: no table is followed twice
//!    ([`walk`]), no reference leaves the file.

mod bitmaps;
mod checker;
mod copied;
mod counts;
mod entries;
mod lost;
mod mend;
mod rebuild;
mod refcounts;
mod repair;
mod report;
mod snapshots;
mod walk;

pub(super) use repair::repair_if_dirty;
pub use repair::{Repair, Repaired, repair};
pub use report::{Finding, Listener, Report, Severity};

use super::header::Header;
use crate::error::{Context, Result};
use crate::progress::Progress;
use crate::storage::Storage;
use crate::units::HostCluster;
use checker::{Checker, Voice};
use copied::FixFlags;
use counts::Counts;
use refcounts::Fix;

/// Bytes that counts may take: for 13 TiB of clusters of 64 KiB.
const MEMORY: usize = 256 << 20;

/// Checks the image in `storage`, which nobody may change meanwhile. `listener` hears of every finding.
///
/// # Errors
/// The storage's; those of [`Header::read`] and [`Header::require_checkable`], where nothing can be checked.
pub async fn check(
    storage: &dyn Storage,
    listener: Listener<'_>,
    progress: &Progress,
) -> Result<Report> {
    let name = storage.name();
    let header = read_header(storage).await.context(|| name.to_owned())?;
    let mut checker = Checker::new(storage, header, MEMORY, listener, progress);
    checker.check().await.context(|| format!("checking {name}"))
}

async fn read_header(storage: &dyn Storage) -> Result<Header> {
    let header = Header::read(storage).await?;
    header.require_checkable()?;
    Ok(header)
}

impl Checker<'_> {
    async fn check(&mut self) -> Result<Report> {
        let mut start = 0;
        while start < u64::MAX {
            let mut counts = Counts::new(HostCluster(start), self.memory);
            self.walk(&mut counts).await?;
            self.compare(&mut counts, Fix::Nothing).await?;
            self.check_copied(&counts, FixFlags::No).await?;
            self.voice = Voice::Silent;
            start = counts.window().end;
        }
        Ok(self.report)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::ErrorKind;
    use crate::image::{Access, Image};
    use crate::qcow2::Qcow2;
    use crate::qcow2::create::{CreateOptions, create};
    use crate::qcow2::header_extension::ExtensionType;
    use crate::qcow2::header_update::set_extension;
    use crate::storage::MemoryStorage;
    use crate::sys::{IoBuf, block_on};
    use crate::units::{GuestOffset, HostOffset};

    /// An image of 16384 clusters and some metadata.
    fn image() -> Arc<MemoryStorage> {
        let storage = Arc::new(MemoryStorage::default());
        let options = CreateOptions {
            cluster_size: 512,
            ..CreateOptions::new(8 << 20)
        };
        block_on(create(storage.as_ref(), &options)).unwrap();
        let disk = Qcow2::open(
            Arc::clone(&storage) as Arc<dyn Storage>,
            None,
            Access::ReadWrite,
        );
        let disk = block_on(disk).unwrap();
        for part in 0..8 {
            let bytes = IoBuf::from_bytes(&vec![7; 1 << 20]);
            block_on(disk.write(GuestOffset(part << 20), bytes)).unwrap();
        }
        block_on(disk.flush()).unwrap();
        storage
    }

    fn check_within(storage: &dyn Storage, memory: usize) -> (Report, Vec<String>) {
        let header = block_on(Header::read(storage)).unwrap();
        let mut lines = Vec::new();
        let mut listener = |finding: Finding| lines.push(finding.to_string());
        let progress = Progress::default();
        let mut checker = Checker::new(storage, header, memory, &mut listener, &progress);
        let report = block_on(checker.check()).unwrap();
        lines.sort();
        (report, lines)
    }

    #[test]
    fn with_little_memory_the_same_is_found_in_more_passes() {
        let storage = image();
        let (report, lines) = check_within(storage.as_ref(), MEMORY);
        assert!(report.is_clean(), "{lines:?}");
        assert_eq!(report.allocated_clusters, 16384);
        for (at, value) in [
            (5 * 512 + 100, 3),
            (4000 * 512, 0xff),
            (9000 * 512 + 1, 0x40),
            (16000 * 512 + 6, 9),
        ] {
            block_on(storage.writev(HostOffset(at), IoBuf::from_bytes(&[value]))).unwrap();
        }
        let whole = check_within(storage.as_ref(), MEMORY);
        assert!(whole.1.len() >= 4, "{whole:?}");
        assert_eq!(check_within(storage.as_ref(), 0), whole);
    }

    fn put(storage: &MemoryStorage, at: u64, bytes: &[u8]) {
        block_on(storage.writev(HostOffset(at), IoBuf::from_bytes(bytes))).unwrap();
    }

    #[test]
    fn tables_that_leave_the_file_are_told() {
        let storage = image();
        put(&storage, 36, &(1u32 << 22).to_be_bytes());
        let (report, lines) = check_within(storage.as_ref(), MEMORY);
        assert!(report.corruptions > 0);
        let is_told = |line: &String| {
            line.starts_with("ERROR L1 table") && line.contains("beyond the end of the file")
        };
        assert!(lines.iter().any(is_told), "{:?}", lines.first());
    }

    #[test]
    fn what_an_encryption_header_takes_up_is_in_use() {
        let storage = super::mend::tests::image_with(4096);
        let at = storage.len().next_multiple_of(4096);
        put(&storage, at, &[0; 8192]);
        let area = [at.to_be_bytes(), 8192u64.to_be_bytes()].concat();
        let extension = ExtensionType::FULL_DISK_ENCRYPTION;
        block_on(set_extension(storage.as_ref(), extension, &area)).unwrap();
        let (_, lines) = check_within(storage.as_ref(), MEMORY);
        let first = at / 4096;
        let expected = [first, first + 1]
            .map(|cluster| format!("ERROR cluster {cluster} refcount=0 reference=1"));
        assert_eq!(lines, expected);
    }

    /// A table of snapshots with L1 tables at these places, of so many entries.
    fn with_snapshots(tables: &[(u64, u32)]) -> Arc<MemoryStorage> {
        let storage = image();
        let mut entries = Vec::new();
        for (at, len) in tables {
            entries.extend(at.to_be_bytes());
            entries.extend(len.to_be_bytes());
            entries.extend([0; 24]);
            entries.extend(24u32.to_be_bytes());
            entries.extend([0; 24]);
        }
        let at = storage.len().next_multiple_of(512);
        put(&storage, at, &entries);
        put(
            &storage,
            60,
            &u32::try_from(tables.len()).unwrap().to_be_bytes(),
        );
        put(&storage, 64, &at.to_be_bytes());
        storage
    }

    #[test]
    fn an_l1_table_counts_once_for_every_snapshot_that_has_it() {
        let storage = image();
        let at = storage.len().next_multiple_of(512);
        let storage = with_snapshots(&[(at + 512, 1), (at + 512, 1)]);
        put(&storage, at + 512, &[0; 512]);
        let (_, lines) = check_within(storage.as_ref(), MEMORY);
        let expected = format!("ERROR cluster {} refcount=0 reference=2", at / 512 + 1);
        assert!(lines.contains(&expected), "{lines:?}");
    }

    #[test]
    fn overlapping_l1_tables_of_snapshots_are_refused() {
        let storage = with_snapshots(&[(512, 4 << 20), (512, (4 << 20) - 1), (512, (4 << 20) - 2)]);
        let checked = block_on(check(storage.as_ref(), &mut |_| {}, &Progress::default()));
        let error = checked.unwrap_err();
        assert!(error.to_string().contains("checking"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }

    /// What a check tells of the snapshot table when a field of its first entry holds `value`.
    fn told_of_snapshot(field: u64, value: u32) -> String {
        let storage = image();
        let at = storage.len().next_multiple_of(512);
        let storage = with_snapshots(&[(at + 512, 1), (at + 1024, 1)]);
        put(&storage, at + 1024, &[0; 512]);
        put(&storage, at + field, &value.to_be_bytes());
        let (report, lines) = check_within(storage.as_ref(), MEMORY);
        assert!(report.corruptions > 0);
        lines.join("\n")
    }

    #[test]
    fn snapshots_beyond_the_limits_are_told_and_not_followed() {
        let told = told_of_snapshot(8, (4 << 20) + 1);
        assert!(
            told.contains("entry 0: its L1 table is too large"),
            "{told}"
        );
        let told = told_of_snapshot(36, 1025);
        assert!(
            told.contains("entry 0: it has too much extra data"),
            "{told}"
        );
        let told = told_of_snapshot(36, 65 << 20);
        assert!(
            told.contains("2 entries lie beyond its largest size"),
            "{told}"
        );
    }

    #[test]
    fn an_l1_table_of_many_snapshots_is_read_once() {
        let storage = image();
        let at = storage.len().next_multiple_of(512);
        let storage = with_snapshots(&[(at + 512, 1), (at + 512, 1), (at + 512, 1)]);
        // An entry that leads nowhere is wrong three times, and told once.
        put(&storage, at + 512, &(1u64 << 40).to_be_bytes());
        let (_, lines) = check_within(storage.as_ref(), MEMORY);
        let told = lines
            .iter()
            .filter(|line| line.contains("L1 entry 0"))
            .count();
        assert_eq!(told, 1, "{lines:?}");
    }

    #[test]
    fn refcounts_behind_the_end_of_the_file_are_leaks_and_no_use() {
        let storage = super::mend::tests::image_with(4096);
        let (before, _) = check_within(storage.as_ref(), MEMORY);
        let bytes = storage.contents();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let table = word(48);
        let block = word(usize::try_from(table).unwrap());
        put(&storage, block + 2 * 1000, &[0, 1]);
        let (report, lines) = check_within(storage.as_ref(), MEMORY);
        assert_eq!(lines, ["Leaked cluster 1000 refcount=1 reference=0"]);
        assert_eq!(report.image_end_offset, before.image_end_offset);
        // A block for clusters behind the end counts only where it is nothing else, however many entries name it.
        for entry in 1..4 {
            put(&storage, table + 8 * entry, &block.to_be_bytes());
        }
        let (report, lines) = check_within(storage.as_ref(), MEMORY);
        assert_eq!(report.leaks, 1, "{lines:?}");
    }

    #[test]
    fn what_no_refcount_block_can_say_is_found_behind_the_table() {
        // One cluster of a table says 512 B / 8 * 256 clusters; the data of this image goes beyond.
        let storage = image();
        put(&storage, 56, &1u32.to_be_bytes());
        let (report, lines) = check_within(storage.as_ref(), MEMORY);
        let last = lines
            .iter()
            .filter(|line| line.contains("refcount=0 reference=1"));
        assert!(last.count() > 0 && report.corruptions > 0, "{lines:?}");
    }
}
