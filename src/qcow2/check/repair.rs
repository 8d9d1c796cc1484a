//! Repairing an image in place.
//!
//! ```text
//! check ─> tables: entries that break a rule (mend), bitmaps that cannot be used, entries of snapshots
//!       ─> refcounts: in place, or all of them anew where blocks are broken (rebuild); then COPIED flags
//!       ─> check again ─> the dirty and the corrupt bit cleared
//! ```
//!
//! # Invariants
//!
//! 1. Each step leaves an image in which no more is wrong than before, whatever a power cut lets through of it, and
//!    is durable before the next: a second repair goes on from there. References that go are durably gone before
//!    their refcounts are lowered.
//! 2. What can be read keeps its contents. What cannot, since its entry leads nowhere, reads as zeros afterwards.
//! 3. The dirty and the corrupt bit go last, and only if nothing corrupt is left.
//! 4. Where tables are broken, only a repair of everything frees leaks: a broken entry may have led to them.

use super::super::features::{AutoclearFeatures, IncompatibleFeatures};
use super::super::header::Header;
use super::super::snapshot_table::{Snapshot, encode_snapshots, read_snapshots};
use super::checker::{Checker, Voice};
use super::copied::FixFlags;
use super::counts::Counts;
use super::mend::Pass;
use super::refcounts::Fix;
use super::report::{Finding, Listener, Report, Severity};
use super::snapshots::L1Place;
use super::{MEMORY, read_header};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::storage::Storage;
use crate::units::HostCluster;

/// Rounds in which tables are mended: each finds what the one before has brought to light.
const ROUNDS: usize = 4;

/// What is to be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Refcounts that are too high, unless tables are broken, whose entries may have led there.
    Leaks,
    /// Refcounts and the flags that follow from them, as they are after a crash with lazy refcounts. Nothing that
    /// tables say of the disk changes.
    Refcounts,
    /// Everything.
    All,
}

/// What a repair has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// What was wrong.
    pub before: Report,
    /// What still is.
    pub after: Report,
}

impl Repaired {
    /// Corruptions that are gone.
    #[must_use]
    pub fn corruptions_fixed(&self) -> u64 {
        self.before
            .corruptions
            .saturating_sub(self.after.corruptions)
    }

    /// Leaks that are gone.
    #[must_use]
    pub fn leaks_fixed(&self) -> u64 {
        self.before.leaks.saturating_sub(self.after.leaks)
    }
}

/// Checks and repairs the image in `storage`, which nobody may use meanwhile. `listener` hears of everything that
/// was wrong, of what is changed, and of what is still wrong.
///
/// # Errors
/// Those of [`super::check`]; the storage's, also for want of room behind the end of the file.
pub async fn repair(
    storage: &dyn Storage,
    what: Repair,
    listener: Listener<'_>,
    progress: &Progress,
) -> Result<Repaired> {
    let name = storage.name();
    let mut job = Job {
        storage,
        listener,
        progress,
    };
    job.run(what).await.context(|| format!("repairing {name}"))
}

/// Makes the refcounts of an image anew that its last writer has left out of date, before they are used; the answer
/// is whether that was necessary.
///
/// # Errors
/// Those of [`repair`]; [`ErrorKind::Corrupt`] if more than refcounts is wrong.
pub(in super::super) async fn repair_if_dirty(
    storage: &dyn Storage,
    header: &Header,
) -> Result<bool> {
    let dirty = IncompatibleFeatures::DIRTY;
    if !header.incompatible_features.contains(dirty) {
        return Ok(false);
    }
    let mut ignore = |_: Finding| {};
    let repaired = repair(
        storage,
        Repair::Refcounts,
        &mut ignore,
        &Progress::default(),
    )
    .await?;
    if repaired.after.corruptions > 0 {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the image was not closed cleanly, and more than its refcounts is wrong: repair it with `seethrough check \
             -r all IMAGE`, or open it read-only",
        ));
    }
    log::info!(
        "{}: it was not closed cleanly: {} refcounts and flags made anew, {} leaked clusters freed",
        storage.name(),
        repaired.corruptions_fixed(),
        repaired.leaks_fixed()
    );
    Ok(true)
}

struct Job<'a, 'l> {
    storage: &'a dyn Storage,
    listener: Listener<'l>,
    progress: &'a Progress,
}

/// What a check has found to be broken, beside refcounts that are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Broken {
    /// Entries of L1 and L2 tables, snapshots, bitmaps.
    tables: bool,
    /// Refcount blocks: refcounts cannot be mended in place.
    blocks: bool,
}

