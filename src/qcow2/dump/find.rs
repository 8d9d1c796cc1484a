//! What lies at a host offset: everything that refers to its cluster, by a walk through all tables.

use std::collections::HashMap;
use std::ops::Range;

use super::{Dump, Entry, Meaning, Refcount};
use crate::error::Result;
use crate::qcow2::bitmap::{BitmapCluster, BitmapDirectory};
use crate::qcow2::engine::read_table;
use crate::qcow2::header::Header;
use crate::qcow2::snapshot_table::read_snapshots;
use crate::storage::Storage;
use crate::units::{GuestOffset, HostOffset};

/// The most uses of one cluster that are told.
const MAX_USES: usize = 1000;

/// What a host cluster is used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// The header, with its extensions and the backing file's name.
    Header,
    /// The active L1 table.
    L1Table,
    /// The L1 table of a snapshot.
    SnapshotL1Table(String),
    /// The refcount table.
    RefcountTable,
    /// The refcount block of this number.
    RefcountBlock(u64),
    /// The snapshot table.
    SnapshotTable,
    /// The L2 table of an L1 entry.
    L2Table {
        /// The snapshot whose L1 table it is; none for the active one.
        snapshot: Option<String>,
        /// The L1 entry.
        l1_index: u64,
    },
    /// A cluster of the guest's data.
    Data {
        /// The snapshot that shows it; none for the active disk.
        snapshot: Option<String>,
        /// The guest cluster's first byte.
        guest: GuestOffset,
    },
    /// A compressed cluster, or a part of one.
    Compressed {
        /// The snapshot that shows it; none for the active disk.
        snapshot: Option<String>,
        /// The guest cluster's first byte.
        guest: GuestOffset,
    },
    /// The directory of persistent bitmaps.
    BitmapDirectory,
    /// The table of a bitmap.
    BitmapTable(String),
    /// A cluster of bits.
    Bitmap(String),
}

/// What lies at a host offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The first byte of the cluster.
    pub cluster: HostOffset,
    /// Whether the file ends before it.
    pub is_beyond_end: bool,
    /// What the refcount structures say of the cluster.
    pub refcount: Refcount,
    /// Everything that refers to it: nothing for a free cluster, or a leaked one.
    pub uses: Vec<Use>,
    /// What could not be searched, and why.
    pub gaps: Vec<String>,
}

/// A search for one cluster.
struct Search<'a> {
    dump: &'a Dump<'a>,
    cluster: HostOffset,
    found: Found,
    /// L2 tables that were searched: where in each the cluster is referred to, and whether as compressed data.
    tables: HashMap<u64, Vec<(u64, bool)>>,
    /// Bytes of L1 tables that may still be read.
    l1_budget: u64,
}

impl Dump<'_> {
    /// Finds what refers to the cluster that holds the byte at `at`.
    ///
    /// # Errors
    /// The storage's.
    pub async fn find(&self, at: HostOffset) -> Result<Found> {
        let cluster = self.geometry.host_start(self.geometry.host_cluster(at));
        let mut search = Search {
            dump: self,
            cluster,
            found: Found {
                cluster,
                is_beyond_end: cluster.0 >= self.storage.len(),
                refcount: self.refcount(cluster).await?,
                uses: Vec::new(),
                gaps: Vec::new(),
            },
            tables: HashMap::new(),
            l1_budget: self.storage.len(),
        };
        search.fixed().await?;
        search.bitmaps().await;
        let active = self.l1_table().await?;
        search.mapping(None, &active).await?;
        search.snapshots().await?;
        Ok(search.found)
    }
}

