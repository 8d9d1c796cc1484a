//! The entries of the L1 table, of L2 tables and of the refcount table (qcow2 specification, "Cluster mapping",
//! "Extended L2 entries", "Refcounts").
//!
//! ```text
//! L1, L2      63 COPIED │ 62 compressed (L2) │ 61…56 0 │ 55…9 host offset │ 8…1 0 │ 0 reads as zeros (L2, v3)
//! extended L2 a second word: 63…32 subcluster reads as zeros │ 31…0 subcluster is allocated
//! compressed  62 compressed │ 61…x additional sectors │ x-1…0 host offset, with x = 62 − (cluster_bits − 8)
//! ```
//!
//! # Invariants
//!
//! 1. What decodes breaks no rule of the format: offsets are aligned to clusters, not in cluster 0, no reserved
//!    bit is set, no subcluster is both allocated and zero, and none is allocated without a host cluster.
//! 2. With an external data file every cluster is in place: at its guest offset ([`L2Entry::check_place`]), owned by
//!    its entry alone, and not compressed.
//! 3. Encoding a decoded entry gives entries that stock QEMU reads in the same way.

use super::compressed::CompressedExtent;
use super::geometry::Geometry;
use crate::units::{GuestOffset, HostOffset};

pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const READS_ZERO: u64 = 1;
/// Host offsets of clusters: bits 9 to 55.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Defect {
    /// An offset is not a multiple of the cluster size.
    Unaligned,
    /// A bit that has no meaning is set.
    ReservedBits,
    /// A subcluster is allocated and zero at once.
    AllocatedAndZero,
    /// A subcluster is allocated in no cluster.
    AllocatedNowhere,
    /// A compressed cluster lies in the header, or beyond 56 bits.
    BadCompressedOffset,
    /// A compressed cluster would lie in the external data file.
    CompressedInDataFile,
    /// A cluster in the external data file is not at its guest offset.
    OutOfPlace,
}

impl Defect {
    /// For messages: "entry … *has reserved bits set*".
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Unaligned => "points to an offset that is not aligned to a cluster",
            Self::ReservedBits => "has reserved bits set",
            Self::AllocatedAndZero => "has subclusters that are both allocated and zero",
            Self::AllocatedNowhere => "has allocated subclusters without a host cluster",
            Self::BadCompressedOffset => {
                "points to compressed data in the header or beyond 56 bits"
            }
            Self::CompressedInDataFile => {
                "points to compressed data, and an image with a data file has none"
            }
            Self::OutOfPlace => "does not point to its own place in the data file",
        }
    }
}

fn aligned_offset(geometry: &Geometry, word: u64) -> Result<Option<HostOffset>, Defect> {
    let offset = word & OFFSET;
    if geometry.within_cluster(offset) != 0 {
        return Err(Defect::Unaligned);
    }
    Ok((offset != 0).then_some(HostOffset(offset)))
}

/// An entry of the L1 table: where an L2 table lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct L1Entry {
    /// The L2 table; none if nothing below it is allocated.
    pub(super) table: Option<HostOffset>,
    /// Whether the L2 table belongs to the active L1 table alone.
    pub(super) copied: bool,
}

impl L1Entry {
    /// Reads an entry.
    pub(super) fn decode(geometry: &Geometry, word: u64) -> Result<Self, Defect> {
        if word & !(COPIED | OFFSET) != 0 {
            return Err(Defect::ReservedBits);
        }
        let table = aligned_offset(geometry, word)?;
        Ok(Self {
            table,
            copied: table.is_some() && word & COPIED != 0,
        })
    }

    /// The entry as stored.
    pub(super) fn encode(self) -> u64 {
        match self.table {
            Some(table) => table.0 | if self.copied { COPIED } else { 0 },
            None => 0,
        }
    }
}

/// Reads an entry of the refcount table: where a refcount block lies.
pub(super) fn decode_refcount_table_entry(
    geometry: &Geometry,
    word: u64,
) -> Result<Option<HostOffset>, Defect> {
    if word & 0x1ff != 0 {
        return Err(Defect::ReservedBits);
    }
    if geometry.within_cluster(word) != 0 || word & !OFFSET != 0 {
        return Err(Defect::Unaligned);
    }
    Ok((word != 0).then_some(HostOffset(word)))
}

/// The host cluster that an L2 entry says to own, judged by its descriptor alone.
pub(super) fn own_host(descriptor: u64) -> Option<HostOffset> {
    (descriptor & (COPIED | COMPRESSED) == COPIED).then_some(HostOffset(descriptor & OFFSET))
}

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum L2Entry {
    /// A cluster stored as it is, or not at all.
    Plain(Cluster),
    /// A compressed cluster.
    Compressed(CompressedExtent),
}

/// What an entry says of a cluster that is not compressed. Without extended L2 entries the cluster has one
/// subcluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cluster {
    /// Its host cluster; without allocated subclusters it is preallocated room.
    pub(super) host: Option<HostOffset>,
    /// Whether the host cluster belongs to this entry alone.
    pub(super) copied: bool,
    /// Subclusters whose data is in the host cluster.
    pub(super) allocated: u32,
    /// Subclusters that read as zeros. The others that are not allocated are the backing image's.
    pub(super) zero: u32,
}

