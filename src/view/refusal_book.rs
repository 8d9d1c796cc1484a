//! What was refused, kept for whoever asks: what lay there, how often, and when last.
//!
//! # Invariants
//!
//! 1. Memory is bounded whatever a guest does: [`MAX_ENTRIES`] of each kind of structure. What an entry gives way for
//!    is still counted, among the others of its kind.
//! 2. The first [`KEPT`] entries of a kind stay for good, the rest are those refused last: neither what began an
//!    attack nor what is going on is hidden by a flood of anything else.

use std::time::SystemTime;

use super::refusal::{Refusal, Structure};
use crate::units::{BlockGroup, GuestOffset, InodeNumber};

/// The most entries of one kind of structure.
pub const MAX_ENTRIES: usize = 64;

/// How many of them never give way.
const KEPT: usize = 32;

/// Refusals that were aimed at the same thing: an inode, a structure of a group, or neighbouring bytes of data.
#[derive(Clone, Debug)]
pub struct Entry {
    /// How many there were.
    pub count: u64,
    /// When the first came.
    pub first: SystemTime,
    /// When the last came.
    pub last: SystemTime,
    /// All bytes that were to be written, from the first one to behind the last.
    pub span: (GuestOffset, GuestOffset),
    /// The last refusal.
    pub latest: Refusal,
}

impl Entry {
    fn new(refusal: &Refusal, now: SystemTime) -> Self {
        Self {
            count: 1,
            first: now,
            last: now,
            span: span_of(refusal),
            latest: *refusal,
        }
    }

    /// The kind of structure.
    #[must_use]
    pub fn structure(&self) -> Structure {
        self.latest.structure
    }

    /// The group it serves, where there is one.
    #[must_use]
    pub fn group(&self) -> Option<BlockGroup> {
        self.latest.group
    }

    /// The inode, where it is one.
    #[must_use]
    pub fn inode(&self) -> Option<InodeNumber> {
        self.latest.inode
    }

    fn is_about(&self, refusal: &Refusal) -> bool {
        let same = (self.group(), self.inode()) == (refusal.group, refusal.inode);
        let (start, end) = span_of(refusal);
        let is_one_thing = refusal.inode.is_some() || is_record(refusal.structure);
        same && (is_one_thing || (start <= self.span.1 && self.span.0 <= end))
    }

    fn add(&mut self, refusal: &Refusal, now: SystemTime) {
        let (start, end) = span_of(refusal);
        self.count = self.count.saturating_add(1);
        self.last = now;
        self.span = (self.span.0.min(start), self.span.1.max(end));
        self.latest = *refusal;
    }
}

/// Whether there is one of its kind in a group, so that the place in it says no more.
fn is_record(structure: Structure) -> bool {
    match structure {
        Structure::Data | Structure::Disk | Structure::Backup => false,
        Structure::Superblock
        | Structure::GroupDescriptor
        | Structure::BlockBitmap
        | Structure::InodeBitmap
        | Structure::Inode => true,
    }
}

fn span_of(refusal: &Refusal) -> (GuestOffset, GuestOffset) {
    let (at, len) = refusal.range;
    (at, GuestOffset(at.0.saturating_add(len)))
}

/// The entries of one kind of structure.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    entries: Vec<Entry>,
    others: u64,
}

impl Shelf {
    /// Takes note of a refusal.
    pub(super) fn note(&mut self, refusal: &Refusal, now: SystemTime) {
        if let Some(entry) = self
            .entries
            .iter_mut()
            .find(|entry| entry.is_about(refusal))
        {
            entry.add(refusal, now);
            return;
        }
        if self.entries.len() == MAX_ENTRIES {
            let fleeting = self.entries.iter().enumerate().skip(KEPT);
            if let Some((oldest, _)) = fleeting.min_by_key(|(_, entry)| entry.last) {
                let gone = self.entries.remove(oldest);
                self.others = self.others.saturating_add(gone.count);
            }
        }
        self.entries.push(Entry::new(refusal, now));
    }

    /// The entries, those that came first in front.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many refusals are in no entry any more.
    pub(super) fn others(&self) -> u64 {
        self.others
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::refusal::{Answer, Operation};
    use super::*;

    fn data(at: u64, len: u64) -> Refusal {
        Refusal {
            operation: Operation::Write,
            range: (GuestOffset(at), len),
            structure: Structure::Data,
            group: Some(BlockGroup(1)),
            inode: None,
            answer: Answer::Failed,
        }
    }

    fn inode(number: u32) -> Refusal {
        Refusal {
            structure: Structure::Inode,
            inode: Some(InodeNumber(number)),
            answer: Answer::Dropped,
            ..data(4096, 4096)
        }
    }

    fn second(n: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(n)
    }

    #[test]
    fn neighbouring_data_are_one_entry_and_inodes_one_each() {
        let mut shelf = Shelf::default();
        for n in 0..100 {
            shelf.note(&data(4096 * n, 4096), second(n));
        }
        let [entry] = shelf.entries() else { panic!() };
        assert_eq!((entry.count, entry.span.1.0), (100, 409_600));
        assert_eq!((entry.first, entry.last), (second(0), second(99)));
        assert_eq!(entry.latest.range.0.0, 4096 * 99);
        shelf.note(&data(1 << 30, 512), second(100));
        shelf.note(&inode(12), second(101));
        shelf.note(&inode(13), second(102));
        shelf.note(&inode(12), second(103));
        assert_eq!(shelf.entries().len(), 4);
    }

    #[test]
    fn a_flood_hides_neither_how_it_began_nor_what_came_last() {
        let mut shelf = Shelf::default();
        let far = |n: u64| data(n << 20, 512);
        shelf.note(&far(0), second(0));
        for n in 1..10_000 {
            shelf.note(&far(n), second(n));
        }
        assert_eq!(shelf.entries().len(), MAX_ENTRIES);
        let starts: Vec<u64> = shelf.entries().iter().map(|e| e.span.0.0 >> 20).collect();
        assert_eq!(starts[..KEPT], (0..KEPT as u64).collect::<Vec<_>>());
        assert_eq!(starts[MAX_ENTRIES - 1], 9999);
        let in_entries: u64 = shelf.entries().iter().map(|entry| entry.count).sum();
        assert_eq!(in_entries + shelf.others(), 10_000);
    }
}
