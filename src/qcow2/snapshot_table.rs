//! The snapshot table (qcow2 specification, "Snapshots"): what an image says of its internal snapshots.
//!
//! ```text
//! entry  0 L1 table │ 8 L1 entries │ 12, 14 lengths of ID and name │ 16 date │ 24 guest clock │ 32 VM state bytes
//!        36 length of the extra data │ 40 extra data │ ID │ name │ padding to a multiple of 8
//! extra  0 VM state bytes, 64 bits wide │ 8 disk size │ 16 instruction count │ 24 … unknown
//! ```
//!
//! # Invariants
//!
//! 1. Reading takes memory for what the entries hold, and they hold no more than stock QEMU's limits.
//! 2. Nothing that was read is lost by writing it back; entries written have the three known extra fields.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::geometry::to_usize;
use super::header::{Header, MAX_HOST_OFFSET, MAX_L1_TABLE_BYTES};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// The most snapshots, as in stock QEMU.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Bytes of the fixed part of an entry.
pub(super) const FIXED_LENGTH: usize = 40;

/// The most bytes of extra data in an entry, as in stock QEMU.
const MAX_EXTRA_DATA: usize = 1024;
/// The largest table in bytes, as in stock QEMU.
const MAX_TABLE: u64 = 64 << 20;
/// Bytes of the extra data whose meaning is known.
const KNOWN_EXTRA_DATA: usize = 24;
/// Entries start on multiples of this.
const ALIGNMENT: usize = 8;
/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// The instruction count of a snapshot that has none.
const NO_INSTRUCTION_COUNT: u64 = u64::MAX;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table lies, as it is written there.
    pub l1_table_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// What tells it from the image's other snapshots.
    pub id: OsString,
    /// What its maker called it; several may have one name.
    pub name: OsString,
    /// When it was taken: whole seconds since 1970.
    pub date_sec: u32,
    /// When it was taken: nanoseconds within the second.
    pub date_nsec: u32,
    /// How long the VM had run by then.
    pub vm_clock_nsec: u64,
    /// Bytes of the VM's state, which lies behind the disk in the snapshot's mapping; 0 for a disk alone.
    pub vm_state_size: u64,
    /// The disk's length in bytes, where the entry tells: then as now.
    pub disk_size: Option<u64>,
    /// Instructions that the VM had run by then, if they were counted.
    pub icount: Option<u64>,
    /// Extra data of unknown meaning.
    pub unknown_extra: Vec<u8>,
}

/// Reads the snapshots of the image in `storage`, in the order of their table.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a table beyond stock QEMU's limits; the storage's.
pub async fn read_snapshots(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let (snapshots, _) = read_table(storage, header).await?;
    Ok(snapshots)
}

/// As [`read_snapshots`], with the bytes that the table takes.
///
/// # Errors
/// As [`read_snapshots`].
pub(super) async fn read_table(
    storage: &dyn Storage,
    header: &Header,
) -> Result<(Vec<Snapshot>, u64)> {
    let mut reader = Reader::new(storage, header.snapshots_offset);
    let mut snapshots = Vec::new();
    for number in 0..header.nb_snapshots {
        snapshots.push(reader.entry(number).await?);
    }
    Ok((snapshots, reader.taken()))
}

/// The bytes that snapshots take up in an image's table.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for an ID or a name that is too long, [`ErrorKind::Unsupported`] for a table that is.
pub(super) fn encode_snapshots(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
    let mut table = Vec::new();
    for snapshot in snapshots {
        snapshot.encode(&mut table)?;
    }
    check_table_size(table.len() as u64)?;
    if snapshots.len() > MAX_SNAPSHOTS as usize {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the image has {MAX_SNAPSHOTS} snapshots, and cannot have more: delete some first"
            ),
        ));
    }
    Ok(table)
}

fn check_table_size(bytes: u64) -> Result<()> {
    if bytes <= MAX_TABLE {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "the snapshot table has more than {MAX_TABLE} bytes, which is the most that is supported"
        ),
    ))
}

impl Snapshot {
    /// The disk's length in bytes; entries that do not tell were made when the disk was as long as it is `now`.
    #[must_use]
    pub fn disk_size(&self, now: u64) -> u64 {
        self.disk_size.unwrap_or(now)
    }

