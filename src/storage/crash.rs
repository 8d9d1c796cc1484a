//! A storage in memory that remembers what a power cut could lose, for tests of crash order.
//!
//! It keeps every change with the moment at which it began, completed and became durable. From that it makes up
//! what a disk may hold after a power cut at any moment: every durable change, and of the others any subset, each
//! whole, absent or torn at sectors.
//!
//! ```
//! # use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Storage};
//! # use seethrough::sys::{block_on, IoBuf};
//! # use seethrough::units::HostOffset;
//! let storage = CrashStorage::new(vec![0; 1024], Delays::none());
//! let acknowledged = block_on(async {
//!     storage.writev(HostOffset(0), IoBuf::from_bytes(b"first")).await?;
//!     storage.flush().await?;
//!     let acknowledged = storage.now();
//!     storage.writev(HostOffset(512), IoBuf::from_bytes(b"second")).await?;
//!     Ok::<_, seethrough::error::Error>(acknowledged)
//! })
//! .unwrap();
//! for cut in storage.moments() {
//!     for seed in 0..4 {
//!         let left = storage.after_power_cut(cut, Lost::Some { seed });
//!         if cut >= acknowledged {
//!             assert_eq!(&left[..5], b"first");
//!         }
//!         let _reopened = MemoryStorage::new(left);
//!     }
//! }
//! ```
//!
//! # Invariants
//!
//! 1. A flush makes durable what had completed when the flush began, and nothing else.
//! 2. Changes that survive a power cut are applied in the order in which they began.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::seeded::{Delays, Seeded};
use super::{IoFuture, Storage, ZeroMode};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;

/// What a discarded byte reads as: neither its old value nor zero, as nobody may rely on either.
const DISCARDED: u8 = 0xd5;

/// A moment in the life of a storage: the power is cut after everything that happened before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub u64);

/// Which of the changes that are not durable a power cut takes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// All of them.
    All,
    /// None.
    None,
    /// Some, wholly or in single sectors, as `seed` says.
    Some {
        /// Chooses which.
        seed: u64,
    },
}

/// Bytes in memory, and what of them a power cut could lose.
pub struct CrashStorage {
    initial: Vec<u8>,
    delays: Delays,
    clock: Arc<AtomicU64>,
    state: Mutex<State>,
}

struct State {
    live: Vec<u8>,
    changes: Vec<Change>,
}

/// Something that changes bytes or length, and when.
struct Change {
    what: What,
    begun: Moment,
    completed: Option<Moment>,
    durable: Option<Moment>,
}

#[derive(Clone)]
enum What {
    Write { at: usize, bytes: Vec<u8> },
    Fill { range: Range<usize>, byte: u8 },
    SetLen(usize),
}

impl CrashStorage {
    /// A store that durably holds `bytes`, and whose operations take their time as `delays` say.
    #[must_use]
    pub fn new(bytes: Vec<u8>, delays: Delays) -> Self {
        Self::with_clock(bytes, delays, Arc::default())
    }

    /// A further store on the same clock as `self`: one power cut hits both at the same [`Moment`].
    #[must_use]
    pub fn beside(&self, bytes: Vec<u8>, delays: Delays) -> Self {
        Self::with_clock(bytes, delays, Arc::clone(&self.clock))
    }

    fn with_clock(bytes: Vec<u8>, delays: Delays, clock: Arc<AtomicU64>) -> Self {
        Self {
            initial: bytes.clone(),
            delays,
            clock,
            state: Mutex::new(State {
                live: bytes,
                changes: Vec::new(),
            }),
        }
    }

    /// The present moment: a power cut at it or later comes after everything that has been acknowledged so far.
    #[must_use]
    pub fn now(&self) -> Moment {
        Moment(self.clock.load(Ordering::Relaxed))
    }

    /// Every moment at which a power cut makes a difference, from the first to the present.
    pub fn moments(&self) -> impl Iterator<Item = Moment> + use<> {
        let all: RangeInclusive<u64> = 0..=self.now().0;
        all.map(Moment)
    }

