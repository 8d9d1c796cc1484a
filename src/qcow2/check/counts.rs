//! How often each host cluster is referred to, counted in bounded memory.
//!
//! # Memory
//!
//! A host cluster takes 1.25 bytes here, in chunks of 4096 clusters that exist only where something is referred
//! to; counts above 254 take 64 bytes more each. When all of that reaches the limit, the highest chunks go: the
//! counts then cover a *window* of the file, and the caller counts the rest in further passes.
//!
//! # Invariants
//!
//! 1. Inside the window every reference is counted, outside it none is kept.
//! 2. The window only ever shrinks, and never below one chunk.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::units::HostCluster;

/// Clusters of a chunk.
pub(super) const CHUNK: u64 = LEN as u64;
/// The same, as memory is indexed.
const LEN: usize = 4096;
/// Words of a bit for each cluster of a chunk.
const WORDS: usize = LEN / 64;
/// Bytes of a chunk, with what the tree needs for it.
const CHUNK_BYTES: usize = LEN + 2 * 8 * WORDS + 64;
/// Bytes of a count that does not fit a byte.
const WIDE_BYTES: usize = 64;
/// The byte that says: the count is among the wide ones.
const WIDE: u8 = u8::MAX;

/// What refers to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// An L1 entry: the cluster holds an L2 table.
    L2Table,
    /// Anything else.
    Other,
}

/// The counts of contiguous clusters.
pub(super) struct Chunk {
    narrow: [u8; LEN],
    wide: BTreeMap<usize, u64>,
    /// Clusters that something else than an L1 entry refers to.
    other: [u64; WORDS],
    /// Clusters whose refcount on disk is 1.
    sole: [u64; WORDS],
}

impl Chunk {
    fn new() -> Box<Self> {
        Box::new(Self {
            narrow: [0; LEN],
            wide: BTreeMap::new(),
            other: [0; WORDS],
            sole: [0; WORDS],
        })
    }

    /// The references to the cluster at `index` of this chunk.
    pub(super) fn get(&self, index: usize) -> u64 {
        match self.narrow.get(index) {
            Some(&WIDE) => self.wide.get(&index).copied().unwrap_or_default(),
            Some(count) => u64::from(*count),
            None => 0,
        }
    }

    /// Adds references; the answer is how many more wide counts there are now.
    fn add(&mut self, index: usize, times: u64) -> usize {
        let sum = self.get(index).saturating_add(times);
        let Some(narrow) = self.narrow.get_mut(index) else {
            return 0;
        };
        match u8::try_from(sum) {
            Ok(small) if small != WIDE => {
                *narrow = small;
                0
            }
            _ => {
                *narrow = WIDE;
                usize::from(self.wide.insert(index, sum).is_none())
            }
        }
    }

    /// Says whether the refcount of the cluster at `index` is 1 on disk.
    pub(super) fn set_sole(&mut self, index: usize, is_sole: bool) {
        if let Some(word) = self.sole.get_mut(index / 64) {
            *word = *word & !(1 << (index % 64)) | u64::from(is_sole) << (index % 64);
        }
    }
}

fn bit(words: &[u64], index: usize) -> bool {
    words
        .get(index / 64)
        .is_some_and(|word| word >> (index % 64) & 1 == 1)
}

/// The counts of a window of the file.
pub(super) struct Counts {
    chunks: BTreeMap<u64, Box<Chunk>>,
    window: Range<u64>,
    bytes: usize,
    limit: usize,
}

impl Counts {
    /// No references yet, to clusters from `start` on, in about `limit` bytes.
    pub(super) fn new(start: HostCluster, limit: usize) -> Self {
        Self {
            chunks: BTreeMap::new(),
            window: start.0..u64::MAX,
            bytes: 0,
            limit,
        }
    }

    /// The clusters whose counts are complete, by their numbers.
    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Whether a cluster's count is known.
    pub(super) fn covers(&self, cluster: HostCluster) -> bool {
        self.window.contains(&cluster.0)
    }

    /// Counts references to a cluster.
    pub(super) fn add(&mut self, cluster: HostCluster, times: u64, by: Use) {
        if !self.covers(cluster) {
            return;
        }
        let (number, index) = place(cluster);
        let mut added = 0;
        let chunk = self.chunks.entry(number).or_insert_with(|| {
            added = CHUNK_BYTES;
            Chunk::new()
        });
        added += chunk.add(index, times) * WIDE_BYTES;
        if by == Use::Other
            && let Some(word) = chunk.other.get_mut(index / 64)
        {
            *word |= 1 << (index % 64);
        }
        self.bytes += added;
        while self.bytes > self.limit && self.chunks.len() > 1 {
            self.drop_last();
        }
    }

