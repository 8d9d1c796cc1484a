//! Persistent bitmaps (qcow2 specification, "Bitmaps"): the directory, its entries, and the tables they lead to.
//!
//! ```text
//! header extension ─> directory: entry │ entry │ …        each entry ─> bitmap table ─> clusters of bits
//!   entry  0 table offset │ 8 table entries │ 12 flags │ 16 type │ 17 granularity bits │ 18 name length │
//!          20 extra data length │ 24 extra data, name, zeros up to a multiple of 8
//!   table  63…56 0 │ 55…9 host offset │ 8…1 0 │ 0 without an offset: all bits are ones
//! ```
//!
//! # Invariants
//!
//! 1. Nothing here keeps bitmaps up to date. So those that shall record every write are durably marked as *in use*
//!    before the first write, and whoever opens the image later does not trust them. Their clusters stay theirs, and
//!    so the feature bit stays set: the directory is as consistent as it was.
//! 2. What is read obeys the format's rules and stock QEMU's limits; reading is bounded by them and by the file's
//!    length.

use super::features::AutoclearFeatures;
use super::header::{Header, MAX_HOST_OFFSET};
use super::header_extension::ExtensionType;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// Bytes of the header extension.
const EXTENSION_LEN: usize = 24;
/// Bytes of an entry without extra data and name.
const ENTRY_LEN: usize = 24;
/// Entries are aligned to this.
const ENTRY_ALIGNMENT: usize = 8;
/// Where an entry has its flags.
const FLAGS_AT: u64 = 12;

/// The bitmap may be out of date: it tells nothing then.
const IN_USE: u32 = 1;
/// The bitmap is to be kept up to date by whoever writes.
const AUTO: u32 = 1 << 1;
/// Whoever does not know the bitmap's extra data may still use it.
const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
/// A bitmap of what was written to.
const DIRTY_TRACKING: u8 = 1;

/// The most bitmaps, as in stock QEMU.
const MAX_BITMAPS: u32 = 65535;
/// The largest directory in bytes, as in stock QEMU.
const MAX_DIRECTORY_LEN: u64 = 1024 * 65535;
/// The longest name in bytes, as in stock QEMU.
const MAX_NAME_LEN: u16 = 1023;
/// The largest granularity's logarithm.
const MAX_GRANULARITY_BITS: u8 = 63;
/// Bytes of all clusters of bits of one bitmap at most, as in stock QEMU.
const MAX_BITMAP_LEN: u64 = 512 << 20;

/// Bits 9 to 55 of a table's entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The bitmaps of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// Where the directory lies.
    pub at: HostOffset,
    /// Its bytes.
    pub len: u64,
    /// The bitmaps, in its order.
    pub bitmaps: Vec<Bitmap>,
}

/// A bitmap as its entry in the directory tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// The name; what is not UTF-8 is replaced.
    pub name: String,
    /// Bytes of the disk for each bit.
    pub granularity: u64,
    /// Whether whoever writes has to keep it up to date.
    pub is_auto: bool,
    /// Whether it may be out of date: it tells nothing then.
    pub is_in_use: bool,
    /// Where its table lies.
    pub table_at: HostOffset,
    /// Entries of the table, 8 bytes each: one for every cluster of bits.
    pub table_entries: u32,
    /// Its flags as they are stored.
    flags: u32,
    /// Where its entry lies.
    entry_at: HostOffset,
}

/// What a bitmap can become untrue by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Writes: to those bitmaps that shall record them. The others tell of an earlier time.
    Contents,
    /// Another size of the disk: all bitmaps are as large as it is.
    Size,
}

/// What an entry of a bitmap's table says of a cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All bits are zeros.
    Zeros,
    /// All bits are ones.
    Ones,
    /// The bits are in the cluster there.
    Stored(HostOffset),
}

impl BitmapDirectory {
    /// Where the directory lies, and its bytes, as the header says; `None` if there is none, or the feature bit does
    /// not vouch for it: a program that does not know bitmaps has written to the image then, and the directory is
    /// none any more.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the header extension breaks a rule.
    pub fn place(header: &Header) -> Result<Option<(HostOffset, u64)>> {
        Ok(Extension::of(header)?.map(|extension| (extension.at, extension.len)))
    }

