//! Writing compressed clusters: each wherever the one before ended, so that several share a host cluster (qcow2
//! specification, "Compressed Clusters Descriptor").
//!
//! ```text
//! host clusters   │ metadata │ A A A A B B C C C C C C C C C C │ C D D D            │
//! refcount        │     1    │                3               │    2               │
//!                                                                       ^ packed_to
//! ```
//!
//! Compressing itself is [`compress`](super::compressed::compress), which any thread may do before.
//!
//! # Invariants
//!
//! Numbers in brackets are those of the crash order in `qcow2::flush`.
//!
//! 1. A host cluster has one reference for each compressed cluster that has a byte in it, from before the byte is
//!    written.
//! 2. \[rules 2, 3\] The L2 entry changes only after the compressed data has been written.
//! 3. Nothing is packed into a host cluster about to be punched out of the file: `Allocator::stop_packing` comes
//!    before the look at its refcount (`qcow2::quarantine`).
//! 4. What `qcow2::write` says of holding clusters and of shared L2 tables holds here too.

use super::allocator::{Allocator, Answer, State};
use super::compressed::CompressedExtent;
use super::cow::references;
use super::engine::Qcow2;
use super::entry::L2Entry;
use super::geometry::to_usize;
use super::header::CompressionType;
use super::quarantine::Dropped;
use super::refcount;
use super::room::Taken;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::sys::IoBuf;
use crate::units::{GuestOffset, HostCluster, HostOffset};

impl Allocator {
    /// Finds a place for `len` bytes of compressed data, fewer than a cluster, and takes a reference to the host
    /// cluster in which others lie already. They may reach into `fresh`, which the caller has taken for them, or lie
    /// in it. `None`: it takes a fresh cluster.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a broken refcount table entry.
    fn try_pack(&self, len: u64, fresh: Option<HostCluster>) -> Result<Answer<Option<HostOffset>>> {
        let geometry = self.geometry;
        let mut state = self.lock();
        if let Some(at) = state.packed_to {
            let cluster = geometry.host_cluster(at);
            let room = geometry.cluster_size() - geometry.within_cluster(at.0);
            let goes_on = fresh.is_some() && fresh == cluster.checked_add(1);
            if len <= room || goes_on {
                match self.try_share(&state, cluster)? {
                    Answer::Known(true) => {
                        self.pack(&mut state, at, len);
                        return Ok(Answer::Known(Some(at)));
                    }
                    Answer::Known(false) => state.packed_to = None,
                    Answer::Load(slice) => return Ok(Answer::Load(slice)),
                    Answer::Grow => return Ok(Answer::Grow),
                }
            }
        }
        let at = fresh.map(|fresh| geometry.host_start(fresh));
        if let Some(at) = at {
            self.pack(&mut state, at, len);
        }
        Ok(Answer::Known(at))
    }

    fn pack(&self, state: &mut State, at: HostOffset, len: u64) {
        let end = at.0 + len;
        // A cluster that is not begun yet is not ours.
        let is_inside = self.geometry.within_cluster(end) != 0;
        state.packed_to = is_inside.then_some(HostOffset(end));
    }

    /// Adds a reference to a cluster in use; `false` if its refcount takes no more.
    fn try_share(&self, state: &State, cluster: HostCluster) -> Result<Answer<bool>> {
        let order = self.geometry.refcount_order();
        self.with_refcount(state, cluster, |slice, index| {
            self.blocks
                .update(slice, refcount::bytes_of(index, order), |bytes| {
                    let present = refcount::get(bytes, index, order);
                    let shared = present.checked_add(1);
                    let shared = shared.filter(|shared| *shared <= refcount::max(order));
                    if let Some(shared) = shared {
                        refcount::set(bytes, index, order, shared);
                    }
                    shared.is_some()
                })
        })
    }

    /// Puts no further compressed data into a cluster.
    pub(super) fn stop_packing(&self, cluster: HostCluster) {
        self.end_packing(&mut self.lock(), cluster);
    }

    /// As [`Allocator::stop_packing`], with the lock held.
    pub(super) fn end_packing(&self, state: &mut State, cluster: HostCluster) {
        state.packed_to = state
            .packed_to
            .filter(|at| self.geometry.host_cluster(*at) != cluster);
    }
}

