//! Bringing another header into force so that a power cut leaves the old one or the new one.
//!
//! ```text
//! in force  ├─ fields, extensions, end mark ─┼──────────────┼─ name ─┤
//! first     ├────────────────────────────────┼─ new parts ──┼────────┤    where the header in force does not look
//! barrier, then one sector: what of the header in force changes, and whatever else is in that sector
//! ```
//!
//! # Invariants
//!
//! 1. Of the bytes that the header in force consists of, a step changes those in one sector, and those last.
//! 2. Where that does not do, steps come before that say the same otherwise, such as the backing file name in another
//!    place. If that does not do either, nothing is written.

use std::ops::Range;

use super::header::Header;
use super::header_extension::PREFIX;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::{HostOffset, SECTOR_SIZE};

/// The writes that bring a header into force.
#[derive(Debug)]
pub(super) struct Switch {
    steps: Vec<Step>,
}

/// Invariant 1.
#[derive(Debug)]
struct Step {
    /// Where nothing is in force yet.
    first: Vec<(usize, Vec<u8>)>,
    /// One sector.
    last: Option<(usize, Vec<u8>)>,
}

/// A header, and the first cluster with it.
#[derive(Clone, Debug)]
struct State {
    header: Header,
    cluster: Vec<u8>,
}

impl Switch {
    /// The first of these ways from the header in force in `storage` that can be gone; each is the headers to bring
    /// into force, and all but the last say the same as the one in force.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if the last header does not fit the first cluster, or there is no way; the
    /// storage's.
    pub(super) async fn plan(
        storage: &dyn Storage,
        in_force: Header,
        ways: &[Vec<Header>],
    ) -> Result<Self> {
        let cluster = IoBuf::zeroed(1 << in_force.cluster_bits);
        storage.readv(HostOffset(0), cluster.clone()).await?;
        let in_force = State {
            header: in_force,
            cluster: cluster.to_vec(),
        };
        for way in ways {
            if let Some(last) = way.last() {
                last.clone().encode()?;
            }
            if let Some(steps) = in_force.go(way)? {
                return Ok(Self { steps });
            }
        }
        Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "the first cluster, of {} bytes, has no room for the new header beside the old one, and a power cut \
                 could leave neither: give the backing file a shorter name, or make a copy with larger clusters, with \
                 `seethrough convert -o cluster_size=64k`",
                in_force.cluster.len()
            ),
        ))
    }

    /// Writes, and returns when all is durable.
    ///
    /// # Errors
    /// The storage's; the old header is in force then, or the new one.
    pub(super) async fn run(self, storage: &dyn Storage) -> Result<()> {
        for Step { first, last } in self.steps {
            for (at, bytes) in &first {
                write(storage, *at, bytes).await?;
            }
            storage.flush().await?;
            if let Some((at, bytes)) = last {
                put(storage, at, &bytes).await?;
            }
        }
        Ok(())
    }
}

impl State {
    /// The steps along a way, if it can be gone.
    fn go(&self, way: &[Header]) -> Result<Option<Vec<Step>>> {
        let mut at = self.clone();
        let mut steps = Vec::new();
        for header in way {
            let Some((more, next)) = at.hop(header)? else {
                return Ok(None);
            };
            steps.extend(more);
            at = next;
        }
        Ok(Some(steps))
    }

    /// The step that brings `header` into force, and before it, if need be, the one that moves the name.
    fn hop(&self, header: &Header) -> Result<Option<(Vec<Step>, Self)>> {
        if let Some((step, next)) = self.steps_to(header)?.into_iter().next() {
            return Ok(Some((vec![step], next)));
        }
        for (first, moved) in self.steps_to(&self.header)? {
            if let Some((second, next)) = moved.steps_to(header)?.into_iter().next() {
                return Ok(Some((vec![first, second], next)));
            }
        }
        Ok(None)
    }

    /// The steps that bring `new` into force, each with the name in another place, and what there is then.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for an extension that is too long.
    fn steps_to(&self, new: &Header) -> Result<Vec<(Step, Self)>> {
        let mut steps = Vec::new();
        for at in self.places_for_name(new) {
            let mut header = new.clone();
            header.backing_file_offset = at.unwrap_or(0) as u64;
            let mut cluster = self.cluster.clone();
            let mut list = header.encode_fields();
            list.extend(header.additional_fields.get(8..).unwrap_or_default());
            header.extensions.encode(&mut list)?;
            let name = header
                .backing_file
                .iter()
                .map(|name| name.as_encoded_bytes());
            let parts = [(0, &*list)].into_iter().chain(at.into_iter().zip(name));
            for (at, part) in parts {
                if let Some(place) = cluster.get_mut(at..at + part.len()) {
                    place.copy_from_slice(part);
                }
            }
            let next = Self { header, cluster };
            if let Some(step) = self.step_to(&next) {
                steps.push((step, next));
            }
        }
        Ok(steps)
    }

    /// Where the name of `new` may lie, if it has one.
    fn places_for_name(&self, new: &Header) -> Vec<Option<usize>> {
        let Some(name) = new.backing_file.as_ref().filter(|name| !name.is_empty()) else {
            return vec![None];
        };
        let old = self.name();
        let has_same = self.header.backing_file.as_ref() == Some(name);
        let list_end = list_end(new);
        let room = list_end..=self.cluster.len().saturating_sub(name.len());
        let places = [old.start, list_end, old.end.max(list_end), *room.end()];
        let places = places.into_iter().skip(usize::from(!has_same));
        places.filter(|at| room.contains(at)).map(Some).collect()
    }

    /// The bytes of the name, none at the end of the cluster if there is none.
    fn name(&self) -> Range<usize> {
        let end = self.cluster.len();
        let offset = usize::try_from(self.header.backing_file_offset).unwrap_or(end);
        match &self.header.backing_file {
            Some(name) if offset > 0 => offset..(offset + name.len()).min(end),
            _ => end..end,
        }
    }

    /// Whether the header in force looks at this byte.
    fn is_in_force(&self, at: usize) -> bool {
        at < list_end(&self.header) || self.name().contains(&at)
    }

    /// `None` if more than one sector in force would have to change.
    fn step_to(&self, next: &Self) -> Option<Step> {
        let mut step = Step {
            first: Vec::new(),
            last: None,
        };
        let size = usize::try_from(SECTOR_SIZE).ok()?;
        let sectors = self.cluster.chunks(size).zip(next.cluster.chunks(size));
        for (number, (old, new)) in sectors.enumerate() {
            let at = number * size;
            let mut changed = old
                .iter()
                .zip(new)
                .enumerate()
                .filter(|(_, (old, new))| old != new);
            if changed.clone().any(|(byte, _)| self.is_in_force(at + byte)) {
                if step.last.replace((at, new.to_vec())).is_some() {
                    return None;
                }
            } else if changed.next().is_some() {
                step.first.push((at, new.to_vec()));
            }
        }
        Some(step)
    }
}

/// Where the extensions end, and with them the mark of their end.
fn list_end(header: &Header) -> usize {
    header.header_length() + header.extensions.encoded_len() + PREFIX
}

async fn write(storage: &dyn Storage, at: usize, bytes: &[u8]) -> Result<()> {
    let at = HostOffset(at as u64);
    storage.writev(at, IoBuf::from_bytes(bytes)).await
}

/// Writes and makes durable.
pub(super) async fn put(storage: &dyn Storage, at: usize, bytes: &[u8]) -> Result<()> {
    write(storage, at, bytes).await?;
    storage.flush().await
}