    /// Reads the directory of an image with this header, as [`BitmapDirectory::place`] finds it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the header extension or an entry breaks a rule; the storage's.
    pub async fn read(storage: &dyn Storage, header: &Header) -> Result<Option<Self>> {
        let Some(extension) = Extension::of(header)? else {
            return Ok(None);
        };
        let end = storage.len().next_multiple_of(header.cluster_size());
        if extension.at.0 + extension.len > end {
            return corrupt("the bitmap directory leaves the file");
        }
        let bytes = read_bytes(storage, extension.at, extension.len).await?;
        let mut bitmaps = Vec::new();
        let mut rest = bytes.as_slice();
        let mut table_bytes = 0;
        for _ in 0..extension.count {
            let entry_at = HostOffset(extension.at.0 + (bytes.len() - rest.len()) as u64);
            let (bitmap, behind) = Bitmap::parse(rest, entry_at, header)?;
            table_bytes += bitmap.table_len();
            bitmaps.push(bitmap);
            rest = behind;
        }
        if !rest.is_empty() {
            return corrupt(format!(
                "{} bytes follow the last bitmap's entry",
                rest.len()
            ));
        }
        // Tables of their own fit into the file; others would take for ever to read.
        if table_bytes > end {
            return corrupt("the tables of the bitmaps are longer than the file");
        }
        Ok(Some(Self {
            at: extension.at,
            len: extension.len,
            bitmaps,
        }))
    }

    /// Bytes of directory, tables and clusters of these bitmaps in an image with clusters of `cluster_size`, if every
    /// bit for a disk of `size` bytes has to be stored. Those that may be out of date are nothing to store.
    #[must_use]
    pub fn full_length(&self, size: u64, cluster_size: u64) -> u64 {
        let mut bytes = 0;
        let mut directory = 0;
        for bitmap in self.bitmaps.iter().filter(|bitmap| !bitmap.is_in_use) {
            let clusters = size
                .div_ceil(bitmap.granularity)
                .div_ceil(8)
                .div_ceil(cluster_size);
            let table = (clusters * 8).next_multiple_of(cluster_size);
            bytes += clusters * cluster_size + table;
            let entry = (ENTRY_LEN + bitmap.name.len()).next_multiple_of(ENTRY_ALIGNMENT);
            directory += entry as u64;
        }
        bytes + directory.next_multiple_of(cluster_size)
    }

    /// Marks the bitmaps that `change` makes untrue as ones that may be out of date (invariant 1). Not durable before
    /// a flush.
    ///
    /// # Errors
    /// The storage's. Some may be marked then, which harms nothing.
    pub(super) async fn mark_in_use(&self, storage: &dyn Storage, change: Change) -> Result<()> {
        let is_concerned = |bitmap: &&Bitmap| bitmap.is_auto || change == Change::Size;
        let concerned = self.bitmaps.iter().filter(is_concerned);
        for bitmap in concerned.filter(|bitmap| !bitmap.is_in_use) {
            let flags = (bitmap.flags | IN_USE).to_be_bytes();
            let at = HostOffset(bitmap.entry_at.0 + FLAGS_AT);
            storage.writev(at, IoBuf::from_bytes(&flags)).await?;
        }
        Ok(())
    }
}

/// The header extension.
struct Extension {
    count: u32,
    at: HostOffset,
    len: u64,
}

impl Extension {
    fn of(header: &Header) -> Result<Option<Self>> {
        let is_valid = header
            .autoclear_features
            .contains(AutoclearFeatures::BITMAPS);
        let data = header
            .extension(ExtensionType::BITMAPS)
            .filter(|_| is_valid);
        let Some(data) = data else {
            return Ok(None);
        };
        let whole = <&[u8; EXTENSION_LEN]>::try_from(data);
        let Ok([c0, c1, c2, c3, r0, r1, r2, r3, rest @ ..]) = whole else {
            return corrupt(format!(
                "the header extension for bitmaps has {} bytes, and not {EXTENSION_LEN}",
                data.len()
            ));
        };
        let count = u32::from_be_bytes([*c0, *c1, *c2, *c3]);
        let reserved = u32::from_be_bytes([*r0, *r1, *r2, *r3]);
        let (words, _) = rest.as_chunks::<8>();
        let mut words = words.iter().map(|word| u64::from_be_bytes(*word));
        let len = words.next().unwrap_or(0);
        let at = words.next().unwrap_or(0);
        if reserved != 0 {
            return corrupt("the header extension for bitmaps has reserved bits set");
        }
        if count == 0 || count > MAX_BITMAPS {
            return corrupt(format!(
                "the image has {count} bitmaps, and 1 to {MAX_BITMAPS} can be"
            ));
        }
        if len == 0 || len > MAX_DIRECTORY_LEN {
            return corrupt(format!(
                "the bitmap directory has {len} bytes, and 1 to {MAX_DIRECTORY_LEN} can be"
            ));
        }
        let at = check_place("the bitmap directory", at, header)?;
        Ok(Some(Self { count, at, len }))
    }
}

