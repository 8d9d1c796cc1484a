//! Writing: in place where the clusters are the entry's own, into new clusters elsewhere.
//!
//! # Invariants
//!
//! Numbers in brackets are those of the crash order in `qcow2::flush`.
//!
//! 1. Whoever changes the L2 entry of a guest cluster holds that cluster in `clusters`, from before the plan is made
//!    until the entry is changed. Writes in place hold nothing: a cluster that one finds in place stays so for all
//!    bytes of it that are allocated, except by an overlapping request.
//! 2. \[rules 2, 3\] The entry changes only after all bytes of its new subclusters have been written.
//! 3. \[rule 8\] An L2 table is changed only while its L1 entry has COPIED; else a copy takes its place first.
//! 4. A write that fails, or is dropped before its end, changes no entry, and gives the clusters back that it took.
//! 5. What is written holds a token of `grace` until the kernel is done with it: a write that was dropped may still
//!    be under way, and its clusters are not given to others before it has ended.

use std::sync::Arc;

use smallvec::SmallVec;

use super::cow::{ClusterPlan, Source};
use super::engine::Qcow2;
use super::entry::L2Entry;
use super::geometry::to_usize;
use super::join::{Piece, join_all};
use super::mapping::{Place, WriteMapping, entry_at};
use super::quarantine::Dropped;
use super::room::Taken;
use super::table_cache::Slice;
use super::zeros::zeros;
use crate::error::{Error, Result};
use crate::sys::IoBuf;
use crate::units::{GuestCluster, GuestOffset, HostOffset};

/// One cluster of an allocating write.
struct ClusterWrite {
    cluster: GuestCluster,
    /// The entry's offset in its slice.
    entry_offset: usize,
    old: L2Entry,
    plan: ClusterPlan,
    /// Where the request's bytes for this cluster begin in its buffer.
    request_at: usize,
    /// Whether the new host cluster reads as zeros already.
    untouched: bool,
}

/// Bytes on their way to the host file.
struct HostWrite {
    at: HostOffset,
    bufs: Vec<IoBuf>,
    len: u64,
}

