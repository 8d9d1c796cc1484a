//! Reading and checking a header (qcow2 specification, "Header"): invariant 1 of [`super::header`].

use std::ffi::OsString;
use std::ops::{Range, RangeInclusive};
use std::os::unix::ffi::OsStringExt;

use super::features::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use super::header::{
    CompressionType, Header, MAGIC, MAX_BACKING_NAME, MAX_HOST_OFFSET, MAX_L1_TABLE_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, V2_LENGTH, V3_LENGTH, Version,
};
use super::header_extension::HeaderExtensions;
use super::snapshot_table::{FIXED_LENGTH, MAX_SNAPSHOTS};
use crate::error::{Error, ErrorKind, Result};
use crate::units::HostOffset;

/// Cluster sizes are 2 to the power of this: 512 bytes to 2 MiB.
const CLUSTER_BITS: RangeInclusive<u32> = 9..=21;
/// With extended L2 entries at least 16 KiB, so that a subcluster has 512 bytes.
const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;
/// Refcounts are 1 to 64 bits wide.
const MAX_REFCOUNT_ORDER: u32 = 6;

impl Header {
    /// Reads and checks the header in an image's first cluster.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where it breaks a rule of the format, [`ErrorKind::Unsupported`] for another
    /// version or compression type, or a size beyond stock QEMU's limits.
    pub fn parse(cluster: &[u8]) -> Result<Self> {
        let (mut header, lengths) = parse_fixed_fields(cluster)?;
        let cluster_size = header.cluster_size();
        let header_length = u64::from(lengths.header);
        if header_length > cluster_size {
            return corrupt(format!(
                "a header of {header_length} bytes leaves the first cluster"
            ));
        }
        let additional = u64::from(V3_LENGTH).min(header_length)..header_length;
        if header.version == Version::V3 {
            header.additional_fields = bytes_of(cluster, additional)?.to_vec();
        }
        header.compression_type = header.parse_compression_type()?;
        if let Some(compression_type) = header.additional_fields.first_mut() {
            *compression_type = 0;
        }
        let name_at = header.backing_file_offset;
        if name_at != 0 && !(header_length..=cluster_size).contains(&name_at) {
            return corrupt(format!(
                "the backing file name at {name_at:#x} is not between the header's {header_length} bytes and the \
                 end of the first cluster"
            ));
        }
        let extensions_end = if name_at == 0 { cluster_size } else { name_at };
        header.extensions =
            HeaderExtensions::parse(bytes_of(cluster, header_length..extensions_end)?)?;
        header.backing_file = header.parse_backing_file(cluster, lengths.backing_file)?;
        header.check_geometry()?;
        header.check_tables()?;
        Ok(header)
    }

    fn parse_compression_type(&self) -> Result<CompressionType> {
        let compression_type = match self.additional_fields.first() {
            None | Some(0) => CompressionType::Deflate,
            Some(1) => CompressionType::Zstd,
            Some(other) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "compression type {other} is not known: convert the image with `qemu-img convert`"
                    ),
                ));
            }
        };
        let flagged = self
            .incompatible_features
            .contains(IncompatibleFeatures::COMPRESSION_TYPE);
        if flagged != (compression_type != CompressionType::Deflate) {
            return corrupt(format!(
                "compression type {} and the feature bit for it contradict each other",
                compression_type.name()
            ));
        }
        Ok(compression_type)
    }

    fn parse_backing_file(&self, cluster: &[u8], length: u32) -> Result<Option<OsString>> {
        if self.backing_file_offset == 0 || length == 0 {
            return Ok(None);
        }
        if length > MAX_BACKING_NAME {
            return corrupt(format!(
                "a backing file name of {length} bytes is longer than {MAX_BACKING_NAME}"
            ));
        }
        let start = self.backing_file_offset;
        let name = bytes_of(cluster, start..start.saturating_add(length.into()))?;
        if name.contains(&0) {
            return corrupt("the backing file name has a zero byte in it");
        }
        Ok(Some(OsString::from_vec(name.to_vec())))
    }

    /// Sizes that later arithmetic relies on.
    fn check_geometry(&self) -> Result<()> {
        if self.refcount_order > MAX_REFCOUNT_ORDER {
            return corrupt(format!(
                "refcount order {} is above {MAX_REFCOUNT_ORDER}",
                self.refcount_order
            ));
        }
        if self.has_extended_l2() && self.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return corrupt(format!(
                "extended L2 entries need clusters of at least {} bytes, and they have {}",
                1 << MIN_EXTENDED_L2_CLUSTER_BITS,
                self.cluster_size()
            ));
        }
        if i64::try_from(self.size).is_err() {
            return corrupt(format!(
                "a virtual size of {} bytes is beyond 63 bits",
                self.size
            ));
        }
        let needed = self.l1_entries_for(self.size);
        if u64::from(self.l1_size) < needed {
            return corrupt(format!(
                "the L1 table has {} entries, and a disk of {} bytes needs {needed}",
                self.l1_size, self.size
            ));
        }
        Ok(())
    }

    /// Where tables may lie and how large they may be.
    fn check_tables(&self) -> Result<()> {
        let refcount_table_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if refcount_table_bytes == 0 {
            return corrupt("the image has no refcount table");
        }
        let snapshot_table_bytes = u64::from(self.nb_snapshots) * FIXED_LENGTH as u64;
        let tables = [
            (
                "L1 table",
                self.l1_table_offset,
                u64::from(self.l1_size) * 8,
                MAX_L1_TABLE_BYTES,
            ),
            (
                "refcount table",
                self.refcount_table_offset,
                refcount_table_bytes,
                MAX_REFCOUNT_TABLE_BYTES,
            ),
            (
                "snapshot table",
                self.snapshots_offset,
                snapshot_table_bytes,
                u64::from(MAX_SNAPSHOTS) * FIXED_LENGTH as u64,
            ),
        ];
        for (name, offset, bytes, limit) in tables {
            self.check_table(name, offset, bytes, limit)?;
        }
        Ok(())
    }

    fn check_table(&self, name: &str, offset: HostOffset, bytes: u64, limit: u64) -> Result<()> {
        if bytes > limit {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the {name} has {bytes} bytes, and {limit} are supported at most"),
            ));
        }
        if !offset.0.is_multiple_of(self.cluster_size()) {
            return corrupt(format!(
                "the {name} at {offset:#x} does not start on a cluster of {} bytes",
                self.cluster_size()
            ));
        }
        if bytes > 0 && offset.0 == 0 {
            return corrupt(format!("the {name} overlaps the header"));
        }
        if offset.0 > MAX_HOST_OFFSET - limit {
            return corrupt(format!("the {name} at {offset:#x} lies beyond 56 bits"));
        }
        Ok(())
    }
}