impl L2Entry {
    /// Reads an entry: its descriptor, and the bitmap word where L2 entries are extended.
    pub(super) fn decode(
        geometry: &Geometry,
        descriptor: u64,
        bitmap: u64,
    ) -> Result<Self, Defect> {
        // The compressed bit decides what all others mean.
        if descriptor & COMPRESSED != 0 {
            if bitmap != 0 {
                return Err(Defect::ReservedBits);
            }
            if geometry.has_data_file() {
                return Err(Defect::CompressedInDataFile);
            }
            return decode_compressed(geometry, descriptor).map(Self::Compressed);
        }
        let flags = if geometry.has_zero_flag() && !geometry.has_extended_l2() {
            COPIED | READS_ZERO
        } else {
            COPIED
        };
        if descriptor & !(OFFSET | flags) != 0 {
            return Err(Defect::ReservedBits);
        }
        let mut host = aligned_offset(geometry, descriptor)?;
        if geometry.has_data_file() && descriptor & (COPIED | READS_ZERO) == COPIED {
            // Offset 0 is a place like any other there.
            host = Some(host.unwrap_or(HostOffset(0)));
        }
        let (allocated, zero) = if geometry.has_extended_l2() {
            split_bitmap(bitmap)
        } else {
            let zero = u32::from(descriptor & READS_ZERO != 0);
            (u32::from(host.is_some()) & !zero, zero)
        };
        if allocated & zero != 0 {
            return Err(Defect::AllocatedAndZero);
        }
        if allocated != 0 && host.is_none() {
            return Err(Defect::AllocatedNowhere);
        }
        Ok(Self::Plain(Cluster {
            host,
            copied: host.is_some() && (geometry.has_data_file() || descriptor & COPIED != 0),
            allocated,
            zero,
        }))
    }

    /// Checks that a cluster whose first guest byte is `start` is where an external data file has it.
    pub(super) fn check_place(
        self,
        geometry: &Geometry,
        start: GuestOffset,
    ) -> Result<Self, Defect> {
        match self {
            Self::Plain(Cluster {
                host: Some(host), ..
            }) if geometry.has_data_file() && host.0 != start.0 => Err(Defect::OutOfPlace),
            _ => Ok(self),
        }
    }
}

impl L2Entry {
    /// The entry as stored: its descriptor, and the bitmap word where L2 entries are extended. `None` for a
    /// compressed cluster that lies beyond what an entry can address.
    pub(super) fn encode(&self, geometry: &Geometry) -> Option<(u64, u64)> {
        match self {
            Self::Plain(cluster) => Some(cluster.encode(geometry)),
            Self::Compressed(extent) => Some((extent.encode(geometry.cluster_bits())?, 0)),
        }
    }
}

fn split_bitmap(bitmap: u64) -> (u32, u32) {
    let half =
        |word: u64| u32::try_from(word & u64::from(u32::MAX)).expect("the mask leaves 32 bits");
    (half(bitmap), half(bitmap >> 32))
}

fn decode_compressed(geometry: &Geometry, descriptor: u64) -> Result<CompressedExtent, Defect> {
    match CompressedExtent::decode(descriptor, geometry.cluster_bits()) {
        Ok(extent) if extent.at.0 >= geometry.cluster_size() => Ok(extent),
        _ => Err(Defect::BadCompressedOffset),
    }
}

impl Cluster {
    /// The entry as stored: its descriptor, and the bitmap word where L2 entries are extended.
    pub(super) fn encode(&self, geometry: &Geometry) -> (u64, u64) {
        let mut descriptor = match self.host {
            // Stock QEMU knows no preallocated zeros at offset 0.
            Some(HostOffset(0)) if self.zero != 0 && !geometry.has_extended_l2() => 0,
            Some(host) => host.0 | if self.copied { COPIED } else { 0 },
            None => 0,
        };
        if geometry.has_extended_l2() {
            return (
                descriptor,
                u64::from(self.zero) << 32 | u64::from(self.allocated),
            );
        }
        if self.zero != 0 {
            descriptor |= READS_ZERO;
        }
        (descriptor, 0)
    }

    /// The host cluster, if this entry may overwrite it in place.
    pub(super) fn own_host(&self) -> Option<HostOffset> {
        self.host.filter(|_| self.copied)
    }
}

#[cfg(test)]
mod tests {
    use super::super::geometry::tests::{geometry, with_data_file};
    use super::*;

    fn plain(host: u64, copied: bool, allocated: u32, zero: u32) -> Result<L2Entry, Defect> {
        Ok(L2Entry::Plain(Cluster {
            host: (host != 0).then_some(HostOffset(host)),
            copied,
            allocated,
            zero,
        }))
    }

