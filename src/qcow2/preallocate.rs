//! Preallocation: giving clusters their place before anything is written to them.
//!
//! # Invariants
//!
//! Numbers in brackets are those of the crash order in `qcow2::flush`.
//!
//! 1. The disk reads as before. So standard entries, which cannot have a place and show the backing image too, are
//!    refused where there is one; extended ones get a place in which no subcluster is allocated.
//! 2. \[rules 2, 3\] What a cluster's place holds reads as zeros before an entry leads to it, and the host file is
//!    long enough for it.
//! 3. What `qcow2::write` says of holding clusters, of shared L2 tables and of failures holds here too.

use std::ops::Range;

use super::data_file::Layout;
use super::engine::Qcow2;
use super::entry::{Cluster, L2Entry};
use super::geometry::to_usize;
use super::join::{Piece, join_all};
use super::room::Taken;
use super::zeros::zeros;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::ZeroMode;
use crate::sys::IoBuf;
use crate::units::{GuestCluster, GuestOffset, HostOffset};

/// Zeros are written in pieces of at most this many bytes.
const MAX_ZERO_WRITE: u64 = 1 << 20;

/// What a new image, or the new part of one, has ready before it is written to: `preallocation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The place of every cluster, in a file that is sparse there.
    Metadata,
    /// Its room on the host too, as far as the host can reserve it.
    Falloc,
    /// Its room, with zeros written to it.
    Full,
}

impl Preallocation {
    /// The one that options call `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        [Self::Off, Self::Metadata, Self::Falloc, Self::Full]
            .into_iter()
            .find(|known| known.name() == name)
    }

    /// The name that options use.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// A cluster that gets a place.
struct Placed {
    /// The entry's offset in its slice.
    entry_offset: usize,
    start: GuestOffset,
    entry: Cluster,
    /// Whether the place reads as zeros already, behind the host file's end.
    untouched: bool,
}

