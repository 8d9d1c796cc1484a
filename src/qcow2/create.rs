//! Writing a new, empty image.
//!
//! ```text
//! cluster 0      1                                                                     metadata's end
//! ├─ header ─┼─ refcount table ─┼─ refcount blocks ─┼─ L1 table ─┤
//! ```
//!
//! The header is written last, behind a flush: a file whose creation was cut short is no image at all.

use std::ffi::OsString;

use super::data_file;
use super::features::{AutoclearFeatures, CompatibleFeatures, FeatureType, IncompatibleFeatures};
use super::header::{CompressionType, Header, MAX_L1_TABLE_BYTES, Version};
use super::header_extension::{ExtensionType, feature_name_table};
use super::preallocate::Preallocation;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::{HostOffset, SECTOR_SIZE};

/// What L2 entries look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum L2Entries {
    /// 64 bits: a cluster is allocated as a whole.
    #[default]
    Standard,
    /// 128 bits: 32 subclusters of each cluster are allocated one by one (`extended_l2=on`).
    Extended,
}

/// When refcounts are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RefcountUpdates {
    /// With every allocation.
    #[default]
    Eager,
    /// Later, the dirty bit being set meanwhile (`lazy_refcounts=on`).
    Lazy,
}

/// The backing file that a new image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingReference {
    /// The name, relative to the new image's directory unless it is absolute.
    pub file: OsString,
    /// The backing file's format, as the header says it: `raw` or `qcow2`.
    pub format: String,
}

/// The external data file that a new image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileReference {
    /// Its name.
    pub file: OsString,
    /// Whether it shall be a copy of the disk.
    pub layout: data_file::Layout,
}

/// What a new image shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The virtual size in bytes; rounded up to a sector.
    pub size: u64,
    /// `compat`.
    pub version: Version,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// `extended_l2`.
    pub l2_entries: L2Entries,
    /// Bits in a refcount.
    pub refcount_bits: u64,
    /// `lazy_refcounts`.
    pub refcount_updates: RefcountUpdates,
    /// `compression_type`.
    pub compression_type: CompressionType,
    /// The backing file.
    pub backing: Option<BackingReference>,
    /// `data_file` and `data_file_raw`.
    pub data_file: Option<DataFileReference>,
    /// `preallocation`: a new image has none of it yet, see [`CreateOptions::preallocation`].
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The defaults of `qemu-img create -f qcow2`.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: Version::V3,
            cluster_size: 65536,
            l2_entries: L2Entries::Standard,
            refcount_bits: 16,
            refcount_updates: RefcountUpdates::Eager,
            compression_type: CompressionType::Deflate,
            backing: None,
            data_file: None,
            preallocation: Preallocation::Off,
        }
    }

    /// Checks that there can be such an image.
    ///
    /// # Errors
    /// As [`create`].
    pub fn check(&self) -> Result<()> {
        let mut header = self.header()?;
        Layout::plan(&mut header)?;
        header.encode().map(drop)
    }

    /// The virtual size, in whole sectors.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is beyond 63 bits.
    pub fn virtual_size(&self) -> Result<u64> {
        let size = self
            .size
            .checked_next_multiple_of(SECTOR_SIZE)
            .filter(|size| i64::try_from(*size).is_ok());
        match size {
            Some(size) => Ok(size),
            None => invalid(format!("a disk of {} bytes is beyond 63 bits", self.size)),
        }
    }

    /// What is to be preallocated once the image is made. A raw data file always has the places of all clusters, so
    /// that what others write to it is read.
    #[must_use]
    pub fn preallocation(&self) -> Preallocation {
        match (&self.data_file, self.preallocation) {
            (Some(file), Preallocation::Off) if file.layout == data_file::Layout::Raw => {
                Preallocation::Metadata
            }
            (_, asked) => asked,
        }
    }

    /// The header of such an image, its tables not placed yet.
    fn header(&self) -> Result<Header> {
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return invalid(format!(
                "cluster_size={}: it must be a power of two between 512 and 2M",
                self.cluster_size
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid(format!(
                "refcount_bits={}: it must be a power of two and at most 64",
                self.refcount_bits
            ));
        }
        if self.l2_entries == L2Entries::Extended && self.cluster_size < 16 << 10 {
            return invalid("extended_l2=on needs a cluster_size of at least 16k");
        }
        if self.version == Version::V2 {
            self.check_version_2()?;
        }
        self.check_places()?;
        let size = self.virtual_size()?;
        let mut header = Header::new(self.version, self.cluster_size.trailing_zeros(), size);
        header.refcount_order = self.refcount_bits.trailing_zeros();
        header.compression_type = self.compression_type;
        if self.l2_entries == L2Entries::Extended {
            header.incompatible_features = IncompatibleFeatures::EXTENDED_L2;
        }
        if self.compression_type != CompressionType::Deflate {
            header.incompatible_features = header
                .incompatible_features
                .with(IncompatibleFeatures::COMPRESSION_TYPE);
        }
        if self.refcount_updates == RefcountUpdates::Lazy {
            header.compatible_features = CompatibleFeatures::LAZY_REFCOUNTS;
        }
        if let Some(file) = &self.data_file {
            header.incompatible_features = header
                .incompatible_features
                .with(IncompatibleFeatures::EXTERNAL_DATA_FILE);
            if file.layout == data_file::Layout::Raw {
                header.autoclear_features = AutoclearFeatures::RAW_EXTERNAL_DATA;
            }
            let name = file.file.clone().into_encoded_bytes();
            header
                .extensions
                .set(ExtensionType::EXTERNAL_DATA_FILE_NAME, name);
        }
        if let Some(backing) = &self.backing {
            header.backing_file = Some(backing.file.clone());
            header.extensions.set(
                ExtensionType::BACKING_FORMAT,
                backing.format.clone().into_bytes(),
            );
        }
        Ok(header)
    }

    /// Checks what backing file, data file and preallocation are together.
    fn check_places(&self) -> Result<()> {
        let is_raw = |file: &DataFileReference| file.layout == data_file::Layout::Raw;
        if self
            .data_file
            .as_ref()
            .is_some_and(|file| file.file.is_empty())
        {
            return invalid("data_file= has no name");
        }
        if self.backing.is_none() {
            return Ok(());
        }
        if self.data_file.as_ref().is_some_and(is_raw) {
            return invalid(
                "data_file_raw=on excludes a backing image: the data file alone is the disk",
            );
        }
        if self.preallocation != Preallocation::Off && self.l2_entries != L2Entries::Extended {
            return invalid(format!(
                "preallocation={} would hide the backing image: use extended_l2=on with it",
                self.preallocation.name()
            ));
        }
        Ok(())
    }

    fn check_version_2(&self) -> Result<()> {
        let defaults = Self::new(self.size);
        let newer = [
            ("extended_l2=on", self.l2_entries != defaults.l2_entries),
            (
                "a refcount width other than 16",
                self.refcount_bits != defaults.refcount_bits,
            ),
            (
                "lazy_refcounts=on",
                self.refcount_updates != defaults.refcount_updates,
            ),
            ("data_file", self.data_file.is_some()),
            (
                "a compression type other than zlib",
                self.compression_type != defaults.compression_type,
            ),
        ];
        match newer.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => invalid(format!("{name} needs compat=1.1 or newer")),
            None => Ok(()),
        }
    }
}