/// What a listener hears of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hears {
    /// Everything.
    All,
    /// What is changed.
    Repairs,
}

impl Job<'_, '_> {
    async fn run(&mut self, what: Repair) -> Result<Repaired> {
        let (before, mut found) = self.check(Hears::All).await?;
        // Invariant 4.
        let is_possible = what == Repair::All || !found.tables;
        if what == Repair::Leaks && found.tables && before.leaks > 0 {
            (self.listener)(Finding {
                severity: Severity::Leak,
                text: "clusters are not freed, since broken entries may have led to them: mend these, too, with `-r \
                       all`, or copy the disk first with `seethrough convert`"
                    .into(),
            });
        }
        let after = if before.is_clean() || !is_possible {
            before
        } else {
            self.drop_unknown_autoclear_bits().await?;
            if what == Repair::All && self.mend().await? {
                (_, found) = self.check(Hears::Repairs).await?;
            }
            self.fix_refcounts(what, found.blocks).await?;
            self.check(Hears::All).await?.0
        };
        if after.corruptions == 0 {
            self.clear_marks().await?;
        }
        Ok(Repaired { before, after })
    }

    /// Has a step done on the image as it is now.
    async fn step<T>(
        &mut self,
        hears: Hears,
        step: impl AsyncFnOnce(&mut Checker<'_>) -> Result<T>,
    ) -> Result<T> {
        let header = read_header(self.storage).await?;
        let listener = &mut self.listener;
        let mut heard = |finding: Finding| {
            if hears == Hears::All || finding.severity == Severity::Repair {
                listener(finding);
            }
        };
        let mut checker = Checker::new(self.storage, header, MEMORY, &mut heard, self.progress);
        step(&mut checker).await
    }

    async fn check(&mut self, hears: Hears) -> Result<(Report, Broken)> {
        self.step(hears, async |checker| {
            let report = checker.check().await?;
            let broken = Broken {
                tables: checker.has_broken_tables,
                blocks: checker.needs_rebuild,
            };
            Ok((report, broken))
        })
        .await
    }

    /// Nothing here keeps up to date what unknown bits vouch for.
    async fn drop_unknown_autoclear_bits(&mut self) -> Result<()> {
        self.step(Hears::Repairs, async |checker| {
            let unknown = checker.header.autoclear_features.unknown();
            if unknown == AutoclearFeatures::default() {
                return Ok(());
            }
            checker.header.autoclear_features = checker.header.autoclear_features.without(unknown);
            checker.write_header().await
        })
        .await
    }

    /// Mends what tables say; the answer is whether anything has changed.
    async fn mend(&mut self) -> Result<bool> {
        let fit = self.step(Hears::Repairs, async |checker| checker.fit_tables().await);
        let mut is_changed = fit.await?;
        for _ in 0..ROUNDS {
            let round = self.step(Hears::Repairs, async |checker| checker.mend_round().await);
            if !round.await? {
                break;
            }
            is_changed = true;
        }
        let others = self.step(Hears::Repairs, async |checker| {
            let bitmaps = checker.drop_broken_bitmaps().await?;
            Ok(checker.complete_snapshots().await? || bitmaps)
        });
        Ok(others.await? || is_changed)
    }

    async fn fix_refcounts(&mut self, what: Repair, needs_rebuild: bool) -> Result<()> {
        let fix = match what {
            Repair::Leaks if needs_rebuild => return Ok(()),
            Repair::Leaks => Fix::Leaks,
            Repair::Refcounts | Repair::All => Fix::All,
        };
        if needs_rebuild {
            self.step(Hears::Repairs, async |checker| {
                checker.rebuild_refcounts().await
            })
            .await?;
        }
        self.step(Hears::Repairs, async |checker| {
            checker.fix_in_place(fix).await
        })
        .await
    }

    /// Invariant 3. All that was mended is durable.
    async fn clear_marks(&mut self) -> Result<()> {
        self.step(Hears::Repairs, async |checker| {
            let marks = IncompatibleFeatures::DIRTY.with(IncompatibleFeatures::CORRUPT);
            let features = checker.header.incompatible_features;
            if features == features.without(marks) {
                return Ok(());
            }
            checker.header.incompatible_features = features.without(marks);
            checker.write_header().await
        })
        .await
    }
}

impl Checker<'_> {
    async fn mend_round(&mut self) -> Result<bool> {
        self.voice = Voice::Silent;
        let mut is_changed = false;
        let mut start = 0;
        while start < u64::MAX {
            let mut counts = Counts::new(HostCluster(start), self.memory);
            self.walk(&mut counts).await?;
            if self.mend_tables(&counts, Pass::InPlace).await? {
                self.storage.flush().await?;
                is_changed = true;
            }
            is_changed |= self.move_active_l1(&counts).await?;
            is_changed |= self.move_inactive_l1s(&counts).await?;
            is_changed |= self.mend_tables(&counts, Pass::Appending).await?;
            self.storage.flush().await?;
            start = counts.window().end;
        }
        Ok(is_changed)
    }

