//! Reading or writing a disk at regular steps, as fast as it goes, the way the daemon serves its guests: from memory
//! and straight to the host file where the image says so, by an operation of the image elsewhere.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_lock::RwLock;

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Mapped};
use crate::sys::{IoBuf, Reactor, block_on};
use crate::units::GuestOffset;

/// The most memory that requests may need together, in bytes.
const MAX_MEMORY: u64 = 4 << 30;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reading.
    Read,
    /// Writing this byte, with flushes in between.
    Write(u8, Flushes),
}

/// When what was written is flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushes {
    /// Never.
    None,
    /// Every so many requests, when those under way have ended.
    Drained(u64),
    /// Every so many requests, beside others.
    Beside(u64),
}

/// The requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// What they do.
    pub kind: Kind,
    /// How many there are.
    pub count: u64,
    /// How many are under way at the same time.
    pub depth: u64,
    /// Bytes of each.
    pub size: u64,
    /// Bytes from the beginning of one to that of the next.
    pub step: u64,
    /// Where the first begins.
    pub offset: u64,
}

struct State {
    image: Arc<dyn Image>,
    load: Load,
    begun: Cell<u64>,
    next_at: Cell<u64>,
    /// Held by writes for reading, and by a flush that waits for them for writing.
    draining: RwLock<()>,
}

/// Runs the requests; how long they took. Behind the disk's end they begin anew at its start.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] for requests that the disk or memory has no room for; the first failure of a request.
pub fn bench(image: &Arc<dyn Image>, load: Load) -> Result<Duration> {
    check(&**image, &load)?;
    let state = Rc::new(State {
        image: Arc::clone(image),
        load,
        begun: Cell::new(0),
        next_at: Cell::new(load.offset),
        draining: RwLock::new(()),
    });
    let size = usize::try_from(load.size).map_err(|_| too_much(&load))?;
    let bufs = (0..load.depth.min(load.count)).map(|_| match load.kind {
        Kind::Read | Kind::Write(0, _) => IoBuf::zeroed(size),
        Kind::Write(byte, _) => IoBuf::from_bytes(&vec![byte; size]),
    });
    let bufs: Vec<IoBuf> = bufs.collect();
    block_on(async {
        let reactor =
            Reactor::current().map_err(|error| Error::io("io_uring cannot be used", error))?;
        let started = Instant::now();
        let lanes: Vec<_> = bufs
            .into_iter()
            .map(|buf| reactor.spawn_local(lane(Rc::clone(&state), buf)))
            .collect();
        let mut outcome = Ok(());
        for lane in lanes {
            outcome = outcome.and(lane.await);
        }
        let took = started.elapsed();
        outcome?;
        // What was written is to be there afterwards, and is no part of the load.
        image.flush().await?;
        Ok(took)
    })
}

fn check(image: &dyn Image, load: &Load) -> Result<()> {
    let disk = image.virtual_size();
    let end = load.offset.checked_add(load.size);
    if load.size == 0 || end.is_none_or(|end| end > disk) {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{} bytes at {} are no request to a disk of {disk} bytes",
                load.size, load.offset
            ),
        ));
    }
    if load.size.saturating_mul(load.depth) > MAX_MEMORY {
        return Err(too_much(load));
    }
    Ok(())
}

fn too_much(load: &Load) -> Error {
    Error::new(
        ErrorKind::InvalidConfig,
        format!(
            "{} requests of {} bytes at a time need more than the {MAX_MEMORY} bytes of memory there may be",
            load.depth, load.size
        ),
    )
}

async fn lane(state: Rc<State>, buf: IoBuf) -> Result<()> {
    while let Some((number, at)) = state.next() {
        let outcome = state.request(number, at, &buf).await;
        if outcome.is_err() {
            // The other lanes have no more to do.
            state.begun.set(state.load.count);
            return outcome;
        }
    }
    Ok(())
}