impl Qcow2 {
    /// How this image's compressed clusters are compressed.
    #[must_use]
    pub fn compression_type(&self) -> CompressionType {
        self.compression_type
    }

    /// Bytes of a cluster: what is compressed as a whole.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// Makes `compressed` the contents of the cluster that begins at `at`: what
    /// [`compress`](super::compressed::compress) has made of all its bytes, zeros where it goes beyond the disk's
    /// end. Whatever the cluster held is given back. Other writes to it must not be under way.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an image with a data file, [`ErrorKind::OutOfBounds`] if that is not a cluster
    /// of the disk, or the data is not smaller than it; those of [`Image::write`].
    pub async fn write_compressed(&self, at: GuestOffset, compressed: IoBuf) -> Result<()> {
        if self.geometry.has_data_file() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: an image with a data file has no compressed clusters: leave -c out",
                    self.name()
                ),
            ));
        }
        let len = compressed.len() as u64;
        if self.geometry.within_cluster(at.0) != 0 || !(1..self.cluster_size()).contains(&len) {
            return Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "{}: {len} compressed bytes at {at} are no cluster's of {} bytes",
                    self.name(),
                    self.cluster_size()
                ),
            ));
        }
        let left = self.virtual_size.saturating_sub(at.0).max(1);
        self.change(at, left.min(self.cluster_size()), || {
            self.link_compressed(at, &compressed)
        })
        .await
    }

    async fn link_compressed(&self, at: GuestOffset, compressed: &IoBuf) -> Result<()> {
        let len = compressed.len() as u64;
        let cluster = self.geometry.guest_cluster(at);
        let _held = self.clusters.lock(cluster.0..cluster.0 + 1).await;
        let (slice, entry_offset) = self.own_slice(cluster).await?;
        let old = slice.read(|bytes| self.entry_in(bytes, entry_offset, at));
        let old = self.judge(old).await?;
        let extent = self.place_compressed(len).await?;
        self.decompressed.forget(extent);
        let new = L2Entry::Compressed(extent);
        let taken = Taken::references(references(&self.geometry, &new));
        let unless_dropped = self.reclaim_if_dropped(&taken);
        let compressed = self.grace.enter().held_by(compressed.clone());
        let written = self.storage.writev(extent.at, compressed).await;
        unless_dropped.settle();
        if let Err(error) = written {
            self.give_back(taken).await;
            return Err(error);
        }
        let end = entry_offset + to_usize(self.geometry.l2_entry_size());
        // Invariant 2.
        self.l2.update_links(&slice, entry_offset..end, |bytes| {
            self.store_entry(bytes, entry_offset, &new);
        });
        let mut dropped = Dropped::default();
        dropped.add(&self.geometry, &old);
        self.unlink(dropped);
        Ok(())
    }

    /// Takes room for `len` bytes of compressed data.
    ///
    /// # Errors
    /// The storage's, and the allocator's; nothing stays taken then.
    async fn place_compressed(&self, len: u64) -> Result<CompressedExtent> {
        // One after the other, so that none begins a cluster in which the one before has left room.
        let _turn = self.packing.lock().await;
        let at = match self.pack_into(len, None).await? {
            Some(at) => at,
            None => {
                let taken = self.take_clusters(1).await?;
                let fresh = taken.clusters().next().map(|(cluster, _)| cluster);
                match self.pack_into(len, fresh).await {
                    Ok(Some(at)) => at,
                    Ok(None) => unreachable!("a cluster was taken"),
                    Err(error) => {
                        self.give_back(taken).await;
                        return Err(error);
                    }
                }
            }
        };
        let extent = CompressedExtent::holding(at, len);
        if extent.encode(self.geometry.cluster_bits()).is_some() {
            return Ok(extent);
        }
        let taken = references(&self.geometry, &L2Entry::Compressed(extent));
        self.give_back(Taken::references(taken)).await;
        Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "{}: compressed data at {at:#x} is beyond what an entry can address: use smaller clusters",
                self.name()
            ),
        ))
    }

    async fn pack_into(&self, len: u64, fresh: Option<HostCluster>) -> Result<Option<HostOffset>> {
        loop {
            let answer = self.allocator.try_pack(len, fresh);
            match self.judge(answer).await? {
                Answer::Known(at) => return Ok(at),
                Answer::Load(slice) => drop(self.allocator.blocks.get(slice).await?),
                Answer::Grow => return Ok(None),
            }
        }
    }
}