/// Lengths that a [`Header`] does not keep, since they follow from its parts.
pub(super) struct Lengths {
    header: u32,
    backing_file: u32,
}

/// The fields up to byte 104, with extensions and strings still missing and nothing checked but what decides how
/// to go on: magic, version, cluster size, header length.
pub(super) fn parse_fixed_fields(bytes: &[u8]) -> Result<(Header, Lengths)> {
    let mut fields = Fields(bytes);
    if fields.u32()?.to_be_bytes() != MAGIC {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "not a qcow2 image: it does not begin with the magic number",
        ));
    }
    let version = match fields.u32()? {
        2 => Version::V2,
        3 => Version::V3,
        other => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("qcow2 version {other} is not known, only 2 and 3 are"),
            ));
        }
    };
    let backing_file_offset = fields.u64()?;
    let backing_file_length = fields.u32()?;
    let cluster_bits = fields.u32()?;
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return corrupt(format!(
            "cluster_bits is {cluster_bits}, and {} to {} are allowed",
            CLUSTER_BITS.start(),
            CLUSTER_BITS.end()
        ));
    }
    let size = fields.u64()?;
    let mut header = Header {
        backing_file_offset,
        crypt_method: fields.u32()?,
        l1_size: fields.u32()?,
        l1_table_offset: HostOffset(fields.u64()?),
        refcount_table_offset: HostOffset(fields.u64()?),
        refcount_table_clusters: fields.u32()?,
        nb_snapshots: fields.u32()?,
        snapshots_offset: HostOffset(fields.u64()?),
        additional_fields: Vec::new(),
        ..Header::new(version, cluster_bits, size)
    };
    let mut header_length = V2_LENGTH;
    if version == Version::V3 {
        header.incompatible_features = IncompatibleFeatures(fields.u64()?);
        header.compatible_features = CompatibleFeatures(fields.u64()?);
        header.autoclear_features = AutoclearFeatures(fields.u64()?);
        header.refcount_order = fields.u32()?;
        header_length = fields.u32()?;
        if header_length < V3_LENGTH || !header_length.is_multiple_of(8) {
            return corrupt(format!(
                "a version 3 header of {header_length} bytes: it must have at least {V3_LENGTH} and a multiple of 8"
            ));
        }
    }
    let lengths = Lengths {
        header: header_length,
        backing_file: backing_file_length,
    };
    Ok((header, lengths))
}

/// Takes big-endian fields from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some((field, rest)) = self.0.split_first_chunk() else {
            return corrupt("the file ends within the header");
        };
        self.0 = rest;
        Ok(*field)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_be_bytes)
    }
}

fn bytes_of(cluster: &[u8], range: Range<u64>) -> Result<&[u8]> {
    let found = usize::try_from(range.start)
        .ok()
        .zip(usize::try_from(range.end).ok())
        .and_then(|(start, end)| cluster.get(start..end));
    match found {
        Some(bytes) => Ok(bytes),
        None => corrupt("the header leaves the first cluster"),
    }
}

fn corrupt<T>(what: impl Into<Box<str>>) -> Result<T> {
    Err(Error::new(ErrorKind::Corrupt, what))
}