    /// The header of the image that has this snapshot, made to lead to the disk as it was then; to read, not to write.
    ///
    /// # Errors
    /// As [`Snapshot::l1_table`], and [`ErrorKind::Corrupt`] for a table that is too short for the disk.
    pub(super) fn header(&self, image: &Header) -> Result<Header> {
        let (at, _) = self.l1_table(image.cluster_size())?;
        let mut header = image.clone();
        header.l1_table_offset = at;
        header.l1_size = self.l1_size;
        header.size = self.disk_size(image.virtual_size());
        if u64::from(header.l1_size) < header.l1_entries_for(header.size) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the L1 table of snapshot '{}' has {} entries, too few for its disk of {} bytes",
                    self.label(),
                    header.l1_size,
                    header.size
                ),
            ));
        }
        Ok(header)
    }

    /// Where its L1 table lies, and how long it is in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a table that breaks a rule of the format, [`ErrorKind::Unsupported`] for one that is
    /// larger than stock QEMU takes.
    pub(super) fn l1_table(&self, cluster_size: u64) -> Result<(HostOffset, u64)> {
        let (at, len) = (self.l1_table_offset, u64::from(self.l1_size) * 8);
        if len > MAX_L1_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the L1 table of snapshot '{}' has {len} bytes, and {MAX_L1_TABLE_BYTES} are supported at most",
                    self.label()
                ),
            ));
        }
        let misplaced = !at.0.is_multiple_of(cluster_size)
            || at.0 > MAX_HOST_OFFSET - len
            || (len > 0 && at.0 == 0);
        if misplaced {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the L1 table of snapshot '{}' cannot lie at {at:#x}",
                    self.label()
                ),
            ));
        }
        Ok((at, len))
    }

    /// Its ID, or its name where that says more, for messages: without characters that could forge lines.
    #[must_use]
    pub fn label(&self) -> String {
        let name = if self.name.is_empty() {
            &self.id
        } else {
            &self.name
        };
        printable(name)
    }

    fn encode(&self, table: &mut Vec<u8>) -> Result<()> {
        let length = |what: &str, text: &OsStr| {
            u16::try_from(text.len()).map_err(|_| {
                Error::new(
                    ErrorKind::InvalidConfig,
                    format!(
                        "the snapshot's {what} has {} bytes, and the format takes {} at most",
                        text.len(),
                        u16::MAX
                    ),
                )
            })
        };
        let (id_length, name_length) = (length("ID", &self.id)?, length("name", &self.name)?);
        let extra_length = KNOWN_EXTRA_DATA + self.unknown_extra.len();
        table.extend(self.l1_table_offset.0.to_be_bytes());
        table.extend(self.l1_size.to_be_bytes());
        table.extend(id_length.to_be_bytes());
        table.extend(name_length.to_be_bytes());
        table.extend(self.date_sec.to_be_bytes());
        table.extend(self.date_nsec.to_be_bytes());
        table.extend(self.vm_clock_nsec.to_be_bytes());
        // The narrow field cannot say more; the wide one among the extra data counts.
        table.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        table.extend(
            u32::try_from(extra_length)
                .unwrap_or(u32::MAX)
                .to_be_bytes(),
        );
        table.extend(self.vm_state_size.to_be_bytes());
        table.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        table.extend(self.icount.unwrap_or(NO_INSTRUCTION_COUNT).to_be_bytes());
        table.extend(&self.unknown_extra);
        table.extend(self.id.as_bytes());
        table.extend(self.name.as_bytes());
        table.resize(table.len().next_multiple_of(ALIGNMENT), 0);
        Ok(())
    }
}

