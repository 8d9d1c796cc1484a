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

    /// Invariant 3.
    async fn clear_marks(&mut self) -> Result<()> {
        self.step(Hears::Repairs, async |checker| {
            let marks = IncompatibleFeatures::DIRTY.with(IncompatibleFeatures::CORRUPT);
            let features = checker.header.incompatible_features;
            if features == features.without(marks) {
                return Ok(());
            }
            checker.storage.flush().await?;
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
            is_changed |= self.move_active_l1(&counts).await?;
            is_changed |= self.move_inactive_l1s(&counts).await?;
            is_changed |= self.mend_tables(&counts).await?;
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