    /// The bytes as they read now.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        self.state().live.clone()
    }

    /// How many changes are not durable now.
    #[must_use]
    pub fn volatile_changes(&self) -> usize {
        let state = self.state();
        state.changes.iter().filter(|c| c.durable.is_none()).count()
    }

    /// The bytes that a disk may hold after the power was cut at `cut`.
    #[must_use]
    pub fn after_power_cut(&self, cut: Moment, lost: Lost) -> Vec<u8> {
        let state = self.state();
        let mut bytes = self.initial.clone();
        let mut seeded = match lost {
            Lost::Some { seed } => Some(Seeded::new(seed)),
            Lost::All | Lost::None => None,
        };
        for change in state.changes.iter().filter(|change| change.begun < cut) {
            let is_durable = change.durable.is_some_and(|moment| moment < cut);
            match &mut seeded {
                _ if is_durable => change.what.apply(&mut bytes),
                Some(seeded) => change.what.apply_in_part(&mut bytes, seeded),
                None if lost == Lost::None => change.what.apply(&mut bytes),
                None => {}
            }
        }
        bytes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an event; a later power cut comes after it.
    fn tick(&self) -> Moment {
        Moment(self.clock.fetch_add(1, Ordering::Relaxed))
    }

    async fn change(&self, what: What) -> Result<()> {
        let index = {
            let mut state = self.state();
            state.changes.push(Change {
                what: what.clone(),
                begun: self.tick(),
                completed: None,
                durable: None,
            });
            state.changes.len() - 1
        };
        self.delays.pause().await;
        what.apply(&mut self.state().live);
        self.delays.pause().await;
        self.state().changes[index].completed = Some(self.tick());
        Ok(())
    }

    async fn read(&self, at: usize, buf: IoBuf) -> Result<()> {
        self.delays.pause().await;
        {
            let state = self.state();
            let start = at.min(state.live.len());
            let end = start.saturating_add(buf.len()).min(state.live.len());
            buf.copy_from(0, &state.live[start..end]);
            buf.zero(end - start..buf.len());
        }
        self.delays.pause().await;
        Ok(())
    }

    async fn sync(&self) -> Result<()> {
        let begun = self.tick();
        self.delays.pause().await;
        self.make_durable(begun);
        self.delays.pause().await;
        Ok(())
    }

    /// Notes that what had completed at `begun` is durable from now on (invariant 1).
    fn make_durable(&self, begun: Moment) {
        let done = self.tick();
        for change in &mut self.state().changes {
            let is_covered = change.completed.is_some_and(|moment| moment < begun);
            if is_covered && change.durable.is_none() {
                change.durable = Some(done);
            }
        }
    }

    /// The part of the range that lies inside the store.
    fn inside(&self, range: Range<usize>) -> Range<usize> {
        let len = self.state().live.len();
        range.start.min(len)..range.end.min(len)
    }
}

impl What {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write { at, bytes: new } => put(bytes, *at, new),
            Self::Fill { range, byte } => fill(bytes, range.clone(), *byte),
            Self::SetLen(len) => bytes.resize(*len, 0),
        }
    }

    /// Whole, not at all, or some sectors of it.
    fn apply_in_part(&self, bytes: &mut Vec<u8>, seeded: &mut Seeded) {
        match seeded.below(4) {
            0 => {}
            1 => self.apply(bytes),
            _ => match self {
                Self::Write { at, bytes: new } => {
                    for sector in sectors(*at..at + new.len()) {
                        if seeded.coin() {
                            put(
                                bytes,
                                sector.start,
                                &new[sector.start - at..sector.end - at],
                            );
                        }
                    }
                }
                Self::Fill { range, byte } => {
                    for sector in sectors(range.clone()) {
                        if seeded.coin() {
                            fill(bytes, sector, *byte);
                        }
                    }
                }
                Self::SetLen(_) => {}
            },
        }
    }
}

/// Cuts a range at sector boundaries.
fn sectors(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let sector = start..range.end.min((start / SECTOR + 1) * SECTOR);
        start = sector.end;
        (!sector.is_empty()).then_some(sector)
    })
}

fn put(bytes: &mut Vec<u8>, at: usize, new: &[u8]) {
    let end = at + new.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(new);
}

fn fill(bytes: &mut Vec<u8>, range: Range<usize>, byte: u8) {
    if bytes.len() < range.end {
        bytes.resize(range.end, 0);
    }
    bytes[range].fill(byte);
}

fn range_of(at: HostOffset, len: u64) -> Result<Range<usize>> {
    let end = at.checked_add(len).map(|end| usize::try_from(end.0));
    match (usize::try_from(at.0), end) {
        (Ok(start), Some(Ok(end))) => Ok(start..end),
        _ => Err(Error::new(
            ErrorKind::OutOfBounds,
            "the range lies outside what memory can hold",
        )),
    }
}

