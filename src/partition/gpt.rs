//! The GUID partition table (UEFI specification, section 5.3): a header in the second sector and a copy of it in the
//! last, each with its entries, all under CRC-32.

use std::ops::RangeInclusive;

use crc::{CRC_32_ISO_HDLC, Crc};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{GuestOffset, SECTOR_SIZE};

const SIGNATURE: &[u8] = b"EFI PART";
/// Where the entries of the primary copy can begin at the earliest.
const PRIMARY_LBA: u64 = 1;
const MIN_HEADER: usize = 92;
const HEADER_CRC: usize = 0x10;
const MIN_ENTRY: u32 = 128;
/// The most bytes of entries that are read; a usual table has 16 KiB.
const MAX_TABLE: usize = 1 << 20;

static CRC32: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

/// One copy of the header, checked.
#[derive(Debug)]
pub(super) struct Header {
    my_lba: u64,
    entries_lba: u64,
    entries_len: usize,
    entry_size: usize,
    entries_crc: u32,
    usable: RangeInclusive<u64>,
}

/// A used entry of the table, in sectors; both ends belong to the partition.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) number: u32,
    pub(super) kind: [u8; 16],
    pub(super) first: u64,
    pub(super) last: u64,
}

/// The entries of one copy, their checksum verified.
#[derive(Debug)]
pub(super) struct Entries<'a> {
    bytes: &'a [u8],
    entry_size: usize,
}

pub(super) fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("GUID partition table: {what}"))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|tail| tail.first_chunk());
    u32::from_le_bytes(field.copied().unwrap_or_default())
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|tail| tail.first_chunk());
    u64::from_le_bytes(field.copied().unwrap_or_default())
}

impl Header {
    /// Reads the header in sector `lba` of a disk whose last sector is `last_lba`.
    pub(super) fn parse(sector: &[u8], lba: u64, last_lba: u64) -> Result<Self> {
        if !sector.starts_with(SIGNATURE) {
            return Err(corrupt(format_args!("no header in sector {lba}")));
        }
        let header_size = usize::try_from(le32(sector, 0x0c)).unwrap_or(usize::MAX);
        let mut header = sector
            .get(..header_size)
            .filter(|header| header.len() >= MIN_HEADER)
            .ok_or_else(|| corrupt(format_args!("header size {header_size}")))?
            .to_vec();
        header[HEADER_CRC..HEADER_CRC + 4].fill(0);
        if CRC32.checksum(&header) != le32(sector, HEADER_CRC) {
            return Err(corrupt(format_args!(
                "the checksum of the header in sector {lba} is wrong"
            )));
        }
        let my_lba = le64(sector, 0x18);
        let (first_usable, last_usable) = (le64(sector, 0x28), le64(sector, 0x30));
        let entries_lba = le64(sector, 0x48);
        let (count, entry_size) = (le32(sector, 0x50), le32(sector, 0x54));
        if my_lba != lba || last_usable > last_lba || first_usable > last_usable {
            return Err(corrupt(format_args!(
                "the header in sector {lba} says it is in {my_lba} and sectors {first_usable} to {last_usable} of \
                 {last_lba} are usable"
            )));
        }
        let entries_len = u64::from(count) * u64::from(entry_size);
        let entries_len = usize::try_from(entries_len).unwrap_or(usize::MAX);
        if entry_size < MIN_ENTRY || !entry_size.is_power_of_two() || entries_len > MAX_TABLE {
            return Err(corrupt(format_args!(
                "{count} entries of {entry_size} bytes"
            )));
        }
        let sectors = entries_len.div_ceil(super::mbr::SECTOR);
        let end = u64::try_from(sectors)
            .ok()
            .and_then(|sectors| entries_lba.checked_add(sectors));
        if entries_lba <= PRIMARY_LBA || end.is_none_or(|end| end > last_lba) {
            return Err(corrupt(format_args!(
                "entries in sector {entries_lba} of {last_lba}"
            )));
        }
        Ok(Self {
            my_lba,
            entries_lba,
            entries_len,
            entry_size: usize::try_from(entry_size).unwrap_or(usize::MAX),
            entries_crc: le32(sector, 0x58),
            usable: first_usable..=last_usable,
        })
    }

    /// Where the entries are, and how many bytes.
    pub(super) fn entries(&self) -> (GuestOffset, usize) {
        (
            GuestOffset(self.entries_lba * SECTOR_SIZE),
            self.entries_len,
        )
    }

    pub(super) fn is_primary(&self) -> bool {
        self.my_lba == PRIMARY_LBA
    }

    /// The sectors that partitions may use.
    pub(super) fn usable(&self) -> &RangeInclusive<u64> {
        &self.usable
    }

    /// Takes the bytes of [`Header::entries`].
    pub(super) fn read_entries<'a>(&self, bytes: &'a [u8]) -> Result<Entries<'a>> {
        if CRC32.checksum(bytes) != self.entries_crc {
            return Err(corrupt(format_args!(
                "the checksum of the entries in sector {} is wrong",
                self.entries_lba
            )));
        }
        Ok(Entries {
            bytes,
            entry_size: self.entry_size,
        })
    }
}

impl Entries<'_> {
    /// The entries in use.
    pub(super) fn iter(&self) -> impl Iterator<Item = Entry> {
        (1..)
            .zip(self.bytes.chunks_exact(self.entry_size))
            .filter_map(|(number, entry)| {
                let kind: [u8; 16] = entry.first_chunk().copied()?;
                (kind != [0; 16]).then(|| Entry {
                    number,
                    kind,
                    first: le64(entry, 0x20),
                    last: le64(entry, 0x28),
                })
            })
    }
}
