//! The master boot record: four primary partitions, and a chain of boot records for logical ones inside an extended
//! partition.

use crate::error::{Error, ErrorKind, Result};
use crate::units::{GuestOffset, SECTOR_SIZE};

/// Bytes of a sector, and of a boot record.
pub(super) const SECTOR: usize = 512;
/// The type of the entry that protects a GPT.
pub(super) const PROTECTIVE: u8 = 0xee;
/// The types of extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const TABLE: usize = 0x1be;
const ENTRY: usize = 16;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The most logical partitions that are followed.
const MAX_LOGICAL: u32 = 128;
const FIRST_LOGICAL: u32 = 5;

/// One of the four entries of a boot record, in sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) kind: u8,
    pub(super) first: u32,
    pub(super) sectors: u32,
}

impl Entry {
    pub(super) fn is_empty(&self) -> bool {
        self.kind == 0 || self.sectors == 0
    }

    pub(super) fn is_extended(&self) -> bool {
        EXTENDED.contains(&self.kind)
    }

    fn parse(bytes: &[u8]) -> Self {
        let le32 = |at: usize| {
            let field = bytes[at..].first_chunk().copied().unwrap_or_default();
            u32::from_le_bytes(field)
        };
        Self {
            kind: bytes[4],
            first: le32(8),
            sectors: le32(12),
        }
    }
}

/// The entries of the boot record in a sector; `None` if it is none: no signature, or what only looks like one (the
/// boot sector of a filesystem, whose code lies where the entries would be).
pub(super) fn parse(sector: &[u8]) -> Option<[Entry; 4]> {
    let table = sector.get(TABLE..SECTOR)?;
    let (entries, signature) = table.split_at(4 * ENTRY);
    if signature != SIGNATURE {
        return None;
    }
    // The first byte of an entry is 0, or 0x80 for the one to boot from.
    if entries
        .chunks_exact(ENTRY)
        .any(|entry| entry[0] & 0x7f != 0)
    {
        return None;
    }
    let mut parsed = entries.chunks_exact(ENTRY).map(Entry::parse);
    Some([
        parsed.next()?,
        parsed.next()?,
        parsed.next()?,
        parsed.next()?,
    ])
}

/// A logical partition: number, first sector, sectors, type.
pub(super) type Logical = (u32, u64, u64, u8);

/// A walk along the boot records of an extended partition. Each describes one logical partition, and where the next
/// boot record is.
#[derive(Debug)]
pub(super) struct Chain {
    /// The extended partition's sectors.
    extended: std::ops::Range<u64>,
    /// The sector of the boot record to read next.
    next: Option<u64>,
    number: u32,
}

impl Chain {
    pub(super) fn new(entry: &Entry, disk_len: u64) -> Result<Self> {
        let first = u64::from(entry.first);
        let end = first + u64::from(entry.sectors);
        if first == 0 || end > disk_len / SECTOR_SIZE {
            return Err(corrupt(
                "the extended partition does not lie inside the disk",
            ));
        }
        Ok(Self {
            extended: first..end,
            next: Some(first),
            number: FIRST_LOGICAL,
        })
    }

    pub(super) fn next_sector(&self) -> GuestOffset {
        GuestOffset(self.next.unwrap_or(self.extended.start) * SECTOR_SIZE)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.next.is_none()
    }

    /// Takes the boot record at [`Chain::next_sector`].
    pub(super) fn supply(&mut self, sector: &[u8]) -> Result<Option<Logical>> {
        let at = self.next.take().unwrap_or(self.extended.start);
        let Some([own, link, ..]) = parse(sector) else {
            // As the kernel has it: without a boot record the chain ends.
            return Ok(None);
        };
        if !link.is_empty() && link.is_extended() {
            let next = self.extended.start + u64::from(link.first);
            // Only forwards, so that the chain ends.
            if next <= at || !self.extended.contains(&next) {
                return Err(corrupt(format_args!(
                    "the boot record in sector {at} names sector {next} as the next one"
                )));
            }
            if self.number >= FIRST_LOGICAL + MAX_LOGICAL {
                return Err(corrupt(format_args!(
                    "more than {MAX_LOGICAL} logical partitions"
                )));
            }
            self.next = Some(next);
        }
        if own.is_empty() || own.is_extended() {
            return Ok(None);
        }
        let (first, sectors) = (at + u64::from(own.first), u64::from(own.sectors));
        if own.first == 0 || first + sectors > self.extended.end {
            return Err(corrupt(format_args!(
                "logical partition {} does not lie inside the extended one",
                self.number
            )));
        }
        let number = self.number;
        self.number += 1;
        Ok(Some((number, first, sectors, own.kind)))
    }
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("partition table: {what}"))
}
