//! Reading a disk's partition table, whichever it is.

use super::gpt::{self, Entries, Header};
use super::mbr::{self, Chain};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{GuestOffset, SECTOR_SIZE};

/// What a partition table says a partition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionKind {
    /// The type byte of an MBR partition.
    Mbr(u8),
    /// The type GUID of a GPT partition, as it is on disk.
    Gpt([u8; 16]),
}

/// One partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number as the kernel counts: 1 to 4 for an MBR's primary ones, from 5 on for logical ones, and the place
    /// in the table for a GPT.
    pub number: u32,
    /// Its first byte.
    pub start: GuestOffset,
    /// Its length in bytes.
    pub len: u64,
    /// What it is for.
    pub kind: PartitionKind,
}

/// Where a scan stands: what it waits for.
#[derive(Debug)]
enum State {
    /// The first sector.
    Mbr,
    /// A sector of the chain of logical partitions.
    Logical(Chain),
    /// The GPT header at the disk's start.
    PrimaryHeader,
    /// The GPT header at the disk's end, because the first copy is damaged as told.
    BackupHeader(Error),
    /// The entries of this header; if it is the primary, damage sends the scan to the backup.
    Entries(Header),
    Done,
}

/// A scan of one disk's partition table.
#[derive(Debug)]
pub struct Scan {
    disk_len: u64,
    state: State,
    found: Vec<Partition>,
}

impl Scan {
    /// Begins a scan of a disk of `disk_len` bytes.
    #[must_use]
    pub fn new(disk_len: u64) -> Self {
        let state = if disk_len < SECTOR_SIZE {
            State::Done
        } else {
            State::Mbr
        };
        Self {
            disk_len,
            state,
            found: Vec::new(),
        }
    }

    /// The bytes to hand to [`Scan::supply`] next: where and how many; `None` once the scan is complete.
    #[must_use]
    pub fn next_read(&self) -> Option<(GuestOffset, usize)> {
        match &self.state {
            State::Mbr => Some((GuestOffset(0), mbr::SECTOR)),
            State::Logical(chain) => Some((chain.next_sector(), mbr::SECTOR)),
            State::PrimaryHeader => Some((GuestOffset(SECTOR_SIZE), mbr::SECTOR)),
            State::BackupHeader(_) => {
                Some((GuestOffset(self.last_sector() * SECTOR_SIZE), mbr::SECTOR))
            }
            State::Entries(header) => Some(header.entries()),
            State::Done => None,
        }
    }

    /// Takes the bytes of [`Scan::next_read`].
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if they break the rules of a partition table (of a GPT, if neither copy keeps them),
    /// [`ErrorKind::OutOfBounds`] if they are not as many as asked for.
    pub fn supply(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some((_, len)) = self.next_read()
            && bytes.len() != len
        {
            return Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "{} bytes of a partition table instead of {len}",
                    bytes.len()
                ),
            ));
        }
        match std::mem::replace(&mut self.state, State::Done) {
            State::Mbr => self.take_mbr(bytes),
            State::Logical(chain) => self.take_logical(chain, bytes),
            State::PrimaryHeader => {
                self.state = match Header::parse(bytes, 1, self.last_sector()) {
                    Ok(header) => State::Entries(header),
                    Err(error) => self.backup_or_done(error)?,
                };
                Ok(())
            }
            State::BackupHeader(primary) => {
                let header = Header::parse(bytes, self.last_sector(), self.last_sector()).map_err(
                    |error| primary.context(format!("{error}, and so is the first copy")),
                )?;
                self.state = State::Entries(header);
                Ok(())
            }
            State::Entries(header) => match header.read_entries(bytes) {
                Ok(entries) => self.take_entries(&header, &entries),
                Err(error) if header.is_primary() => {
                    self.state = self.backup_or_done(error)?;
                    Ok(())
                }
                Err(error) => Err(error),
            },
            State::Done => Ok(()),
        }
    }

    /// The partitions in the order of their numbers: none if the disk has no partition table.
    ///
    /// # Panics
    /// If the scan is not complete.
    #[must_use]
    pub fn finish(self) -> Vec<Partition> {
        assert!(matches!(self.state, State::Done), "the scan is complete");
        self.found
    }

    fn last_sector(&self) -> u64 {
        (self.disk_len / SECTOR_SIZE).saturating_sub(1)
    }

    /// The state after a damaged first copy of a GPT.
    fn backup_or_done(&self, error: Error) -> Result<State> {
        if self.last_sector() <= 1 {
            return Err(error);
        }
        Ok(State::BackupHeader(error))
    }

    fn take_mbr(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(entries) = mbr::parse(bytes) else {
            return Ok(());
        };
        if entries.iter().any(|entry| entry.kind == mbr::PROTECTIVE) {
            self.state = if self.last_sector() >= 1 {
                State::PrimaryHeader
            } else {
                State::Done
            };
            return Ok(());
        }
        for (number, entry) in (1..).zip(&entries) {
            if entry.is_empty() {
                continue;
            }
            if entry.is_extended() {
                // The kernel follows the first one.
                if matches!(self.state, State::Done) {
                    self.state = State::Logical(Chain::new(entry, self.disk_len)?);
                }
                continue;
            }
            self.add(
                number,
                u64::from(entry.first),
                u64::from(entry.sectors),
                PartitionKind::Mbr(entry.kind),
            )?;
        }
        Ok(())
    }

    fn take_logical(&mut self, mut chain: Chain, bytes: &[u8]) -> Result<()> {
        let logical = chain.supply(bytes)?;
        if let Some((number, first, sectors, kind)) = logical {
            self.add(number, first, sectors, PartitionKind::Mbr(kind))?;
        }
        if !chain.is_complete() {
            self.state = State::Logical(chain);
        }
        Ok(())
    }

    fn take_entries(&mut self, header: &Header, entries: &Entries) -> Result<()> {
        for entry in entries.iter() {
            if !header.usable().contains(&entry.first) || !header.usable().contains(&entry.last) {
                return Err(gpt::corrupt(format_args!(
                    "partition {} from sector {} to {} leaves the usable ones",
                    entry.number, entry.first, entry.last
                )));
            }
            let sectors = (entry.last + 1).checked_sub(entry.first).ok_or_else(|| {
                gpt::corrupt(format_args!(
                    "partition {} ends before it begins",
                    entry.number
                ))
            })?;
            self.add(
                entry.number,
                entry.first,
                sectors,
                PartitionKind::Gpt(entry.kind),
            )?;
        }
        Ok(())
    }

    /// Adds a partition, in sectors, if it lies inside the disk and overlaps no other.
    fn add(&mut self, number: u32, first: u64, sectors: u64, kind: PartitionKind) -> Result<()> {
        let inside = first
            .checked_add(sectors)
            .and_then(|end| end.checked_mul(SECTOR_SIZE))
            .filter(|end| *end <= self.disk_len && first > 0 && sectors > 0);
        let Some(end) = inside else {
            return Err(corrupt(format_args!(
                "partition {number} ({sectors} sectors from {first} on) does not lie inside the disk"
            )));
        };
        let start = first * SECTOR_SIZE;
        for other in &self.found {
            if start < other.start.0 + other.len && other.start.0 < end {
                return Err(corrupt(format_args!(
                    "partitions {} and {number} overlap",
                    other.number
                )));
            }
        }
        self.found.push(Partition {
            number,
            start: GuestOffset(start),
            len: end - start,
            kind,
        });
        Ok(())
    }
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("partition table: {what}"))
}
