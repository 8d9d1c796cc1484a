//! A new revision of an image's metadata, made beside the one in force and brought into force by one write of the
//! header: how snapshots and sizes change (qcow2 specification, "Header", "Snapshots").
//!
//! ```text
//! in force   header ─> L1, L2 tables, snapshot table, refcount table, refcount blocks
//! new                  copies of those that change, in clusters that are free ─ barrier ─> header ─ barrier ─> punch
//! ```
//!
//! # Invariants
//!
//! Numbers in brackets are those of the crash order in `qcow2::flush`.
//!
//! 1. Nothing that the revision in force leads to is written, and no cluster that it counts. So a crash before the
//!    header is written, or any failure, leaves the image as it was, without even a leak.
//! 2. \[rules 2, 5, 6, 7, 8\] All that the new revision leads to is durable before the header is written.
//! 3. The header changes in one write within one sector: size, L1 table, snapshot table and refcount table at once.
//!    Whatever a crash leaves is the old revision or the new one, and both have exact refcounts and COPIED flags.
//! 4. \[rule 4\] What only the old revision needed is punched out after the header is durable, and used for nothing
//!    before the image is opened anew.
//! 5. Nobody else has the image open: who takes a [`Qcow2`] by value has its only user.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use super::cow::references;
use super::data_file::DataFile;
use super::engine::Qcow2;
use super::entry::{Cluster, Defect, L1Entry, L2Entry};
use super::geometry::{Geometry, to_usize};
use super::header::{Header, MAX_L1_TABLE_BYTES};
use super::health::require_refcounts;
use super::l2_table::L2Table;
use super::revision_refcounts::{NewRefcounts, corrupt};
use super::snapshot_metadata::SnapshotMetadata;
use super::snapshot_table::{Snapshot, encode_snapshots, read_table};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::{HostCluster, HostOffset};

/// What happens to references.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counting {
    /// There is one more of each.
    Add,
    /// There is one less of each.
    Drop,
}

/// Metadata that is not in force yet.
pub(super) struct Revision {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    /// The header in force.
    pub(super) header: Header,
    /// The snapshots in force.
    pub(super) snapshots: Vec<Snapshot>,
    snapshot_table_len: u64,
    refcounts: NewRefcounts,
    len_in_force: u64,
}

impl Qcow2 {
    /// Ends all work on the image, brings the revision into force that `work` makes, with the header that it returns,
    /// and opens the image anew.
    ///
    /// # Errors
    /// Those of `work` and of [`Revision::begin`], and the storage's; unless it is the header's write that fails,
    /// nothing has changed then.
    pub(super) async fn revise(
        self,
        work: impl AsyncFnOnce(&mut Revision) -> Result<Header>,
    ) -> Result<Self> {
        self.close_cleanly().await?;
        Revision::run(&self.storage, work).await?;
        self.reopened().await
    }

    /// Ends all work on the image, moves metadata that lies behind byte `end` of the file to where there is room before
    /// it, and opens the image anew. A hint: it says the same before and after, and only its file becomes shorter.
    ///
    /// # Errors
    /// As [`Qcow2::open_sharing`].
    pub(super) async fn with_metadata_before(self, end: u64) -> Result<Self> {
        self.close_cleanly().await?;
        let end = HostOffset(end);
        let moved = Revision::run(&self.storage, async |revision| {
            revision.move_before(end).await
        });
        if let Err(error) = moved.await {
            log::debug!(
                "{}: its metadata stays at the end: {error}",
                self.storage.name()
            );
        }
        self.reopened().await
    }

    /// The image opened anew, as its header is now.
    ///
    /// # Errors
    /// As [`Qcow2::open_sharing`].
    pub(super) async fn reopened(self) -> Result<Self> {
        let Self {
            storage,
            data_file,
            backing,
            access,
            l2,
            ..
        } = self;
        let budget = Arc::clone(l2.budget());
        drop(l2);
        let data = data_file.map(DataFile::into_storage);
        Self::open_sharing(storage, data, backing, access, &budget).await
    }
}

