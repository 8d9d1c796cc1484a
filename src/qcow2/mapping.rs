//! Looking up what a guest range is, over the longest run that is one thing (qcow2 specification, "Cluster
//! mapping").
//!
//! # Invariants
//!
//! 1. A lookup does no I/O: where a slice of an L2 table is missing, the answer names it.
//! 2. The caller holds a token of `grace` from before the lookup until its I/O has ended, so that the host clusters
//!    in the answer are not given to other data meanwhile.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::compressed::CompressedExtent;
use super::engine::Qcow2;
use super::entry::{Cluster, Defect, L2Entry, own_host};
use super::geometry::{Geometry, to_usize};
use super::table_cache::Slice;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{GuestCluster, GuestOffset, HostOffset};

/// Where the bytes of a guest range come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadMapping {
    /// They are zeros.
    Zero,
    /// They are in the host file, one after the other from here on.
    Data(HostOffset),
    /// They are in the compressed cluster there; the range does not leave its guest cluster.
    Compressed(CompressedExtent),
    /// This image says nothing: the backing image decides, or zeros where there is none.
    Unallocated,
}

/// How the bytes of a guest range are overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteMapping {
    /// In the host file, one after the other from here on; no metadata changes.
    InPlace(HostOffset),
    /// By a change of L2 entries, all in one slice.
    Allocate,
}

/// The answer of a lookup.
#[derive(Debug)]
pub(super) enum Found<M> {
    /// What the range is, and for how many bytes.
    Run(M, u64),
    /// This slice of an L2 table is needed first.
    Load(HostOffset),
}

/// Where a guest cluster's L2 entry lies.
pub(super) enum Place {
    /// In no table, as for this many bytes from the cluster's start on.
    NoTable(u64),
    /// In a slice of a table.
    Slice {
        /// Where the slice begins.
        at: HostOffset,
        /// The entry's offset in it.
        entry: usize,
        /// Whether the table belongs to the active L1 table alone.
        copied: bool,
    },
}

/// One thing, for how many bytes, that may go on with the next of its kind.
pub(super) trait Run: Copy {
    /// Whether `next` continues this one after `len` bytes.
    fn goes_on(self, len: u64, next: Self) -> bool;
}

impl Run for ReadMapping {
    fn goes_on(self, len: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) | (Self::Unallocated, Self::Unallocated) => true,
            (Self::Data(first), Self::Data(next)) => first.checked_add(len) == Some(next),
            _ => false,
        }
    }
}

impl Run for WriteMapping {
    fn goes_on(self, len: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Allocate, Self::Allocate) => true,
            (Self::InPlace(first), Self::InPlace(next)) => first.checked_add(len) == Some(next),
            _ => false,
        }
    }
}

impl ReadMapping {
    /// Whether `next` continues this one after `len` bytes.
    pub(super) fn continues(self, len: u64, next: Self) -> bool {
        self.goes_on(len, next)
    }
}

/// The entry at byte `at` of a slice; `None` behind its end.
pub(super) fn entry_at(
    geometry: &Geometry,
    slice: &[u8],
    at: usize,
) -> Option<Result<L2Entry, Defect>> {
    let word = |at: usize| Some(u64::from_be_bytes(*slice.get(at..)?.first_chunk()?));
    let descriptor = word(at)?;
    let bitmap = if geometry.has_extended_l2() {
        word(at + 8)?
    } else {
        0
    };
    Some(L2Entry::decode(geometry, descriptor, bitmap))
}

/// What the bytes from `within` its cluster on are, and for how many of them the cluster says so.
fn read_mapping(geometry: &Geometry, entry: L2Entry, within: u64) -> (ReadMapping, u64) {
    let left = geometry.cluster_size() - within;
    let cluster = match entry {
        L2Entry::Compressed(extent) => return (ReadMapping::Compressed(extent), left),
        L2Entry::Plain(cluster) => cluster,
    };
    let size = geometry.subcluster_size();
    let first = u32::try_from(within / size).expect("a cluster has at most 32 subclusters");
    let status = |mask: u32| mask >> first & 1 == 1;
    let (mapping, same) = match cluster.host {
        Some(host) if status(cluster.allocated) => (
            ReadMapping::Data(HostOffset(host.0 + within)),
            cluster.allocated,
        ),
        _ if status(cluster.zero) => (ReadMapping::Zero, cluster.zero),
        _ => (
            ReadMapping::Unallocated,
            !(cluster.allocated | cluster.zero),
        ),
    };
    let run = u64::from((same >> first).trailing_ones());
    (mapping, left.min(run * size - within % size))
}