impl Qcow2 {
    /// Gives all clusters that the `len` bytes at `at` touch, and that have no place yet, one. Nobody else writes
    /// meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] where the entries would hide the backing image; those of
    /// [`Image::write`](crate::image::Image::write). What has got a place before a failure keeps it.
    pub async fn preallocate(
        &self,
        at: GuestOffset,
        len: u64,
        preallocation: Preallocation,
    ) -> Result<()> {
        if preallocation == Preallocation::Off || len == 0 {
            return Ok(());
        }
        if self.has_backing && !self.geometry.has_extended_l2() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                "preallocation would hide the backing image, unless the image has extended L2 entries: use \
                 extended_l2=on",
            ));
        }
        let end = at.0 + len;
        let mut start = at.0;
        while start < end {
            let here = GuestOffset(start);
            let part = self.slice_reach(here).min(end - start);
            self.change(here, part, || {
                self.preallocate_in_slice(start..start + part, preallocation)
            })
            .await?;
            start += part;
        }
        Ok(())
    }

    /// Gives clusters a place whose entries are all in one slice.
    async fn preallocate_in_slice(
        &self,
        range: Range<u64>,
        preallocation: Preallocation,
    ) -> Result<()> {
        let size = self.geometry.cluster_size();
        let clusters = range.start / size..range.end.div_ceil(size);
        let _held = self.clusters.lock(clusters.clone()).await;
        let (slice, first_entry) = self.own_slice(GuestCluster(clusters.start)).await?;
        let homeless = slice.read(|bytes| self.find_homeless(bytes, first_entry, clusters));
        let mut placed = self.judge(homeless).await?;
        let taken = if self.geometry.has_data_file() {
            for new in &mut placed {
                new.entry.host = Some(HostOffset(new.start.0));
            }
            Taken::default()
        } else {
            let taken = self.take_clusters(placed.len() as u64).await?;
            for (new, (cluster, untouched)) in placed.iter_mut().zip(taken.clusters()) {
                new.entry.host = Some(self.geometry.host_start(cluster));
                new.untouched = untouched;
            }
            taken
        };
        // Invariant 2.
        let unless_dropped = self.reclaim_if_dropped(&taken);
        let prepared = self.prepare_room(&placed, preallocation).await;
        unless_dropped.settle();
        if let Err(error) = prepared {
            self.give_back(taken).await;
            return Err(error);
        }
        if let (Some(first), Some(last)) = (placed.first(), placed.last()) {
            let end = last.entry_offset + to_usize(self.geometry.l2_entry_size());
            self.l2
                .update_links(&slice, first.entry_offset..end, |bytes| {
                    for new in &placed {
                        self.store_entry(bytes, new.entry_offset, &L2Entry::Plain(new.entry));
                    }
                });
        }
        Ok(())
    }

    /// The clusters without a place, with the entries that they will have.
    fn find_homeless(
        &self,
        slice: &[u8],
        first_entry: usize,
        clusters: Range<u64>,
    ) -> Result<Vec<Placed>> {
        let mut homeless = Vec::new();
        let mut entry_offset = first_entry;
        for cluster in clusters.map(GuestCluster) {
            let start = self.geometry.guest_start(cluster);
            let old = self.entry_in(slice, entry_offset, start)?;
            if let L2Entry::Plain(old @ Cluster { host: None, .. }) = old {
                homeless.push(Placed {
                    entry_offset,
                    start,
                    untouched: false,
                    entry: Cluster {
                        copied: true,
                        allocated: self.readable_at_once() & !old.zero,
                        ..old
                    },
                });
            }
            entry_offset += to_usize(self.geometry.l2_entry_size());
        }
        Ok(homeless)
    }

    /// The subclusters of a preallocated cluster that are read from it from the beginning: of extended entries none
    /// (invariant 1), but for a raw data file, which others may write to.
    fn readable_at_once(&self) -> u32 {
        if self.geometry.has_extended_l2() && self.data_layout() != Some(Layout::Raw) {
            0
        } else {
            self.geometry.full_mask()
        }
    }

    /// Makes the places of clusters read as zeros, with as much room as is asked for.
    async fn prepare_room(&self, placed: &[Placed], preallocation: Preallocation) -> Result<()> {
        let zero_all = |runs: Vec<Range<u64>>, mode| {
            join_all(runs.into_iter().map(move |run| -> Piece<'_> {
                let len = run.end - run.start;
                self.data().write_zeroes(HostOffset(run.start), len, mode)
            }))
        };
        match preallocation {
            Preallocation::Off => Ok(()),
            Preallocation::Metadata => {
                let touched = self.runs_of(placed.iter().filter(|new| !new.untouched));
                zero_all(touched, ZeroMode::MayUnmap).await?;
                let end = self.runs_of(placed.iter()).into_iter().map(|run| run.end);
                match end.max() {
                    Some(end) if end > self.data().len() => self.data().set_len(end).await,
                    _ => Ok(()),
                }
            }
            Preallocation::Falloc => {
                zero_all(self.runs_of(placed.iter()), ZeroMode::KeepAllocated).await
            }
            Preallocation::Full => {
                let pieces = self.runs_of(placed.iter()).into_iter().flat_map(pieces_of);
                join_all(pieces.map(|(at, zeros)| self.data().writev(at, zeros))).await
            }
        }
    }

    /// Where clusters lie on the host, contiguous ones as one range.
    fn runs_of<'a>(&self, placed: impl Iterator<Item = &'a Placed>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for host in placed.filter_map(|new| new.entry.host) {
            let cluster = host.0..host.0 + self.geometry.cluster_size();
            let cluster = self.writable_part(cluster);
            match runs.last_mut() {
                Some(last) if last.end == cluster.start => last.end = cluster.end,
                _ => runs.push(cluster),
            }
        }
        runs
    }
}

/// Zeros to be written to every byte of a range.
fn pieces_of(range: Range<u64>) -> impl Iterator<Item = (HostOffset, IoBuf)> {
    let end = range.end;
    range.step_by(to_usize(MAX_ZERO_WRITE)).map(move |at| {
        (
            HostOffset(at),
            zeros(to_usize(MAX_ZERO_WRITE.min(end - at))),
        )
    })
}
