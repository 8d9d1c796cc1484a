//! An open qcow2 image: its parts, and how it is opened.
//!
//! # Lock order
//!
//! Waiting (held across I/O), outermost first: `clusters` (guest clusters whose entries are being changed) →
//! `tables` (L1 entries whose table is being made) → `packing` → `flushing` → `header` → loads inside a
//! [`TableCache`]. A task holds at most one of each.
//! Spinning (std locks, never across an await): the allocator's → a cache shard's → a slice's → a dirty list's; that of
//! the decompressed clusters is taken alone.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};

use super::allocator::{Allocator, Layout};
use super::bitmap::BitmapDirectory;
use super::cache_budget::{CacheBudget, CacheSize};
use super::check::repair_if_dirty;
use super::commitment::nominal_clusters;
use super::data_file::DataFile;
use super::decompressed::Decompressed;
use super::geometry::{Geometry, to_usize};
use super::header::{CompressionType, Header};
use super::header_extension::ExtensionType;
use super::header_update::set_extension;
use super::health::Health;
use super::l1::L1Table;
use super::quarantine::{Dropped, Retired};
use super::snapshot_metadata::SnapshotMetadata;
use super::table_cache::TableCache;
use crate::error::{Context, Result};
use crate::image::grace::Grace;
use crate::image::{Access, Image};
use crate::storage::RangeLock;
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// Bytes of L2 tables kept in memory by default, unless the image needs fewer: at 64 KiB clusters they map 256 GiB.
const MAX_L2_CACHE: u64 = 32 << 20;
/// Bytes of refcount blocks kept in memory by default, unless the image needs fewer: at 64 KiB clusters they cover
/// 256 GiB.
const MAX_REFCOUNT_CACHE: u64 = 8 << 20;

/// An open image. All its users in this process share it.
pub struct Qcow2 {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) data_file: Option<DataFile>,
    pub(super) backing: Option<Arc<dyn Image>>,
    pub(super) access: Access,
    pub(super) geometry: Geometry,
    pub(super) virtual_size: u64,
    /// Whether unallocated clusters may be someone else's to decide, now or when the image is opened next.
    pub(super) has_backing: bool,
    pub(super) compression_type: CompressionType,
    pub(super) header: async_lock::Mutex<Header>,
    pub(super) health: Health,
    /// Whether refcounts are written late: when memory is short, and when the image is closed.
    pub(super) is_lazy: bool,
    pub(super) l1: L1Table,
    pub(super) l2: TableCache,
    pub(super) allocator: Allocator,
    /// Tells when the I/O on a cluster that was freed has ended.
    pub(super) grace: Grace,
    /// Whether the host has given the file less room than its clusters need, once that is known.
    pub(super) sparse_on_host: OnceLock<bool>,
    /// Guest clusters whose L2 entries are being changed.
    pub(super) clusters: RangeLock,
    /// L1 entries whose L2 table is being made.
    pub(super) tables: RangeLock,
    /// Compressed clusters that were read lately.
    pub(super) decompressed: Decompressed,
    /// Locked while compressed data is given a place.
    pub(super) packing: async_lock::Mutex<()>,
    /// Flushes begun so far.
    pub(super) flushes_begun: AtomicU64,
    /// The number of the last flush that succeeded; locked while one is under way.
    pub(super) flushing: async_lock::Mutex<u64>,
    /// References to host clusters that memory has dropped, and the disk not yet.
    pub(super) unlinked: Mutex<Dropped>,
    /// References that the disk has dropped too, but I/O under way may still use.
    pub(super) retired: Mutex<VecDeque<Retired>>,
}