    /// Sets refcounts and flags to what is counted.
    async fn fix_in_place(&mut self, fix: Fix) -> Result<()> {
        let mut start = 0;
        while start < u64::MAX {
            let mut counts = Counts::new(HostCluster(start), self.memory);
            self.walk(&mut counts).await?;
            self.compare(&mut counts, fix).await?;
            self.voice = Voice::Silent;
            // Where refcounts stay wrong, flags that follow from them would be wrong, too.
            let flags = match fix {
                Fix::Leaks if self.report.corruptions > 0 => FixFlags::Sole,
                _ => FixFlags::All,
            };
            self.check_copied(&counts, flags).await?;
            start = counts.window().end;
        }
        self.storage.flush().await
    }

    /// Gives bitmaps up that cannot be used.
    async fn drop_broken_bitmaps(&mut self) -> Result<bool> {
        let mut counts = Counts::new(HostCluster(0), 0);
        self.voice = Voice::Silent;
        self.walk_bitmaps(&mut counts).await?;
        if !self.has_broken_bitmaps {
            return Ok(false);
        }
        self.tell(Severity::Repair, "bitmaps: all of them are given up".into());
        let features = self.header.autoclear_features;
        self.header.autoclear_features = features.without(AutoclearFeatures::BITMAPS);
        self.write_header().await?;
        Ok(true)
    }

    /// Adds what entries of the snapshot table lack: a new table, then one write of the header.
    async fn complete_snapshots(&mut self) -> Result<bool> {
        let Ok(mut snapshots) = read_snapshots(self.storage, &self.header).await else {
            return Ok(false);
        };
        self.voice = Voice::Silent;
        self.read_snapshots().await?;
        if !self.has_incomplete_snapshots {
            return Ok(false);
        }
        self.replace_snapshots(&mut snapshots).await?;
        Ok(true)
    }

    /// Copies L1 tables of snapshots that are something else, too, each to a place of its own.
    async fn move_inactive_l1s(&mut self, counts: &Counts) -> Result<bool> {
        let Ok(mut snapshots) = read_snapshots(self.storage, &self.header).await else {
            return Ok(false);
        };
        let tables = self.read_snapshots().await?.tables;
        let mut is_changed = false;
        for snapshot in &mut snapshots {
            let (at, entries) = (snapshot.l1_table_offset, u64::from(snapshot.l1_size));
            let same = |table: &&L1Place| table.at == at && table.entries == entries;
            let times = tables
                .iter()
                .find(same)
                .map_or(u64::MAX, |table| table.times);
            let mut clusters = self.clusters_of(at, entries * 8).map(HostCluster);
            let is_shared = |cluster| counts.covers(cluster) && counts.get(cluster) > times;
            if self.bounds.holds(at.0, entries * 8) && clusters.any(is_shared) {
                let bytes = self.read(at, entries * 8).await?;
                let mended = self.mended_l1(at, &bytes).await?;
                snapshot.l1_table_offset = self.append(&mended).await?;
                is_changed = true;
            }
        }
        if is_changed {
            self.replace_snapshots(&mut snapshots).await?;
        }
        Ok(is_changed)
    }

