//! What an image holds of a guest range and where, for tools that look at whole images.
//!
//! # Invariants
//!
//! 1. The host is asked for holes only where the image has much more room allocated than the host has given it, as
//!    with `preallocation=metadata`: stock QEMU draws the line there, and both show the same map.

use std::ops::Range;

use super::allocator::{Allocator, Answer};
use super::engine::Qcow2;
use super::entry::L2Entry;
use super::geometry::Geometry;
use super::mapping::{Found, Place, Run};
use super::refcount;
use crate::error::Result;
use crate::image::Allocation;
use crate::storage::Held;
use crate::units::{GuestOffset, HostOffset};

impl Run for Allocation {
    fn goes_on(self, len: u64, next: Self) -> bool {
        self.after(len) == next
    }
}

impl Qcow2 {
    /// What `len` bytes at `at` are, and for how many of them. The range is not empty and lies inside the disk.
    ///
    /// # Errors
    /// The storage's; [`ErrorKind::Corrupt`](crate::error::ErrorKind::Corrupt) for metadata that makes no sense.
    pub(super) async fn find_allocation(
        &self,
        at: GuestOffset,
        len: u64,
    ) -> Result<(Allocation, u64)> {
        let (allocation, mut run) = self.find_allocation_in_slice(at, len).await?;
        while run < len {
            let next = GuestOffset(at.0 + run);
            let (next, next_run) = self.find_allocation_in_slice(next, len - run).await?;
            if !allocation.goes_on(run, next) {
                break;
            }
            run += next_run;
        }
        match allocation {
            Allocation::Data(Some(host)) if self.is_sparse_on_host().await? => {
                Ok(match self.data().held(host, run) {
                    (Held::Data, same) => (allocation, same),
                    (Held::Hole, same) => (Allocation::Sparse(host), same),
                })
            }
            _ => Ok((allocation, run)),
        }
    }

    async fn find_allocation_in_slice(
        &self,
        at: GuestOffset,
        len: u64,
    ) -> Result<(Allocation, u64)> {
        self.find(|| self.look_up_allocation(at, len)).await
    }

    fn look_up_allocation(&self, at: GuestOffset, len: u64) -> Result<Found<Allocation>> {
        match self.place(at)? {
            Place::NoTable(covered) => {
                let nothing = Allocation::Unallocated(None);
                Ok(Found::Run(nothing, len.min(covered)))
            }
            Place::Slice {
                at: slice, entry, ..
            } => self.look_up_in(slice, entry, (at, len), |entry, within, _| {
                allocation_of(&self.geometry, entry, within)
            }),
        }
    }

    /// Whether clusters may be in use here for which the host has given no room (invariant 1).
    async fn is_sparse_on_host(&self) -> Result<bool> {
        if let Some(known) = self.sparse_on_host.get() {
            return Ok(*known);
        }
        let sparse = match self.storage.bytes_on_host() {
            Some(bytes) => self.has_clusters_beyond(bytes).await?,
            None => false,
        };
        Ok(*self.sparse_on_host.get_or_init(|| sparse))
    }

    /// Whether more clusters are in use than fit in `bytes`, with a tenth and two to spare.
    async fn has_clusters_beyond(&self, bytes: u64) -> Result<bool> {
        let fit = bytes / self.geometry.cluster_size();
        let many = (fit + 2).max(fit.saturating_add(fit / 9));
        let clusters = self.storage.len().div_ceil(self.geometry.cluster_size());
        if clusters < many {
            return Ok(false);
        }
        let mut used = 0;
        let mut next = 0;
        while next < clusters && used < many {
            match self.allocator.try_count_used(next..clusters) {
                Ok(Answer::Known((more, end))) => (used, next) = (used + more, end),
                Ok(Answer::Load(slice)) => drop(self.allocator.blocks.get(slice).await?),
                // The refcount table covers no more.
                Ok(Answer::Grow) => return Ok(false),
                Err(error) => {
                    // Reading needs no refcounts, and to ask the host in vain only takes time.
                    log::warn!(
                        "{}: {error}: the host is asked where the file has holes; repair the image with `seethrough \
                         check -r all`",
                        self.storage.name()
                    );
                    return Ok(true);
                }
            }
        }
        Ok(used >= many)
    }
}

