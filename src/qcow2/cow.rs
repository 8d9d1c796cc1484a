//! What a write to one cluster needs: where its bytes go, what has to be copied along, and the entry it leads to.
//!
//! Pure planning over a decoded entry; `qcow2::write` does the I/O.
//!
//! # Invariants
//!
//! 1. A host cluster that the entry does not own alone (COPIED clear, or compressed) is never written: the data
//!    goes to a new one, and the reference to the old one is dropped.
//! 2. Only subclusters that the request touches become allocated, and of those only the bytes that the request does
//!    not have are copied up. Neighbours stay as they are: not allocated, they keep showing the backing image.
//! 3. Subclusters that are allocated in an old cluster that is left move along.

use std::ops::Range;

use super::compressed::CompressedExtent;
use super::entry::{Cluster, L2Entry};
use super::geometry::Geometry;
use crate::units::{HostCluster, HostOffset};

/// Where the bytes of a part of a cluster come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The request.
    Request,
    /// They are zeros.
    Zero,
    /// The backing image.
    Backing,
    /// The old host cluster, which starts here.
    Old(HostOffset),
    /// The old compressed cluster.
    Compressed(CompressedExtent),
}

/// Bytes of a cluster to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Which bytes of the cluster.
    pub(super) within: Range<u64>,
    /// Where they come from.
    pub(super) source: Source,
}

/// What a write to one cluster needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ClusterPlan {
    /// The entry afterwards; without a host cluster it needs a new one.
    pub(super) entry: Cluster,
    /// Whether the entry changes.
    pub(super) changes: bool,
    /// What is written, in the cluster's order, without overlaps.
    pub(super) parts: Vec<Part>,
}

impl ClusterPlan {
    /// The plan for a write of the bytes `within` a cluster whose entry is `old`.
    pub(super) fn new(geometry: &Geometry, old: L2Entry, within: Range<u64>) -> Self {
        match old {
            L2Entry::Compressed(extent) => Self::replacing_compressed(geometry, extent, within),
            L2Entry::Plain(old) => Self::changing(geometry, old, within),
        }
    }

    fn replacing_compressed(
        geometry: &Geometry,
        extent: CompressedExtent,
        within: Range<u64>,
    ) -> Self {
        let source = Source::Compressed(extent);
        let head = Part {
            within: 0..within.start,
            source,
        };
        let tail = Part {
            within: within.end..geometry.cluster_size(),
            source,
        };
        let request = Part {
            within,
            source: Source::Request,
        };
        Self {
            entry: Cluster {
                host: None,
                copied: true,
                allocated: geometry.full_mask(),
                zero: 0,
            },
            changes: true,
            parts: [head, request, tail]
                .into_iter()
                .filter(|part| !part.within.is_empty())
                .collect(),
        }
    }

    fn changing(geometry: &Geometry, old: Cluster, within: Range<u64>) -> Self {
        let touched = geometry.mask_touched(&within);
        let entry = Cluster {
            host: old.own_host(),
            copied: true,
            allocated: old.allocated | touched,
            zero: old.zero & !touched,
        };
        let stays = entry.host.is_some();
        let size = geometry.subcluster_size();
        let first = within.start / size;
        let last = (within.end - 1) / size;
        let mut parts = Vec::new();
        if !stays {
            moved_parts(&mut parts, geometry, &old, 0..first);
        }
        push_fill(&mut parts, &old, stays, first, first * size..within.start);
        parts.push(Part {
            within: within.clone(),
            source: Source::Request,
        });
        push_fill(&mut parts, &old, stays, last, within.end..(last + 1) * size);
        if !stays {
            moved_parts(
                &mut parts,
                geometry,
                &old,
                last + 1..u64::from(geometry.subclusters()),
            );
        }
        Self {
            entry,
            changes: entry != old,
            parts,
        }
    }
}

fn has(mask: u32, subcluster: u64) -> bool {
    u64::from(mask) >> subcluster & 1 == 1
}

/// Completes a touched subcluster with the bytes that the request does not have (invariant 2).
fn push_fill(
    parts: &mut Vec<Part>,
    old: &Cluster,
    stays: bool,
    subcluster: u64,
    within: Range<u64>,
) {
    let source = match old.host {
        Some(_) if has(old.allocated, subcluster) && stays => return,
        Some(host) if has(old.allocated, subcluster) => Source::Old(host),
        _ if has(old.zero, subcluster) => Source::Zero,
        _ => Source::Backing,
    };
    if !within.is_empty() {
        parts.push(Part { within, source });
    }
}

/// Invariant 3, contiguous subclusters at once.
fn moved_parts(parts: &mut Vec<Part>, geometry: &Geometry, old: &Cluster, subclusters: Range<u64>) {
    let Some(host) = old.host else { return };
    let size = geometry.subcluster_size();
    for subcluster in subclusters.filter(|subcluster| has(old.allocated, *subcluster)) {
        let within = subcluster * size..(subcluster + 1) * size;
        match parts.last_mut() {
            Some(last) if last.within.end == within.start && last.source == Source::Old(host) => {
                last.within.end = within.end;
            }
            _ => parts.push(Part {
                within,
                source: Source::Old(host),
            }),
        }
    }
}

