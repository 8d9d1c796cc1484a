//! Giving an overlay another backing image without changing what the overlay reads.
//!
//! # Invariants
//!
//! 1. Where the overlay holds nothing and the old and the new backing image differ, the old one's bytes are written
//!    into the overlay. All of that is durable before the header names the new one: a power cut at any moment leaves
//!    an image with the same contents, on the old backing image or on the new one.
//! 2. What both backing images have from one layer, and what both know to be zeros, is not read.

use std::ops::Range;
use std::sync::Arc;

use super::extents::{Extent, Extents};
use super::lanes::Lanes;
use crate::error::{Context, Result};
use crate::image::Image;
use crate::progress::Progress;
use crate::storage::ZeroMode;
use crate::sys::{IoBuf, block_on};
use crate::units::GuestOffset;

/// What a lane compares at a time, in bytes.
const CHUNK: u64 = 1 << 20;
/// Pieces under way at the same time.
const LANES: usize = 8;
/// The least that is written at a time, in bytes.
const MIN_BLOCK: u64 = 4096;
/// The most that is written for one byte that differs, in bytes.
const MAX_BLOCK: u64 = 64 << 10;

/// Writes into `overlay`, durably, what it would read otherwise if `new` was its backing image, or nothing.
///
/// # Errors
/// What reading the backing images or writing the overlay fails with; the overlay reads the same still.
pub fn absorb_difference(
    overlay: &Arc<dyn Image>,
    new: Option<&Arc<dyn Image>>,
    progress: &Progress,
) -> Result<()> {
    let size = overlay.virtual_size();
    progress.expect(size);
    let granularity = u64::from(overlay.limits().discard_granularity);
    let job = Absorb {
        overlay,
        backings: [overlay.backing(), new],
        block: granularity.clamp(MIN_BLOCK, MAX_BLOCK),
        progress,
        plan: async_lock::Mutex::new(Plan {
            overlay: Extents::above(overlay, overlay.backing()),
            backings: [overlay.backing(), new].map(Side::new),
            at: 0,
            end: size,
        }),
        lanes: Lanes::default(),
    };
    job.lanes.run(LANES, || job.lane())?;
    block_on(overlay.close())
}

/// A backing image, old or new, and a walk over it.
struct Side {
    extents: Option<Extents>,
    size: u64,
}

/// What a backing image has for a range.
struct Has {
    /// None behind its end.
    extent: Option<Extent>,
    layer: Option<Arc<dyn Image>>,
    end: u64,
}

impl Side {
    fn new(image: Option<&Arc<dyn Image>>) -> Self {
        Self {
            extents: image.map(Extents::new),
            size: image.map_or(0, |image| image.virtual_size()),
        }
    }

    async fn look(&mut self, at: u64, end: u64) -> Result<Has> {
        let (Some(extents), true) = (&mut self.extents, at < self.size) else {
            return Ok(Has {
                extent: None,
                layer: None,
                end,
            });
        };
        let extent = extents.next(GuestOffset(at), end.min(self.size)).await?;
        Ok(Has {
            layer: extents.layer(&extent).cloned(),
            end: extent.end().0,
            extent: Some(extent),
        })
    }
}

impl Has {
    fn is_zero(&self) -> bool {
        self.extent.as_ref().is_none_or(Extent::is_zero)
    }

    /// Whether both are the same range of one image.
    fn is_same(&self, other: &Self) -> bool {
        let present = |has: &Self| has.extent.as_ref().is_some_and(Extent::is_present);
        present(self)
            && present(other)
            && matches!((&self.layer, &other.layer), (Some(a), Some(b)) if Arc::ptr_eq(a, b))
    }
}

/// A part that has to be compared.
struct Step {
    at: u64,
    len: u64,
    /// Whether the old and the new backing image have to be read; otherwise they have zeros.
    read: [bool; 2],
}

/// What is still to be handed out.
struct Plan {
    overlay: Extents,
    backings: [Side; 2],
    at: u64,
    end: u64,
}

impl Plan {
    async fn next(&mut self, progress: &Progress) -> Result<Option<Step>> {
        while self.at < self.end {
            let at = self.at;
            let held = self.overlay.next(GuestOffset(at), self.end).await?;
            let mut end = held.end().0;
            if held.is_present() {
                self.at = end;
                progress.advance(end - at);
                continue;
            }
            let [old, new] = &mut self.backings;
            let old = old.look(at, end).await?;
            let new = new.look(at, end).await?;
            end = end.min(old.end).min(new.end);
            let read = [!old.is_zero(), !new.is_zero()];
            if read == [false; 2] || old.is_same(&new) {
                self.at = end;
                progress.advance(end - at);
                continue;
            }
            end = end.min(at - at % CHUNK + CHUNK);
            self.at = end;
            let len = end - at;
            return Ok(Some(Step { at, len, read }));
        }
        Ok(None)
    }
}

struct Absorb<'a> {
    overlay: &'a Arc<dyn Image>,
    /// The old and the new one.
    backings: [Option<&'a Arc<dyn Image>>; 2],
    /// What is compared, and written, as a whole.
    block: u64,
    progress: &'a Progress,
    plan: async_lock::Mutex<Plan>,
    lanes: Lanes,
}

impl Absorb<'_> {
    async fn lane(&self) -> Result<()> {
        let size = in_memory(CHUNK);
        let bufs = [IoBuf::zeroed(size), IoBuf::zeroed(size)];
        let mut bytes = [vec![0; size], vec![0; size]];
        while !self.lanes.is_stopped() {
            let Some(step) = self.plan.lock().await.next(self.progress).await? else {
                break;
            };
            let len = in_memory(step.len);
            for (number, backing) in self.backings.into_iter().enumerate() {
                let part = bufs[number].slice(0..len);
                match backing {
                    Some(backing) if step.read[number] => {
                        let reading = backing.read(GuestOffset(step.at), part.clone());
                        reading.await.context(|| "reading a backing image")?;
                    }
                    _ => part.zero(0..len),
                }
                part.copy_to(0, &mut bytes[number][..len]);
            }
            let [old, new] = &bytes;
            for run in self.differences(step.at, &old[..len], &new[..len]) {
                self.write(step.at, run, &bufs[0]).await?;
            }
            self.progress.advance(step.len);
        }
        Ok(())
    }

    /// The runs of blocks that differ, each all zeros in the old backing image or none of it.
    fn differences(&self, at: u64, old: &[u8], new: &[u8]) -> Vec<Range<usize>> {
        let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
        let mut start = 0;
        while start < old.len() {
            let place = at + start as u64;
            let block_end = in_memory(place - place % self.block + self.block - at);
            let end = block_end.min(old.len());
            let block = &old[start..end];
            if block != &new[start..end] {
                let is_zero = block.iter().all(|byte| *byte == 0);
                match runs.last_mut() {
                    Some((last, zero)) if last.end == start && *zero == is_zero => last.end = end,
                    _ => runs.push((start..end, is_zero)),
                }
            }
            start = end;
        }
        runs.into_iter().map(|(run, _)| run).collect()
    }

    async fn write(&self, at: u64, run: Range<usize>, old: &IoBuf) -> Result<()> {
        let place = GuestOffset(at + run.start as u64);
        if old.is_zero(run.clone()) {
            let len = run.len() as u64;
            let zeroing = self.overlay.write_zeroes(place, len, ZeroMode::MayUnmap);
            return zeroing.await;
        }
        self.overlay.write(place, old.slice(run)).await
    }
}

fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("a chunk fits in memory")
}
