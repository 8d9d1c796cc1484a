//! The header (qcow2 specification, "Header"): cluster 0 of an image.
//!
//! ```text
//! 0            72 (v2), header_length (v3)                             cluster size
//! ├─ fixed fields ─┼─ extensions … end mark ─┼─ backing file name ─┼─ unused ─┤
//! ```
//!
//! # Invariants
//!
//! 1. A [`Header`] that [`Header::parse`] returned obeys the format's rules and stock QEMU's limits: tables are
//!    aligned, not in cluster 0, inside 56 bits and no larger than QEMU takes; the L1 table covers the disk.
//! 2. Nothing that was read is lost by writing it back: unknown fields, unknown feature bits and unknown
//!    extensions stay.
//! 3. Whether the image can be *used* is another question: [`Header::require_supported`].

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use super::features::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use super::header_extension::{ExtensionType, HeaderExtensions};
use super::header_parse::parse_fixed_fields;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::{HostOffset, SECTOR_SIZE};

/// The first four bytes of every qcow2 file: "QFI" and 0xfb.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of a version 2 header.
pub(super) const V2_LENGTH: u32 = 72;
/// Bytes of the fields that every version 3 header has.
pub(super) const V3_LENGTH: u32 = 104;
/// Bytes of a version 3 header with the compression type, as images are created.
const V3_FULL_LENGTH: u32 = 112;

/// The longest backing file name in bytes.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// The largest L1 table in bytes, as in stock QEMU.
pub const MAX_L1_TABLE_BYTES: u64 = 32 << 20;
/// The largest refcount table in bytes, as in stock QEMU.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Host offsets in tables have 56 bits.
pub const MAX_HOST_OFFSET: u64 = 1 << 56;

/// The version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `compat=0.10`: no feature bits, no zero clusters, 16-bit refcounts.
    V2,
    /// `compat=1.1`.
    V3,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate; called zlib by the format.
    #[default]
    Deflate,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// The name that options and listings use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }

    fn to_byte(self) -> u8 {
        match self {
            Self::Deflate => 0,
            Self::Zstd => 1,
        }
    }
}

/// Everything that the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The format's version.
    pub version: Version,
    /// The name of the backing file as it is written there.
    pub backing_file: Option<OsString>,
    /// The cluster size's logarithm.
    pub cluster_bits: u32,
    /// The virtual size in bytes as it is written there; see [`Header::virtual_size`].
    pub size: u64,
    /// 0 for none, 1 for AES, 2 for LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table lies.
    pub l1_table_offset: HostOffset,
    /// Where the refcount table lies.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Entries of the snapshot table.
    pub nb_snapshots: u32,
    /// Where the snapshot table lies.
    pub snapshots_offset: HostOffset,
    /// Features without which the image cannot be understood.
    pub incompatible_features: IncompatibleFeatures,
    /// Features that may be ignored.
    pub compatible_features: CompatibleFeatures,
    /// Features that a writer who does not keep them up to date has to clear.
    pub autoclear_features: AutoclearFeatures,
    /// The logarithm of a refcount's width in bits.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// The extensions, known and unknown.
    pub extensions: HeaderExtensions,
    /// Where the backing file name lies on disk, 0 for none; [`Header::encode`] decides it anew.
    pub(super) backing_file_offset: u64,
    /// What follows byte 104 within `header_length`, verbatim, but for the first byte: the compression type's,
    /// zero here.
    pub(super) additional_fields: Vec<u8>,
}

impl Header {
    /// A header of a new image of `size` bytes whose tables are not placed yet.
    #[must_use]
    pub fn new(version: Version, cluster_bits: u32, size: u64) -> Self {
        let additional = match version {
            Version::V2 => 0,
            Version::V3 => (V3_FULL_LENGTH - V3_LENGTH) as usize,
        };
        Self {
            version,
            backing_file: None,
            cluster_bits,
            size,
            crypt_method: 0,
            l1_size: 0,
            l1_table_offset: HostOffset(0),
            refcount_table_offset: HostOffset(0),
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible_features: IncompatibleFeatures::default(),
            compatible_features: CompatibleFeatures::default(),
            autoclear_features: AutoclearFeatures::default(),
            refcount_order: 4,
            compression_type: CompressionType::Deflate,
            extensions: HeaderExtensions::default(),
            backing_file_offset: 0,
            additional_fields: vec![0; additional],
        }
    }

