//! The refcount table and its blocks: whether they are sound, and whether what they say is what was counted (qcow2
//! specification, "Refcounts").

use std::ops::Range;

use super::super::geometry::to_usize;
use super::super::refcount;
use super::checker::{Checker, Voice};
use super::counts::{CHUNK, Chunk, Counts, Use};
use super::report::Severity;
use crate::error::Result;
use crate::units::{HostCluster, HostOffset};

/// Bits without a meaning in entries of the refcount table.
const RESERVED: u64 = 0x1ff;

/// Which refcounts are set to what was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fix {
    Nothing,
    /// Those that are too high.
    Leaks,
    /// All.
    All,
}

/// Where a refcount block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    At(HostOffset),
    /// There is none: its refcounts are 0.
    Absent,
    /// The entry leads nowhere: its refcounts are unknown.
    Unknown,
}

/// A cluster whose refcount is not what was counted.
struct Mismatch {
    cluster: HostCluster,
    actual: u64,
    counted: u64,
}

/// What comparing some refcounts has shown.
#[derive(Default)]
struct Compared {
    mismatches: Vec<Mismatch>,
    /// The last cluster of the file that is referred to, or has a refcount.
    last_used: Option<u64>,
}

/// A refcount block in memory.
struct Refcounts {
    bytes: Vec<u8>,
    /// The cluster whose refcount is the first.
    first: u64,
    /// Where the clusters of the file end.
    file_clusters: u64,
    order: u32,
    max: u64,
    is_changed: bool,
}

impl Refcounts {
    /// Compares the refcounts of clusters of one chunk.
    fn compare(
        &mut self,
        mut chunk: Option<&mut Chunk>,
        clusters: Range<u64>,
        fix: Fix,
    ) -> Compared {
        let mut compared = Compared::default();
        for cluster in clusters {
            let index = to_usize(cluster % CHUNK);
            let actual = refcount::get(&self.bytes, cluster - self.first, self.order);
            let counted = chunk
                .as_ref()
                .map_or(0, |chunk| chunk.get(index))
                .min(self.max);
            if cluster < self.file_clusters && (actual > 0 || counted > 0) {
                compared.last_used = Some(cluster);
            }
            let is_fixed = match fix {
                Fix::Nothing => false,
                Fix::Leaks => actual > counted,
                Fix::All => actual != counted,
            };
            if is_fixed {
                refcount::set(&mut self.bytes, cluster - self.first, self.order, counted);
                self.is_changed = true;
            }
            if actual != counted {
                compared.mismatches.push(Mismatch {
                    cluster: HostCluster(cluster),
                    actual,
                    counted,
                });
            }
            if let Some(chunk) = &mut chunk {
                chunk.set_sole(index, if is_fixed { counted } else { actual } == 1);
            }
        }
        compared
    }
}

