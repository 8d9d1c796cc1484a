//! Write-zeroes and discard: changes of entries where whole subclusters are concerned, written zeros elsewhere.
//!
//! # Invariants
//!
//! 1. Nothing but the range reads differently afterwards; what surrounds it in its first and last subcluster stays.
//! 2. A discarded or zeroed range never shows the backing image again: where the format has no zero flag (version
//!    2), zeros are written instead, and a discard is ignored.
//! 3. A host cluster without allocated subclusters is freed, unless its room was asked to stay.
//! 4. A raw external data file is zeroed itself, and no entry changes (`qcow2::data_file`).
//! 5. What `qcow2::write` says of holding clusters and of shared L2 tables holds here too.

use std::ops::Range;

use super::data_file::Layout;
use super::engine::Qcow2;
use super::entry::{Cluster, L2Entry};
use super::geometry::to_usize;
use super::mapping::{Place, ReadMapping};
use super::quarantine::Dropped;
use super::zeros::zeros;
use crate::error::Result;
use crate::storage::ZeroMode;
use crate::units::{GuestCluster, GuestOffset};

/// Zeros are written in pieces of at most this many bytes.
const MAX_ZERO_WRITE: u64 = 1 << 20;

/// What is forgotten between two looks at how much metadata is dirty, in bytes.
const FORGET_CHUNK: u64 = 1 << 30;

/// Why a range is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clearing {
    /// It has to read as zeros.
    Zero(ZeroMode),
    /// It is no longer needed.
    Discard,
    /// The backing image has it, too.
    Forget,
}

/// What clearing does to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cleared {
    /// It stays.
    Unchanged,
    /// It becomes this one.
    Becomes(Cluster),
    /// Entries cannot say it: zeros have to be written.
    NeedsWrite,
}

impl Qcow2 {
    /// Makes a range inside the disk read as zeros.
    ///
    /// # Errors
    /// As [`Qcow2::write_range`].
    pub(super) async fn zero_range(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Result<()> {
        if self.data_layout() == Some(Layout::Raw) {
            return self.zero_raw(at, len, mode).await;
        }
        let range = at.0..at.0 + len;
        let whole = self.whole_subclusters(&range);
        if whole.is_empty() || !(self.geometry.has_zero_flag() || self.can_unallocate(mode)) {
            return self.write_zeros_where_needed(range).await;
        }
        self.write_zeros_where_needed(range.start..whole.start)
            .await?;
        self.clear(whole.clone(), Clearing::Zero(mode)).await?;
        self.write_zeros_where_needed(whole.end..range.end.max(whole.end))
            .await
    }

    /// Gives the room of a range inside the disk back, as far as whole subclusters go.
    ///
    /// # Errors
    /// As [`Qcow2::write_range`].
    pub(super) async fn discard_range(&self, at: GuestOffset, len: u64) -> Result<()> {
        if self.data_layout() == Some(Layout::Raw) {
            return self.zero_raw(at, len, ZeroMode::MayUnmap).await;
        }
        // Invariant 2.
        if !self.geometry.has_zero_flag() && self.has_backing {
            return Ok(());
        }
        self.clear(
            self.whole_subclusters(&(at.0..at.0 + len)),
            Clearing::Discard,
        )
        .await
    }

    /// Gives back all that the disk holds itself, so that it reads as its backing image does everywhere, or as zeros
    /// if there is none. What internal snapshots hold stays.
    ///
    /// # Errors
    /// As [`Image::write`](crate::image::Image::write).
    pub async fn forget_all(&self) -> Result<()> {
        let mut at = 0;
        while at < self.virtual_size {
            let end = at.saturating_add(FORGET_CHUNK).min(self.virtual_size);
            let range = self.whole_subclusters(&(at..end));
            self.change(GuestOffset(at), end - at, || {
                self.clear(range.clone(), Clearing::Forget)
            })
            .await?;
            at = end;
        }
        Ok(())
    }

    /// Whether unallocated clusters read as zeros and room may go.
    fn can_unallocate(&self, mode: ZeroMode) -> bool {
        !self.has_backing && mode == ZeroMode::MayUnmap
    }

    /// The whole subclusters in a range; one that the disk's end cuts short counts as whole.
    fn whole_subclusters(&self, range: &Range<u64>) -> Range<u64> {
        let size = self.geometry.subcluster_size();
        let start = range.start.next_multiple_of(size);
        let end = if range.end == self.virtual_size {
            range.end.next_multiple_of(size)
        } else {
            range.end - range.end % size
        };
        start..end.max(start)
    }

    /// Writes zeros wherever the range does not read as zeros already.
    async fn write_zeros_where_needed(&self, range: Range<u64>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (mapping, run) = self.find_read(GuestOffset(at), range.end - at).await?;
            let len = run.min(MAX_ZERO_WRITE);
            let is_zero = match mapping {
                ReadMapping::Zero => true,
                ReadMapping::Unallocated => !self.has_backing,
                ReadMapping::Data(_) | ReadMapping::Compressed(_) => false,
            };
            if !is_zero {
                self.write_range(GuestOffset(at), &zeros(to_usize(len)))
                    .await?;
            }
            at += len;
        }
        Ok(())
    }

