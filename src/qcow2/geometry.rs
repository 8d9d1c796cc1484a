//! Where things lie: from an image's cluster size and entry widths to indices, masks and lengths (qcow2
//! specification, "Cluster mapping", "Extended L2 entries", "Refcounts").
//!
//! All arithmetic that depends on the header is here, so that everything else speaks of clusters,
//! subclusters and tables.

use std::ops::Range;

use super::header::{Header, Version};
use crate::units::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u32 = 32;

/// A 64-bit length or index as memory is indexed.
pub(super) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("the program runs on 64-bit hosts only")
}

/// The shape of one image, fixed as long as it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
    data_file: bool,
    version: Version,
}

impl Geometry {
    /// The shape that a checked header describes.
    pub(super) fn new(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended_l2: header.has_extended_l2(),
            data_file: header.has_data_file(),
            version: header.version,
        }
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The cluster size's logarithm.
    pub(super) fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// The logarithm of a refcount's width in bits.
    pub(super) fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Whether L2 entries are 128 bits wide and describe subclusters.
    pub(super) fn has_extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Whether guest clusters lie in another file, each at its guest offset.
    pub(super) fn has_data_file(&self) -> bool {
        self.data_file
    }

    /// Whether an entry can say that its cluster reads as zeros.
    pub(super) fn has_zero_flag(&self) -> bool {
        self.version == Version::V3
    }

    /// Bytes of an L2 entry.
    pub(super) fn l2_entry_size(&self) -> u64 {
        1 << self.l2_entry_bits()
    }

    fn l2_entry_bits(&self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// The logarithm of the entries of an L2 table.
    fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// Bytes of a subcluster; without extended L2 entries the cluster is its own only subcluster.
    pub(super) fn subcluster_size(&self) -> u64 {
        self.cluster_size() / u64::from(self.subclusters())
    }

    /// Subclusters of a cluster.
    pub(super) fn subclusters(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// The mask of all subclusters of a cluster.
    pub(super) fn full_mask(&self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// The mask of the subclusters that a byte range of a cluster touches.
    pub(super) fn mask_touched(&self, range: &Range<u64>) -> u32 {
        if range.is_empty() {
            return 0;
        }
        let size = self.subcluster_size();
        self.mask_between(range.start / size, range.end.div_ceil(size))
    }

    /// The mask of the subclusters that lie wholly in a byte range of a cluster.
    pub(super) fn mask_inside(&self, range: &Range<u64>) -> u32 {
        let size = self.subcluster_size();
        self.mask_between(range.start.div_ceil(size), range.end / size)
    }

    fn mask_between(&self, first: u64, end: u64) -> u32 {
        (first..end.min(u64::from(self.subclusters()))).fold(0, |mask, index| mask | 1 << index)
    }

    /// The cluster that holds a guest byte.
    pub(super) fn guest_cluster(&self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.cluster_bits)
    }

    /// A guest cluster's first byte.
    pub(super) fn guest_start(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// How far into its cluster a byte lies.
    pub(super) fn within_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The L1 entry that leads to a guest cluster.
    pub(super) fn l1_index(&self, cluster: GuestCluster) -> usize {
        to_usize(cluster.0 >> self.l2_bits())
    }

    /// Where in its L2 table a guest cluster's entry lies, in bytes.
    pub(super) fn l2_entry_offset(&self, cluster: GuestCluster) -> u64 {
        (cluster.0 & ((1 << self.l2_bits()) - 1)) << self.l2_entry_bits()
    }

    /// The host cluster that holds a host byte.
    pub(super) fn host_cluster(&self, at: HostOffset) -> HostCluster {
        HostCluster(at.0 >> self.cluster_bits)
    }

    /// A host cluster's first byte.
    pub(super) fn host_start(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Refcounts in a refcount block.
    pub(super) fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The most that a refcount can say.
    pub(super) fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Where the slice of the refcount block at `block` begins that holds the refcount of `cluster`, with slices of
    /// `slice_size` bytes; the cluster's index in it, and the clusters that it covers.
    pub(super) fn refcount_slice(
        &self,
        slice_size: u64,
        block: HostOffset,
        cluster: HostCluster,
    ) -> (HostOffset, u64, Range<u64>) {
        let per_slice = (slice_size * 8) >> self.refcount_order;
        let in_block = cluster.0 % self.block_entries();
        let within = in_block % per_slice;
        let at = HostOffset(block.0 + in_block / per_slice * slice_size);
        let first = cluster.0 - within;
        (at, within, first..first + per_slice)
    }

    /// Bytes that a disk of `size` bytes needs for its L2 tables, all together.
    pub(super) fn l2_bytes_for(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size()) << self.l2_entry_bits()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A shape for tests of the parts.
    pub(in crate::qcow2) fn geometry(
        cluster_bits: u32,
        refcount_order: u32,
        extended_l2: bool,
    ) -> Geometry {
        Geometry {
            cluster_bits,
            refcount_order,
            extended_l2,
            data_file: false,
            version: Version::V3,
        }
    }

    /// The shape of an image with an external data file and 64 KiB clusters.
    pub(in crate::qcow2) fn with_data_file(extended_l2: bool) -> Geometry {
        Geometry {
            data_file: true,
            ..geometry(16, 4, extended_l2)
        }
    }

    #[test]
    fn masks_tell_touched_from_covered_subclusters() {
        let extended = geometry(17, 4, true);
        assert_eq!(extended.mask_touched(&(4095..8193)), 0b111);
        assert_eq!(extended.mask_inside(&(4095..8193)), 0b10);
        assert_eq!(extended.mask_touched(&(0..131_072)), u32::MAX);
        assert_eq!(extended.mask_inside(&(0..131_072)), u32::MAX);
        assert_eq!(extended.mask_touched(&(5..5)), 0);
        let plain = geometry(16, 4, false);
        assert_eq!(plain.mask_touched(&(1..2)), 1);
        assert_eq!(plain.mask_inside(&(1..65536)), 0);
        assert_eq!(plain.mask_inside(&(0..65536)), 1);
    }

    #[test]
    fn clusters_are_found_through_both_levels() {
        let plain = geometry(16, 4, false);
        let cluster = plain.guest_cluster(GuestOffset(8192 * 65536 + 3 * 65536 + 7));
        assert_eq!(
            (plain.l1_index(cluster), plain.l2_entry_offset(cluster)),
            (1, 24)
        );
        let extended = geometry(16, 4, true);
        assert_eq!(
            (
                extended.l1_index(cluster),
                extended.l2_entry_offset(cluster)
            ),
            (2, 48)
        );
        assert_eq!(geometry(16, 6, false).block_entries(), 8192);
        assert_eq!(geometry(9, 0, false).block_entries(), 4096);
    }
}
