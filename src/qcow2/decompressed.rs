//! Reading compressed clusters: no more of one than is wanted, and those that are wanted again from memory.
//!
//! A cluster can only be decompressed from its beginning. Whoever reads it once, at random, pays for what lies before
//! the wanted bytes; whoever comes back to it, as sequential readers do with every request, gets the whole cluster
//! decompressed once and kept for a while. Requests for one cluster at the same time wait for one decompression.
//!
//! # Invariants
//!
//! 1. What is kept under an extent is what the extent holds on disk. Its bytes change only when new compressed data is
//!    placed there, which [`Decompressed::forget`]s it first; by then no reader of the old data is left, for each holds
//!    a token of `grace` from its lookup on.
//! 2. Memory is bounded by [`MAX_BYTES`], or two clusters.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_lock::OnceCell;

use super::compressed::{CompressedExtent, Decompressor};
use super::engine::Qcow2;
use super::geometry::to_usize;
use super::header::CompressionType;
use crate::error::{Context, Result};
use crate::sys::{IoBuf, offload};

/// The most bytes of decompressed clusters that an image keeps.
const MAX_BYTES: u64 = 4 << 20;

/// The most clusters that an image remembers.
const MAX_CLUSTERS: u64 = 64;

/// A cluster's bytes, once somebody has decompressed them.
type Cluster = Arc<OnceCell<IoBuf>>;

/// The compressed clusters that were read last.
#[derive(Debug)]
pub(super) struct Decompressed {
    /// The one read last comes first.
    entries: Mutex<VecDeque<Entry>>,
    capacity: usize,
}

struct Entry {
    extent: CompressedExtent,
    /// `None` for a cluster that has been read once.
    cluster: Option<Cluster>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.extent)
    }
}

impl Decompressed {
    /// Room for clusters of `cluster_size` bytes.
    pub(super) fn new(cluster_size: u64) -> Self {
        Self {
            entries: Mutex::default(),
            capacity: to_usize((MAX_BYTES / cluster_size).clamp(2, MAX_CLUSTERS)),
        }
    }

    /// Notes that the cluster at `extent` is read: where its bytes are kept if that is not for the first time.
    fn touch(&self, extent: CompressedExtent) -> Option<Cluster> {
        let mut entries = self.lock();
        let known = entries.iter().position(|entry| entry.extent == extent);
        let Some(mut entry) = known.and_then(|index| entries.remove(index)) else {
            entries.truncate(self.capacity - 1);
            entries.push_front(Entry {
                extent,
                cluster: None,
            });
            return None;
        };
        let cluster = Arc::clone(entry.cluster.get_or_insert_default());
        entries.push_front(entry);
        Some(cluster)
    }

    /// Says that other data is about to lie at `extent` (invariant 1).
    pub(super) fn forget(&self, extent: CompressedExtent) {
        let overlaps = |other: CompressedExtent| other.at < extent.end() && extent.at < other.end();
        self.lock().retain(|entry| !overlaps(entry.extent));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Qcow2 {
    /// Fills `buf` with the bytes of a guest cluster from `within` it on; its compressed data lies at `extent`. The
    /// caller holds a token of `grace`.
    ///
    /// # Errors
    /// As [`Qcow2::read_compressed`].
    pub(super) async fn read_part_of_compressed(
        &self,
        extent: CompressedExtent,
        within: usize,
        buf: IoBuf,
    ) -> Result<()> {
        let range = within..within + buf.len();
        if range.len() == to_usize(self.geometry.cluster_size()) {
            return self.decompress_into(extent, range, buf).await;
        }
        match self.decompressed.touch(extent) {
            None => self.decompress_into(extent, range, buf).await,
            Some(kept) => {
                let cluster = kept
                    .get_or_try_init(|| self.read_compressed(extent))
                    .await?;
                buf.copy_from_buf(0, &cluster.slice(range));
                Ok(())
            }
        }
    }

    /// The whole guest cluster whose compressed data lies at `extent`.
    ///
    /// # Errors
    /// The storage's; [`ErrorKind::Corrupt`](crate::error::ErrorKind::Corrupt) if the data does not decompress. That
    /// spoils this cluster alone.
    pub(super) async fn read_compressed(&self, extent: CompressedExtent) -> Result<IoBuf> {
        let cluster_size = to_usize(self.geometry.cluster_size());
        let cluster = IoBuf::zeroed(cluster_size);
        self.decompress_into(extent, 0..cluster_size, cluster.clone())
            .await?;
        Ok(cluster)
    }

    async fn decompress_into(
        &self,
        extent: CompressedExtent,
        range: Range<usize>,
        into: IoBuf,
    ) -> Result<()> {
        let input = IoBuf::to_be_filled(to_usize(extent.len));
        self.storage.readv(extent.at, input.clone()).await?;
        let cluster_size = to_usize(self.geometry.cluster_size());
        let compression_type = self.compression_type;
        let job = move || {
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.decompress(compression_type, &input, cluster_size, range, &into)
            })
        };
        offload(job).await.context(|| {
            format!(
                "{}: compressed data at {:#x}",
                self.storage.name(),
                extent.at
            )
        })
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A thread's memory to decompress in: buffers can be the guest's, of which no reference may be made.
#[derive(Default)]
struct Scratch {
    decompressor: Decompressor,
    input: Vec<u8>,
    cluster: Vec<u8>,
}

impl Scratch {
    fn decompress(
        &mut self,
        compression_type: CompressionType,
        input: &IoBuf,
        cluster_size: usize,
        range: Range<usize>,
        into: &IoBuf,
    ) -> Result<()> {
        self.input.resize(input.len(), 0);
        input.copy_to(0, &mut self.input);
        self.cluster.resize(cluster_size, 0);
        self.decompressor.decompress(
            compression_type,
            &self.input,
            &mut self.cluster,
            range.end,
        )?;
        into.copy_from(0, &self.cluster[range]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::HostOffset;

    fn extent(at: u64) -> CompressedExtent {
        CompressedExtent {
            at: HostOffset(at),
            len: 512,
        }
    }

    #[test]
    fn a_cluster_is_kept_from_its_second_reader_on() {
        let kept = Decompressed::new(65536);
        assert!(kept.touch(extent(512)).is_none());
        let second = kept.touch(extent(512)).unwrap();
        let third = kept.touch(extent(512)).unwrap();
        assert!(Arc::ptr_eq(&second, &third));
    }

    #[test]
    fn no_more_clusters_are_remembered_than_there_is_room_for() {
        for (cluster_size, room) in [(512, 64), (65536, 64), (2 << 20, 2)] {
            let kept = Decompressed::new(cluster_size);
            for at in 1..=room + 1 {
                kept.touch(extent(at * 512));
            }
            assert_eq!(kept.lock().len() as u64, room);
            assert!(kept.touch(extent(512)).is_none(), "the oldest has gone");
            assert!(kept.touch(extent((room + 1) * 512)).is_some());
        }
    }

    #[test]
    fn what_is_placed_over_a_cluster_makes_it_unknown() {
        let kept = Decompressed::new(65536);
        kept.touch(extent(512));
        kept.touch(extent(1024));
        kept.forget(CompressedExtent {
            at: HostOffset(1000),
            len: 24,
        });
        assert!(kept.touch(extent(512)).is_none());
        assert!(kept.touch(extent(1024)).is_some());
    }
}