/// Makes `storage`, which holds nothing that is still needed, a new image. A data file and preallocation are the
/// caller's.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for options that contradict each other or a limit of the format; the storage's own.
pub async fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let mut header = options.header()?;
    let layout = Layout::plan(&mut header)?;
    add_feature_names(&mut header);
    let first_cluster = header.encode()?;

    storage.set_len(0).await?;
    storage
        .set_len(layout.clusters * header.cluster_size())
        .await?;
    layout.write_refcounts(storage, &header).await?;
    storage.flush().await?;
    storage
        .writev(HostOffset(0), IoBuf::from_bytes(&first_cluster))
        .await?;
    storage.flush().await
}

/// An empty image that is not written: its header, with the tables placed.
pub(super) struct EmptyImage {
    pub(super) header: Header,
    /// Refcount blocks that it has.
    pub(super) refcount_blocks: u64,
    /// Clusters of its file, all in use.
    pub(super) clusters: u64,
}

/// What [`create()`] would make.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] as [`create()`].
pub(super) fn plan_empty(options: &CreateOptions) -> Result<EmptyImage> {
    let mut header = options.header()?;
    let layout = Layout::plan(&mut header)?;
    Ok(EmptyImage {
        header,
        refcount_blocks: layout.refcount_blocks,
        clusters: layout.clusters,
    })
}

/// Which clusters hold what; all of them are metadata, with refcount 1.
struct Layout {
    refcount_blocks_at: HostOffset,
    refcount_blocks: u64,
    clusters: u64,
}

