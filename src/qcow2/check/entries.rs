//! What single entries of L1 and L2 tables say, what is wrong with them, and what a repair makes of them: pure
//! functions (qcow2 specification, "Cluster mapping", "Extended L2 entries").
//!
//! # Invariants
//!
//! 1. The mended form of a sound entry is the entry itself.
//! 2. An entry whose data can be found keeps it. Where the data cannot be found the mended entry reads as zeros
//!    (version 2: as unallocated), never as what lies behind it in the backing chain of version 3 images.

use super::super::entry::{COMPRESSED, COPIED, OFFSET, READS_ZERO};
use super::super::geometry::Geometry;
use crate::units::{HostOffset, SECTOR_SIZE};

/// Bits without a meaning in L1 entries.
const L1_RESERVED: u64 = !(COPIED | OFFSET);
/// Bits without a meaning in L2 entries of clusters that are not compressed, whatever the version.
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET | READS_ZERO);

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    ReservedBits,
    ZeroFlag,
    FlagsWithoutTable,
    Unaligned,
    BeyondEnd,
    InHeader,
    CompressedCopied,
    CompressedInDataFile,
    CompressedSubclusters,
    AllocatedAndZero,
    AllocatedNowhere,
}

impl Fault {
    /// For messages: "L2 entry … *has reserved bits set*".
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::ReservedBits => "has reserved bits set",
            Self::ZeroFlag => "has a zero flag, which such an image does not have",
            Self::FlagsWithoutTable => "has flags, but no table",
            Self::Unaligned => "points to an offset that is not aligned to a cluster",
            Self::BeyondEnd => "points behind the end of the file",
            Self::InHeader => "points into the header",
            Self::CompressedCopied => "is compressed and has the COPIED flag",
            Self::CompressedInDataFile => "is compressed, and the image has an external data file",
            Self::CompressedSubclusters => "is compressed and has a subcluster bitmap",
            Self::AllocatedAndZero => "has subclusters that are both allocated and zero",
            Self::AllocatedNowhere => "has allocated subclusters without a host cluster",
        }
    }
}

impl Fault {
    /// Whether an L1 entry that has it leads to no L2 table, and should.
    pub(super) fn loses_table(self) -> bool {
        matches!(self, Self::Unaligned | Self::BeyondEnd)
    }
}

/// What entries are judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) geometry: Geometry,
    pub(super) file_len: u64,
    pub(super) has_data_file: bool,
}

impl Bounds {
    /// Whether these bytes lie in the file, as far as its last cluster may be incomplete.
    pub(super) fn holds(&self, at: u64, len: u64) -> bool {
        at.checked_add(len)
            .is_some_and(|end| end.saturating_sub(self.file_len) < self.geometry.cluster_size())
    }
}

/// An entry of an L1 table that is not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct L1Verdict {
    pub(super) faults: Vec<Fault>,
    /// The clusters that it refers to, from this offset on; perhaps not aligned.
    pub(super) refers_to: Option<HostOffset>,
    /// The L2 table, if it can be one.
    pub(super) table: Option<HostOffset>,
    pub(super) mended: u64,
}

/// Judges an entry of an L1 table.
pub(super) fn judge_l1(bounds: &Bounds, word: u64) -> L1Verdict {
    let mut faults = Vec::new();
    if word & L1_RESERVED != 0 {
        faults.push(Fault::ReservedBits);
    }
    let offset = word & OFFSET;
    let size = bounds.geometry.cluster_size();
    let is_aligned = bounds.geometry.within_cluster(offset) == 0;
    let is_inside = bounds.holds(offset, size);
    if offset == 0 && word != 0 {
        faults.push(Fault::FlagsWithoutTable);
    }
    if !is_aligned {
        faults.push(Fault::Unaligned);
    }
    if !is_inside {
        faults.push(Fault::BeyondEnd);
    }
    let is_table = offset != 0 && is_aligned && is_inside;
    L1Verdict {
        faults,
        refers_to: (offset != 0 && is_inside).then_some(HostOffset(offset)),
        table: is_table.then_some(HostOffset(offset)),
        mended: if is_table { word & !L1_RESERVED } else { 0 },
    }
}

/// What an L2 entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nothing in the image file.
    Nothing,
    /// One cluster, at an offset that is perhaps not aligned; in the data file if there is one.
    Cluster(HostOffset),
    /// Compressed bytes.
    Compressed(HostOffset, u64),
}

/// A judged entry of an L2 table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct L2Verdict {
    pub(super) faults: Vec<Fault>,
    /// What it occupies.
    pub(super) target: Target,
    /// Whether `target` lies in the image file, and counts.
    pub(super) is_counted: bool,
    pub(super) mended: (u64, u64),
}

impl L2Verdict {
    fn nothing(faults: Vec<Fault>, mended: (u64, u64)) -> Self {
        Self {
            faults,
            target: Target::Nothing,
            is_counted: false,
            mended,
        }
    }
}