/// Whether `len` bytes from `within` the cluster on can be overwritten in place.
fn write_mapping(geometry: &Geometry, entry: L2Entry, within: u64, len: u64) -> WriteMapping {
    let touched = geometry.mask_touched(&(within..within + len));
    match entry {
        L2Entry::Plain(cluster @ Cluster { allocated, .. }) if touched & !allocated == 0 => {
            match cluster.own_host() {
                Some(host) => WriteMapping::InPlace(HostOffset(host.0 + within)),
                None => WriteMapping::Allocate,
            }
        }
        _ => WriteMapping::Allocate,
    }
}

/// Walks the entries of a slice for as long as they are one thing.
fn walk<M: Run>(
    geometry: &Geometry,
    slice: &[u8],
    first_entry: usize,
    range: (GuestOffset, u64),
    mapping_of: impl Fn(L2Entry, u64, u64) -> (M, u64),
) -> Result<(M, u64), Defect> {
    let (at, len) = range;
    let mut found: Option<M> = None;
    let mut done = 0;
    let mut entry_offset = first_entry;
    while done < len {
        let within = geometry.within_cluster(at.0 + done);
        let left = (geometry.cluster_size() - within).min(len - done);
        let start = GuestOffset(at.0 + done - within);
        let entry = entry_at(geometry, slice, entry_offset);
        let entry = match entry.map(|entry| entry?.check_place(geometry, start)) {
            Some(Ok(entry)) => entry,
            // A broken entry is reported by the lookup that begins with it.
            Some(Err(defect)) if done == 0 => return Err(defect),
            _ => break,
        };
        let (mapping, run) = mapping_of(entry, within, left);
        let run = run.min(left);
        match found {
            None => found = Some(mapping),
            Some(first) if first.goes_on(done, mapping) => {}
            Some(_) => break,
        }
        done += run;
        if geometry.within_cluster(at.0 + done) == 0 {
            entry_offset += to_usize(geometry.l2_entry_size());
        }
    }
    // The slice holds at least the first entry, and the range is not empty.
    found
        .map(|mapping| (mapping, done))
        .ok_or(Defect::ReservedBits)
}

impl Qcow2 {
    /// What `len` bytes at `at` are for a reader, as far as one slice tells. The range is not empty and lies inside
    /// the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a broken entry.
    pub(super) fn look_up_read(&self, at: GuestOffset, len: u64) -> Result<Found<ReadMapping>> {
        match self.place(at)? {
            Place::NoTable(covered) => Ok(Found::Run(ReadMapping::Unallocated, len.min(covered))),
            Place::Slice {
                at: slice, entry, ..
            } => self.look_up_in(slice, entry, (at, len), |entry, within, _| {
                read_mapping(&self.geometry, entry, within)
            }),
        }
    }

    /// What `len` bytes at `at` are for a writer, as far as one slice tells, as [`Qcow2::look_up_read`].
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a broken entry.
    pub(super) fn look_up_write(&self, at: GuestOffset, len: u64) -> Result<Found<WriteMapping>> {
        match self.place(at)? {
            Place::NoTable(covered) => Ok(Found::Run(
                WriteMapping::Allocate,
                len.min(self.slice_reach(at)).min(covered),
            )),
            Place::Slice { copied: false, .. } => Ok(Found::Run(
                WriteMapping::Allocate,
                len.min(self.slice_reach(at)),
            )),
            Place::Slice {
                at: slice, entry, ..
            } => self.look_up_in(slice, entry, (at, len), |entry, within, len| {
                (write_mapping(&self.geometry, entry, within, len), len)
            }),
        }
    }