impl Checker<'_> {
    /// The largest refcount that the image's width can say.
    pub(super) fn refcount_max(&self) -> u64 {
        match self.header.refcount_bits() {
            64 => u64::MAX,
            bits => (1 << bits) - 1,
        }
    }

    fn table_entries(&self) -> u64 {
        u64::from(self.header.refcount_table_clusters) * self.header.cluster_size() / 8
    }

    /// Counts the references of the refcount table, after all others: a block that has any other is no block.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn walk_refcount_table(&mut self, counts: &mut Counts) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let file_clusters = self.file_clusters();
        for piece in self.pieces(self.header.refcount_table_offset, self.table_entries()) {
            for (index, word) in self.words(&piece).await? {
                if word == 0 {
                    continue;
                }
                let wrong = if !word.is_multiple_of(cluster_size) {
                    "is not aligned to a cluster"
                } else if word / cluster_size >= file_clusters {
                    "points behind the end of the file"
                } else {
                    self.count_block(counts, index, HostOffset(word));
                    continue;
                };
                self.needs_rebuild = true;
                if self.voice == Voice::Silent {
                    continue;
                }
                self.corruption(1, || {
                    format!("refcount table entry {index} ({word:#x}) {wrong}")
                });
            }
        }
        Ok(())
    }

    fn count_block(&mut self, counts: &mut Counts, index: u64, at: HostOffset) {
        let range = (at, self.header.cluster_size());
        self.refer(counts, range, 1, Use::Other, "refcount block");
        let cluster = self.bounds.geometry.host_cluster(at);
        let references = counts.get(cluster);
        if counts.covers(cluster) && references != 1 {
            self.needs_rebuild = true;
            // What a refcount cannot say is told as such, once.
            let times = u64::from(references.min(self.refcount_max()) != 1);
            self.corruption(times, || {
                format!("refcount block {index} at {at:#x}: something else refers to it, too")
            });
        }
    }

    /// Compares refcounts with what was counted, and notes which of the clusters have refcount 1.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn compare(&mut self, counts: &mut Counts, fix: Fix) -> Result<()> {
        self.tell_overflows(counts);
        let per_block = self.bounds.geometry.block_entries();
        let window = counts.window();
        let mut covered = window.start;
        for piece in self.pieces(self.header.refcount_table_offset, self.table_entries()) {
            for (index, word) in self.words(&piece).await? {
                let clusters = index * per_block..(index + 1) * per_block;
                let within = clusters.start.max(window.start)..clusters.end.min(window.end);
                if within.is_empty() {
                    continue;
                }
                covered = within.end;
                match self.block_at(counts, word, &clusters) {
                    Block::At(at) => {
                        let first = clusters.start;
                        self.compare_block(counts, at, first, within, fix).await?;
                    }
                    Block::Absent => self.compare_absent(counts, &within),
                    Block::Unknown => {}
                }
            }
        }
        let last = counts.last().map_or(0, |cluster| cluster.0 + 1);
        self.compare_absent(counts, &(covered..last.max(covered)));
        Ok(())
    }

    fn block_at(&self, counts: &Counts, word: u64, clusters: &Range<u64>) -> Block {
        let at = HostOffset(word & !RESERVED);
        let geometry = &self.bounds.geometry;
        if at.0 == 0 {
            return Block::Absent;
        }
        if geometry.within_cluster(at.0) != 0 {
            return Block::Unknown;
        }
        let block = geometry.host_cluster(at);
        // Blocks for clusters behind the end are read only if each is a cluster of its own: there may be many.
        let is_behind = clusters.start >= self.file_clusters();
        if block.0 >= self.file_clusters() || is_behind && counts.get(block) != 1 {
            return Block::Absent;
        }
        Block::At(at)
    }

    /// Compares the refcounts of `within` in the block at `at`, whose first refcount is that of cluster `first`.
    async fn compare_block(
        &mut self,
        counts: &mut Counts,
        at: HostOffset,
        first: u64,
        within: Range<u64>,
        fix: Fix,
    ) -> Result<()> {
        let mut block = Refcounts {
            bytes: self.read(at, self.header.cluster_size()).await?,
            first,
            file_clusters: self.file_clusters(),
            order: self.header.refcount_order,
            max: self.refcount_max(),
            is_changed: false,
        };
        let mut start = within.start;
        while start < within.end {
            let number = start / CHUNK;
            let end = within.end.min((number + 1) * CHUNK);
            let compared = block.compare(counts.chunk_mut(number), start..end, fix);
            self.note_used(compared.last_used);
            for mismatch in &compared.mismatches {
                self.tell_mismatch(mismatch);
            }
            start = end;
        }
        if block.is_changed {
            self.write(at, &block.bytes).await?;
        }
        Ok(())
    }

    /// Clusters whose refcounts nothing stores: they are 0.
    fn compare_absent(&mut self, counts: &mut Counts, within: &Range<u64>) {
        for number in counts.chunks_in(within) {
            let Some(chunk) = counts.chunk_mut(number) else {
                continue;
            };
            let start = within.start.max(number * CHUNK);
            let end = within.end.min((number + 1) * CHUNK);
            let used: Vec<(u64, u64)> = (start..end)
                .map(|cluster| (cluster, chunk.get(to_usize(cluster % CHUNK))))
                .filter(|(_, counted)| *counted > 0)
                .collect();
            let max = self.refcount_max();
            self.needs_rebuild |= !used.is_empty();
            for (cluster, counted) in used {
                self.note_used(Some(cluster));
                self.tell_mismatch(&Mismatch {
                    cluster: HostCluster(cluster),
                    actual: 0,
                    counted: counted.min(max),
                });
            }
        }
    }

    /// Keeps where the last cluster in use ends; refcounts behind the end of the file are not use.
    fn note_used(&mut self, cluster: Option<u64>) {
        if let Some(cluster) = cluster.filter(|cluster| *cluster < self.file_clusters()) {
            let end = (cluster + 1) * self.header.cluster_size();
            self.report.image_end_offset = self.report.image_end_offset.max(end);
        }
    }

    fn tell_mismatch(&mut self, mismatch: &Mismatch) {
        let Mismatch {
            cluster,
            actual,
            counted,
        } = mismatch;
        let text = format!("cluster {cluster} refcount={actual} reference={counted}");
        if actual < counted {
            self.corruption(1, || text);
        } else {
            self.report.leaks += 1;
            self.tell(Severity::Leak, text);
        }
    }

    /// More references than a refcount can say are one corruption each.
    fn tell_overflows(&mut self, counts: &mut Counts) {
        let max = self.refcount_max();
        for number in counts.chunks_in(&counts.window()) {
            let Some(chunk) = counts.chunk_mut(number) else {
                continue;
            };
            let over: Vec<(usize, u64)> = (0..to_usize(CHUNK))
                .map(|index| (index, chunk.get(index)))
                .filter(|(_, counted)| *counted > max)
                .collect();
            for (index, counted) in over {
                let cluster = number * CHUNK + index as u64;
                self.corruption(counted - max, || {
                    format!(
                        "cluster {cluster} has {counted} references, and its refcount can say {max} at most: copy the \
                         disk with `seethrough convert`"
                    )
                });
            }
        }
    }
}
