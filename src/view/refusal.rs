//! Writes that were refused: counted for each VM and kind of structure, and logged at a bounded rate.
//!
//! # Invariants
//!
//! 1. Every refusal is counted; only logging is limited.
//! 2. Memory is constant, and so is the rate of log lines, whatever a guest does.
//! 3. Each kind of structure has its own allowance: a flood of one kind hides no other.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::units::{BlockGroup, GuestOffset, InodeNumber};

/// What kind of structure a refused write was aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Structure {
    /// File data, directories, extent blocks and everything else in a group that is no metadata of the layout.
    Data,
    /// A backup of the superblock or of the descriptors, or blocks reserved for the table's growth.
    Backup,
    /// The superblock, and the boot sectors that share its block.
    Superblock,
    /// A group descriptor.
    GroupDescriptor,
    /// A block bitmap.
    BlockBitmap,
    /// An inode bitmap.
    InodeBitmap,
    /// An inode.
    Inode,
    /// Bytes of the disk outside the filesystem: a partition table, another partition.
    Disk,
}

impl Structure {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Data,
        Self::Backup,
        Self::Superblock,
        Self::GroupDescriptor,
        Self::BlockBitmap,
        Self::InodeBitmap,
        Self::Inode,
        Self::Disk,
    ];

    /// What a guest that writes there hears once it runs.
    ///
    /// Backups are metadata like the structures that they copy: a kernel writes them through its journal (to relabel
    /// a filesystem, say), and an error at the checkpoint would stop its whole filesystem.
    #[must_use]
    pub(super) fn answer(self) -> Answer {
        match self {
            Self::Data | Self::Superblock | Self::Disk => Answer::Failed,
            Self::Backup
            | Self::GroupDescriptor
            | Self::BlockBitmap
            | Self::InodeBitmap
            | Self::Inode => Answer::Dropped,
        }
    }

    /// The kind's name in logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Backup => "backup metadata",
            Self::Superblock => "superblock",
            Self::GroupDescriptor => "group descriptor",
            Self::BlockBitmap => "block bitmap",
            Self::InodeBitmap => "inode bitmap",
            Self::Inode => "inode",
            Self::Disk => "disk outside the filesystem",
        }
    }
}

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// To write data.
    Write,
    /// To write zeros.
    WriteZeroes,
    /// To discard.
    Discard,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "write",
            Self::WriteZeroes => "write-zeroes",
            Self::Discard => "discard",
        })
    }
}

/// What the guest hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The request fails, so that its program learns of it.
    Failed,
    /// The request succeeds, and this part of it is dropped: an error would stop the guest's filesystem.
    Dropped,
}

/// One refused write.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// What the guest asked for.
    pub operation: Operation,
    /// The first byte that is not the VM's to write, and how many follow it.
    pub range: (GuestOffset, u64),
    /// What lies there.
    pub structure: Structure,
    /// The group it serves, where there is one.
    pub group: Option<BlockGroup>,
    /// The first inode that was to change, where it is one.
    pub inode: Option<InodeNumber>,
    /// What the guest heard.
    pub answer: Answer,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, len) = self.range;
        let end = at.0.saturating_add(len);
        write!(f, "refused {} of bytes {at}..{end}", self.operation)?;
        if let Some(group) = self.group {
            write!(f, " of block group {group}")?;
        }
        write!(f, ", kind {}", self.structure.name())?;
        if let Some(inode) = self.inode {
            write!(f, ", inode {inode}")?;
        }
        f.write_str(match self.answer {
            Answer::Failed => ": not this VM's to write, the request failed",
            Answer::Dropped => ": not this VM's to write, dropped",
        })
    }
}

/// Log lines of one kind that may come at once.
const BURST: u32 = 16;
/// The time after which one more may come.
const REFILL: Duration = Duration::from_millis(500);

/// How many more lines of one kind may be logged now.
#[derive(Debug)]
struct Allowance {
    lines: u32,
    since: Option<Instant>,
    suppressed: u64,
}