    /// What `range` is, as far as the slice at `slice` tells, in which the range's first entry is at `entry`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a broken entry.
    pub(super) fn look_up_in<M: Run>(
        &self,
        slice: HostOffset,
        entry: usize,
        range: (GuestOffset, u64),
        mapping_of: impl Fn(L2Entry, u64, u64) -> (M, u64),
    ) -> Result<Found<M>> {
        let found = self.l2.peek(slice, |bytes| {
            walk(&self.geometry, bytes, entry, range, mapping_of)
        });
        match found {
            None => Ok(Found::Load(slice)),
            Some(Ok((mapping, run))) => Ok(Found::Run(mapping, run)),
            Some(Err(defect)) => Err(self.broken_entry("L2", range.0, defect)),
        }
    }

    /// As [`Qcow2::look_up_read`], loading what is missing.
    ///
    /// # Errors
    /// The storage's too.
    pub(super) async fn find_read(&self, at: GuestOffset, len: u64) -> Result<(ReadMapping, u64)> {
        self.find(|| self.look_up_read(at, len)).await
    }

    /// As [`Qcow2::look_up_write`], loading what is missing.
    ///
    /// # Errors
    /// The storage's too.
    pub(super) async fn find_write(
        &self,
        at: GuestOffset,
        len: u64,
    ) -> Result<(WriteMapping, u64)> {
        self.find(|| self.look_up_write(at, len)).await
    }

    /// Looks up until nothing is missing.
    ///
    /// # Errors
    /// Those of `look_up`, and the storage's.
    pub(super) async fn find<M>(&self, look_up: impl Fn() -> Result<Found<M>>) -> Result<(M, u64)> {
        loop {
            let found = look_up();
            match self.judge(found).await? {
                Found::Run(mapping, run) => return Ok((mapping, run)),
                Found::Load(slice) => drop(self.l2_slice(slice).await?),
            }
        }
    }

    /// The error for an entry that breaks a rule.
    pub(super) fn broken_entry(&self, level: &str, at: GuestOffset, defect: Defect) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "{}: the {level} entry for guest offset {at} {}",
                self.storage.name(),
                defect.describe()
            ),
        )
    }

    /// Where the L2 entry for `at` lies.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a broken L1 entry.
    pub(super) fn place(&self, at: GuestOffset) -> Result<Place> {
        let cluster = self.geometry.guest_cluster(at);
        let l1_entry = self
            .l1
            .get(self.geometry.l1_index(cluster))
            .map_err(|defect| self.broken_entry("L1", at, defect))?;
        let Some(table) = l1_entry.table else {
            return Ok(Place::NoTable(self.table_reach(at)));
        };
        Ok(self.place_in(table, cluster, l1_entry.copied))
    }

    /// Where in `table` the entry of `cluster` lies.
    pub(super) fn place_in(&self, table: HostOffset, cluster: GuestCluster, copied: bool) -> Place {
        let entry_at = HostOffset(table.0 + self.geometry.l2_entry_offset(cluster));
        let at = self.l2.slice_start(entry_at);
        Place::Slice {
            at,
            entry: to_usize(entry_at.0 - at.0),
            copied,
        }
    }

    /// Bytes from `at` to the end of what its L2 table covers.
    fn table_reach(&self, at: GuestOffset) -> u64 {
        self.reach(at, self.geometry.cluster_size())
    }

    /// Bytes from `at` to the end of what the slice with its L2 entry covers.
    pub(super) fn slice_reach(&self, at: GuestOffset) -> u64 {
        self.reach(at, self.l2.slice_size())
    }

    fn reach(&self, at: GuestOffset, table_bytes: u64) -> u64 {
        let covered = table_bytes / self.geometry.l2_entry_size() * self.geometry.cluster_size();
        covered - at.0 % covered
    }

    /// A slice of an L2 table. What comes from disk is looked through once: entries that would let a guest overwrite
    /// metadata forbid all writing before anyone sees them.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn l2_slice(&self, at: HostOffset) -> Result<Arc<Slice>> {
        if let Some(slice) = self.l2.cached(at) {
            return Ok(slice);
        }
        let slice = self.l2.get_vetted(at, |bytes| self.vet(at, bytes)).await?;
        self.record_corruption().await;
        Ok(slice)
    }

    fn vet(&self, at: HostOffset, slice: &[u8]) {
        if self.geometry.has_data_file() {
            return;
        }
        let runs = runs_of_own_clusters(&self.geometry, slice);
        if !self.allocator.holds_metadata(&runs) {
            return;
        }
        let entries = (0..slice.len()).step_by(to_usize(self.geometry.l2_entry_size()));
        let own_hosts = entries.filter_map(|entry| match entry_at(&self.geometry, slice, entry)? {
            Ok(L2Entry::Plain(cluster)) => Some(self.geometry.host_cluster(cluster.own_host()?)),
            _ => None,
        });
        if let Some(cluster) = self.allocator.first_metadata(own_hosts) {
            self.health.find_corrupt(&format!(
                "an L2 entry in the table around {at:#x} gives metadata in host cluster {cluster} to the guest"
            ));
        }
    }
}