/// The references that an entry holds to host clusters: one item for each.
pub(super) fn references(
    geometry: &Geometry,
    entry: &L2Entry,
) -> impl Iterator<Item = HostCluster> + use<> {
    let clusters = match entry {
        // What lies in an external data file has no refcount.
        _ if geometry.has_data_file() => 0..0,
        L2Entry::Plain(Cluster {
            host: Some(host), ..
        }) => {
            let cluster = geometry.host_cluster(*host).0;
            cluster..cluster + 1
        }
        L2Entry::Plain(_) => 0..0,
        // Data may reach into a second cluster, and both are counted.
        L2Entry::Compressed(extent) => {
            let last = HostOffset(extent.end().0 - 1);
            geometry.host_cluster(extent.at).0..geometry.host_cluster(last).0 + 1
        }
    };
    clusters.map(HostCluster)
}

#[cfg(test)]
mod tests {
    use super::super::geometry::tests::geometry;
    use super::*;

    const HOST: HostOffset = HostOffset(0x9_0000);
    const UNALLOCATED: L2Entry = L2Entry::Plain(Cluster {
        host: None,
        copied: false,
        allocated: 0,
        zero: 0,
    });

    fn entry(host: Option<HostOffset>, copied: bool, allocated: u32, zero: u32) -> L2Entry {
        L2Entry::Plain(Cluster {
            host,
            copied,
            allocated,
            zero,
        })
    }

    fn parts(geometry: &Geometry, old: L2Entry, within: Range<u64>) -> Vec<(Range<u64>, Source)> {
        let plan = ClusterPlan::new(geometry, old, within);
        plan.parts
            .into_iter()
            .map(|part| (part.within, part.source))
            .collect()
    }

    #[test]
    fn unallocated_cluster_is_completed_from_the_backing_image() {
        let g = geometry(16, 4, false);
        let expected = [
            (0..512, Source::Backing),
            (512..1024, Source::Request),
            (1024..65536, Source::Backing),
        ];
        assert_eq!(parts(&g, UNALLOCATED, 512..1024), expected);
        assert_eq!(
            parts(&g, UNALLOCATED, 0..65536),
            [(0..65536, Source::Request)]
        );
    }

    #[test]
    fn write_to_zero_cluster_with_backing_copies_nothing() {
        let g = geometry(16, 4, false);
        for host in [None, Some(HOST)] {
            let plan = ClusterPlan::new(&g, entry(host, host.is_some(), 0, 1), 512..65536);
            assert_eq!(plan.parts[0].source, Source::Zero);
            assert_eq!(
                (plan.entry.host, plan.entry.zero, plan.changes),
                (host, 0, true)
            );
        }
    }

    #[test]
    fn preallocated_zero_cluster_that_is_shared_is_left() {
        let g = geometry(16, 4, false);
        let plan = ClusterPlan::new(&g, entry(Some(HOST), false, 0, 1), 0..512);
        assert_eq!(plan.entry.host, None);
    }

    #[test]
    fn shared_cluster_moves_to_a_new_one_whole() {
        let g = geometry(16, 4, false);
        let expected = [
            (0..512, Source::Old(HOST)),
            (512..1024, Source::Request),
            (1024..65536, Source::Old(HOST)),
        ];
        assert_eq!(
            parts(&g, entry(Some(HOST), false, 1, 0), 512..1024),
            expected
        );
    }

    #[test]
    fn aligned_subclusters_are_written_without_copies_and_neighbours_stay_unallocated() {
        let g = geometry(17, 4, true);
        let plan = ClusterPlan::new(&g, UNALLOCATED, 4096..12288);
        assert_eq!(plan.entry.allocated, 0b110);
        assert_eq!(plan.parts.len(), 1);
    }

    #[test]
    fn only_touched_subclusters_are_completed() {
        let g = geometry(17, 4, true);
        // 0 zero, 1 allocated, 2 unallocated.
        let expected = [
            (0..100, Source::Zero),
            (100..8200, Source::Request),
            (8200..12288, Source::Backing),
        ];
        assert_eq!(
            parts(&g, entry(Some(HOST), true, 0b10, 0b1), 100..8200),
            expected
        );
    }

    #[test]
    fn allocated_subclusters_of_a_shared_cluster_move_along_and_others_do_not() {
        let g = geometry(17, 4, true);
        let expected = [
            (0..8192, Source::Old(HOST)),
            (16384..20480, Source::Request),
            (24576..28672, Source::Old(HOST)),
        ];
        assert_eq!(
            parts(&g, entry(Some(HOST), false, 0b101_0011, 0), 16384..20480)[..],
            expected
        );
    }

    #[test]
    fn compressed_data_is_referenced_in_every_cluster_it_touches() {
        let g = geometry(16, 4, false);
        let spanning = L2Entry::Compressed(CompressedExtent {
            at: HostOffset(0x2_fff0),
            len: 16 + 512,
        });
        let found: Vec<_> = references(&g, &spanning).collect();
        assert_eq!(found, [HostCluster(2), HostCluster(3)]);
    }
}
