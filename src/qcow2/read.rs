//! Reading: a request is cut into runs that are one thing each, and these are read at the same time.

use std::sync::Arc;

use smallvec::SmallVec;

use super::engine::Qcow2;
use super::geometry::to_usize;
use super::join::{Piece, join_all};
use super::mapping::ReadMapping;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Image;
use crate::sys::IoBuf;
use crate::units::GuestOffset;

impl Qcow2 {
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] if the range leaves the disk.
    pub(super) fn check_bounds(&self, at: GuestOffset, len: u64) -> Result<()> {
        if at
            .checked_add(len)
            .is_some_and(|end| end.0 <= self.virtual_size)
        {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfBounds,
            format!(
                "{}: {len} bytes at {at} leave the disk of {} bytes",
                self.storage.name(),
                self.virtual_size
            ),
        ))
    }

    /// Fills `buf` with the bytes at `at`, which lie inside the disk.
    ///
    /// # Errors
    /// The storage's and the backing image's; [`ErrorKind::Corrupt`] for metadata that makes no sense.
    pub(super) async fn read_range(&self, at: GuestOffset, buf: &IoBuf) -> Result<()> {
        let in_flight = self.grace.enter();
        let buf = in_flight.held_by(buf.clone());
        // All is looked up before anything is read, so that a failed lookup leaves no I/O behind.
        let mut runs: SmallVec<[(GuestOffset, ReadMapping, IoBuf); 4]> = SmallVec::new();
        let mut done = 0;
        while done < buf.len() {
            let start = GuestOffset(at.0 + done as u64);
            let (mapping, len) = self.find_read_run(start, (buf.len() - done) as u64).await?;
            runs.push((start, mapping, buf.slice(done..done + to_usize(len))));
            done += to_usize(len);
        }
        let pieces = runs
            .into_iter()
            .map(|(start, mapping, part)| self.read_run(start, mapping, part));
        join_all(pieces).await
    }

    fn read_run(&self, at: GuestOffset, mapping: ReadMapping, buf: IoBuf) -> Piece<'_> {
        match mapping {
            ReadMapping::Data(host) => self.data().readv(host, buf),
            ReadMapping::Unallocated => Piece::boxed(self.read_backing(at, buf)),
            ReadMapping::Zero => {
                buf.zero(0..buf.len());
                Piece::ready(Ok(()))
            }
            ReadMapping::Compressed(extent) => {
                let within = to_usize(self.geometry.within_cluster(at.0));
                Piece::boxed(self.read_part_of_compressed(extent, within, buf))
            }
        }
    }

    /// What the bytes at `at` are, joined across slices and tables.
    async fn find_read_run(&self, at: GuestOffset, len: u64) -> Result<(ReadMapping, u64)> {
        let (mapping, mut run) = self.find_read(at, len).await?;
        while run < len {
            let (next, next_run) = self.find_read(GuestOffset(at.0 + run), len - run).await?;
            if !mapping.continues(run, next) {
                break;
            }
            run += next_run;
        }
        Ok((mapping, run))
    }

    /// Fills `buf` with what the backing image has at `at`; zeros where there is none, where it ends, and behind
    /// the end of this disk, where a longer backing must not show.
    ///
    /// # Errors
    /// The backing image's.
    pub(super) async fn read_backing(&self, at: GuestOffset, buf: IoBuf) -> Result<()> {
        let backed = self.backed_len(at, buf.len());
        buf.zero(backed..buf.len());
        match &self.backing {
            Some(backing) if backed > 0 => backing
                .read(at, buf.slice(0..backed))
                .await
                .context(|| format!("reading the backing image of {}", self.storage.name())),
            _ => Ok(()),
        }
    }

    /// How many of `len` bytes at `at` the backing image has.
    pub(super) fn backed_len(&self, at: GuestOffset, len: usize) -> usize {
        let size = self
            .backing
            .as_ref()
            .map_or(0, |backing: &Arc<dyn Image>| backing.virtual_size());
        let end = size.min(self.virtual_size);
        usize::try_from(end.saturating_sub(at.0)).map_or(len, |backed| backed.min(len))
    }
}