    fn drop_last(&mut self) {
        if let Some((number, chunk)) = self.chunks.pop_last() {
            self.bytes -= CHUNK_BYTES + chunk.wide.len() * WIDE_BYTES;
            self.window.end = number * CHUNK;
        }
    }

    /// The references to a cluster.
    pub(super) fn get(&self, cluster: HostCluster) -> u64 {
        let (number, index) = place(cluster);
        self.chunks.get(&number).map_or(0, |chunk| chunk.get(index))
    }

    /// Whether something else than an L1 entry refers to a cluster.
    pub(super) fn has_other_use(&self, cluster: HostCluster) -> bool {
        let (number, index) = place(cluster);
        self.chunks
            .get(&number)
            .is_some_and(|chunk| bit(&chunk.other, index))
    }

    /// Whether the refcount of a cluster that is referred to is 1 on disk.
    pub(super) fn is_sole(&self, cluster: HostCluster) -> bool {
        let (number, index) = place(cluster);
        self.chunks
            .get(&number)
            .is_some_and(|chunk| bit(&chunk.sole, index))
    }

    /// The chunk with this number (clusters from `number` · [`CHUNK`] on), if anything in it is referred to.
    pub(super) fn chunk_mut(&mut self, number: u64) -> Option<&mut Chunk> {
        self.chunks.get_mut(&number).map(Box::as_mut)
    }

    /// The numbers of the chunks that hold clusters of `range`.
    pub(super) fn chunks_in(&self, range: &Range<u64>) -> Vec<u64> {
        if range.is_empty() {
            return Vec::new();
        }
        self.chunks
            .range(range.start / CHUNK..=(range.end - 1) / CHUNK)
            .map(|(number, _)| *number)
            .collect()
    }

    /// The last cluster that is referred to.
    pub(super) fn last(&self) -> Option<HostCluster> {
        self.chunks.iter().rev().find_map(|(number, chunk)| {
            let last = chunk.narrow.iter().rposition(|count| *count != 0)?;
            Some(HostCluster(number * CHUNK + last as u64))
        })
    }
}

/// The number of a cluster's chunk, and the cluster's index in it.
fn place(cluster: HostCluster) -> (u64, usize) {
    let index = usize::try_from(cluster.0 % CHUNK).expect("less than a chunk");
    (cluster.0 / CHUNK, index)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLENTY: usize = 1 << 30;

    fn add(counts: &mut Counts, cluster: u64, times: u64) {
        counts.add(HostCluster(cluster), times, Use::Other);
    }

    #[test]
    fn counts_of_any_size_add_up() {
        let mut counts = Counts::new(HostCluster(0), PLENTY);
        for (cluster, times) in [(5, 1), (5, 253), (5, 1), (5, 1000), (70_000, u64::MAX)] {
            add(&mut counts, cluster, times);
        }
        assert_eq!(counts.get(HostCluster(5)), 1255);
        assert_eq!(counts.get(HostCluster(6)), 0);
        assert_eq!(counts.get(HostCluster(70_000)), u64::MAX);
        assert_eq!(counts.last(), Some(HostCluster(70_000)));
        assert_eq!(counts.chunks_in(&(0..70_000)), [0, 17]);
    }

    #[test]
    fn what_refers_to_a_cluster_is_told_apart() {
        let mut counts = Counts::new(HostCluster(0), PLENTY);
        counts.add(HostCluster(3), 2, Use::L2Table);
        counts.add(HostCluster(4), 1, Use::L2Table);
        counts.add(HostCluster(4), 1, Use::Other);
        assert!(!counts.has_other_use(HostCluster(3)));
        assert!(counts.has_other_use(HostCluster(4)));
    }

    #[test]
    fn memory_stays_within_its_limit_and_the_windows_cover_everything() {
        let clusters: Vec<u64> = (0..100).map(|n| n * 7919 % 100 * CHUNK + n).collect();
        let mut start = 0;
        let mut seen = 0;
        let mut passes = 0;
        while start < 100 * CHUNK {
            let mut counts = Counts::new(HostCluster(start), 10 * CHUNK_BYTES);
            for cluster in &clusters {
                add(&mut counts, *cluster, 300);
                assert!(counts.bytes <= 10 * CHUNK_BYTES);
            }
            let window = counts.window();
            assert!(window.start < window.end);
            for cluster in clusters.iter().filter(|cluster| window.contains(cluster)) {
                assert_eq!(counts.get(HostCluster(*cluster)), 300);
                seen += 1;
            }
            start = window.end;
            passes += 1;
        }
        assert_eq!(seen, clusters.len());
        assert!(passes >= 10, "{passes}");
    }
}