/// A string from an image without control characters, which could forge lines of a listing.
#[must_use]
pub fn printable(text: &OsStr) -> String {
    text.to_string_lossy()
        .chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// Reads a table from its start to its end, in chunks.
struct Reader<'a> {
    storage: &'a dyn Storage,
    start: HostOffset,
    /// Bytes read so far, from `start` on.
    read: u64,
    /// The last of them, which have not been taken yet.
    ahead: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(storage: &'a dyn Storage, start: HostOffset) -> Self {
        Self {
            storage,
            start,
            read: 0,
            ahead: Vec::new(),
        }
    }

    /// Bytes taken so far.
    fn taken(&self) -> u64 {
        self.read - self.ahead.len() as u64
    }

    /// The next `len` bytes.
    async fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        while self.ahead.len() < len {
            // Invariant 1: what was taken counts, and not what a chunk reads ahead.
            check_table_size(self.taken() + len as u64)?;
            let chunk = IoBuf::zeroed(CHUNK);
            let at = HostOffset(self.start.0 + self.read);
            self.storage.readv(at, chunk.clone()).await?;
            self.read += CHUNK as u64;
            self.ahead.extend(chunk.to_vec());
        }
        let rest = self.ahead.split_off(len);
        Ok(std::mem::replace(&mut self.ahead, rest))
    }

    async fn entry(&mut self, number: u32) -> Result<Snapshot> {
        let fixed = self.take(FIXED_LENGTH).await?;
        let extra_length = to_usize(u64::from(u32_at(&fixed, 36)));
        if extra_length > MAX_EXTRA_DATA {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "entry {number} of the snapshot table has {extra_length} bytes of extra data, and {MAX_EXTRA_DATA} \
                     are supported at most"
                ),
            ));
        }
        let id_length = usize::from(u16_at(&fixed, 12));
        let name_length = usize::from(u16_at(&fixed, 14));
        let length = FIXED_LENGTH + extra_length + id_length + name_length;
        let padded = length.next_multiple_of(ALIGNMENT);
        let mut rest = self.take(padded - FIXED_LENGTH).await?;
        rest.truncate(length - FIXED_LENGTH);
        let mut text = rest.split_off(extra_length);
        let name = text.split_off(id_length);
        let extra = rest;
        let extra_field = |at: usize| (extra.len() >= at + 8).then(|| u64_at(&extra, at));
        Ok(Snapshot {
            l1_table_offset: HostOffset(u64_at(&fixed, 0)),
            l1_size: u32_at(&fixed, 8),
            id: OsString::from_vec(text),
            name: OsString::from_vec(name),
            date_sec: u32_at(&fixed, 16),
            date_nsec: u32_at(&fixed, 20),
            vm_clock_nsec: u64_at(&fixed, 24),
            vm_state_size: extra_field(0).unwrap_or_else(|| u32_at(&fixed, 32).into()),
            disk_size: extra_field(8),
            icount: extra_field(16).filter(|count| *count != NO_INSTRUCTION_COUNT),
            unknown_extra: extra.get(KNOWN_EXTRA_DATA..).unwrap_or_default().to_vec(),
        })
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(field(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Version;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    const TABLE_AT: usize = 0x1000;

    fn snapshot(id: &str, name: &str) -> Snapshot {
        Snapshot {
            l1_table_offset: HostOffset(0x5_0000),
            l1_size: 3,
            id: id.into(),
            name: name.into(),
            date_sec: 1_795_180_333,
            date_nsec: 499_005_000,
            vm_clock_nsec: 7,
            vm_state_size: 5 << 32,
            disk_size: Some(1 << 30),
            icount: Some(9),
            unknown_extra: Vec::new(),
        }
    }

    fn read(table: &[u8], count: u32) -> Result<Vec<Snapshot>> {
        let mut bytes = vec![0; TABLE_AT];
        bytes.extend(table);
        let mut header = Header::new(Version::V3, 12, 1 << 30);
        header.nb_snapshots = count;
        header.snapshots_offset = HostOffset(TABLE_AT as u64);
        block_on(read_snapshots(&MemoryStorage::new(bytes), &header))
    }

    #[test]
    fn nothing_is_lost_in_a_round_trip() {
        let mut odd = snapshot("17", "a name whose length is odd");
        odd.unknown_extra = b"from the future".to_vec();
        odd.icount = None;
        odd.vm_state_size = 12;
        let long = snapshot("1", &"n".repeat(65535));
        let all = vec![snapshot("1", ""), odd, long, snapshot("2", "last")];
        let table = encode_snapshots(&all).unwrap();
        assert!(table.len().is_multiple_of(8));
        assert_eq!(read(&table, 4).unwrap(), all);
    }

    #[test]
    fn entries_without_extra_data_have_the_narrow_vm_state_size_and_no_disk_size() {
        let mut table = vec![0; 40];
        table[8..12].copy_from_slice(&3u32.to_be_bytes());
        table[13] = 1;
        table[32..36].copy_from_slice(&77u32.to_be_bytes());
        table.extend(b"4\0\0\0\0\0\0\0");
        let found = read(&table, 1).unwrap().remove(0);
        assert_eq!((found.vm_state_size, found.disk_size), (77, None));
        assert_eq!(found.disk_size(4096), 4096);
        assert_eq!((found.id.as_bytes(), found.l1_size), (&b"4"[..], 3));
        // Extra data that ends within a field does not have it.
        table[36..40].copy_from_slice(&12u32.to_be_bytes());
        table.truncate(40);
        table.extend(9u64.to_be_bytes());
        table.extend([1; 4]);
        table.extend(b"4\0\0\0");
        let found = read(&table, 1).unwrap().remove(0);
        assert_eq!((found.vm_state_size, found.disk_size), (9, None));
    }

    #[test]
    fn tables_beyond_the_limits_are_refused_with_the_reason() {
        let mut entry = encode_snapshots(&[snapshot("1", "one")]).unwrap();
        entry[36..40].copy_from_slice(&1025u32.to_be_bytes());
        let error = read(&entry, 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(
            error.to_string().contains("1025 bytes of extra data"),
            "{error}"
        );
        // Names of 64 KiB each: the 1024th entry leaves the limit.
        let mut large = vec![0; 40];
        large[14..16].copy_from_slice(&[0xff, 0xff]);
        large.resize((40 + 65535usize).next_multiple_of(8), 0);
        let error = read(&large.repeat(1030), 1030).unwrap_err();
        assert!(error.to_string().contains("67108864 bytes"), "{error}");
        let error = encode_snapshots(&[snapshot("1", &"n".repeat(65536))]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }

    #[test]
    fn there_are_no_more_snapshots_than_stock_tools_take() {
        let mut all = vec![snapshot("1", ""); MAX_SNAPSHOTS as usize];
        assert!(encode_snapshots(&all).is_ok());
        all.push(snapshot("2", ""));
        let error = encode_snapshots(&all).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn an_l1_table_has_to_be_aligned_and_within_limits() {
        let mut one = snapshot("1", "one");
        assert_eq!(one.l1_table(1 << 16).unwrap(), (HostOffset(0x5_0000), 24));
        for (at, entries) in [(0x5_0200, 3), (0, 3), (1 << 56, 3), (0x5_0000, 5 << 20)] {
            one.l1_table_offset = HostOffset(at);
            one.l1_size = entries;
            let error = one.l1_table(1 << 16).unwrap_err();
            assert!(error.to_string().contains("snapshot 'one'"), "{error}");
        }
    }
}