impl Allowance {
    const FULL: Self = Self {
        lines: BURST,
        since: None,
        suppressed: 0,
    };

    /// Takes one line out; `Some` says how many were suppressed since the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let periods = now.saturating_duration_since(since).as_millis() / REFILL.as_millis();
        if let Ok(periods) = u32::try_from(periods)
            && periods < BURST
        {
            self.lines = self.lines.saturating_add(periods).min(BURST);
            self.since = Some(since + REFILL * periods);
        } else {
            self.lines = BURST;
            self.since = Some(now);
        }
        if self.lines == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// The refusals of one VM.
#[derive(Debug)]
pub struct Refusals {
    vm: String,
    counts: [AtomicU64; Structure::ALL.len()],
    allowances: Mutex<[Allowance; Structure::ALL.len()]>,
}

impl Refusals {
    /// None yet, for the VM called `vm`.
    #[must_use]
    pub fn new(vm: impl Into<String>) -> Self {
        Self {
            vm: vm.into(),
            counts: Default::default(),
            allowances: Mutex::new([const { Allowance::FULL }; Structure::ALL.len()]),
        }
    }

    /// The VM's name.
    #[must_use]
    pub fn vm(&self) -> &str {
        &self.vm
    }

    /// How many writes aimed at `structure` have been refused.
    #[must_use]
    pub fn count(&self, structure: Structure) -> u64 {
        self.counts[structure as usize].load(Ordering::Relaxed)
    }

    /// How many writes have been refused.
    #[must_use]
    pub fn total(&self) -> u64 {
        Structure::ALL.iter().map(|&s| self.count(s)).sum()
    }

    /// Counts `refusal`, and logs it unless too many of its kind came of late.
    pub fn record(&self, refusal: &Refusal) {
        let kind = refusal.structure as usize;
        self.counts[kind].fetch_add(1, Ordering::Relaxed);
        let allowed = {
            let mut allowances = self
                .allowances
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            allowances[kind].take(Instant::now())
        };
        match allowed {
            Some(0) => log::warn!("vm {}: {refusal}", self.vm),
            Some(more) => log::warn!(
                "vm {}: {refusal} ({more} more of this kind were not logged)",
                self.vm
            ),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(structure: Structure) -> Refusal {
        Refusal {
            operation: Operation::Write,
            range: (GuestOffset(4096), 512),
            structure,
            group: Some(BlockGroup(3)),
            inode: Some(InodeNumber(77)),
            answer: Answer::Dropped,
        }
    }

    #[test]
    fn a_refusal_names_range_group_kind_and_inode() {
        let text = refusal(Structure::Inode).to_string();
        assert_eq!(
            text,
            "refused write of bytes 4096..4608 of block group 3, kind inode, inode 77: \
             not this VM's to write, dropped"
        );
    }

    #[test]
    fn every_refusal_is_counted_by_its_kind() {
        let refusals = Refusals::new("tom");
        for _ in 0..100 {
            refusals.record(&refusal(Structure::Data));
        }
        refusals.record(&refusal(Structure::Disk));
        assert_eq!(refusals.count(Structure::Data), 100);
        assert_eq!(refusals.count(Structure::Inode), 0);
        assert_eq!(refusals.total(), 101);
        for (index, kind) in Structure::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
        }
    }

    #[test]
    fn a_flood_is_logged_in_bounded_lines_and_says_what_it_left_out() {
        let start = Instant::now();
        let mut allowance = Allowance::FULL;
        let logged = (0..1000)
            .filter(|_| allowance.take(start).is_some())
            .count();
        assert_eq!(logged, BURST as usize);
        assert_eq!(
            allowance.take(start + REFILL),
            Some(1000 - u64::from(BURST))
        );
        assert_eq!(allowance.take(start + REFILL), None);
        let later = start + REFILL * 1000;
        assert_eq!(allowance.take(later), Some(1));
        let logged = (0..1000)
            .filter(|_| allowance.take(later).is_some())
            .count();
        assert_eq!(logged, BURST as usize - 1);
    }
}
