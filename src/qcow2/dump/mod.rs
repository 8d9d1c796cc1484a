//! An image's tables as they lie on disk, for those who look into a broken image: nothing is refused but a header that
//! cannot be read, and what breaks a rule is shown with the rule that it breaks.
//!
//! ```text
//! trace   guest offset ─> L1 entry ─> L2 entry ─> host offset, with the refcount of every cluster on the way
//! find    host offset ─> everything that refers to its cluster
//! ```
//!
//! # Invariants
//!
//! 1. Nothing is written, and nothing is trusted: offsets that leave the file read as zeros.
//! 2. What is read is bounded by the file's length, whatever the tables say.

mod find;
mod trace;

pub use find::{Found, Use};
pub use trace::{Holds, Trace};

use super::engine::read_table;
use super::entry::{L1Entry, L2Entry, decode_refcount_table_entry};
use super::geometry::{Geometry, to_usize};
use super::header::Header;
use super::mapping::entry_at;
use super::refcount;
use crate::error::Result;
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// What an entry of a table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// There is nothing.
    Nothing,
    /// An L2 table or a refcount block lies there.
    Table {
        /// Its first byte.
        at: HostOffset,
        /// Whether it belongs to this entry alone.
        copied: bool,
    },
    /// A cluster that is not compressed. Without extended L2 entries it has one subcluster.
    Cluster {
        /// Its host cluster, if it has one.
        host: Option<HostOffset>,
        /// Whether that belongs to this entry alone.
        copied: bool,
        /// The subclusters whose data is there.
        allocated: u32,
        /// The subclusters that read as zeros.
        zero: u32,
    },
    /// A compressed cluster.
    Compressed {
        /// Its first byte.
        at: HostOffset,
        /// Bytes to the end of its last sector.
        len: u64,
    },
    /// It breaks this rule.
    Broken(&'static str),
}

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number in the table.
    pub index: u64,
    /// Where it lies in the file.
    pub at: HostOffset,
    /// Its 64 bits; of an extended L2 entry the first.
    pub word: u64,
    /// The second 64 bits of an extended L2 entry.
    pub bitmap: Option<u64>,
    /// What it says.
    pub meaning: Meaning,
}

/// What the refcount structures say of a host cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refcount {
    /// Its refcount.
    Is(u64),
    /// There is no refcount block for it, so it is free.
    NoBlock,
    /// The refcount table's entry for it breaks this rule.
    Broken(&'static str),
}

/// The tables of one image.
pub struct Dump<'a> {
    storage: &'a dyn Storage,
    header: &'a Header,
    geometry: Geometry,
}

impl<'a> Dump<'a> {
    /// The tables of the image in `storage`, which has this header.
    #[must_use]
    pub fn new(storage: &'a dyn Storage, header: &'a Header) -> Self {
        Self {
            storage,
            header,
            geometry: Geometry::new(header),
        }
    }

    /// The entries of the active L1 table that are not zero.
    ///
    /// # Errors
    /// The storage's.
    pub async fn l1_table(&self) -> Result<Vec<Entry>> {
        let len = u64::from(self.header.l1_size) * 8;
        self.words(self.header.l1_table_offset, len, |word| {
            self.l1_meaning(word)
        })
        .await
    }

    /// The entries of the refcount table that are not zero.
    ///
    /// # Errors
    /// The storage's.
    pub async fn refcount_table(&self) -> Result<Vec<Entry>> {
        let len = u64::from(self.header.refcount_table_clusters) * self.geometry.cluster_size();
        self.words(self.header.refcount_table_offset, len, |word| {
            self.block_meaning(word)
        })
        .await
    }

    /// The entries of the L2 table at `table` that are not zero.
    ///
    /// # Errors
    /// The storage's.
    pub async fn l2_table(&self, table: HostOffset) -> Result<Vec<Entry>> {
        let size = self.geometry.cluster_size();
        let bytes = read_table(self.storage, table, size).await?;
        let step = self.geometry.l2_entry_size();
        let entries = (0..size / step).filter_map(|index| self.l2_entry(table, &bytes, index));
        Ok(entries
            .filter(|entry| entry.word != 0 || entry.bitmap.unwrap_or(0) != 0)
            .collect())
    }