impl Layout {
    /// Places the tables and enters them in the header.
    fn plan(header: &mut Header) -> Result<Self> {
        let cluster_size = header.cluster_size();
        let l1_entries = header.l1_entries_for(header.size);
        if l1_entries * 8 > MAX_L1_TABLE_BYTES {
            return invalid(format!(
                "a disk of {} bytes needs an L1 table beyond {MAX_L1_TABLE_BYTES} bytes: use a larger cluster_size",
                header.size
            ));
        }
        let l1_clusters = (l1_entries * 8).div_ceil(cluster_size);
        let (refcount_blocks, table_clusters) = refcount_clusters(header, 1 + l1_clusters);
        let clusters = 1 + table_clusters + refcount_blocks + l1_clusters;
        let refcount_blocks_at = HostOffset((1 + table_clusters) * cluster_size);
        header.refcount_table_offset = HostOffset(cluster_size);
        header.refcount_table_clusters = narrow(table_clusters)?;
        header.l1_size = narrow(l1_entries)?;
        if l1_entries > 0 {
            header.l1_table_offset =
                HostOffset(refcount_blocks_at.0 + refcount_blocks * cluster_size);
        }
        Ok(Self {
            refcount_blocks_at,
            refcount_blocks,
            clusters,
        })
    }

    async fn write_refcounts(&self, storage: &dyn Storage, header: &Header) -> Result<()> {
        let cluster_size = header.cluster_size();
        let table: Vec<u8> = (0..self.refcount_blocks)
            .flat_map(|block| (self.refcount_blocks_at.0 + block * cluster_size).to_be_bytes())
            .collect();
        storage
            .writev(header.refcount_table_offset, IoBuf::from_bytes(&table))
            .await?;
        let ones = refcounts_of_one(self.clusters, header.refcount_bits());
        storage
            .writev(self.refcount_blocks_at, IoBuf::from_bytes(&ones))
            .await
            .context(|| "writing refcounts")
    }
}

/// Refcount blocks, and clusters of the refcount table, that describe `others` clusters, one at least, and themselves.
pub(super) fn refcount_clusters(header: &Header, others: u64) -> (u64, u64) {
    let cluster_size = header.cluster_size();
    let block_entries = cluster_size * 8 / u64::from(header.refcount_bits());
    let (mut blocks, mut table_clusters) = (1, 1);
    loop {
        let clusters = others + table_clusters + blocks;
        let blocks_needed = clusters.div_ceil(block_entries);
        let table_needed = (blocks_needed * 8).div_ceil(cluster_size);
        if blocks_needed <= blocks && table_needed <= table_clusters {
            return (blocks, table_clusters);
        }
        (blocks, table_clusters) = (blocks_needed, table_needed);
    }
}

/// `count` refcounts of 1, packed as in a refcount block: entries of less than a byte lowest bits first, wider
/// ones big-endian.
fn refcounts_of_one(count: u64, bits: u32) -> Vec<u8> {
    let len = usize::try_from((count * u64::from(bits)).div_ceil(8))
        .expect("metadata of an empty image is small");
    let mut bytes = vec![0; len];
    for index in 0..count {
        let bit = index * u64::from(bits);
        // The lowest bit of a wide entry is in its last byte.
        let byte = usize::try_from(bit / 8 + u64::from(bits / 8).saturating_sub(1)).ok();
        if let Some(byte) = byte.and_then(|byte| bytes.get_mut(byte)) {
            *byte |= 1 << (bit % 8);
        }
    }
    bytes
}

/// Names for every feature bit, for programs that will not know them. Left out where the first cluster is too
/// small for it.
fn add_feature_names(header: &mut Header) {
    if header.version == Version::V2 {
        return;
    }
    let of = |feature_type, known: &'static [(u8, &'static str)]| {
        known
            .iter()
            .map(move |(bit, name)| (feature_type, *bit, *name))
    };
    let names = of(FeatureType::Incompatible, IncompatibleFeatures::KNOWN)
        .chain(of(FeatureType::Compatible, CompatibleFeatures::KNOWN))
        .chain(of(FeatureType::Autoclear, AutoclearFeatures::KNOWN));
    let mut named = header.clone();
    named
        .extensions
        .set(ExtensionType::FEATURE_NAME_TABLE, feature_name_table(names));
    if named.encode().is_ok() {
        *header = named;
    }
}

fn narrow(count: u64) -> Result<u32> {
    u32::try_from(count).map_err(|_| {
        Error::new(
            ErrorKind::InvalidConfig,
            "the image's tables are too large: use a larger cluster_size",
        )
    })
}