impl Allocator {
    /// How many of the first of these clusters are in use, and where those end: with what one slice of a refcount block
    /// covers, or with what a block would that is not there.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`](crate::error::ErrorKind::Corrupt) for a broken refcount table entry.
    pub(super) fn try_count_used(&self, clusters: Range<u64>) -> Result<Answer<(u64, u64)>> {
        let state = self.lock();
        let per_block = self.geometry.block_entries();
        let block_index = clusters.start / per_block;
        let word = usize::try_from(block_index).ok();
        let Some(word) = word.and_then(|index| state.table.get(index)) else {
            return Ok(Answer::Grow);
        };
        let Some(block) = self.block_at(block_index, *word)? else {
            let end = (block_index + 1) * per_block;
            return Ok(Answer::Known((0, end.min(clusters.end))));
        };
        let (slice_at, within, covered) = self.slice_of(block, clusters.start);
        let Some(slice) = self.blocks.cached(slice_at) else {
            return Ok(Answer::Load(slice_at));
        };
        let end = covered.end.min(clusters.end);
        let order = self.geometry.refcount_order();
        let is_used = |bytes: &[u8], index: &u64| refcount::get(bytes, *index, order) > 0;
        let used = slice.read(|bytes| {
            let indices = within..end - covered.start;
            indices.filter(|index| is_used(bytes, index)).count()
        });
        Ok(Answer::Known((used as u64, end)))
    }
}