    /// Writes a new snapshot table, and then the header that points to it.
    ///
    /// # Errors
    /// The storage's, and those of [`encode_snapshots`].
    pub(super) async fn replace_snapshots(&mut self, snapshots: &mut [Snapshot]) -> Result<()> {
        let disk = self.header.virtual_size();
        for snapshot in snapshots.iter_mut() {
            snapshot.disk_size = Some(snapshot.disk_size(disk));
        }
        let table = encode_snapshots(snapshots)?;
        self.tell(
            Severity::Repair,
            "the snapshot table, in a new place".into(),
        );
        let at = self.append(&table).await?;
        self.storage.flush().await?;
        self.header.snapshots_offset = at;
        self.write_header().await
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::sync::Arc;
    use std::time::UNIX_EPOCH;

    use super::super::check;
    use super::super::mend::tests::{image_with, open};
    use super::*;
    use crate::image::{Access, Image};
    use crate::storage::{CrashStorage, Delays, FaultStorage, Lost, MemoryStorage};
    use crate::sys::{IoBuf, block_on};
    use crate::units::{GuestOffset, HostOffset};

    const COPIED: u64 = 1 << 63;
    const SIZE: u64 = 8 << 20;

    fn word(bytes: &[u8], at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn put(storage: &MemoryStorage, at: u64, word: u64) {
        let word = IoBuf::from_bytes(&word.to_be_bytes());
        block_on(storage.writev(HostOffset(at), word)).unwrap();
    }

    /// Where the L1 table and the first L2 table lie.
    fn tables(storage: &MemoryStorage) -> (u64, u64) {
        let bytes = storage.contents();
        let l1 = word(&bytes, 40);
        (l1, word(&bytes, l1) & !COPIED)
    }

    fn found(storage: &dyn Storage) -> Report {
        block_on(check(storage, &mut |_| (), &Progress::default())).unwrap()
    }

    fn work(storage: &dyn Storage, what: Repair) -> Repaired {
        block_on(repair(storage, what, &mut |_| (), &Progress::default())).unwrap()
    }

    /// Whether the disk begins with 64 KiB of sevens, and has zeros in its second half.
    fn is_right(storage: &Arc<MemoryStorage>) -> bool {
        let read = |at: u64, len: usize| {
            let buf = IoBuf::zeroed(len);
            block_on(open(storage, Access::ReadOnly).read(GuestOffset(at), buf.clone())).unwrap();
            buf.to_vec()
        };
        read(0, 64 << 10).iter().all(|byte| *byte == 7)
            && read(SIZE / 2, 64 << 10).iter().all(|byte| *byte == 0)
    }

    /// Repairs, and repairs again wherever the power goes in the first repair.
    fn whenever_the_power_goes(
        broken: &MemoryStorage,
        is_right: impl Fn(&Arc<MemoryStorage>) -> bool,
    ) {
        let crash = CrashStorage::new(broken.contents(), Delays::none());
        assert!(work(&crash, Repair::All).after.is_clean());
        for cut in crash.moments() {
            for seed in 0..6 {
                let left = crash.after_power_cut(cut, Lost::Some { seed });
                let left = Arc::new(MemoryStorage::new(left));
                assert!(
                    work(left.as_ref(), Repair::All).after.is_clean(),
                    "{cut:?} {seed}"
                );
                assert!(is_right(&left), "{cut:?} {seed}");
            }
        }
    }

    #[test]
    fn an_l1_table_that_is_data_too_is_copied_and_what_is_below_it_mended() {
        let storage = image_with(64 << 10);
        let (l1, l2) = tables(&storage);
        put(&storage, l2 + 20 * 8, l1 | COPIED);
        put(&storage, l2 + 30 * 8, 1 << 40 | COPIED);
        whenever_the_power_goes(&storage, is_right);
    }

    #[test]
    fn an_l2_table_that_is_data_too_has_one_copy_for_all_that_lead_there() {
        let storage = image_with(64 << 10);
        let (l1, l2) = tables(&storage);
        put(&storage, l2 + 100 * 8, l2);
        // Nor has the L1 table a place of its own, which it gets a round before.
        put(&storage, l2 + 101 * 8, l1);
        put(&storage, l1 + 8, l2);
        assert!(work(storage.as_ref(), Repair::All).after.is_clean());
        let bytes = storage.contents();
        let l1 = word(&bytes, 40);
        let copy = word(&bytes, l1) & !COPIED;
        assert_eq!(word(&bytes, l1 + 8) & !COPIED, copy);
        assert_ne!(copy, l2);
    }

    fn with_snapshot() -> Arc<MemoryStorage> {
        let storage = image_with(64 << 10);
        let disk = open(&storage, Access::ReadWrite);
        drop(block_on(disk.create_snapshot(OsStr::new("one"), UNIX_EPOCH)).unwrap());
        storage
    }

    fn is_snapshot_right(storage: &Arc<MemoryStorage>) -> bool {
        let disk = open(storage, Access::ReadWrite);
        let snapshots = block_on(disk.snapshots()).unwrap();
        assert_eq!(snapshots[0].disk_size, Some(SIZE));
        drop(block_on(disk.apply_snapshot(OsStr::new("one"))).unwrap());
        is_right(storage)
    }

    #[test]
    fn a_snapshot_s_l1_table_that_is_data_too_is_copied_mended() {
        let storage = with_snapshot();
        let (_, l2) = tables(&storage);
        let bytes = storage.contents();
        let table = word(&bytes, word(&bytes, 64));
        put(&storage, l2 + 20 * 8, table);
        put(&storage, table + 16, 1 << 40);
        whenever_the_power_goes(&storage, is_snapshot_right);
        // Right behind the end of the file, where the copy goes.
        put(&storage, table + 16, bytes.len() as u64);
        assert!(work(storage.as_ref(), Repair::All).after.is_clean());
        assert!(is_snapshot_right(&storage));
    }

    #[test]
    fn what_leads_behind_the_end_of_the_file_does_not_lead_to_what_is_appended() {
        let storage = image_with(64 << 10);
        let (l1, l2) = tables(&storage);
        let end = storage.len().next_multiple_of(4096);
        put(&storage, l2 + 20 * 8, l1 | COPIED);
        put(&storage, l2 + 30 * 8, end | COPIED);
        put(&storage, l2 + 31 * 8, (end + 4096) | COPIED);
        whenever_the_power_goes(&storage, |left| {
            let disk = open(left, Access::ReadOnly);
            let buf = IoBuf::zeroed(2 * 4096);
            block_on(disk.read(GuestOffset(30 * 4096), buf.clone())).unwrap();
            is_right(left) && buf.to_vec().iter().all(|byte| *byte == 0)
        });
    }

    #[test]
    fn an_entry_of_a_snapshot_is_completed_with_the_size_of_its_disk() {
        let storage = with_snapshot();
        let bytes = storage.contents();
        let at = word(&bytes, 64);
        let start = usize::try_from(at).unwrap();
        let mut entry = bytes[start..start + 40].to_vec();
        let extra = usize::from(entry[39]);
        entry[39] = 0;
        entry.extend(&bytes[start + 40 + extra..][..32]);
        block_on(storage.writev(HostOffset(at), IoBuf::from_bytes(&entry))).unwrap();
        whenever_the_power_goes(&storage, is_snapshot_right);
    }

    #[test]
    fn refcounts_made_anew_are_sound_as_soon_as_they_are_in_force() {
        let storage = image_with(64 << 10);
        let bytes = storage.contents();
        let table = word(&bytes, 48);
        put(&storage, table, 1 << 40);
        let broken = storage.contents();
        // Freeing leaks does not go as far.
        work(storage.as_ref(), Repair::Leaks);
        assert!(storage.contents() == broken);
        whenever_the_power_goes(&storage, is_right);
        let crash = CrashStorage::new(broken, Delays::none());
        work(&crash, Repair::All);
        for cut in crash.moments() {
            for seed in 0..6 {
                let left = crash.after_power_cut(cut, Lost::Some { seed });
                if word(&left, 48) != table {
                    let left = MemoryStorage::new(left);
                    assert_eq!(found(&left).corruptions, 0, "{cut:?} {seed}");
                }
            }
        }
    }

    #[test]
    fn a_repair_drops_unknown_autoclear_bits() {
        let storage = image_with(64 << 10);
        let (_, l2) = tables(&storage);
        put(&storage, 88, 1 << 60);
        put(&storage, l2, 0);
        assert_eq!(work(storage.as_ref(), Repair::Leaks).leaks_fixed(), 1);
        assert_eq!(word(&storage.contents(), 88), 0);
    }

    #[test]
    fn an_l2_table_that_thousands_lead_to_is_not_read_thousands_of_times() {
        let storage = image_with(64 << 10);
        let (_, l2) = tables(&storage);
        let end = storage.len().next_multiple_of(4096);
        let entries: Vec<u8> = [l2.to_be_bytes()].repeat(32 << 10).concat();
        block_on(storage.writev(HostOffset(end), IoBuf::from_bytes(&entries))).unwrap();
        put(&storage, 40, end);
        let l1_size = IoBuf::from_bytes(&(32u32 << 10).to_be_bytes());
        block_on(storage.writev(HostOffset(36), l1_size)).unwrap();
        let counted = FaultStorage::new(storage as Arc<dyn Storage>);
        assert!(!found(&counted).is_clean());
        assert!(counted.operations() < 2000, "{}", counted.operations());
    }
}