impl Revision {
    /// Brings the revision into force that `work` makes of an image that nobody has open.
    ///
    /// # Errors
    /// As [`Qcow2::revise`].
    async fn run(
        storage: &Arc<dyn Storage>,
        work: impl AsyncFnOnce(&mut Self) -> Result<Header>,
    ) -> Result<()> {
        let mut revision = Self::begin(Arc::clone(storage)).await?;
        let prepared = async {
            let mut header = work(&mut revision).await?;
            revision.prepare(&mut header).await?;
            Ok(header)
        };
        match prepared.await {
            Ok(header) => revision.bring_into_force(&header).await,
            Err(error) => {
                // Invariant 1.
                revision.abandon().await;
                Err(error)
            }
        }
    }

    /// Starts from what is in force in `storage`, an image that nobody has open.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an image whose refcounts cannot be relied on; those of [`Header::read`],
    /// [`Header::require_writable`], [`read_table`] and the storage.
    pub(super) async fn begin(storage: Arc<dyn Storage>) -> Result<Self> {
        let header = Header::read(storage.as_ref()).await?;
        header.require_writable()?;
        require_refcounts(&header)?;
        let (snapshots, snapshot_table_len) = read_table(storage.as_ref(), &header).await?;
        let refcounts = NewRefcounts::read(Arc::clone(&storage), &header).await?;
        let revision = Self {
            geometry: Geometry::new(&header),
            len_in_force: storage.len(),
            storage,
            header,
            snapshots,
            snapshot_table_len,
            refcounts,
        };
        revision.check_counted().await?;
        Ok(revision)
    }

    /// Checks that refcounts protect all that is in force: a cluster that is not counted would be taken for a free one.
    async fn check_counted(&self) -> Result<()> {
        self.refcounts.check_own_clusters().await?;
        let storage = self.storage.as_ref();
        let snapshots = SnapshotMetadata::read(storage, self.geometry, &self.header).await?;
        let cluster_size = self.geometry.cluster_size();
        let l1_at = self.header.l1_table_offset.0;
        let l1_len = u64::from(self.header.l1_size) * 8;
        let own = [0..cluster_size, l1_at..l1_at + l1_len];
        for bytes in own.into_iter().chain(snapshots.ranges) {
            let clusters = bytes.start / cluster_size..bytes.end.div_ceil(cluster_size);
            self.refcounts.check_counted(clusters).await?;
        }
        // What breaks a rule is told by whoever works on it.
        let words = self.active_l1().await?.into_iter();
        let tables = words.filter_map(|word| self.l1_entry(word).ok()?.table);
        let mut seen = HashSet::new();
        for table in tables.chain(snapshots.l2_tables) {
            if seen.insert(table) {
                self.check_counted_below(table).await?;
            }
        }
        Ok(())
    }

    /// Checks that refcounts protect an L2 table and what its entries lead to.
    async fn check_counted_below(&self, table_at: HostOffset) -> Result<()> {
        let mut clusters = vec![self.geometry.host_cluster(table_at)];
        let table = self.read_table(table_at).await?;
        for index in 0..table.len() {
            if let Ok(entry) = table.entry(index) {
                clusters.extend(references(&self.geometry, &entry));
            }
        }
        for run in runs(&clusters) {
            self.refcounts.check_counted(run).await?;
        }
        Ok(())
    }