impl Qcow2 {
    /// Opens the image in `storage`, whose unallocated clusters read from `backing`.
    ///
    /// Nothing is written before the first write to the disk.
    ///
    /// # Errors
    /// Those of [`Header::read`], [`Header::require_readable`] and, for `Access::ReadWrite`,
    /// [`Header::require_writable`]; [`ErrorKind::Corrupt`](crate::error::ErrorKind::Corrupt) for an image that is
    /// to be written and whose refcounts are out of date; and the storage's.
    pub async fn open(
        storage: Arc<dyn Storage>,
        backing: Option<Arc<dyn Image>>,
        access: Access,
    ) -> Result<Self> {
        Self::open_with_data(storage, None, backing, access).await
    }

    /// As [`Qcow2::open`], with the external data file that the image names in `data`, open for the same access.
    ///
    /// # Errors
    /// As [`Qcow2::open`]; and [`ErrorKind::InvalidConfig`](crate::error::ErrorKind::InvalidConfig) if the image has
    /// none, or has one that is not given.
    pub async fn open_with_data(
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        backing: Option<Arc<dyn Image>>,
        access: Access,
    ) -> Result<Self> {
        let tables = CacheBudget::new(CacheSize::Covering);
        Self::open_sharing(storage, data, backing, access, &tables).await
    }

    /// As [`Qcow2::open_with_data`]; the image's metadata cache shares `budget` with other images.
    ///
    /// # Errors
    /// As [`Qcow2::open_with_data`].
    pub async fn open_sharing(
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        backing: Option<Arc<dyn Image>>,
        access: Access,
        budget: &Arc<CacheBudget>,
    ) -> Result<Self> {
        let name = storage.name().to_owned();
        Self::open_unnamed(storage, data, backing, access, budget)
            .await
            .context(|| format!("opening {name}"))
    }

    async fn open_unnamed(
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        backing: Option<Arc<dyn Image>>,
        access: Access,
        budget: &Arc<CacheBudget>,
    ) -> Result<Self> {
        let header = Header::read(storage.as_ref()).await?;
        Self::open_with_header(storage, data, backing, access, budget, header).await
    }

    /// As [`Qcow2::open_sharing`], with a header that has been read, and perhaps made to lead to a snapshot.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub(super) async fn open_with_header(
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        backing: Option<Arc<dyn Image>>,
        access: Access,
        budget: &Arc<CacheBudget>,
        mut header: Header,
    ) -> Result<Self> {
        match access {
            Access::ReadOnly => header.require_readable()?,
            Access::ReadWrite => {
                header.require_writable()?;
                if repair_if_dirty(storage.as_ref(), &header).await? {
                    header = Header::read(storage.as_ref()).await?;
                }
            }
        }
        let data_file = DataFile::new(&header, data)?;
        let geometry = Geometry::new(&header);
        let l1_bytes = u64::from(header.l1_size) * 8;
        let l1 = read_table(storage.as_ref(), header.l1_table_offset, l1_bytes).await?;
        let l1 = L1Table::new(geometry, header.l1_table_offset, &l1);
        let allocator = open_allocator(&storage, access, &header, &l1, budget).await?;
        let virtual_size = header.virtual_size();
        let l2_wanted = geometry.l2_bytes_for(virtual_size).min(MAX_L2_CACHE);
        Ok(Self {
            l2: TableCache::new(
                Arc::clone(&storage),
                geometry.cluster_size(),
                budget,
                l2_wanted,
            ),
            has_backing: backing.is_some() || header.backing_file.is_some(),
            compression_type: header.compression_type,
            health: Health::new(&header, access),
            is_lazy: header.has_lazy_refcounts(),
            header: async_lock::Mutex::new(header),
            storage,
            data_file,
            backing,
            access,
            geometry,
            virtual_size,
            l1,
            allocator,
            grace: Grace::default(),
            sparse_on_host: OnceLock::new(),
            clusters: RangeLock::default(),
            tables: RangeLock::default(),
            decompressed: Decompressed::new(geometry.cluster_size()),
            packing: async_lock::Mutex::new(()),
            flushes_begun: AtomicU64::new(0),
            flushing: async_lock::Mutex::new(0),
            unlinked: Mutex::default(),
            retired: Mutex::default(),
        })
    }

    /// Bounds the memory for L2 tables and refcount blocks, of all images with the same budget, to about `bytes`. What
    /// is dirty beyond it is written back before it goes.
    pub fn set_metadata_cache(&self, bytes: u64) {
        self.l2.set_limit(bytes);
        self.allocator.blocks.set_limit(bytes);
    }

    /// The file that the image is in. Whoever writes to it must have closed the image first.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Sets a header extension of this open image, durably: a power cut leaves the old one or the new one.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`](crate::error::ErrorKind::ReadOnly); and as
    /// [`set_extension`](super::header_update::set_extension).
    pub async fn set_extension(&self, extension_type: ExtensionType, data: &[u8]) -> Result<()> {
        self.begin_writing().await?;
        let mut header = self.header.lock().await;
        let unless_known = self.health.poison_if_dropped("setting a header extension");
        let outcome = set_extension(self.storage.as_ref(), extension_type, data).await;
        // The backing file's name may have moved, even if the rest has failed.
        *header = Header::read(self.storage.as_ref()).await?;
        unless_known.settle();
        outcome
    }

    /// Changes the header's fixed fields, on disk and in memory: one write within one sector.
    ///
    /// # Errors
    /// The storage's; memory then stays as it was.
    pub(super) async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut header = self.header.lock().await;
        let mut changed = header.clone();
        change(&mut changed);
        let bytes = IoBuf::from_bytes(&changed.encode_fields());
        self.storage.writev(HostOffset(0), bytes).await?;
        *header = changed;
        Ok(())
    }
}

