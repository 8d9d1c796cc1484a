//! The snapshot table as a check reads it: as much of it as can be read, whatever is wrong with the rest (qcow2
//! specification, "Snapshots").

use super::super::header::{MAX_L1_TABLE_BYTES, Version};
use super::checker::Checker;
use crate::error::Result;
use crate::units::HostOffset;

/// Bytes of the fixed part of an entry.
const FIXED: u64 = 40;
/// Entries start at multiples of this.
const ALIGNMENT: u64 = 8;
/// The largest table in bytes, as in stock QEMU.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// The most extra data of an entry in bytes, as in stock QEMU.
const MAX_EXTRA: u64 = 1024;
/// The extra data that every entry of a version 3 image has.
const V3_EXTRA: u64 = 16;

/// Where an L1 table lies, perhaps that of several snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct L1Place {
    pub(super) at: HostOffset,
    pub(super) entries: u64,
    /// The snapshots that share it.
    pub(super) times: u64,
}

/// What the snapshot table leads to.
#[derive(Debug, Default)]
pub(super) struct SnapshotTable {
    /// Bytes of the table.
    pub(super) len: u64,
    /// The L1 tables, each once.
    pub(super) tables: Vec<L1Place>,
}

impl Checker<'_> {
    /// Reads the snapshot table, and tells what is wrong with it.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn read_snapshots(&mut self) -> Result<SnapshotTable> {
        let mut found = SnapshotTable::default();
        let start = self.header.snapshots_offset.0;
        let count = self.header.nb_snapshots;
        for number in 0..count {
            let at = found.len.next_multiple_of(ALIGNMENT);
            let fixed = self.read(HostOffset(start + at), FIXED).await?;
            let Some(entry) = Entry::parse(&fixed) else {
                break;
            };
            let len = at + FIXED + entry.extra + entry.strings;
            if len > MAX_TABLE_BYTES {
                let rest = u64::from(count - number);
                self.walk_corruption(rest, || {
                    format!("snapshot table: {rest} entries lie beyond its largest size")
                });
                break;
            }
            found.len = len;
            self.judge_snapshot(number, &entry, &mut found.tables);
        }
        found.tables.sort_unstable();
        found.tables.dedup_by(|next, first| {
            let same = (next.at, next.entries) == (first.at, first.entries);
            if same {
                first.times += next.times;
            }
            same
        });
        Ok(found)
    }

    fn judge_snapshot(&mut self, number: u32, entry: &Entry, tables: &mut Vec<L1Place>) {
        let mut wrong = |what: &str| {
            self.walk_corruption(1, || format!("snapshot table entry {number}: {what}"));
        };
        if entry.extra > MAX_EXTRA {
            wrong("it has too much extra data");
        }
        let at = entry.l1_table_offset;
        if entry.l1_size * 8 > MAX_L1_TABLE_BYTES {
            wrong("its L1 table is too large");
            return;
        }
        tables.push(L1Place {
            at: HostOffset(at),
            entries: entry.l1_size,
            times: 1,
        });
        if self.header.version == Version::V3 && entry.extra < V3_EXTRA {
            self.has_incomplete_snapshots = true;
            self.walk_corruption(1, || {
                format!("snapshot table entry {number}: its extra data is incomplete")
            });
        }
        if !at.is_multiple_of(self.header.cluster_size()) {
            tables.pop();
            self.walk_corruption(1, || {
                format!("snapshot table entry {number}: its L1 table at {at:#x} is not aligned to a cluster")
            });
        }
    }
}

/// What matters of an entry.
struct Entry {
    l1_table_offset: u64,
    l1_size: u64,
    /// Bytes of ID and name.
    strings: u64,
    /// Bytes of extra data.
    extra: u64,
}

impl Entry {
    fn parse(fixed: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| {
            fixed
                .get(at..)?
                .first_chunk()
                .map(|b| u16::from_be_bytes(*b))
        };
        let u32_at = |at: usize| {
            fixed
                .get(at..)?
                .first_chunk()
                .map(|b| u32::from_be_bytes(*b))
        };
        Some(Self {
            l1_table_offset: fixed.first_chunk().map(|b| u64::from_be_bytes(*b))?,
            l1_size: u32_at(8)?.into(),
            strings: u64::from(u16_at(12)?) + u64::from(u16_at(14)?),
            extra: u32_at(36)?.into(),
        })
    }
}