    /// The words of the active L1 table.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn active_l1(&self) -> Result<Vec<u64>> {
        let len = u64::from(self.header.l1_size) * 8;
        self.read_l1(self.header.l1_table_offset, len).await
    }

    /// The words of a snapshot's L1 table.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::Unsupported`] for a table that cannot be one; the storage's.
    pub(super) async fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let (at, len) = snapshot.l1_table(self.geometry.cluster_size())?;
        self.read_l1(at, len).await
    }

    async fn read_l1(&self, at: HostOffset, len: u64) -> Result<Vec<u64>> {
        let buf = IoBuf::zeroed(to_usize(len));
        if len > 0 {
            self.storage.readv(at, buf.clone()).await?;
        }
        let bytes = buf.to_vec();
        let (words, _) = bytes.as_chunks::<8>();
        Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
    }

    /// Entries of the L1 table of a disk of `size` bytes: at least one.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] beyond stock QEMU's limit.
    pub(super) fn l1_entries_for(&self, size: u64) -> Result<usize> {
        let entries = self.header.l1_entries_for(size).max(1);
        if entries > MAX_L1_TABLE_BYTES / 8 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "a disk of {size} bytes needs an L1 table of more than {MAX_L1_TABLE_BYTES} bytes: make a copy of \
                     the image with larger clusters (the option cluster_size)"
                ),
            ));
        }
        Ok(to_usize(entries))
    }

    /// Counts every reference below the words of an L1 table once more, or once less: those of L2 tables, and those
    /// of their entries.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for broken entries and refcounts, [`ErrorKind::Unsupported`] where a refcount's width
    /// does not do; the storage's.
    pub(super) async fn count(&mut self, l1: &[u64], counting: Counting) -> Result<()> {
        for word in l1 {
            let Some(table_at) = self.l1_entry(*word)?.table else {
                continue;
            };
            let cluster = self.geometry.host_cluster(table_at);
            self.count_clusters(&[cluster], counting).await?;
            let table = self.read_table(table_at).await?;
            let mut clusters = Vec::new();
            for index in 0..table.len() {
                let entry = self.l2_entry(&table, table_at, index)?;
                clusters.extend(references(&self.geometry, &entry));
            }
            self.count_clusters(&clusters, counting).await?;
        }
        Ok(())
    }

    /// Counts each of these once more or once less, contiguous ones together.
    async fn count_clusters(&mut self, clusters: &[HostCluster], counting: Counting) -> Result<()> {
        for run in runs(clusters) {
            match counting {
                Counting::Add => self.refcounts.add(run).await?,
                Counting::Drop => self.refcounts.remove(run).await?,
            }
        }
        Ok(())
    }

    /// Brings the COPIED flags up to date in an L1 table that becomes the active one, and in its L2 tables, which move
    /// where their flags change. `holders` L1 tables are going to have the words: that many references move along.
    ///
    /// # Errors
    /// As [`Revision::count`].
    pub(super) async fn refresh_copied(&mut self, l1: &mut [u64], holders: u64) -> Result<()> {
        for word in l1 {
            let Some(mut table_at) = self.l1_entry(*word)?.table else {
                continue;
            };
            let mut table = self.read_table(table_at).await?;
            if self.refresh_entries(&mut table, table_at).await? {
                table_at = self.move_table(table_at, &table, holders).await?;
            }
            let cluster = self.geometry.host_cluster(table_at).0;
            let entry = L1Entry {
                table: Some(table_at),
                copied: self.refcounts.counts(cluster..cluster + 1).await? == [1],
            };
            *word = entry.encode();
        }
        Ok(())
    }

    /// Whether any flag has changed.
    async fn refresh_entries(&self, table: &mut L2Table, table_at: HostOffset) -> Result<bool> {
        let mut hosts = Vec::new();
        for index in 0..table.len() {
            // A compressed cluster never has the flag.
            if let L2Entry::Plain(cluster) = self.l2_entry(table, table_at, index)?
                && let Some(host) = cluster.host
            {
                hosts.push((index, cluster, self.geometry.host_cluster(host).0));
            }
        }
        let mut changed = false;
        for run in hosts.chunk_by(|(.., one), (.., next)| one + 1 == *next) {
            let Some((.., first)) = run.first() else {
                continue;
            };
            let counts = self
                .refcounts
                .counts(*first..first + run.len() as u64)
                .await?;
            for ((index, cluster, _), count) in run.iter().zip(counts) {
                let copied = count == 1;
                if cluster.copied != copied {
                    table.set(*index, Cluster { copied, ..*cluster });
                    changed = true;
                }
            }
        }
        Ok(changed)
    }

    /// Takes everything out of an L1 table that lies behind guest byte `end`, as far as whole clusters go.
    ///
    /// # Errors
    /// As [`Revision::count`].
    pub(super) async fn cut(&mut self, l1: &mut [u64], end: u64) -> Result<()> {
        let clusters = end.div_ceil(self.geometry.cluster_size());
        let per_table = self.header.l2_entries();
        let kept_whole = to_usize(clusters / per_table).min(l1.len());
        let kept_of_next = to_usize(clusters % per_table);
        let (_, behind) = l1.split_at_mut(kept_whole);
        let dropped = match behind.split_first_mut() {
            Some((boundary, rest)) if kept_of_next > 0 => {
                self.cut_table(boundary, kept_of_next).await?;
                rest
            }
            _ => behind,
        };
        self.count(dropped, Counting::Drop).await?;
        dropped.fill(0);
        Ok(())
    }

    /// Empties the entries of an L2 table from the one at `kept` on.
    async fn cut_table(&mut self, word: &mut u64, kept: usize) -> Result<()> {
        let Some(table_at) = self.l1_entry(*word)?.table else {
            return Ok(());
        };
        let mut table = self.read_table(table_at).await?;
        let mut changed = false;
        let mut dropped = Vec::new();
        for index in kept..table.len() {
            let entry = self.l2_entry(&table, table_at, index)?;
            dropped.extend(references(&self.geometry, &entry));
            changed |= entry != L2Entry::Plain(Cluster::default());
            table.set(index, Cluster::default());
        }
        self.count_clusters(&dropped, Counting::Drop).await?;
        if changed {
            let entry = L1Entry {
                table: Some(self.move_table(table_at, &table, 1).await?),
                copied: true,
            };
            *word = entry.encode();
        }
        Ok(())
    }

    /// Writes a changed L2 table to a new place; `holders` references move there.
    async fn move_table(
        &mut self,
        from: HostOffset,
        table: &L2Table,
        holders: u64,
    ) -> Result<HostOffset> {
        let to = self.place(table.bytes()).await?;
        let (old, new) = (
            self.geometry.host_cluster(from).0,
            self.geometry.host_cluster(to).0,
        );
        for held in 0..holders {
            if held > 0 {
                self.refcounts.add(new..new + 1).await?;
            }
            self.refcounts.remove(old..old + 1).await?;
        }
        Ok(to)
    }

    /// Writes bytes to new clusters of their own; none for no bytes.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`]; the storage's.
    pub(super) async fn place(&mut self, bytes: &[u8]) -> Result<HostOffset> {
        if bytes.is_empty() {
            return Ok(HostOffset(0));
        }
        let size = self.geometry.cluster_size();
        let clusters = (bytes.len() as u64).div_ceil(size);
        let at = self
            .geometry
            .host_start(self.refcounts.take(clusters).await?);
        let mut whole = bytes.to_vec();
        whole.resize(to_usize(clusters * size), 0);
        self.storage.writev(at, IoBuf::from_bytes(&whole)).await?;
        Ok(at)
    }

    /// As [`Revision::place`], for the words of an L1 table.
    ///
    /// # Errors
    /// As [`Revision::place`].
    pub(super) async fn place_l1(&mut self, l1: &[u64]) -> Result<HostOffset> {
        let bytes: Vec<u8> = l1.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.place(&bytes).await
    }

    /// Puts an L1 table in place of the active one, and returns the header that leads to it.
    ///
    /// # Errors
    /// As [`Revision::place`] and [`Revision::release`].
    pub(super) async fn replace_l1(&mut self, l1: &[u64]) -> Result<Header> {
        let mut header = self.header.clone();
        self.release(header.l1_table_offset, u64::from(header.l1_size) * 8)
            .await?;
        header.l1_table_offset = self.place_l1(l1).await?;
        header.l1_size = u32::try_from(l1.len()).expect("an L1 table has at most 4 Mi entries");
        Ok(header)
    }

    /// Moves the active L1 table, and L2 tables and refcount blocks that lie behind `end`, to the first free clusters.
    async fn move_before(&mut self, end: HostOffset) -> Result<Header> {
        let mut l1 = self.active_l1().await?;
        for word in &mut l1 {
            let entry = self.l1_entry(*word)?;
            // One without the flag is in L1 tables of snapshots, too.
            let Some(at) = entry.table.filter(|at| *at >= end && entry.copied) else {
                continue;
            };
            let table = self.read_table(at).await?;
            let moved = L1Entry {
                table: Some(self.move_table(at, &table, 1).await?),
                copied: true,
            };
            *word = moved.encode();
        }
        self.refcounts.move_blocks_before(end).await?;
        self.replace_l1(&l1).await
    }

    /// Lets go of the clusters of a table of `len` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if they are not counted; the storage's.
    pub(super) async fn release(&mut self, at: HostOffset, len: u64) -> Result<()> {
        let first = self.geometry.host_cluster(at).0;
        let clusters = len.div_ceil(self.geometry.cluster_size());
        self.refcounts.remove(first..first + clusters).await
    }

    /// Puts a table of `snapshots` in place of the one in force, and returns where it lies.
    ///
    /// # Errors
    /// Those of [`encode_snapshots`] and [`Revision::place`].
    pub(super) async fn replace_snapshots(&mut self, snapshots: &[Snapshot]) -> Result<HostOffset> {
        let old_at = self.header.snapshots_offset;
        self.release(old_at, self.snapshot_table_len).await?;
        self.place(&encode_snapshots(snapshots)?).await
    }

    /// Writes the refcounts, and makes all durable that `header` is going to lead to (invariant 2).
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`]; the storage's.
    async fn prepare(&mut self, header: &mut Header) -> Result<()> {
        let table = self.refcounts.write().await?;
        header.refcount_table_offset = table.at;
        header.refcount_table_clusters = table.clusters;
        // The bitmaps' bit stays: what they say of the disk is as true as before.
        let unknown = header.autoclear_features.unknown();
        header.autoclear_features = header.autoclear_features.without(unknown);
        self.storage.flush().await
    }

    /// Gives the room back that a revision has taken which does not come into force. A hint: no one knows of it.
    async fn abandon(&self) {
        if let Err(error) = self.storage.set_len(self.len_in_force).await {
            log::debug!(
                "{}: it stays longer than it was: {error}",
                self.storage.name()
            );
        }
    }

    /// Makes `header` the one in force (invariant 3), and gives the room back that is free now (invariant 4).
    ///
    /// # Errors
    /// The storage's; which revision is in force is not known then.
    async fn bring_into_force(&self, header: &Header) -> Result<()> {
        let fields = IoBuf::from_bytes(&header.encode_fields());
        self.storage.writev(HostOffset(0), fields).await?;
        self.storage.flush().await?;
        self.refcounts.punch_freed().await;
        self.cut_file().await;
        Ok(())
    }

    /// Has the file end where the last cluster in use ends. A hint.
    async fn cut_file(&self) {
        let Ok(end) = self.refcounts.end_of_used().await else {
            return;
        };
        let end = self.geometry.host_start(end).0;
        if end < self.storage.len()
            && let Err(error) = self.storage.set_len(end).await
        {
            log::debug!(
                "{}: it stays longer than it need be: {error}",
                self.storage.name()
            );
        }
    }

    async fn read_table(&self, at: HostOffset) -> Result<L2Table> {
        let buf = IoBuf::zeroed(to_usize(self.geometry.cluster_size()));
        self.storage.readv(at, buf.clone()).await?;
        Ok(L2Table::new(self.geometry, buf.to_vec()))
    }

    fn l1_entry(&self, word: u64) -> Result<L1Entry> {
        L1Entry::decode(&self.geometry, word)
            .map_err(|defect| broken(&format!("L1 entry {word:#x}"), defect))
    }

    fn l2_entry(&self, table: &L2Table, at: HostOffset, index: usize) -> Result<L2Entry> {
        table
            .entry(index)
            .map_err(|defect| broken(&format!("entry {index} of the L2 table at {at:#x}"), defect))
    }
}

/// The contiguous ones of clusters as ranges.
fn runs(clusters: &[HostCluster]) -> impl Iterator<Item = Range<u64>> {
    let runs = clusters.chunk_by(|one, next| one.checked_add(1) == Some(*next));
    runs.filter_map(|run| {
        let first = run.first()?.0;
        Some(first..first + run.len() as u64)
    })
}

fn broken(what: &str, defect: Defect) -> Error {
    corrupt(&format!("{what} {}", defect.describe()))
}