/// The `len` bytes of a table at `at`.
///
/// # Errors
/// The storage's.
pub(super) async fn read_table(storage: &dyn Storage, at: HostOffset, len: u64) -> Result<Vec<u8>> {
    let buf = IoBuf::zeroed(to_usize(len));
    if len > 0 {
        storage.readv(at, buf.clone()).await?;
    }
    Ok(buf.to_vec())
}

async fn open_allocator(
    storage: &Arc<dyn Storage>,
    access: Access,
    header: &Header,
    l1: &L1Table,
    budget: &Arc<CacheBudget>,
) -> Result<Allocator> {
    let geometry = Geometry::new(header);
    let snapshots = match access {
        // Nothing is going to be handed out.
        Access::ReadOnly => SnapshotMetadata::default(),
        Access::ReadWrite => SnapshotMetadata::read(storage.as_ref(), geometry, header).await?,
    };
    let cluster_size = geometry.cluster_size();
    let table_at = header.refcount_table_offset;
    let table_bytes = u64::from(header.refcount_table_clusters) * cluster_size;
    let table = read_table(storage.as_ref(), table_at, table_bytes).await?;
    let (words, _) = table.as_chunks::<8>();
    let l1_at = header.l1_table_offset.0;
    let mut fixed = vec![
        0..cluster_size,
        l1_at..l1_at + u64::from(header.l1_size) * 8,
    ];
    fixed.extend(snapshots.ranges);
    if let Ok(Some((at, len))) = BitmapDirectory::place(header) {
        fixed.push(at.0..at.0 + len);
    }
    let layout = Layout {
        table_at,
        table: words.iter().map(|word| u64::from_be_bytes(*word)).collect(),
        file_len: storage.len(),
        fixed,
        l2_tables: l1.tables().chain(snapshots.l2_tables).collect(),
        nominal: nominal_clusters(header),
    };
    // As many as describe the file that the disk grows to.
    let clusters = header.size.div_ceil(cluster_size);
    let wanted = clusters
        .div_ceil(geometry.block_entries())
        .saturating_mul(cluster_size);
    let blocks = TableCache::new(
        Arc::clone(storage),
        cluster_size,
        budget,
        wanted.min(MAX_REFCOUNT_CACHE),
    );
    Ok(Allocator::new(geometry, blocks, layout))
}