/// Judges an entry of an L2 table; `bitmap` is 0 where entries are not extended.
pub(super) fn judge_l2(bounds: &Bounds, descriptor: u64, bitmap: u64) -> L2Verdict {
    if descriptor & COMPRESSED != 0 {
        judge_compressed(bounds, descriptor, bitmap)
    } else {
        judge_plain(bounds, descriptor, bitmap)
    }
}

fn judge_compressed(bounds: &Bounds, descriptor: u64, bitmap: u64) -> L2Verdict {
    let mut faults = Vec::new();
    if descriptor & COPIED != 0 {
        faults.push(Fault::CompressedCopied);
    }
    let word = descriptor & !COPIED;
    if bounds.has_data_file {
        faults.push(Fault::CompressedInDataFile);
        return L2Verdict::nothing(faults, lost(bounds, all_allocated(bounds)));
    }
    if bitmap != 0 {
        faults.push(Fault::CompressedSubclusters);
        return L2Verdict::nothing(faults, (word, 0));
    }
    let (at, len) = compressed_extent(&bounds.geometry, word);
    let is_inside = bounds.holds(at, len);
    let in_header = at < bounds.geometry.cluster_size();
    if !is_inside {
        faults.push(Fault::BeyondEnd);
    } else if in_header {
        faults.push(Fault::InHeader);
    }
    L2Verdict {
        faults,
        target: Target::Compressed(HostOffset(at), len),
        is_counted: is_inside,
        mended: if is_inside && !in_header {
            (word, 0)
        } else {
            lost(bounds, all_allocated(bounds))
        },
    }
}

/// Where compressed bytes lie, whether they can lie there or not.
fn compressed_extent(geometry: &Geometry, word: u64) -> (u64, u64) {
    let sectors_bits = geometry.cluster_bits() - 8;
    let offset_bits = 62 - sectors_bits;
    let at = word & ((1 << offset_bits) - 1);
    let additional_sectors = word >> offset_bits & ((1 << sectors_bits) - 1);
    (
        at,
        (additional_sectors + 1) * SECTOR_SIZE - at % SECTOR_SIZE,
    )
}

fn judge_plain(bounds: &Bounds, descriptor: u64, bitmap: u64) -> L2Verdict {
    let geometry = &bounds.geometry;
    let is_extended = geometry.has_extended_l2();
    let mut faults = Vec::new();
    if descriptor & L2_RESERVED != 0 {
        faults.push(Fault::ReservedBits);
    }
    let mut word = descriptor & !L2_RESERVED;
    if descriptor & READS_ZERO != 0 && (is_extended || !geometry.has_zero_flag()) {
        faults.push(Fault::ZeroFlag);
        word &= !READS_ZERO;
    }
    let offset = word & OFFSET;
    let (allocated, zero) = (bitmap & u64::from(u32::MAX), bitmap >> 32);
    // Offset 0 of a data file is a place like any other.
    let has_place = offset != 0 || bounds.has_data_file && word & COPIED != 0;
    if !has_place {
        if allocated == 0 {
            return L2Verdict::nothing(faults, (word, bitmap));
        }
        faults.push(Fault::AllocatedNowhere);
        return L2Verdict::nothing(faults, lost(bounds, bitmap));
    }
    let bitmap = (zero & !allocated) << 32 | allocated;
    if allocated & zero != 0 {
        faults.push(Fault::AllocatedAndZero);
    }
    let is_aligned = geometry.within_cluster(offset) == 0;
    let is_inside = bounds.has_data_file || bounds.holds(offset, geometry.cluster_size());
    if !is_aligned {
        faults.push(Fault::Unaligned);
    }
    if !is_inside {
        faults.push(Fault::BeyondEnd);
    }
    L2Verdict {
        faults,
        target: Target::Cluster(HostOffset(offset)),
        is_counted: is_inside && !bounds.has_data_file,
        mended: if is_aligned && is_inside {
            (word, bitmap)
        } else {
            lost(bounds, bitmap)
        },
    }
}

/// An entry without a place: what was allocated reads as zeros.
fn lost(bounds: &Bounds, bitmap: u64) -> (u64, u64) {
    if bounds.geometry.has_extended_l2() {
        (0, (bitmap >> 32 | bitmap & u64::from(u32::MAX)) << 32)
    } else if bounds.geometry.has_zero_flag() {
        (READS_ZERO, 0)
    } else {
        (0, 0)
    }
}

/// A subcluster bitmap in which all is allocated.
fn all_allocated(bounds: &Bounds) -> u64 {
    u64::from(bounds.geometry.full_mask())
}

#[cfg(test)]
mod tests {
    use super::super::super::geometry::tests::geometry;
    use super::*;

    fn bounds(extended: bool) -> Bounds {
        Bounds {
            geometry: geometry(16, 4, extended),
            file_len: 0x10_0000,
            has_data_file: false,
        }
    }

    fn l2(extended: bool, descriptor: u64, bitmap: u64) -> (Vec<Fault>, (u64, u64)) {
        let verdict = judge_l2(&bounds(extended), descriptor, bitmap);
        (verdict.faults, verdict.mended)
    }

