//! Comparing two disks: what both know to be zeros, and what both have from one place, is not read.
//!
//! # Invariants
//!
//! 1. The difference that is told is the first one, whatever lane finds one first: parts that lie before it are
//!    compared to their end.
//! 2. Memory is bounded: every lane has two buffers of [`CHUNK`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::extents::{Extent, Extents};
use super::lanes::Lanes;
use crate::error::Result;
use crate::image::Image;
use crate::progress::Progress;
use crate::sys::IoBuf;
use crate::units::{GuestOffset, SECTOR_SIZE};

/// What a lane reads of each disk at a time, in bytes.
const CHUNK: u64 = 1 << 20;
/// Pieces under way at the same time.
const LANES: usize = 8;

/// What counts as a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Other bytes; where one disk has ended, other bytes than zeros.
    Contents,
    /// Another way to hold the same bytes, too.
    Allocation,
}

/// The first difference of two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// In the sector that begins there.
    Contents(GuestOffset),
    /// In how the bytes there are held.
    Allocation(GuestOffset),
}

/// A step of the comparison that failed, and which.
#[derive(Debug)]
pub enum Failure {
    /// Asking what a disk holds.
    Allocation(crate::error::Error),
    /// Reading it.
    Read(crate::error::Error),
}

/// Compares two disks; the shorter one goes on with zeros. `None` if they do not differ.
///
/// # Errors
/// What asking and reading the disks fails with.
pub fn compare(
    disks: [&Arc<dyn Image>; 2],
    strictness: Strictness,
    progress: &Progress,
) -> Result<Option<Difference>, Failure> {
    let end = disks.map(|disk| disk.virtual_size()).into_iter().max();
    let end = end.unwrap_or(0);
    progress.expect(end);
    let job = Compare {
        disks,
        strictness,
        progress,
        plan: async_lock::Mutex::new(Plan {
            sides: disks.map(|disk| Side {
                extents: Extents::new(disk),
                size: disk.virtual_size(),
            }),
            at: 0,
            end,
        }),
        contents_differ: AtomicU64::new(u64::MAX),
        allocation_differs: AtomicU64::new(u64::MAX),
        asking_failed: std::sync::atomic::AtomicBool::new(false),
        lanes: Lanes::default(),
    };
    if let Err(error) = job.lanes.run(LANES, || job.lane()) {
        return Err(if job.asking_failed.into_inner() {
            Failure::Allocation(error)
        } else {
            Failure::Read(error)
        });
    }
    let contents = job.contents_differ.into_inner();
    let allocation = job.allocation_differs.into_inner();
    Ok(match contents.min(allocation) {
        u64::MAX => None,
        at if allocation <= contents => Some(Difference::Allocation(GuestOffset(at))),
        at => Some(Difference::Contents(GuestOffset(at))),
    })
}

/// One of the disks, and a walk over it.
struct Side {
    extents: Extents,
    size: u64,
}

/// What a disk holds of a range.
struct Held {
    extent: Extent,
    layer: Option<Arc<dyn Image>>,
}

impl Side {
    /// What the disk holds at `at`; `None` behind its end.
    async fn look(&mut self, at: u64, end: u64) -> Result<Option<Held>> {
        if at >= self.size {
            return Ok(None);
        }
        let extent = self
            .extents
            .next(GuestOffset(at), end.min(self.size))
            .await?;
        let layer = self.extents.layer(&extent).cloned();
        Ok(Some(Held { extent, layer }))
    }
}

impl Held {
    /// Whether both are the same range of one image.
    fn is_same(&self, other: &Self) -> bool {
        self.extent.is_present()
            && other.extent.is_present()
            && matches!((&self.layer, &other.layer), (Some(a), Some(b)) if Arc::ptr_eq(a, b))
    }

    /// How the bytes are held, as far as that is to be the same in a strict comparison.
    fn manner(&self) -> [bool; 4] {
        let extent = &self.extent;
        [
            extent.is_present(),
            extent.is_zero(),
            extent.is_data(),
            extent.host_offset().is_some(),
        ]
    }
}

/// A part that has to be read.
#[derive(Clone, Copy, Debug)]
struct Step {
    at: u64,
    len: u64,
    /// Which of the disks; one that is known to read as zeros is not.
    read: [bool; 2],
}

