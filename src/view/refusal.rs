//! Writes that were refused: counted for each VM and kind of structure, kept for whoever asks, and logged at a bounded
//! rate.
//!
//! # Invariants
//!
//! 1. Every refusal is counted; only logging is limited.
//! 2. Memory is constant, and so is the rate of log lines, whatever a guest does.
//! 3. Each kind of structure has its own allowance: a flood of one kind hides no other.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::refusal_book::Shelf;
pub use super::refusal_book::{Entry, MAX_ENTRIES};
use crate::log_limit::LogLimit;
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

/// The refusals of one VM.
#[derive(Debug)]
pub struct Refusals {
    vm: String,
    counts: [AtomicU64; Structure::ALL.len()],
    limits: [LogLimit; Structure::ALL.len()],
    shelves: Mutex<[Shelf; Structure::ALL.len()]>,
}

impl Refusals {
    /// None yet, for the VM called `vm`.
    #[must_use]
    pub fn new(vm: impl Into<String>) -> Self {
        Self {
            vm: vm.into(),
            counts: Default::default(),
            limits: Default::default(),
            shelves: Mutex::default(),
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

    /// What the refusals were aimed at: [`MAX_ENTRIES`] entries of each kind at most.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let shelves = self.lock();
        shelves.iter().flat_map(Shelf::entries).cloned().collect()
    }

    /// How many writes aimed at `structure` have been refused that no entry holds any more.
    #[must_use]
    pub fn others(&self, structure: Structure) -> u64 {
        self.lock()[structure as usize].others()
    }

    fn lock(&self) -> MutexGuard<'_, [Shelf; Structure::ALL.len()]> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts `refusal`, and logs it unless too many of its kind came of late.
    pub fn record(&self, refusal: &Refusal) {
        let kind = refusal.structure as usize;
        self.counts[kind].fetch_add(1, Ordering::Relaxed);
        self.lock()[kind].note(refusal, SystemTime::now());
        match self.limits[kind].take() {
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
}