impl Qcow2 {
    /// Writes `buf` at `at`, inside the disk.
    ///
    /// # Errors
    /// The storage's and the backing image's, [`crate::error::ErrorKind::NoSpace`],
    /// [`crate::error::ErrorKind::Corrupt`].
    pub(super) async fn write_range(&self, at: GuestOffset, buf: &IoBuf) -> Result<()> {
        let in_flight = self.grace.enter();
        let buf = in_flight.held_by(buf.clone());
        let mut runs: SmallVec<[(GuestOffset, WriteMapping, IoBuf); 4]> = SmallVec::new();
        let mut done = 0;
        while done < buf.len() {
            let start = GuestOffset(at.0 + done as u64);
            let (mapping, len) = self.find_write(start, (buf.len() - done) as u64).await?;
            runs.push((start, mapping, buf.slice(done..done + to_usize(len))));
            done += to_usize(len);
        }
        // A lookup may have found the metadata broken: what it says must not be written to.
        self.check_not_poisoned()?;
        let pieces = runs.into_iter().map(|(start, mapping, part)| -> Piece<'_> {
            match mapping {
                WriteMapping::InPlace(host) => self.data().writev(host, part),
                WriteMapping::Allocate => Piece::boxed(self.write_allocating(start, part)),
            }
        });
        join_all(pieces).await
    }

    /// Writes a range whose entries are all in one slice, changing those that need it.
    pub(super) async fn write_allocating(&self, at: GuestOffset, buf: IoBuf) -> Result<()> {
        let last = GuestOffset(at.0 + buf.len() as u64 - 1);
        let first_cluster = self.geometry.guest_cluster(at);
        let clusters = first_cluster.0..self.geometry.guest_cluster(last).0 + 1;
        // Invariant 1.
        let _held = self.clusters.lock(clusters).await;
        let (slice, first_entry) = self.own_slice(first_cluster).await?;
        let planned = slice.read(|bytes| self.plan_write(bytes, first_entry, at, buf.len()));
        let mut writes = self.judge(planned).await?;
        self.place_in_data_file(&mut writes);
        let missing = writes
            .iter()
            .filter(|write| write.plan.entry.host.is_none())
            .count();
        let taken = self.take_clusters(missing as u64).await?;
        let unless_dropped = self.reclaim_if_dropped(&taken);
        self.place_new(&mut writes, &taken);
        let outcome = self.write_parts(&writes, &buf).await;
        unless_dropped.settle();
        match outcome {
            Ok(()) => {
                self.link(&slice, &writes);
                Ok(())
            }
            Err(error) => {
                // Invariant 4.
                self.give_back(taken).await;
                Err(error)
            }
        }
    }

    /// The slice of an L2 table that may be changed with the entry of `cluster`, and that entry's offset in it.
    ///
    /// # Errors
    /// The storage's, and those of making a table.
    pub(super) async fn own_slice(&self, cluster: GuestCluster) -> Result<(Arc<Slice>, usize)> {
        let table = self.own_table(cluster).await?;
        let Place::Slice { at, entry, .. } = self.place_in(table, cluster, true) else {
            unreachable!("a table has slices only");
        };
        let slice = self.l2_slice(at).await?;
        self.check_not_poisoned()?;
        Ok((slice, entry))
    }

    fn plan_write(
        &self,
        slice: &[u8],
        first_entry: usize,
        at: GuestOffset,
        len: usize,
    ) -> Result<Vec<ClusterWrite>> {
        let size = self.geometry.cluster_size();
        let end = at.0 + len as u64;
        let first = self.geometry.guest_cluster(at);
        let mut entry_offset = first_entry;
        let mut writes = Vec::new();
        for cluster in (first.0..end.div_ceil(size)).map(GuestCluster) {
            let start = self.geometry.guest_start(cluster).0;
            let within = at.0.max(start) - start..end.min(start + size) - start;
            let old = self.entry_in(slice, entry_offset, GuestOffset(start))?;
            writes.push(ClusterWrite {
                cluster,
                entry_offset,
                old,
                request_at: to_usize(start + within.start - at.0),
                plan: ClusterPlan::new(&self.geometry, old, within),
                untouched: false,
            });
            entry_offset += to_usize(self.geometry.l2_entry_size());
        }
        Ok(writes)
    }

    /// The entry at byte `entry` of a slice.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Corrupt`] if it breaks a rule.
    pub(super) fn entry_in(&self, slice: &[u8], entry: usize, at: GuestOffset) -> Result<L2Entry> {
        let entry = entry_at(&self.geometry, slice, entry);
        match entry.map(|entry| entry?.check_place(&self.geometry, at)) {
            Some(Ok(entry)) => Ok(entry),
            Some(Err(defect)) => Err(self.broken_entry("L2", at, defect)),
            None => Err(Error::new(
                crate::error::ErrorKind::OutOfBounds,
                format!("guest offset {at} is not in the slice of its L2 table"),
            )),
        }
    }

    /// With an external data file every cluster has its place.
    fn place_in_data_file(&self, writes: &mut [ClusterWrite]) {
        if !self.geometry.has_data_file() {
            return;
        }
        for write in writes {
            let start = self.geometry.guest_start(write.cluster);
            write.plan.entry.host = Some(HostOffset(start.0));
        }
    }

    /// Gives the new clusters to those that need one, in their order.
    fn place_new(&self, writes: &mut [ClusterWrite], taken: &Taken) {
        let homeless = writes
            .iter_mut()
            .filter(|write| write.plan.entry.host.is_none());
        for (write, (cluster, untouched)) in homeless.zip(taken.clusters()) {
            write.plan.entry.host = Some(self.geometry.host_start(cluster));
            write.untouched = untouched;
        }
    }

    /// Reads what is to be copied up, and writes all parts: contiguous ones in one operation.
    async fn write_parts(&self, writes: &[ClusterWrite], buf: &IoBuf) -> Result<()> {
        let mut reads: Vec<Piece<'_>> = Vec::new();
        let mut host_writes: Vec<HostWrite> = Vec::new();
        for write in writes {
            let Some(host) = write.plan.entry.host else {
                continue;
            };
            let mut decompressed: Option<IoBuf> = None;
            for part in &write.plan.parts {
                if part.source == Source::Zero && write.untouched
                    || self.shows_nothing(write, part.source)
                {
                    continue;
                }
                let at = host.0 + part.within.start;
                let part_of_file = self.writable_part(at..host.0 + part.within.end);
                let len = to_usize(part_of_file.end - part_of_file.start);
                if len == 0 {
                    continue;
                }
                let bytes = match part.source {
                    Source::Request => buf.slice(write.request_at..write.request_at + len),
                    Source::Zero => zeros(len),
                    Source::Backing => {
                        let at = GuestOffset(
                            self.geometry.guest_start(write.cluster).0 + part.within.start,
                        );
                        if self.backed_len(at, len) == 0 {
                            zeros(len)
                        } else {
                            let copy = IoBuf::to_be_filled(len);
                            reads.push(Piece::boxed(self.read_backing(at, copy.clone())));
                            copy
                        }
                    }
                    Source::Old(old) => {
                        let copy = IoBuf::to_be_filled(len);
                        let at = HostOffset(old.0 + part.within.start);
                        reads.push(self.data().readv(at, copy.clone()));
                        copy
                    }
                    Source::Compressed(extent) => {
                        let cluster = match decompressed.take() {
                            Some(cluster) => cluster,
                            None => self.read_compressed(extent).await?,
                        };
                        decompressed = Some(cluster.clone());
                        let start = to_usize(part.within.start);
                        cluster.slice(start..start + len)
                    }
                };
                push_write(&mut host_writes, HostOffset(at), bytes);
            }
        }
        join_all(reads).await?;
        let in_flight = self.grace.enter();
        let writes = host_writes.into_iter().map(|write| -> Piece<'_> {
            let buf = in_flight.held_by(IoBuf::concat(write.bufs));
            self.data().writev(write.at, buf)
        });
        join_all(writes).await
    }

    /// Whether a part need not be written: zeros from no backing image, into a cluster that reads as zeros.
    fn shows_nothing(&self, write: &ClusterWrite, source: Source) -> bool {
        write.untouched && source == Source::Backing && self.backing.is_none()
    }

    /// Changes the entries, and drops the references of the old ones.
    fn link(&self, slice: &Arc<Slice>, writes: &[ClusterWrite]) {
        let mut dropped = Dropped::default();
        let changed = || writes.iter().filter(|write| write.plan.changes);
        let (Some(first), Some(last)) = (changed().next(), changed().next_back()) else {
            return;
        };
        let end = last.entry_offset + to_usize(self.geometry.l2_entry_size());
        // Invariant 2: the data has been written.
        self.l2
            .update_links(slice, first.entry_offset..end, |bytes| {
                for write in changed() {
                    self.store_entry(bytes, write.entry_offset, &L2Entry::Plain(write.plan.entry));
                    if !keeps_host(&write.old, &write.plan) {
                        dropped.add(&self.geometry, &write.old);
                    }
                }
            });
        self.unlink(dropped);
    }

    /// Puts an entry at byte `at` of a slice; whoever makes it sees to it that it can be encoded.
    pub(super) fn store_entry(&self, slice: &mut [u8], at: usize, entry: &L2Entry) {
        let Some((descriptor, bitmap)) = entry.encode(&self.geometry) else {
            return;
        };
        let mut words = slice.get_mut(at..).unwrap_or_default().chunks_exact_mut(8);
        if let Some(word) = words.next() {
            word.copy_from_slice(&descriptor.to_be_bytes());
        }
        if self.geometry.has_extended_l2()
            && let Some(word) = words.next()
        {
            word.copy_from_slice(&bitmap.to_be_bytes());
        }
    }

    /// The L2 table for `cluster`, made or copied if the active L1 table has none of its own (invariant 3).
    async fn own_table(&self, cluster: GuestCluster) -> Result<HostOffset> {
        let index = self.geometry.l1_index(cluster);
        if let Some(table) = self.owned_table_at(index, cluster).await? {
            return Ok(table);
        }
        let _held = self.tables.lock(index as u64..index as u64 + 1).await;
        if let Some(table) = self.owned_table_at(index, cluster).await? {
            return Ok(table);
        }
        let old = self.l1.get(index).unwrap_or_default().table;
        let bytes = match old {
            Some(shared) => self.copy_table(shared).await?,
            None => vec![0; to_usize(self.geometry.cluster_size())],
        };
        let taken = self.take_clusters(1).await?;
        let Some((new, _)) = taken.clusters().next() else {
            unreachable!("one cluster was taken");
        };
        let at = self.geometry.host_start(new);
        // Rule 5: the table is fresh, so it is durable before the L1 entry is.
        self.allocator.add_table(new);
        self.l2.insert_fresh(at, &bytes);
        self.l1.set(index, at);
        let old = old.map(|old| self.geometry.host_cluster(old));
        self.unlink(Dropped::shared(old));
        Ok(at)
    }

    async fn owned_table_at(
        &self,
        index: usize,
        cluster: GuestCluster,
    ) -> Result<Option<HostOffset>> {
        let entry = self
            .l1
            .get(index)
            .map_err(|defect| self.broken_entry("L1", self.geometry.guest_start(cluster), defect));
        let entry = self.judge(entry).await?;
        Ok(entry.table.filter(|_| entry.copied))
    }

    /// The bytes of a whole L2 table, with every COPIED flag as it is.
    async fn copy_table(&self, table: HostOffset) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(to_usize(self.geometry.cluster_size()));
        let end = table.0 + self.geometry.cluster_size();
        for at in (table.0..end).step_by(to_usize(self.l2.slice_size())) {
            let slice = self.l2_slice(HostOffset(at)).await?;
            slice.read(|part| bytes.extend_from_slice(part));
        }
        Ok(bytes)
    }
}

/// Whether the new entry still refers to the old one's host cluster.
fn keeps_host(old: &L2Entry, plan: &ClusterPlan) -> bool {
    matches!(old, L2Entry::Plain(old) if old.host == plan.entry.host)
}

fn push_write(writes: &mut Vec<HostWrite>, at: HostOffset, buf: IoBuf) {
    let len = buf.len() as u64;
    match writes.last_mut() {
        Some(last) if last.at.checked_add(last.len) == Some(at) => {
            last.bufs.push(buf);
            last.len += len;
        }
        _ => writes.push(HostWrite {
            at,
            bufs: vec![buf],
            len,
        }),
    }
}
