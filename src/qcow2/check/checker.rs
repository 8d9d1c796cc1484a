//! What all parts of a check share: the image, the numbers found so far, and large reads of tables.

use std::ops::Range;

use super::super::geometry::{Geometry, to_usize};
use super::super::header::Header;
use super::super::join::{Piece, join_all};
use super::counts::{Counts, Use};
use super::entries::Bounds;
use super::lost::StandIn;
use super::report::{Finding, Listener, Report, Severity};
use crate::error::Result;
use crate::progress::Progress;
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::{HostCluster, HostOffset};

/// Bytes of a table that are read at once.
const PIECE: u64 = 1 << 20;

/// Whether what is found is counted and told, or was already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Voice {
    Aloud,
    Silent,
}

/// A check under way.
pub(super) struct Checker<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) header: Header,
    pub(super) bounds: Bounds,
    pub(super) report: Report,
    /// Something is wrong with what tables say, whatever refcounts say of it.
    pub(super) has_broken_tables: bool,
    /// Refcounts cannot be mended where they are.
    pub(super) needs_rebuild: bool,
    /// Bitmaps cannot be used.
    pub(super) has_broken_bitmaps: bool,
    /// Entries of the snapshot table lack fields.
    pub(super) has_incomplete_snapshots: bool,
    /// What stands in for lost L2 tables.
    pub(super) stand_in: StandIn,
    /// Bytes that counts may take.
    pub(super) memory: usize,
    pub(super) progress: &'a Progress,
    listener: Listener<'a>,
    /// For what a walk through the tables finds: every further pass finds it again.
    pub(super) voice: Voice,
}

impl<'a> Checker<'a> {
    /// Nothing is checked yet.
    pub(super) fn new(
        storage: &'a dyn Storage,
        header: Header,
        memory: usize,
        listener: Listener<'a>,
        progress: &'a Progress,
    ) -> Self {
        let bounds = Bounds {
            geometry: Geometry::new(&header),
            file_len: storage.len(),
            has_data_file: header.has_data_file(),
        };
        let total_clusters = header.virtual_size().div_ceil(header.cluster_size());
        Self {
            storage,
            header,
            bounds,
            report: Report {
                total_clusters,
                ..Report::default()
            },
            has_broken_tables: false,
            needs_rebuild: false,
            has_broken_bitmaps: false,
            has_incomplete_snapshots: false,
            stand_in: StandIn::default(),
            memory,
            progress,
            listener,
            voice: Voice::Aloud,
        }
    }

    /// Clusters of the file, the last perhaps incomplete.
    pub(super) fn file_clusters(&self) -> u64 {
        self.bounds.file_len.div_ceil(self.header.cluster_size())
    }

    /// Counts and tells `times` corruptions.
    pub(super) fn corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        if times == 0 {
            return;
        }
        self.report.corruptions = self.report.corruptions.saturating_add(times);
        self.tell(Severity::Corruption, text());
    }

    /// As [`Checker::corruption`], for what every pass finds: only the first counts.
    pub(super) fn walk_corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        if self.voice == Voice::Aloud {
            self.has_broken_tables = true;
            self.corruption(times, text);
        }
    }

    /// Tells something that has no number of its own, or whose number is counted already.
    pub(super) fn tell(&mut self, severity: Severity, text: String) {
        (self.listener)(Finding { severity, text });
    }

    /// Counts references to all clusters that these bytes touch, unless they leave the file.
    pub(super) fn refer(
        &mut self,
        counts: &mut Counts,
        (at, len): (HostOffset, u64),
        times: u64,
        by: Use,
        what: &str,
    ) {
        if len == 0 {
            return;
        }
        if !self.bounds.holds(at.0, len) {
            self.walk_corruption(times, || {
                format!("{what} at {at:#x}, {len} bytes: it reaches beyond the end of the file")
            });
            return;
        }
        for cluster in self.clusters_of(at, len) {
            counts.add(HostCluster(cluster), times, by);
        }
    }

    /// The clusters that these bytes touch.
    pub(super) fn clusters_of(&self, at: HostOffset, len: u64) -> Range<u64> {
        let size = self.header.cluster_size();
        at.0 / size..at.0.saturating_add(len).div_ceil(size)
    }

    /// Reads bytes; zeros behind the end of the file.
    pub(super) async fn read(&self, at: HostOffset, len: u64) -> Result<Vec<u8>> {
        let buf = IoBuf::zeroed(to_usize(len));
        self.storage.readv(at, buf.clone()).await?;
        Ok(buf.to_vec())
    }

    /// Reads the clusters at these offsets, many at a time.
    pub(super) async fn read_clusters(&self, offsets: &[HostOffset]) -> Result<Vec<Vec<u8>>> {
        let size = to_usize(self.header.cluster_size());
        let buffers: Vec<IoBuf> = offsets.iter().map(|_| IoBuf::zeroed(size)).collect();
        let reads = offsets
            .iter()
            .zip(&buffers)
            .map(|(at, buf)| -> Piece<'_> { self.storage.readv(*at, buf.clone()) });
        join_all(reads).await?;
        Ok(buffers.iter().map(IoBuf::to_vec).collect())
    }

    /// Writes the header's fixed fields and makes them durable: one write within one sector.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn write_header(&self) -> Result<()> {
        self.write(HostOffset(0), &self.header.encode_fields())
            .await?;
        self.storage.flush().await
    }

    /// Overwrites bytes of the file.
    pub(super) async fn write(&self, at: HostOffset, bytes: &[u8]) -> Result<()> {
        self.storage.writev(at, IoBuf::from_bytes(bytes)).await
    }

    /// The pieces in which a table of big-endian words is read: where each begins, and the words in it. What lies
    /// behind the end of the file is zero and left out.
    pub(super) fn pieces(
        &self,
        at: HostOffset,
        words: u64,
    ) -> impl Iterator<Item = WordsAt> + use<> {
        let end =
            at.0.saturating_add(words.saturating_mul(8))
                .min(self.bounds.file_len.next_multiple_of(8));
        let mut from = at.0;
        std::iter::from_fn(move || {
            let len = end.saturating_sub(from).min(PIECE);
            let piece = WordsAt {
                at: HostOffset(from),
                first: (from - at.0) / 8,
                len,
            };
            from = from.saturating_add(len);
            (len >= 8).then_some(piece)
        })
    }

    /// The words of a piece, each with its index in the table.
    pub(super) async fn words(&self, piece: &WordsAt) -> Result<Vec<(u64, u64)>> {
        let bytes = self.read(piece.at, piece.len).await?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok((piece.first..)
            .zip(words.iter().map(|word| u64::from_be_bytes(*word)))
            .collect())
    }
}

/// A part of a table of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WordsAt {
    pub(super) at: HostOffset,
    /// The index of its first word in the table.
    pub(super) first: u64,
    /// Bytes.
    pub(super) len: u64,
}