impl Bitmap {
    /// Reads the entry at the beginning of `bytes`, which lie at `entry_at`; returns it with what follows it.
    fn parse<'a>(
        bytes: &'a [u8],
        entry_at: HostOffset,
        header: &Header,
    ) -> Result<(Self, &'a [u8])> {
        let Some((fixed, rest)) = bytes.split_first_chunk::<ENTRY_LEN>() else {
            return corrupt("the bitmap directory ends inside an entry");
        };
        let [
            o0,
            o1,
            o2,
            o3,
            o4,
            o5,
            o6,
            o7,
            s0,
            s1,
            s2,
            s3,
            f0,
            f1,
            f2,
            f3,
            kind,
            bits,
            n0,
            n1,
            x0,
            x1,
            x2,
            x3,
        ] = *fixed;
        let name_len = u16::from_be_bytes([n0, n1]);
        let extra_len = u32::from_be_bytes([x0, x1, x2, x3]);
        let end = "the bitmap directory ends inside an entry";
        let extra_len = usize::try_from(extra_len).unwrap_or(usize::MAX);
        let Some((_, rest)) = rest.split_at_checked(extra_len) else {
            return corrupt(end);
        };
        let Some((name, _)) = rest.split_at_checked(name_len.into()) else {
            return corrupt(end);
        };
        if !(1..=MAX_NAME_LEN).contains(&name_len) {
            return corrupt(format!(
                "a bitmap's name has {name_len} bytes, and 1 to {MAX_NAME_LEN} can be"
            ));
        }
        let name = String::from_utf8_lossy(name).into_owned();
        let broken = |what: String| corrupt(format!("the bitmap {name:?} {what}"));
        if kind != DIRTY_TRACKING {
            return broken(format!("is of the unknown type {kind}"));
        }
        let flags = u32::from_be_bytes([f0, f1, f2, f3]);
        if flags & !(IN_USE | AUTO | EXTRA_DATA_COMPATIBLE) != 0 {
            return broken(format!("has reserved flags set: {flags:#x}"));
        }
        if bits > MAX_GRANULARITY_BITS {
            return broken(format!(
                "has a granularity of 2 to the power of {bits} bytes"
            ));
        }
        let table_entries = u32::from_be_bytes([s0, s1, s2, s3]);
        if table_entries == 0 || u64::from(table_entries) * header.cluster_size() > MAX_BITMAP_LEN {
            return broken(format!("has a table of {table_entries} entries"));
        }
        let table_at = u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
        let table_at = check_place("a bitmap's table", table_at, header)?;
        let len = (ENTRY_LEN + extra_len + name.len()).next_multiple_of(ENTRY_ALIGNMENT);
        let Some(behind) = bytes.get(len..) else {
            return corrupt(end);
        };
        let bitmap = Self {
            granularity: 1 << bits,
            is_auto: flags & AUTO != 0,
            is_in_use: flags & IN_USE != 0,
            table_at,
            table_entries,
            flags,
            entry_at,
            name,
        };
        Ok((bitmap, behind))
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_len(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// Reads the table: what each of its entries says, or [`ErrorKind::Corrupt`] in place of one that breaks a rule.
    ///
    /// # Errors
    /// The storage's.
    pub async fn read_table(
        &self,
        storage: &dyn Storage,
        header: &Header,
    ) -> Result<Vec<Result<BitmapCluster>>> {
        let bytes = read_bytes(storage, self.table_at, self.table_len()).await?;
        let (words, _) = bytes.as_chunks::<8>();
        let decode = |word: &[u8; 8]| self.decode(u64::from_be_bytes(*word), header);
        Ok(words.iter().map(decode).collect())
    }

    fn decode(&self, word: u64, header: &Header) -> Result<BitmapCluster> {
        let is_broken = match word & OFFSET {
            0 => word > 1,
            offset => word != offset || !offset.is_multiple_of(header.cluster_size()),
        };
        if is_broken {
            return corrupt(format!(
                "the bitmap {:?} has an entry {word:#x} in its table",
                self.name
            ));
        }
        Ok(match word {
            0 => BitmapCluster::Zeros,
            1 => BitmapCluster::Ones,
            at => BitmapCluster::Stored(HostOffset(at)),
        })
    }
}

/// Checks that a table may lie at `at`.
fn check_place(what: &str, at: u64, header: &Header) -> Result<HostOffset> {
    if at == 0 || !at.is_multiple_of(header.cluster_size()) || at >= MAX_HOST_OFFSET {
        return corrupt(format!("{what} cannot lie at {at:#x}"));
    }
    Ok(HostOffset(at))
}

async fn read_bytes(storage: &dyn Storage, at: HostOffset, len: u64) -> Result<Vec<u8>> {
    let buf = IoBuf::zeroed(super::geometry::to_usize(len));
    storage.readv(at, buf.clone()).await?;
    Ok(buf.to_vec())
}

fn corrupt<T>(what: impl Into<Box<str>>) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::Version;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const CLUSTER: usize = 65536;
    /// The directory is in cluster 1, the bitmaps' tables are in clusters 2 and 3.
    const DIRECTORY: usize = CLUSTER;

    /// Two entries: `a`, with 4 bytes of extra data, and `second`.
    fn directory() -> Vec<u8> {
        let mut bytes = Vec::new();
        for (table, flags, bits, extra, name) in [
            (2u64, AUTO, 16, [1u8; 4].as_slice(), "a"),
            (3, EXTRA_DATA_COMPATIBLE, 9, &[], "second"),
        ] {
            bytes.extend((table * CLUSTER as u64).to_be_bytes());
            bytes.extend(2u32.to_be_bytes());
            bytes.extend(flags.to_be_bytes());
            bytes.extend([DIRTY_TRACKING, bits]);
            bytes.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
            bytes.extend(u32::try_from(extra.len()).unwrap().to_be_bytes());
            bytes.extend(extra);
            bytes.extend(name.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes
    }

    fn image(directory: &[u8]) -> MemoryStorage {
        let mut bytes = vec![0; 5 * CLUSTER];
        bytes[DIRECTORY..][..directory.len()].copy_from_slice(directory);
        bytes[2 * CLUSTER + 7] = 1;
        bytes[2 * CLUSTER + 13] = 4;
        bytes[3 * CLUSTER + 7] = 2;
        MemoryStorage::new(bytes)
    }

    fn extension(len: usize) -> Vec<u8> {
        let mut data = vec![0, 0, 0, 2, 0, 0, 0, 0];
        data.extend((len as u64).to_be_bytes());
        data.extend((DIRECTORY as u64).to_be_bytes());
        data
    }

    fn header(extension: Vec<u8>) -> Header {
        let mut header = Header::new(Version::V3, 16, 1 << 30);
        header.autoclear_features = AutoclearFeatures::BITMAPS;
        header.with_extension(ExtensionType::BITMAPS, extension)
    }

    fn read(extension: Vec<u8>, directory: &[u8]) -> Result<Option<BitmapDirectory>> {
        block_on(BitmapDirectory::read(&image(directory), &header(extension)))
    }

    #[test]
    fn entries_of_every_length_are_read_and_lead_to_their_tables() {
        let directory = directory();
        let header = header(extension(directory.len()));
        let storage = image(&directory);
        let found = block_on(BitmapDirectory::read(&storage, &header))
            .unwrap()
            .unwrap();
        let [a, second] = found.bitmaps.as_slice() else {
            panic!("two bitmaps");
        };
        assert_eq!(
            (a.name.as_str(), a.granularity, a.is_auto),
            ("a", 65536, true)
        );
        assert_eq!((second.name.as_str(), second.granularity), ("second", 512));
        assert!(!second.is_auto && !second.is_in_use);
        let table = block_on(a.read_table(&storage, &header)).unwrap();
        let clusters: Vec<_> = table.into_iter().map(Result::unwrap).collect();
        let stored = BitmapCluster::Stored(HostOffset(4 * CLUSTER as u64));
        assert_eq!(clusters, [BitmapCluster::Ones, stored]);
        let table = block_on(second.read_table(&storage, &header)).unwrap();
        assert_eq!(table[0].as_ref().unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(*table[1].as_ref().unwrap(), BitmapCluster::Zeros);
    }

    #[test]
    fn writes_make_automatic_bitmaps_untrue_and_another_size_all() {
        for (change, expected) in [
            (Change::Contents, [true, false]),
            (Change::Size, [true, true]),
        ] {
            let directory = directory();
            let header = header(extension(directory.len()));
            let storage = image(&directory);
            let read = || {
                block_on(BitmapDirectory::read(&storage, &header))
                    .unwrap()
                    .unwrap()
            };
            block_on(read().mark_in_use(&storage, change)).unwrap();
            let found: Vec<_> = read()
                .bitmaps
                .iter()
                .map(|bitmap| bitmap.is_in_use)
                .collect();
            assert_eq!(found, expected);
            assert!(read().bitmaps[0].is_auto, "the other flags stay");
        }
    }

    #[test]
    fn a_directory_that_the_feature_bit_does_not_vouch_for_is_none() {
        let directory = directory();
        let mut header = header(extension(directory.len()));
        header.autoclear_features = AutoclearFeatures::default();
        let found = block_on(BitmapDirectory::read(&image(&directory), &header));
        assert_eq!(found.unwrap(), None);
    }

    #[test]
    fn whatever_breaks_a_rule_is_corrupt() {
        let whole = directory();
        let with = |at: usize, value: u8| {
            let mut bytes = whole.clone();
            bytes[at] = value;
            bytes
        };
        for (what, directory) in [
            ("table in no cluster", with(5, 0)),
            ("unaligned table", with(7, 1)),
            ("table beyond 56 bits", with(0, 1)),
            ("table of no entries", with(11, 0)),
            ("table longer than a bitmap may be", with(9, 1)),
            ("reserved flag", with(15, 8)),
            ("unknown type", with(16, 2)),
            ("granularity", with(17, 64)),
            ("no name", with(19, 0)),
            ("long name", with(18, 4)),
            ("extra data", with(20, 1)),
        ] {
            let error = read(extension(directory.len()), &directory).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}");
        }
        let with = |at: usize, value: u8| {
            let mut bytes = extension(whole.len());
            bytes[at] = value;
            bytes
        };
        for (what, extension) in [
            ("no bitmaps", with(3, 0)),
            ("one bitmap less", with(3, 1)),
            ("one bitmap more", with(3, 3)),
            ("too many bitmaps", with(0, 1)),
            ("reserved bits", with(7, 1)),
            ("directory beyond the file", with(13, 8)),
            ("directory beyond all limits", with(8, 1)),
            ("unaligned directory", with(23, 8)),
            ("directory in the header", with(21, 0)),
            ("too short", extension(whole.len())[..16].to_vec()),
        ] {
            let error = read(extension, &whole).expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}");
        }
        // Before anything is read or allocated.
        for (what, extension, told) in [
            ("no bitmaps", with(3, 0), "has 0 bitmaps"),
            ("too many bitmaps", with(0, 1), "has 16777218 bitmaps"),
            ("directory beyond all limits", with(12, 16), "can be"),
            ("directory beyond the file", with(13, 8), "leaves the file"),
        ] {
            let error = read(extension, &whole).expect_err(what);
            assert!(error.to_string().contains(told), "{what}: {error}");
        }
    }

    /// They would take for ever to read.
    #[test]
    fn tables_that_are_longer_than_the_file_are_corrupt() {
        let mut entry = directory()[..32].to_vec();
        entry[8..12].copy_from_slice(&8192u32.to_be_bytes());
        for (entries, fits) in [(5, true), (6, false)] {
            let directory = entry.repeat(entries);
            let mut extension = extension(directory.len());
            extension[3] = u8::try_from(entries).unwrap();
            assert_eq!(read(extension, &directory).is_ok(), fits, "{entries}");
        }
    }

    #[test]
    fn damage_of_any_kind_is_an_error_at_worst() {
        let mut rng = StdRng::seed_from_u64(5);
        for _ in 0..2000 {
            let mut directory = directory();
            let mut extension = extension(directory.len());
            for _ in 0..rng.random_range(0..4) {
                let at = rng.random_range(0..directory.len());
                directory[at] = rng.random();
            }
            if rng.random_bool(0.3) {
                let at = rng.random_range(0..extension.len());
                extension[at] = rng.random();
            }
            let storage = image(&directory);
            let header = header(extension);
            if let Ok(Some(found)) = block_on(BitmapDirectory::read(&storage, &header)) {
                for bitmap in found.bitmaps {
                    block_on(bitmap.read_table(&storage, &header)).unwrap();
                }
            }
        }
    }
}