/// What the bytes from `within` its cluster on are, and for how many of them the cluster says so.
fn allocation_of(geometry: &Geometry, entry: L2Entry, within: u64) -> (Allocation, u64) {
    let left = geometry.cluster_size() - within;
    let cluster = match entry {
        L2Entry::Compressed(_) => return (Allocation::Compressed, left),
        L2Entry::Plain(cluster) => cluster,
    };
    let size = geometry.subcluster_size();
    let first = u32::try_from(within / size).expect("a cluster has at most 32 subclusters");
    let is_set = |mask: u32| mask >> first & 1 == 1;
    let host = cluster.host.map(|host| HostOffset(host.0 + within));
    let (allocation, same) = if is_set(cluster.allocated) {
        (Allocation::Data(host), cluster.allocated)
    } else if is_set(cluster.zero) {
        (Allocation::Zero(host), cluster.zero)
    } else {
        let neither = !(cluster.allocated | cluster.zero);
        (Allocation::Unallocated(host), neither)
    };
    let run = u64::from((same >> first).trailing_ones());
    (allocation, left.min(run * size - within % size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Access, Image};
    use crate::qcow2::create::{CreateOptions, L2Entries, create};
    use crate::storage::{CacheMode, FileStorage, Storage, ZeroMode};
    use crate::sys::{IoBuf, block_on};
    use std::sync::Arc;

    const CLUSTER: u64 = 64 << 10;

    fn new_image(l2_entries: L2Entries) -> (tempfile::TempDir, Arc<FileStorage>, Qcow2) {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("image");
        let file = Arc::new(FileStorage::create_new(&path, CacheMode::Writeback).unwrap());
        let options = CreateOptions {
            l2_entries,
            ..CreateOptions::new(64 << 20)
        };
        let image = block_on(async {
            create(file.as_ref(), &options).await.unwrap();
            let shared = Arc::clone(&file) as Arc<dyn Storage>;
            Qcow2::open(shared, None, Access::ReadWrite).await.unwrap()
        });
        (directory, file, image)
    }

    fn found(image: &Qcow2, at: u64) -> (Allocation, u64) {
        block_on(image.allocation(GuestOffset(at), image.virtual_size() - at)).unwrap()
    }

    #[test]
    fn data_zeros_with_room_and_nothing_follow_one_another() {
        let (_directory, _file, image) = new_image(L2Entries::Extended);
        block_on(async {
            let at = GuestOffset(CLUSTER + 4096);
            image
                .write(at, IoBuf::from_bytes(&[1; 4096]))
                .await
                .unwrap();
            let keep = ZeroMode::KeepAllocated;
            image.write_zeroes(at, 2048, keep).await.unwrap();
        });
        assert_eq!(found(&image, 0), (Allocation::Unallocated(None), CLUSTER));
        let (Allocation::Unallocated(Some(host)), 4096) = found(&image, CLUSTER) else {
            panic!(
                "room for the rest of the cluster: {:?}",
                found(&image, CLUSTER)
            );
        };
        let at = |len: u64| Some(HostOffset(host.0 + len));
        for (within, expected) in [
            (4096, (Allocation::Zero(at(4096)), 2048)),
            (6144, (Allocation::Data(at(6144)), 2048)),
            (7000, (Allocation::Data(at(7000)), 8192 - 7000)),
            (8192, (Allocation::Unallocated(at(8192)), CLUSTER - 8192)),
        ] {
            assert_eq!(found(&image, CLUSTER + within), expected, "{within}");
        }
    }

    #[test]
    fn clusters_for_which_the_host_has_no_room_are_sparse() {
        let (directory, file, image) = new_image(L2Entries::Standard);
        block_on(async {
            let data = IoBuf::from_bytes(&vec![1; 16 << 16]);
            image.write(GuestOffset(0), data).await.unwrap();
            image.flush().await.unwrap();
        });
        let (Allocation::Data(Some(host)), len) = found(&image, 0) else {
            panic!("data");
        };
        assert_eq!(len, 16 * CLUSTER);
        drop(image);
        let hole = (HostOffset(host.0 + CLUSTER), 15 * CLUSTER);
        block_on(file.write_zeroes(hole.0, hole.1, ZeroMode::MayUnmap)).unwrap();
        let image = block_on(Qcow2::open(file, None, Access::ReadOnly)).unwrap();
        assert_eq!(found(&image, 0), (Allocation::Data(Some(host)), CLUSTER));
        assert_eq!(
            found(&image, CLUSTER),
            (Allocation::Sparse(hole.0), 15 * CLUSTER)
        );
        drop(directory);
    }

    #[test]
    fn where_refcounts_are_broken_the_host_is_asked() {
        let (_directory, file, image) = new_image(L2Entries::Standard);
        block_on(async {
            let data = IoBuf::from_bytes(&vec![1; 16 << 16]);
            image.write(GuestOffset(0), data).await.unwrap();
            image.flush().await.unwrap();
        });
        let (Allocation::Data(Some(host)), _) = found(&image, 0) else {
            panic!("data");
        };
        let table = block_on(image.header.lock()).refcount_table_offset;
        drop(image);
        let hole = HostOffset(host.0 + CLUSTER);
        block_on(async {
            let keep = ZeroMode::MayUnmap;
            file.write_zeroes(hole, 15 * CLUSTER, keep).await.unwrap();
            // Reserved bits.
            let entry = IoBuf::from_bytes(&0x1ff_u64.to_be_bytes());
            file.writev(table, entry).await.unwrap();
        });
        let image = block_on(Qcow2::open(file, None, Access::ReadOnly)).unwrap();
        assert_eq!(
            found(&image, CLUSTER),
            (Allocation::Sparse(hole), 15 * CLUSTER)
        );
    }

    #[test]
    fn clusters_in_use_are_counted_block_by_block_up_to_an_end() {
        let (_directory, _file, image) = new_image(L2Entries::Standard);
        block_on(async {
            let data = IoBuf::from_bytes(&vec![1; 16 << 16]);
            image.write(GuestOffset(0), data).await.unwrap();
        });
        let count = |clusters| match image.allocator.try_count_used(clusters) {
            Ok(Answer::Known(known)) => known,
            _ => panic!("the refcounts are in memory"),
        };
        // The header, the refcount table and a block, the L1 table and an L2 table; then the data.
        let used = 5 + 16;
        assert_eq!(count(0..7), (7, 7));
        assert_eq!(count(3..100), (used - 3, 100));
        let per_block = image.geometry.block_entries();
        let (_, end) = count(0..u64::MAX);
        assert!(end <= per_block, "one slice of a block at a time");
        // No block, and then no table.
        assert_eq!(count(per_block..u64::MAX), (0, 2 * per_block));
        let covered = per_block * (CLUSTER / 8);
        let beyond = image.allocator.try_count_used(covered..u64::MAX);
        assert!(matches!(beyond, Ok(Answer::Grow)));
    }
}