impl State {
    fn next(&self) -> Option<(u64, GuestOffset)> {
        let number = self.begun.get();
        if number >= self.load.count {
            return None;
        }
        self.begun.set(number + 1);
        let at = self.next_at.get();
        let next = at.saturating_add(self.load.step);
        let fits = next
            .checked_add(self.load.size)
            .is_some_and(|end| end <= self.image.virtual_size());
        self.next_at.set(if fits { next } else { 0 });
        Some((number, GuestOffset(at)))
    }

    async fn request(&self, number: u64, at: GuestOffset, buf: &IoBuf) -> Result<()> {
        let Kind::Write(_, flushes) = self.load.kind else {
            return self.read(at, buf).await;
        };
        let is_due = |every: u64| number > 0 && number.is_multiple_of(every.max(1));
        match flushes {
            Flushes::Drained(every) if is_due(every) => {
                let _drained = self.draining.write().await;
                self.image.flush().await?;
            }
            Flushes::Beside(every) if is_due(every) => self.image.flush().await?,
            _ => {}
        }
        let _under_way = self.draining.read().await;
        self.write(at, buf).await
    }

    async fn read(&self, at: GuestOffset, buf: &IoBuf) -> Result<()> {
        match self.image.map_read(at, self.load.size) {
            Mapped::Extent { storage, at, guard } => {
                let outcome = storage.readv(at, buf.clone()).await;
                drop(guard);
                outcome
            }
            Mapped::Zeroes => {
                buf.zero(0..buf.len());
                Ok(())
            }
            Mapped::Slow => self.image.read(at, buf.clone()).await,
        }
    }

    async fn write(&self, at: GuestOffset, buf: &IoBuf) -> Result<()> {
        match self.image.map_write(at, self.load.size) {
            Mapped::Extent { storage, at, guard } => {
                let outcome = storage.writev(at, buf.clone()).await;
                drop(guard);
                outcome
            }
            Mapped::Zeroes | Mapped::Slow => self.image.write(at, buf.clone()).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Access, RawImage};
    use crate::storage::MemoryStorage;

    fn disk(len: usize) -> (Arc<MemoryStorage>, Arc<dyn Image>) {
        let storage = Arc::new(MemoryStorage::new(vec![0; len]));
        let image = RawImage::new(storage.clone(), Access::ReadWrite);
        (storage, Arc::new(image))
    }

    fn load(kind: Kind) -> Load {
        Load {
            kind,
            count: 10,
            depth: 4,
            size: 512,
            step: 1024,
            offset: 512,
        }
    }

    #[test]
    fn requests_go_forward_in_steps_and_begin_anew_behind_the_end() {
        let (storage, image) = disk(4096);
        for flushes in [Flushes::None, Flushes::Drained(3), Flushes::Beside(2)] {
            let three = Load {
                count: 3,
                ..load(Kind::Write(7, flushes))
            };
            bench(&image, three).unwrap();
            let written = |sector: usize| storage.contents()[sector * 512] == 7;
            let sectors: Vec<usize> = (0..8).filter(|sector| written(*sector)).collect();
            assert_eq!(sectors, [1, 3, 5], "{flushes:?}");
            bench(&image, load(Kind::Read)).unwrap();
        }
        bench(&image, load(Kind::Write(7, Flushes::None))).unwrap();
        // 512, 1536, 2560, 3584, and again from the start.
        assert_eq!(storage.contents()[0], 7);
    }

    #[test]
    fn requests_that_have_no_room_are_refused() {
        let (_, image) = disk(4096);
        for wrong in [
            Load {
                size: 0,
                ..load(Kind::Read)
            },
            Load {
                offset: 4096,
                ..load(Kind::Read)
            },
            Load {
                size: 8192,
                offset: 0,
                ..load(Kind::Read)
            },
            Load {
                depth: 1 << 40,
                ..load(Kind::Read)
            },
        ] {
            let error = bench(&image, wrong).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        }
    }
}