/// What is still to be handed out.
struct Plan {
    sides: [Side; 2],
    at: u64,
    end: u64,
}

struct Compare<'a> {
    disks: [&'a Arc<dyn Image>; 2],
    strictness: Strictness,
    progress: &'a Progress,
    plan: async_lock::Mutex<Plan>,
    /// The first sector known to differ.
    contents_differ: AtomicU64,
    /// Where allocation is known to differ.
    allocation_differs: AtomicU64,
    asking_failed: std::sync::atomic::AtomicBool,
    lanes: Lanes,
}

impl Compare<'_> {
    /// Where the parts end that have still to be looked at.
    fn end(&self, plan: &Plan) -> u64 {
        let contents = self.contents_differ.load(Ordering::SeqCst);
        let allocation = self.allocation_differs.load(Ordering::SeqCst);
        plan.end.min(contents).min(allocation)
    }

    /// The next part that has to be read.
    async fn next(&self, plan: &mut Plan) -> Result<Option<Step>> {
        while plan.at < self.end(plan) {
            let at = plan.at;
            let [a, b] = &mut plan.sides;
            let a = a.look(at, plan.end).await?;
            let b = b.look(at, plan.end).await?;
            let len = [&a, &b].into_iter().flatten();
            let len = len
                .map(|held| held.extent.len)
                .min()
                .unwrap_or(plan.end - at);
            if self.strictness == Strictness::Allocation
                && let (Some(a), Some(b)) = (&a, &b)
                && a.manner() != b.manner()
            {
                self.allocation_differs.fetch_min(at, Ordering::SeqCst);
                return Ok(None);
            }
            let is_same = matches!((&a, &b), (Some(a), Some(b)) if a.is_same(b));
            let has_bytes = |held: Option<Held>| held.is_some_and(|held| !held.extent.is_zero());
            let read = [has_bytes(a), has_bytes(b)];
            if is_same || read == [false; 2] {
                plan.at += len;
                self.progress.advance(len);
                continue;
            }
            let len = len.min(CHUNK - at % CHUNK);
            plan.at += len;
            return Ok(Some(Step { at, len, read }));
        }
        Ok(None)
    }

    async fn lane(&self) -> Result<()> {
        let size = usize::try_from(CHUNK).expect("a chunk fits in memory");
        let bufs = [IoBuf::zeroed(size), IoBuf::zeroed(size)];
        let mut bytes = [vec![0; size], vec![0; size]];
        while !self.lanes.is_stopped() {
            let next = {
                let mut plan = self.plan.lock().await;
                self.next(&mut plan).await
            };
            let step = match next {
                Ok(Some(step)) => step,
                Ok(None) => break,
                Err(error) => {
                    self.asking_failed.store(true, Ordering::SeqCst);
                    return Err(error);
                }
            };
            if let Some(at) = self.first_difference(&step, &bufs, &mut bytes).await? {
                self.contents_differ.fetch_min(at, Ordering::SeqCst);
            }
            self.progress.advance(step.len);
        }
        Ok(())
    }

    /// The first sector of a part that differs; `bytes` is room to look at what has been read.
    async fn first_difference(
        &self,
        step: &Step,
        bufs: &[IoBuf; 2],
        bytes: &mut [Vec<u8>; 2],
    ) -> Result<Option<u64>> {
        let len = usize::try_from(step.len).expect("a chunk fits in memory");
        for (number, disk) in self.disks.into_iter().enumerate() {
            let bytes = &mut bytes[number][..len];
            if step.read[number] {
                let part = bufs[number].slice(0..len);
                disk.read(GuestOffset(step.at), part.clone()).await?;
                part.copy_to(0, bytes);
            } else {
                bytes.fill(0);
            }
        }
        let [a, b] = bytes;
        if a[..len] == b[..len] {
            return Ok(None);
        }
        let sector = usize::try_from(SECTOR_SIZE).expect("a sector is small");
        let mut sectors = a[..len].chunks(sector).zip(b[..len].chunks(sector));
        let differs = sectors.position(|(a, b)| a != b);
        Ok(differs.map(|number| step.at + number as u64 * SECTOR_SIZE))
    }
}