fn invalid<T>(what: impl Into<Box<str>>) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidConfig, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;
    use crate::sys::block_on;

    fn created(options: &CreateOptions) -> Result<(Header, Vec<u8>)> {
        let storage = MemoryStorage::new(vec![0xee; 100]);
        block_on(create(&storage, options))?;
        let bytes = storage.contents();
        Ok((Header::parse(&bytes)?, bytes))
    }

    #[test]
    fn a_new_image_says_what_was_asked_for() {
        let options = CreateOptions {
            cluster_size: 128 << 10,
            l2_entries: L2Entries::Extended,
            refcount_bits: 1,
            refcount_updates: RefcountUpdates::Lazy,
            compression_type: CompressionType::Zstd,
            backing: Some(BackingReference {
                file: "base.raw".into(),
                format: "raw".to_owned(),
            }),
            ..CreateOptions::new((1 << 30) - 100)
        };
        let (header, bytes) = created(&options).unwrap();
        assert_eq!(header.size, 1 << 30);
        assert_eq!(header.cluster_size(), 128 << 10);
        assert!(header.has_extended_l2());
        assert_eq!(header.refcount_bits(), 1);
        assert_eq!(
            header.compatible_features,
            CompatibleFeatures::LAZY_REFCOUNTS
        );
        assert_eq!(header.compression_type, CompressionType::Zstd);
        assert_eq!(header.backing_file.as_deref(), Some("base.raw".as_ref()));
        assert_eq!(header.backing_format(), Some("raw".as_ref()));
        assert_eq!(bytes.len(), 4 * (128 << 10));
        assert_eq!(bytes[2 * (128 << 10)], 0b1111);
    }

    #[test]
    fn refcounts_are_packed_lowest_bits_first_and_big_endian() {
        assert_eq!(refcounts_of_one(9, 1), [0xff, 1]);
        assert_eq!(refcounts_of_one(3, 2), [0b01_0101]);
        assert_eq!(refcounts_of_one(2, 8), [1, 1]);
        assert_eq!(refcounts_of_one(2, 16), [0, 1, 0, 1]);
        assert_eq!(refcounts_of_one(1, 64), [0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn refcount_blocks_cover_themselves_and_a_large_l1_table() {
        let options = CreateOptions {
            cluster_size: 512,
            refcount_bits: 64,
            ..CreateOptions::new(8 << 30)
        };
        let (header, bytes) = created(&options).unwrap();
        let clusters = bytes.len() / 512;
        let blocks_at =
            header.refcount_table_offset.0 + u64::from(header.refcount_table_clusters) * 512;
        let blocks = (header.l1_table_offset.0 - blocks_at) / 512;
        assert!(blocks as usize * 64 >= clusters);
        assert!(u64::from(header.refcount_table_clusters) * 64 >= blocks);
    }

    #[test]
    fn options_that_cannot_be_are_refused() {
        let good = CreateOptions::new(1 << 20);
        let wrong = [
            CreateOptions {
                cluster_size: 256,
                ..good.clone()
            },
            CreateOptions {
                cluster_size: 4 << 20,
                ..good.clone()
            },
            CreateOptions {
                cluster_size: 65537,
                ..good.clone()
            },
            CreateOptions {
                refcount_bits: 0,
                ..good.clone()
            },
            CreateOptions {
                refcount_bits: 24,
                ..good.clone()
            },
            CreateOptions {
                refcount_bits: 128,
                ..good.clone()
            },
            CreateOptions {
                l2_entries: L2Entries::Extended,
                cluster_size: 8192,
                ..good.clone()
            },
            CreateOptions {
                version: Version::V2,
                refcount_bits: 8,
                ..good.clone()
            },
            CreateOptions {
                version: Version::V2,
                l2_entries: L2Entries::Extended,
                ..good.clone()
            },
            CreateOptions {
                size: u64::MAX,
                ..good.clone()
            },
            CreateOptions {
                size: 1 << 62,
                ..good.clone()
            },
            CreateOptions {
                cluster_size: 512,
                size: 1 << 40,
                ..good.clone()
            },
        ];
        for (case, options) in wrong.iter().enumerate() {
            let error = created(options).expect_err(&format!("case {case} passed"));
            assert_eq!(
                error.kind(),
                ErrorKind::InvalidConfig,
                "case {case}: {error}"
            );
        }
    }

    #[test]
    fn feature_names_are_left_out_where_they_do_not_fit() {
        let options = CreateOptions {
            cluster_size: 512,
            backing: Some(BackingReference {
                file: "base.qcow2".into(),
                format: "qcow2".to_owned(),
            }),
            ..CreateOptions::new(1 << 20)
        };
        let (header, _) = created(&options).unwrap();
        assert_eq!(header.extension(ExtensionType::FEATURE_NAME_TABLE), None);
        let (header, _) = created(&CreateOptions::new(1 << 20)).unwrap();
        let table = header.extension(ExtensionType::FEATURE_NAME_TABLE).unwrap();
        assert_eq!(table.len(), 8 * 48);
    }
}