    #[test]
    fn sound_entries_stay_as_they_are() {
        for (extended, descriptor, bitmap) in [
            (false, 0, 0),
            (false, COPIED | 0x5_0000, 0),
            (false, COPIED | 0x5_0001, 0),
            (false, 1, 0),
            (false, COMPRESSED | 3 << 54 | 0x1_2345, 0),
            (true, COPIED | 0x6_0000, 0xf0 << 32 | 0xf),
            (true, 0, 0xff << 32),
        ] {
            assert_eq!(
                l2(extended, descriptor, bitmap),
                (vec![], (descriptor, bitmap))
            );
        }
        let verdict = judge_l1(&bounds(false), COPIED | 0x5_0000);
        assert_eq!(
            (verdict.faults, verdict.mended),
            (vec![], COPIED | 0x5_0000)
        );
    }

    #[test]
    fn entries_whose_data_can_be_found_keep_it() {
        for (extended, descriptor, bitmap, fault, mended) in [
            (
                false,
                1 << 57 | 0x5_0000,
                0,
                Fault::ReservedBits,
                (0x5_0000, 0),
            ),
            (true, 0x5_0001, 1, Fault::ZeroFlag, (0x5_0000, 1)),
            (
                false,
                COPIED | COMPRESSED | 0x1_2345,
                0,
                Fault::CompressedCopied,
                (COMPRESSED | 0x1_2345, 0),
            ),
            (
                true,
                COMPRESSED | 0x1_2345,
                7,
                Fault::CompressedSubclusters,
                (COMPRESSED | 0x1_2345, 0),
            ),
            (
                true,
                0x5_0000,
                3 << 32 | 1,
                Fault::AllocatedAndZero,
                (0x5_0000, 2 << 32 | 1),
            ),
        ] {
            assert_eq!(l2(extended, descriptor, bitmap), (vec![fault], mended));
        }
    }

    #[test]
    fn entries_whose_data_is_lost_read_as_zeros() {
        for (extended, descriptor, bitmap, fault, mended) in [
            (false, 0x5_0200, 0, Fault::Unaligned, (1, 0)),
            (false, 0x10_0000, 0, Fault::BeyondEnd, (1, 0)),
            (false, COMPRESSED | 0x200, 0, Fault::InHeader, (1, 0)),
            (false, COMPRESSED | 0x40_0000, 0, Fault::BeyondEnd, (1, 0)),
            (true, 0x5_0200, 4 << 32 | 1, Fault::Unaligned, (0, 5 << 32)),
            (true, 0, 4 << 32 | 1, Fault::AllocatedNowhere, (0, 5 << 32)),
            (
                true,
                COMPRESSED | 0x200,
                0,
                Fault::InHeader,
                (0, 0xffff_ffff << 32),
            ),
        ] {
            assert_eq!(l2(extended, descriptor, bitmap), (vec![fault], mended));
        }
        for (word, faults) in [
            (1, vec![Fault::ReservedBits, Fault::FlagsWithoutTable]),
            (COPIED, vec![Fault::FlagsWithoutTable]),
            (0x5_0200, vec![Fault::Unaligned]),
            (0x20_0000, vec![Fault::BeyondEnd]),
        ] {
            let verdict = judge_l1(&bounds(false), word);
            assert_eq!((verdict.table, verdict.mended), (None, 0), "{word:#x}");
            assert_eq!(verdict.faults, faults, "{word:#x}");
        }
    }

    #[test]
    fn the_last_cluster_of_the_file_may_be_incomplete() {
        let short = Bounds {
            file_len: 0x10_0001,
            ..bounds(false)
        };
        assert!(judge_l2(&short, 0x10_0000, 0).faults.is_empty());
        assert!(!judge_l2(&short, 0x11_0000, 0).faults.is_empty());
    }

    #[test]
    fn in_a_data_file_every_place_is_sound_and_none_counts_and_nothing_is_compressed() {
        for extended in [false, true] {
            let bounds = Bounds {
                has_data_file: true,
                ..bounds(extended)
            };
            // Offset 0, which only the flag tells from no place; and one that the image file does not reach.
            for place in [0, 0x40_0000] {
                let entry = (COPIED | place, u64::from(extended));
                let verdict = judge_l2(&bounds, entry.0, entry.1);
                assert_eq!(verdict.faults, vec![], "{place:#x}");
                assert_eq!(verdict.mended, entry);
                assert_eq!(verdict.target, Target::Cluster(HostOffset(place)));
                assert!(!verdict.is_counted);
            }
            let verdict = judge_l2(&bounds, COMPRESSED | 0x1_2345, 0);
            assert_eq!(verdict.faults, vec![Fault::CompressedInDataFile]);
            assert_eq!(verdict.target, Target::Nothing);
            let zeros = if extended {
                (0, 0xffff_ffff << 32)
            } else {
                (1, 0)
            };
            assert_eq!(verdict.mended, zeros);
        }
    }
}