impl Search<'_> {
    fn header(&self) -> &Header {
        self.dump.header
    }

    fn size(&self) -> u64 {
        self.dump.geometry.cluster_size()
    }

    fn is_in(&self, at: HostOffset, len: u64) -> bool {
        let end = at.0.saturating_add(len);
        len > 0 && at.0 < self.cluster.0.saturating_add(self.size()) && self.cluster.0 < end
    }

    fn add(&mut self, what: Use) {
        if self.found.uses.len() >= MAX_USES {
            return;
        }
        self.found.uses.push(what);
        if self.found.uses.len() == MAX_USES {
            let gap = format!("there are {MAX_USES} uses, and perhaps more");
            self.found.gaps.push(gap);
        }
    }

    /// Header, L1 table, refcount table and blocks.
    async fn fixed(&mut self) -> Result<()> {
        let header = self.header();
        let l1 = (header.l1_table_offset, u64::from(header.l1_size) * 8);
        let table_len = u64::from(header.refcount_table_clusters) * self.size();
        let table = (header.refcount_table_offset, table_len);
        if self.is_in(HostOffset(0), self.size()) {
            self.add(Use::Header);
        }
        if self.is_in(l1.0, l1.1) {
            self.add(Use::L1Table);
        }
        if self.is_in(table.0, table.1) {
            self.add(Use::RefcountTable);
        }
        for entry in self.dump.refcount_table().await? {
            if let Meaning::Table { at, .. } = entry.meaning
                && self.is_in(at, self.size())
            {
                self.add(Use::RefcountBlock(entry.index));
            }
        }
        Ok(())
    }

    async fn bitmaps(&mut self) {
        if let Err(error) = self.search_bitmaps().await {
            self.found.gaps.push(error.to_string());
        }
    }

    async fn search_bitmaps(&mut self) -> Result<()> {
        let (storage, header) = (self.dump.storage, self.dump.header);
        let Some(directory) = BitmapDirectory::read(storage, header).await? else {
            return Ok(());
        };
        if self.is_in(directory.at, directory.len) {
            self.add(Use::BitmapDirectory);
        }
        for bitmap in &directory.bitmaps {
            if self.is_in(bitmap.table_at, bitmap.table_len()) {
                self.add(Use::BitmapTable(bitmap.name.clone()));
            }
            for cluster in bitmap.read_table(storage, header).await? {
                if let Ok(BitmapCluster::Stored(at)) = cluster
                    && self.is_in(at, self.size())
                {
                    self.add(Use::Bitmap(bitmap.name.clone()));
                }
            }
        }
        Ok(())
    }

    async fn snapshots(&mut self) -> Result<()> {
        let (storage, header) = (self.dump.storage, self.dump.header);
        let snapshots = match read_snapshots(storage, header).await {
            Ok(snapshots) => snapshots,
            Err(error) => {
                self.found.gaps.push(error.to_string());
                return Ok(());
            }
        };
        let table_len = table_len(storage, header, &snapshots);
        if self.is_in(header.snapshots_offset, table_len) {
            self.add(Use::SnapshotTable);
        }
        for snapshot in snapshots {
            let name = snapshot.label();
            let (at, len) = match snapshot.l1_table(self.size()) {
                Ok(place) => place,
                Err(error) => {
                    self.found.gaps.push(error.to_string());
                    continue;
                }
            };
            let Some(left) = self.l1_budget.checked_sub(len) else {
                let gap =
                    format!("the L1 tables of snapshots from '{name}' on are longer than the file");
                self.found.gaps.push(gap);
                return Ok(());
            };
            self.l1_budget = left;
            if self.is_in(at, len) {
                self.add(Use::SnapshotL1Table(name.clone()));
            }
            let l1 = self
                .dump
                .words(at, len, |word| self.dump.l1_meaning(word))
                .await?;
            self.mapping(Some(&name), &l1).await?;
        }
        Ok(())
    }

    /// The L2 tables that an L1 table leads to, and what they lead to.
    async fn mapping(&mut self, snapshot: Option<&String>, l1: &[Entry]) -> Result<()> {
        for entry in l1 {
            let Meaning::Table { at: table, .. } = entry.meaning else {
                continue;
            };
            if self.found.uses.len() >= MAX_USES {
                return Ok(());
            }
            // Behind the file's end there are only zeros. Tables of the file are read once each.
            if table.0 >= self.dump.storage.len() {
                continue;
            }
            if self.is_in(table, self.size()) {
                self.add(Use::L2Table {
                    snapshot: snapshot.cloned(),
                    l1_index: entry.index,
                });
            }
            if !self.tables.contains_key(&table.0) {
                let references = self.references(table).await?;
                self.tables.insert(table.0, references);
            }
            let references = self.tables.get(&table.0).cloned().unwrap_or_default();
            for (index, is_compressed) in references {
                let per_table = self.header().l2_entries();
                let cluster = entry.index * per_table + index;
                let guest = GuestOffset(cluster.saturating_mul(self.size()));
                let snapshot = snapshot.cloned();
                self.add(if is_compressed {
                    Use::Compressed { snapshot, guest }
                } else {
                    Use::Data { snapshot, guest }
                });
            }
        }
        Ok(())
    }

    /// Where an L2 table refers to the cluster, and whether as compressed data.
    async fn references(&self, table: HostOffset) -> Result<Vec<(u64, bool)>> {
        let bytes = read_table(self.dump.storage, table, self.size()).await?;
        let indices: Range<u64> = 0..self.header().l2_entries();
        let refers = |index: u64| {
            let entry = self.dump.l2_entry(table, &bytes, index)?;
            match entry.meaning {
                Meaning::Cluster { host: Some(at), .. } if self.is_in(at, self.size()) => {
                    Some((index, false))
                }
                Meaning::Compressed { at, len } if self.is_in(at, len) => Some((index, true)),
                _ => None,
            }
        };
        Ok(indices.filter_map(refers).collect())
    }
}

/// Bytes of the snapshot table, as its entries are read.
fn table_len(
    storage: &dyn Storage,
    header: &Header,
    snapshots: &[crate::qcow2::snapshot_table::Snapshot],
) -> u64 {
    match crate::qcow2::snapshot_table::encode_snapshots(snapshots) {
        Ok(bytes) => bytes.len() as u64,
        Err(_) => storage.len().saturating_sub(header.snapshots_offset.0),
    }
}