/// The host clusters that entries of a slice say to own, whether these make sense or not: those that follow each other
/// are one run. Plain loops, since every table that comes from disk passes here.
fn runs_of_own_clusters(geometry: &Geometry, slice: &[u8]) -> SmallVec<[Range<u64>; 8]> {
    let mut runs: SmallVec<[Range<u64>; 8]> = SmallVec::new();
    for entry in slice.chunks_exact(to_usize(geometry.l2_entry_size())) {
        let descriptor = entry
            .first_chunk()
            .map_or(0, |word| u64::from_be_bytes(*word));
        let Some(host) = own_host(descriptor) else {
            continue;
        };
        let cluster = geometry.host_cluster(host).0;
        match runs.last_mut() {
            Some(run) if run.end == cluster => run.end += 1,
            _ => runs.push(cluster..cluster + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::super::geometry::tests::geometry;
    use super::*;

    fn read_run(extended: bool, entries: &[(u64, u64)], at: u64, len: u64) -> (ReadMapping, u64) {
        let geometry = geometry(16, 4, extended);
        let mut slice = Vec::new();
        for (descriptor, bitmap) in entries {
            slice.extend(descriptor.to_be_bytes());
            if extended {
                slice.extend(bitmap.to_be_bytes());
            }
        }
        walk(
            &geometry,
            &slice,
            0,
            (GuestOffset(at), len),
            |entry, within, _| read_mapping(&geometry, entry, within),
        )
        .unwrap()
    }

    #[test]
    fn contiguous_clusters_are_one_run_from_the_middle_of_the_first() {
        let entries = [(0x5_0000, 0), (0x6_0000, 0), (0x8_0000, 0)];
        let expected = (ReadMapping::Data(HostOffset(0x5_0100)), 0x1_ff00);
        assert_eq!(read_run(false, &entries, 0x100, 0x3_0000), expected);
    }

    #[test]
    fn own_clusters_that_follow_each_other_are_one_run() {
        const OWN: u64 = 1 << 63;
        const COMPRESSED: u64 = 1 << 62;
        let words = [
            OWN | 0x5_0000,
            OWN | 0x6_0000,
            0x7_0000,
            0,
            OWN | COMPRESSED | 0x8_0000,
            OWN | 0x7_0000,
            OWN | 0x5_0000,
        ];
        let slice: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let runs = runs_of_own_clusters(&geometry(16, 4, false), &slice);
        assert_eq!(runs[..], [5..8, 5..6]);
    }

    #[test]
    fn a_run_ends_with_the_slice_or_before_a_broken_entry() {
        assert_eq!(
            read_run(false, &[(1, 0), (1, 0)], 0, 1 << 30),
            (ReadMapping::Zero, 0x2_0000)
        );
        assert_eq!(
            read_run(false, &[(0, 0), (2, 0)], 0, 1 << 30),
            (ReadMapping::Unallocated, 0x1_0000)
        );
    }

    #[test]
    fn subclusters_are_told_apart_inside_and_joined_across_clusters() {
        // Subclusters of 2 KiB: 0 zero, 1 data, 2 to 31 unallocated, then a cluster with 0 and 1 unallocated.
        let entries = [(0x5_0000, 1 << 32 | 2), (0x7_0000, 0b100)];
        assert_eq!(
            read_run(true, &entries, 512, 1 << 20),
            (ReadMapping::Zero, 1536)
        );
        assert_eq!(
            read_run(true, &entries, 2048, 1 << 20),
            (ReadMapping::Data(HostOffset(0x5_0800)), 2048)
        );
        assert_eq!(
            read_run(true, &entries, 4096, 1 << 20),
            (ReadMapping::Unallocated, 30 * 2048 + 4096)
        );
    }
}