    #[test]
    fn standard_entries_tell_data_zero_and_unallocated() {
        let g = geometry(16, 4, false);
        for (word, expected) in [
            (0, plain(0, false, 0, 0)),
            (COPIED | 0x5_0000, plain(0x5_0000, true, 1, 0)),
            (0x5_0000, plain(0x5_0000, false, 1, 0)),
            (1, plain(0, false, 0, 1)),
            (COPIED | 0x5_0001, plain(0x5_0000, true, 0, 1)),
            // Allocated only where an external data file exists.
            (COPIED, plain(0, false, 0, 0)),
            (0x5_0200, Err(Defect::Unaligned)),
            (0x5_0002, Err(Defect::ReservedBits)),
            (1 << 56 | 0x5_0000, Err(Defect::ReservedBits)),
        ] {
            assert_eq!(L2Entry::decode(&g, word, 0), expected, "{word:#x}");
        }
    }

    #[test]
    fn the_zero_flag_is_reserved_with_extended_entries() {
        let g = geometry(16, 4, true);
        assert_eq!(L2Entry::decode(&g, 1, 0), Err(Defect::ReservedBits));
    }

    #[test]
    fn a_data_file_has_every_cluster_at_its_guest_offset_and_none_compressed() {
        let g = with_data_file(false);
        for (word, expected) in [
            (0, plain(0, false, 0, 0)),
            (1, plain(0, false, 0, 1)),
            (COPIED | 1, plain(0, false, 0, 1)),
            (COPIED | 0x5_0000, plain(0x5_0000, true, 1, 0)),
            (0x5_0000, plain(0x5_0000, true, 1, 0)),
            (COMPRESSED | 0x5_0000, Err(Defect::CompressedInDataFile)),
        ] {
            assert_eq!(L2Entry::decode(&g, word, 0), expected, "{word:#x}");
        }
        let first = Cluster {
            host: Some(HostOffset(0)),
            copied: true,
            allocated: 1,
            zero: 0,
        };
        let decoded = L2Entry::decode(&g, COPIED, 0);
        assert_eq!(decoded, Ok(L2Entry::Plain(first)));
        assert_eq!(first.encode(&g), (COPIED, 0));
        let extended = with_data_file(true);
        let prepared = Cluster {
            allocated: 0,
            ..first
        };
        let decoded = L2Entry::decode(&extended, COPIED, 0);
        assert_eq!(decoded, Ok(L2Entry::Plain(prepared)));

        let entry = L2Entry::Plain(first);
        assert_eq!(entry.check_place(&g, GuestOffset(0)), Ok(entry));
        let elsewhere = entry.check_place(&g, GuestOffset(0x1_0000));
        assert_eq!(elsewhere, Err(Defect::OutOfPlace));
    }

    #[test]
    fn extended_entries_take_both_bitmaps_and_refuse_contradictions() {
        let g = geometry(17, 4, true);
        let at = COPIED | 0x4_0000;
        assert_eq!(
            L2Entry::decode(&g, at, 1 << 32 | 6),
            plain(0x4_0000, true, 6, 1)
        );
        assert_eq!(
            L2Entry::decode(&g, at, 1 << 32 | 1),
            Err(Defect::AllocatedAndZero)
        );
        assert_eq!(L2Entry::decode(&g, 0, 1), Err(Defect::AllocatedNowhere));
        assert_eq!(
            L2Entry::decode(&g, COMPRESSED | 0x4_0000, 1),
            Err(Defect::ReservedBits)
        );
    }

    #[test]
    fn compressed_entries_count_additional_sectors_from_an_unaligned_start() {
        let g = geometry(16, 4, false);
        // 62 − 8 = 54 bits of offset.
        let word = COMPRESSED | 3 << 54 | 0x1_2345;
        let expected = CompressedExtent {
            at: HostOffset(0x1_2345),
            len: 4 * 512 - 0x145,
        };
        assert_eq!(
            L2Entry::decode(&g, word, 0),
            Ok(L2Entry::Compressed(expected))
        );
        // The compressed bit is tested before bit 0, which is part of the offset here.
        assert_eq!(
            L2Entry::decode(&g, COMPRESSED | 0xffff, 0),
            Err(Defect::BadCompressedOffset)
        );
    }

    #[test]
    fn what_was_decoded_encodes_to_the_same_words() {
        for (extended, descriptor, bitmap) in [
            (false, COPIED | 0x5_0000, 0),
            (false, COPIED | 0x5_0001, 0),
            (false, 1, 0),
            (true, COPIED | 0x6_0000, 0xf0 << 32 | 0xf),
            (true, 0, 0xff << 32),
        ] {
            let g = geometry(16, 4, extended);
            let Ok(L2Entry::Plain(cluster)) = L2Entry::decode(&g, descriptor, bitmap) else {
                panic!("not a plain entry");
            };
            assert_eq!(cluster.encode(&g), (descriptor, bitmap));
        }
        let g = geometry(16, 4, false);
        let entry = L1Entry::decode(&g, COPIED | 0x3_0000).unwrap();
        assert_eq!(entry.encode(), COPIED | 0x3_0000);
        assert_eq!(L1Entry::decode(&g, 1), Err(Defect::ReservedBits));
        assert_eq!(
            decode_refcount_table_entry(&g, 0x3_0001),
            Err(Defect::ReservedBits)
        );
        assert_eq!(
            decode_refcount_table_entry(&g, 0x3_0200),
            Err(Defect::Unaligned)
        );
    }
}