    /// Clears whole subclusters, slice by slice.
    async fn clear(&self, range: Range<u64>, clearing: Clearing) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let start = GuestOffset(at);
            let place = self.place(start);
            let hides_nothing = !self.has_backing || clearing == Clearing::Forget;
            let len = match self.judge(place).await? {
                // Nothing to free, and nothing to hide.
                Place::NoTable(reach) if hides_nothing => reach.min(range.end - at),
                _ => {
                    let len = self.slice_reach(start).min(range.end - at);
                    self.clear_in_slice(at..at + len, clearing).await?;
                    len
                }
            };
            at += len;
        }
        Ok(())
    }

    /// Clears whole subclusters whose entries are all in one slice.
    async fn clear_in_slice(&self, range: Range<u64>, clearing: Clearing) -> Result<()> {
        let size = self.geometry.cluster_size();
        let clusters = range.start / size..range.end.div_ceil(size);
        let mut to_write = Vec::new();
        {
            let held = self.clusters.lock(clusters.clone()).await;
            let (slice, first_entry) = self.own_slice(GuestCluster(clusters.start)).await?;
            let planned = slice.read(|bytes| {
                let mut changes = Vec::new();
                let mut entry_offset = first_entry;
                for cluster in clusters {
                    let start = cluster * size;
                    let within =
                        range.start.max(start) - start..range.end.min(start + size) - start;
                    let old = self.entry_in(bytes, entry_offset, GuestOffset(start))?;
                    match self.cleared(old, self.geometry.mask_inside(&within), clearing) {
                        Cleared::Unchanged => {}
                        Cleared::Becomes(new) => changes.push((entry_offset, old, new)),
                        Cleared::NeedsWrite => {
                            to_write.push(start + within.start..start + within.end);
                        }
                    }
                    entry_offset += to_usize(self.geometry.l2_entry_size());
                }
                Ok(changes)
            });
            let changes = self.judge(planned).await?;
            let freed = changes.iter().filter_map(|(_, old, new)| match old {
                L2Entry::Plain(Cluster {
                    host: Some(host), ..
                }) if new.host.is_none() => Some(host.0..host.0 + size),
                _ => None,
            });
            self.free_in_data_file(freed).await;
            if let (Some(first), Some(last)) = (changes.first(), changes.last()) {
                let end = last.0 + to_usize(self.geometry.l2_entry_size());
                let mut dropped = Dropped::default();
                self.l2.update(&slice, first.0..end, |bytes| {
                    for (entry_offset, old, new) in &changes {
                        self.store_entry(bytes, *entry_offset, &L2Entry::Plain(*new));
                        if new.host.is_none() {
                            dropped.add(&self.geometry, old);
                        }
                    }
                });
                self.unlink(dropped);
            }
            drop(held);
        }
        for range in to_write {
            self.write_zeros_where_needed(range.start..range.end.min(self.virtual_size))
                .await?;
        }
        Ok(())
    }

    /// What an entry becomes when the subclusters in `mask` are cleared.
    fn cleared(&self, old: L2Entry, mask: u32, clearing: Clearing) -> Cleared {
        let old = match old {
            L2Entry::Plain(cluster) => cluster,
            L2Entry::Compressed(_) if mask == self.geometry.full_mask() => Cluster {
                allocated: mask,
                ..Cluster::default()
            },
            L2Entry::Compressed(_) if clearing == Clearing::Discard => return Cleared::Unchanged,
            L2Entry::Compressed(_) => return Cleared::NeedsWrite,
        };
        let reads_zero = match clearing {
            Clearing::Forget => 0,
            _ if !self.geometry.has_zero_flag() => 0,
            _ if self.has_backing => mask,
            // Without a backing image, what is not allocated reads as zeros anyway.
            Clearing::Zero(_) => mask & (old.allocated | old.zero),
            Clearing::Discard => 0,
        };
        let allocated = old.allocated & !mask;
        let zero = old.zero & !mask | reads_zero;
        let room_stays = clearing == Clearing::Zero(ZeroMode::KeepAllocated)
            && old.copied
            && zero & mask == mask;
        let host = old.host.filter(|_| allocated != 0 || room_stays);
        let new = Cluster {
            host,
            copied: host.is_some() && old.copied,
            allocated,
            zero,
        };
        if new == old {
            Cleared::Unchanged
        } else {
            Cleared::Becomes(new)
        }
    }
}