    /// Reads and checks the header of the image in `storage`.
    ///
    /// # Errors
    /// As [`Header::parse`], and the storage's own.
    pub async fn read(storage: &dyn Storage) -> Result<Self> {
        let start = IoBuf::zeroed(V3_LENGTH as usize);
        storage.readv(HostOffset(0), start.clone()).await?;
        let (header, _) = parse_fixed_fields(&start.to_vec())?;
        let cluster = IoBuf::zeroed(1 << header.cluster_bits);
        storage.readv(HostOffset(0), cluster.clone()).await?;
        Self::parse(&cluster.to_vec())
    }

    /// The whole first cluster: fixed fields, extensions, backing file name right behind them, zeros.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it does not fit a cluster, or the backing file name is too long.
    pub fn encode(&mut self) -> Result<Vec<u8>> {
        let mut behind = self.additional_fields.get(8..).unwrap_or_default().to_vec();
        self.extensions.encode(&mut behind)?;
        self.backing_file_offset = 0;
        let fields_length = self.encode_fields().len();
        if let Some(name) = self.backing_file.as_ref().filter(|name| !name.is_empty()) {
            if name.len() > MAX_BACKING_NAME as usize {
                return Err(Error::new(
                    ErrorKind::InvalidConfig,
                    format!(
                        "the backing file name has {} bytes, and the format takes {MAX_BACKING_NAME} at most",
                        name.len()
                    ),
                ));
            }
            self.backing_file_offset = (fields_length + behind.len()) as u64;
            behind.extend(name.as_bytes());
        }
        let mut cluster = self.encode_fields();
        cluster.extend(behind);
        let size = 1usize << self.cluster_bits;
        if cluster.len() > size {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "header, extensions and backing file name need {} bytes and must fit the first cluster of {size}: \
                     use larger clusters",
                    cluster.len()
                ),
            ));
        }
        cluster.resize(size, 0);
        Ok(cluster)
    }

    /// The fixed fields alone, to be written at offset 0: at most 112 bytes, which are one sector, so that the
    /// change of any of them is atomic. Extensions and backing file name stay as they are on disk.
    #[must_use]
    pub fn encode_fields(&self) -> Vec<u8> {
        let name_length = match self.backing_file_offset {
            0 => 0,
            _ => self.backing_file.as_ref().map_or(0, |name| name.len()),
        };
        let mut bytes = Vec::with_capacity(V3_FULL_LENGTH as usize);
        bytes.extend(MAGIC);
        let version: u32 = match self.version {
            Version::V2 => 2,
            Version::V3 => 3,
        };
        bytes.extend(version.to_be_bytes());
        bytes.extend(self.backing_file_offset.to_be_bytes());
        bytes.extend(u32::try_from(name_length).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.crypt_method.to_be_bytes());
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend(self.l1_table_offset.0.to_be_bytes());
        bytes.extend(self.refcount_table_offset.0.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.nb_snapshots.to_be_bytes());
        bytes.extend(self.snapshots_offset.0.to_be_bytes());
        if self.version == Version::V3 {
            bytes.extend(self.incompatible_features.0.to_be_bytes());
            bytes.extend(self.compatible_features.0.to_be_bytes());
            bytes.extend(self.autoclear_features.0.to_be_bytes());
            bytes.extend(self.refcount_order.to_be_bytes());
            let length = u32::try_from(self.header_length()).unwrap_or(u32::MAX);
            bytes.extend(length.to_be_bytes());
            bytes.extend(self.additional_fields.iter().take(8));
            if let Some(compression_type) = bytes.get_mut(V3_LENGTH as usize) {
                *compression_type = self.compression_type.to_byte();
            }
        }
        bytes
    }

    /// Bytes of the fixed fields, known and unknown.
    #[must_use]
    pub fn header_length(&self) -> usize {
        match self.version {
            Version::V2 => V2_LENGTH as usize,
            Version::V3 => V3_LENGTH as usize + self.additional_fields.len(),
        }
    }

    /// The size of a cluster in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The length of the disk in bytes: whole sectors, as stock QEMU counts it.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.size - self.size % SECTOR_SIZE
    }

    /// Whether L2 entries are 128 bits wide and describe subclusters.
    #[must_use]
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible_features
            .contains(IncompatibleFeatures::EXTENDED_L2)
    }

    /// Whether refcounts may be written late, the dirty bit being set meanwhile.
    #[must_use]
    pub fn has_lazy_refcounts(&self) -> bool {
        self.version == Version::V3
            && self
                .compatible_features
                .contains(CompatibleFeatures::LAZY_REFCOUNTS)
    }

    /// Whether guest data lies in another file.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features
            .contains(IncompatibleFeatures::EXTERNAL_DATA_FILE)
    }

    /// Bytes of an L2 entry.
    #[must_use]
    pub fn l2_entry_size(&self) -> u64 {
        if self.has_extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table, which is one cluster.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// The width of a refcount in bits.
    #[must_use]
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// L1 entries that a disk of `size` bytes needs.
    #[must_use]
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size() * self.l2_entries())
    }

    /// The format of the backing file, if the image tells.
    #[must_use]
    pub fn backing_format(&self) -> Option<&OsStr> {
        self.extensions
            .get(ExtensionType::BACKING_FORMAT)
            .map(OsStr::from_bytes)
    }

    /// The data of an extension, if the image has it.
    #[must_use]
    pub fn extension(&self, extension_type: ExtensionType) -> Option<&[u8]> {
        self.extensions.get(extension_type)
    }

    /// This header with an extension set, all else as it is.
    #[must_use]
    pub fn with_extension(mut self, extension_type: ExtensionType, data: Vec<u8>) -> Self {
        self.extensions.set(extension_type, data);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header_extension::SEETHROUGH_EXTENSION;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    /// A header in which every field has a value of its own.
    fn golden() -> Header {
        let mut header = Header::new(Version::V3, 16, (1 << 30) + 100);
        header.backing_file = Some("base.qcow2".into());
        header.l1_size = 3;
        header.l1_table_offset = HostOffset(0x3_0000);
        header.refcount_table_offset = HostOffset(0x1_0000);
        header.refcount_table_clusters = 1;
        header.nb_snapshots = 2;
        header.snapshots_offset = HostOffset(0x5_0000);
        header.incompatible_features =
            IncompatibleFeatures(1 << 40).with(IncompatibleFeatures::COMPRESSION_TYPE);
        header.compatible_features = CompatibleFeatures(1 << 41);
        header.autoclear_features = AutoclearFeatures(1 << 42);
        header.refcount_order = 3;
        header.compression_type = CompressionType::Zstd;
        header
            .extensions
            .set(ExtensionType(0xabcd_ef01), b"unknown".to_vec());
        header
            .extensions
            .set(ExtensionType::BACKING_FORMAT, b"qcow2".to_vec());
        header
    }

    fn with_u32(at: usize, value: u32) -> Result<Header> {
        let mut bytes = golden().encode().unwrap();
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        Header::parse(&bytes)
    }

    fn with_u64(at: usize, value: u64) -> Result<Header> {
        let mut bytes = golden().encode().unwrap();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        Header::parse(&bytes)
    }

    #[test]
    fn nothing_is_lost_in_a_round_trip() {
        let mut header = golden();
        let bytes = header.encode().unwrap();
        let mut again = Header::parse(&bytes).unwrap();
        assert_eq!(again, header);
        assert_eq!(again.encode().unwrap(), bytes);
        assert_eq!(again.virtual_size(), 1 << 30);
        let storage = MemoryStorage::new(bytes);
        assert_eq!(block_on(Header::read(&storage)).unwrap(), header);
    }

    #[test]
    fn unknown_additional_fields_are_kept() {
        let mut header = golden();
        header.additional_fields = vec![0, 0, 0, 0, 0, 0, 9, 0, 7, 7, 7, 7, 7, 7, 7, 7];
        let bytes = header.encode().unwrap();
        let again = Header::parse(&bytes).unwrap();
        assert_eq!(again.additional_fields, header.additional_fields);
        assert_eq!(again.backing_file, header.backing_file);
        assert!(bytes.starts_with(&header.encode_fields()));
    }

    #[test]
    fn a_version_2_header_has_no_feature_fields() {
        let mut header = Header::new(Version::V2, 9, 0);
        header.refcount_table_offset = HostOffset(512);
        header.refcount_table_clusters = 1;
        header
            .extensions
            .set(ExtensionType::BACKING_FORMAT, b"raw".to_vec());
        let bytes = header.encode().unwrap();
        assert_eq!(header.encode_fields().len(), 72);
        assert_eq!(bytes.len(), 512);
        assert_eq!(Header::parse(&bytes).unwrap(), header);
    }

    #[test]
    fn the_fixed_fields_do_not_move_a_name_that_lies_elsewhere() {
        let mut bytes = golden().encode().unwrap();
        bytes[8..16].copy_from_slice(&0x800u64.to_be_bytes());
        bytes[0x800..0x80a].copy_from_slice(b"other.file");
        let mut header = Header::parse(&bytes).unwrap();
        assert_eq!(header.backing_file.as_deref(), Some("other.file".as_ref()));
        assert!(bytes.starts_with(&header.encode_fields()));
        let moved = header.encode().unwrap();
        assert_eq!(Header::parse(&moved).unwrap(), header);
    }

    #[test]
    fn an_extension_that_does_not_fit_is_a_clear_error() {
        let mut header = golden().with_extension(SEETHROUGH_EXTENSION, vec![b' '; 65_000]);
        assert_eq!(Header::parse(&header.encode().unwrap()).unwrap(), header);
        let mut header = header.with_extension(SEETHROUGH_EXTENSION, vec![b' '; 65_500]);
        let error = header.encode().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("65536"), "{error}");
    }

    #[test]
    fn a_backing_file_name_with_a_zero_byte_is_corrupt() {
        let mut header = golden();
        let mut bytes = header.encode().unwrap();
        bytes[usize::try_from(header.backing_file_offset).unwrap() + 4] = 0;
        assert_eq!(
            Header::parse(&bytes).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
    }

    #[test]
    fn every_broken_rule_is_found() {
        let corrupt = [
            with_u64(8, 0x10001),        // backing file name outside cluster 0
            with_u64(8, 100),            // backing file name inside the header
            with_u32(16, 1024),          // backing file name too long
            with_u32(20, 8),             // cluster_bits
            with_u32(20, 22),            // cluster_bits
            with_u64(24, 1 << 63),       // virtual size
            with_u64(24, (3 << 29) + 1), // L1 table too small for it
            with_u64(40, 0),             // L1 table in the header
            with_u64(40, 0x3_0200),      // L1 table not aligned
            with_u64(40, 1 << 56),       // L1 table beyond 56 bits
            with_u64(48, 0x1_0008),      // refcount table not aligned
            with_u64(48, 0),             // refcount table in the header
            with_u32(56, 0),             // no refcount table
            with_u64(64, 8),             // snapshot table not aligned
            with_u64(72, 0),             // compression type without its bit
            with_u32(96, 7),             // refcount order
            with_u32(100, 96),           // header length
            with_u32(100, 108),          // header length
            with_u32(100, 0x1_0008),     // header length
        ];
        for (case, result) in corrupt.into_iter().enumerate() {
            let error = result.expect_err(&format!("case {case} passed"));
            assert_eq!(error.kind(), ErrorKind::Corrupt, "case {case}: {error}");
        }
        let unsupported = [
            with_u32(0, 0),              // magic
            with_u32(4, 1),              // version
            with_u32(36, (4 << 20) + 1), // L1 table too large
            with_u32(56, 129),           // refcount table too large
            with_u32(60, 65537),         // too many snapshots
            with_u32(104, 2 << 24),      // compression type
        ];
        for (case, result) in unsupported.into_iter().enumerate() {
            let error = result.expect_err(&format!("case {case} passed"));
            assert_eq!(error.kind(), ErrorKind::Unsupported, "case {case}: {error}");
        }
    }

    #[test]
    fn extended_l2_needs_clusters_of_16_kib() {
        let mut header = golden();
        header.incompatible_features = header
            .incompatible_features
            .with(IncompatibleFeatures::EXTENDED_L2);
        header.cluster_bits = 14;
        header.size = 0;
        Header::parse(&header.encode().unwrap()).unwrap();
        header.cluster_bits = 13;
        assert!(Header::parse(&header.encode().unwrap()).is_err());
    }

    #[test]
    fn a_file_cut_short_is_an_error() {
        let bytes = golden().encode().unwrap();
        for len in 0..162 {
            assert!(Header::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
}