impl Storage for CrashStorage {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        match range_of(at, 0) {
            Ok(range) => IoFuture::boxed(self.read(range.start, buf)),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        match range_of(at, buf.len() as u64) {
            Ok(range) if range.is_empty() => IoFuture::ready(Ok(())),
            Ok(range) => IoFuture::boxed(async move {
                let (at, bytes) = (range.start, buf.to_vec());
                self.change(What::Write { at, bytes }).await
            }),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn flush(&self) -> IoFuture<'_> {
        IoFuture::boxed(self.sync())
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        let byte = DISCARDED;
        match range_of(at, len).map(|range| self.inside(range)) {
            Ok(range) if range.is_empty() => IoFuture::ready(Ok(())),
            Ok(range) => IoFuture::boxed(self.change(What::Fill { range, byte })),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, _mode: ZeroMode) -> IoFuture<'_> {
        match range_of(at, len) {
            Ok(range) if range.is_empty() => IoFuture::ready(Ok(())),
            Ok(range) => IoFuture::boxed(self.change(What::Fill { range, byte: 0 })),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        match range_of(HostOffset(len), 0) {
            Ok(range) => IoFuture::boxed(self.change(What::SetLen(range.start))),
            Err(error) => IoFuture::ready(Err(error)),
        }
    }

    fn len(&self) -> u64 {
        self.state().live.len() as u64
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn name(&self) -> &str {
        "memory that may lose power"
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::future::poll_fn;
    use std::task::Poll;

    use super::*;
    use crate::sys::block_on;

    async fn write(storage: &CrashStorage, at: u64, bytes: &[u8]) {
        let buf = IoBuf::from_bytes(bytes);
        storage.writev(HostOffset(at), buf).await.unwrap();
    }

    #[test]
    fn flushed_writes_survive_every_later_cut_and_others_may_not() {
        let storage = CrashStorage::new(vec![0; 4], Delays::none());
        let flushed = block_on(async {
            write(&storage, 0, b"AB").await;
            storage.flush().await.unwrap();
            let flushed = storage.now();
            write(&storage, 1, b"xyz").await;
            flushed
        });
        assert_eq!(storage.contents(), b"Axyz");
        assert_eq!(storage.volatile_changes(), 1);
        assert_eq!(storage.after_power_cut(storage.now(), Lost::All), b"AB\0\0");
        assert_eq!(storage.after_power_cut(storage.now(), Lost::None), b"Axyz");
        assert_eq!(storage.after_power_cut(Moment(0), Lost::None), [0; 4]);
        for cut in storage.moments().filter(|cut| *cut >= flushed) {
            for seed in 0..20 {
                let left = storage.after_power_cut(cut, Lost::Some { seed });
                assert!(
                    left == b"AB\0\0" || left == b"Axyz",
                    "seed {seed}: {left:?}"
                );
            }
        }
    }

    #[test]
    fn a_flush_does_not_cover_a_write_that_completes_after_it_began() {
        let storage = CrashStorage::new(vec![0; 1], Delays::up_to(20, 3));
        block_on(async {
            let mut written = Box::pin(write(&storage, 0, b"w"));
            poll_fn(|context| {
                assert!(written.as_mut().poll(context).is_pending());
                Poll::Ready(())
            })
            .await;
            let mut flush = Box::pin(storage.flush());
            poll_fn(|context| {
                assert!(flush.as_mut().poll(context).is_pending());
                Poll::Ready(())
            })
            .await;
            written.await;
            flush.await.unwrap();
        });
        assert_eq!(storage.after_power_cut(storage.now(), Lost::All), [0]);
    }

    #[test]
    fn torn_writes_are_torn_at_sectors_of_the_disk() {
        let storage = CrashStorage::new(vec![0; 2048], Delays::none());
        block_on(write(&storage, 256, &[1; 1024]));
        let mut seen = HashSet::new();
        for seed in 0..200 {
            let left = storage.after_power_cut(storage.now(), Lost::Some { seed });
            for sector in [0..256, 256..512, 512..1024, 1024..1280, 1280..2048] {
                let part = &left[sector.clone()];
                assert!(part.iter().all(|b| *b == part[0]), "{sector:?} is torn");
            }
            seen.insert((left[256], left[512], left[1024]));
        }
        assert_eq!(seen.len(), 8, "every subset of three sectors");
    }

    #[test]
    fn stores_on_one_clock_lose_power_together() {
        let first = CrashStorage::new(vec![0], Delays::none());
        let second = first.beside(vec![0], Delays::none());
        block_on(async {
            write(&first, 0, b"1").await;
            let between = second.now();
            write(&second, 0, b"2").await;
            assert_eq!(first.after_power_cut(between, Lost::None), b"1");
            assert_eq!(second.after_power_cut(between, Lost::None), [0]);
        });
    }

    #[test]
    fn lengths_and_zeroes_can_be_lost_too() {
        let storage = CrashStorage::new(vec![7; 4], Delays::none());
        block_on(async {
            storage.set_len(2).await.unwrap();
            storage
                .write_zeroes(HostOffset(1), 5, ZeroMode::MayUnmap)
                .await
                .unwrap();
            storage.discard(HostOffset(0), 1).await.unwrap();
        });
        assert_eq!(storage.contents(), [DISCARDED, 0, 0, 0, 0, 0]);
        assert_eq!(storage.after_power_cut(storage.now(), Lost::All), [7; 4]);
    }
}