    /// What the refcount structures say of the cluster that holds the byte at `at`.
    ///
    /// # Errors
    /// The storage's.
    pub async fn refcount(&self, at: HostOffset) -> Result<Refcount> {
        let cluster = self.geometry.host_cluster(at).0;
        let index = cluster / self.geometry.block_entries();
        let entries =
            u64::from(self.header.refcount_table_clusters) * self.geometry.cluster_size() / 8;
        if index >= entries {
            return Ok(Refcount::NoBlock);
        }
        let word = self
            .word(HostOffset(self.header.refcount_table_offset.0 + index * 8))
            .await?;
        match decode_refcount_table_entry(&self.geometry, word) {
            Err(defect) => Ok(Refcount::Broken(defect.describe())),
            Ok(None) => Ok(Refcount::NoBlock),
            Ok(Some(block)) => {
                let block = read_table(self.storage, block, self.geometry.cluster_size()).await?;
                let within = cluster % self.geometry.block_entries();
                let order = self.geometry.refcount_order();
                Ok(Refcount::Is(refcount::get(&block, within, order)))
            }
        }
    }

    async fn word(&self, at: HostOffset) -> Result<u64> {
        let buf = IoBuf::zeroed(8);
        self.storage.readv(at, buf.clone()).await?;
        Ok(buf
            .to_vec()
            .as_chunks::<8>()
            .0
            .first()
            .map_or(0, |word| u64::from_be_bytes(*word)))
    }

    async fn words(
        &self,
        table: HostOffset,
        len: u64,
        meaning: impl Fn(u64) -> Meaning,
    ) -> Result<Vec<Entry>> {
        // Behind the file's end there are only zeros.
        let len = len.min(
            self.storage
                .len()
                .saturating_sub(table.0)
                .next_multiple_of(8),
        );
        let bytes = read_table(self.storage, table, len).await?;
        let (words, _) = bytes.as_chunks::<8>();
        let entries = (0..).zip(words).map(|(index, word)| {
            let word = u64::from_be_bytes(*word);
            Entry {
                index,
                at: HostOffset(table.0 + index * 8),
                word,
                bitmap: None,
                meaning: meaning(word),
            }
        });
        Ok(entries.filter(|entry| entry.word != 0).collect())
    }

    fn l1_meaning(&self, word: u64) -> Meaning {
        match L1Entry::decode(&self.geometry, word) {
            Err(defect) => Meaning::Broken(defect.describe()),
            Ok(entry) => entry.table.map_or(Meaning::Nothing, |at| Meaning::Table {
                at,
                copied: entry.copied,
            }),
        }
    }

    fn block_meaning(&self, word: u64) -> Meaning {
        match decode_refcount_table_entry(&self.geometry, word) {
            Err(defect) => Meaning::Broken(defect.describe()),
            Ok(None) => Meaning::Nothing,
            Ok(Some(at)) => Meaning::Table { at, copied: true },
        }
    }

    fn l2_entry(&self, table: HostOffset, bytes: &[u8], index: u64) -> Option<Entry> {
        let offset = index * self.geometry.l2_entry_size();
        let start = to_usize(offset);
        let word = |at: usize| Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let meaning = match entry_at(&self.geometry, bytes, start)? {
            Err(defect) => Meaning::Broken(defect.describe()),
            Ok(L2Entry::Compressed(extent)) => Meaning::Compressed {
                at: extent.at,
                len: extent.len,
            },
            Ok(L2Entry::Plain(cluster)) => Meaning::Cluster {
                host: cluster.host,
                copied: cluster.copied,
                allocated: cluster.allocated,
                zero: cluster.zero,
            },
        };
        Some(Entry {
            index,
            at: HostOffset(table.0.saturating_add(offset)),
            word: word(start)?,
            bitmap: if self.geometry.has_extended_l2() {
                Some(word(start + 8)?)
            } else {
                None
            },
            meaning,
        })
    }
}
