//! The client: one thread that keeps all queues of all disks busy, and believes nothing that it reads.
//!
//! # Invariants
//!
//! 1. No block has two writes under way, so that the last one to begin is what a read finds afterwards.
//! 2. Every block of every read is held against its stamp.

use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::time::{ClockId, clock_gettime};

use crate::Result;
use crate::daemon::{DEADLINE, Daemon, Usage};
use crate::device::{Device, Request, Waiting};
use crate::disk::Disk;
use crate::histogram::Histogram;
use crate::load::{Kind, Load};
use crate::places::Places;
use crate::stamp::{BLOCK, BLOCK_LEN, Stamp};

/// How often in a row a place is chosen anew that is being written.
const ATTEMPTS: usize = 64;
/// How many vain looks at the rings come between two looks at the time.
const LOOKS: u32 = 1 << 16;
/// How long a client sleeps at most, to see that the daemon still lives.
const PATIENCE_MS: u16 = 1000;

/// How long a load runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
}

/// What was measured.
pub(crate) struct Outcome {
    pub(crate) elapsed: Duration,
    pub(crate) latencies: Histogram,
    /// Requests of each disk that ended.
    pub(crate) ended: Vec<u64>,
    pub(crate) before: Usage,
    pub(crate) after: Usage,
    /// CPU time of the client itself.
    pub(crate) client_cpu: Duration,
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    Notified,
    TimeIsUp,
}

/// What a request of a slot is up to.
#[derive(Clone, Copy)]
struct UnderWay {
    began: Instant,
    at: u64,
    flushing: bool,
}

/// One disk, as the client works on it.
struct Target {
    device: Device,
    disk: Disk,
    places: Places,
    slots: Vec<Option<UnderWay>>,
    /// By block from the disk's start: written by this client.
    written: Vec<bool>,
    /// By block: being written.
    busy: Vec<bool>,
    ended: u64,
}

/// A client at work.
pub(crate) struct Client<'a> {
    targets: Vec<Target>,
    load: Load,
    /// In the stamps of what it writes.
    generation: u32,
    daemon: &'a mut Daemon,
    epoll: Epoll,
    latencies: Histogram,
    under_way: usize,
    counting: bool,
    stopping: bool,
}

impl<'a> Client<'a> {
    pub(crate) fn new(
        devices: Vec<(Device, Disk)>,
        load: Load,
        generation: u32,
        daemon: &'a mut Daemon,
    ) -> Result<Self> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|error| error.to_string())?;
        let targets = (u64::from(generation)..)
            .zip(devices)
            .map(|(seed, (device, disk))| {
                let blocks = if load.writes() {
                    usize::try_from(disk.len / BLOCK_LEN).unwrap_or(0)
                } else {
                    0
                };
                let shape = device.shape();
                Target {
                    places: Places::new(&load, disk.start, disk.room, seed),
                    slots: vec![None; shape.queues * shape.depth],
                    written: vec![false; blocks],
                    busy: vec![false; blocks],
                    ended: 0,
                    device,
                    disk,
                }
            });
        let targets: Vec<Target> = targets.collect();
        for target in &targets {
            for queue in 0..target.device.shape().queues {
                // Every notification is an edge, as an interrupt is: nobody has to read the counter.
                let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
                epoll
                    .add(target.device.call(queue), event)
                    .map_err(|error| error.to_string())?;
            }
        }
        Ok(Self {
            targets,
            load,
            generation,
            daemon,
            epoll,
            latencies: Histogram::new(),
            under_way: 0,
            counting: false,
            stopping: false,
        })
    }

    /// Sends the requests of each disk to these places instead.
    pub(crate) fn go_to(&mut self, places: Vec<Places>) {
        for (target, places) in self.targets.iter_mut().zip(places) {
            target.places = places;
        }
    }

    /// Runs the load, and waits for what is under way at its end.
    pub(crate) fn run(&mut self, span: Span) -> Result<Outcome> {
        self.begin_all()?;
        self.go_on_until(Instant::now() + span.warm_up)?;
        let (before, client_before) = (self.daemon.usage()?, thread_cpu()?);
        let start = Instant::now();
        self.counting = true;
        self.go_on_until(start + span.measured)?;
        self.counting = false;
        let elapsed = start.elapsed();
        let (after, client_after) = (self.daemon.usage()?, thread_cpu()?);
        self.stopping = true;
        self.drain()?;
        Ok(Outcome {
            elapsed,
            latencies: std::mem::replace(&mut self.latencies, Histogram::new()),
            ended: self.targets.iter().map(|target| target.ended).collect(),
            before,
            after,
            client_cpu: client_after.saturating_sub(client_before),
        })
    }

    /// Reads back all that was written.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        let len = self
            .targets
            .iter()
            .map(|target| target.device.shape().slot_len)
            .min()
            .unwrap_or(BLOCK);
        self.load = Load {
            kind: Kind::Read,
            len,
            waiting: self.load.waiting,
            ..self.load
        };
        self.stopping = false;
        for target in &mut self.targets {
            let chunk = len / BLOCK;
            let chunks = target.written.chunks(chunk).enumerate();
            let places = chunks.filter(|(_, blocks)| blocks.contains(&true));
            let places: Vec<u64> = places.map(|(number, _)| (number * len) as u64).collect();
            target.places = Places::these(places);
        }
        self.begin_all()?;
        self.drain()
    }

    fn begin_all(&mut self) -> Result<()> {
        for index in 0..self.targets.len() {
            let shape = self.targets[index].device.shape();
            let now = Instant::now();
            for slot in 0..shape.queues * shape.depth {
                self.begin(index, slot, now)?;
            }
            for queue in 0..shape.queues {
                self.targets[index].device.kick(queue)?;
            }
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        self.go_on_until(Instant::now() + Duration::from_secs(3600))
    }

    /// Works until `end`, or until no request is left to begin.
    fn go_on_until(&mut self, end: Instant) -> Result<()> {
        let mut heard = Instant::now();
        let mut vain: u32 = 0;
        loop {
            if self.look()? {
                vain = 0;
                heard = Instant::now();
                if heard >= end || self.under_way == 0 {
                    return Ok(());
                }
                continue;
            }
            if self.load.waiting == Waiting::Interrupts {
                if self.sleep()? == Woken::Notified {
                    continue;
                }
            } else {
                vain += 1;
                if vain < LOOKS {
                    std::hint::spin_loop();
                    continue;
                }
                vain = 0;
            }
            if Instant::now() >= end || self.under_way == 0 {
                return Ok(());
            }
            self.daemon.check_alive()?;
            if heard.elapsed() > DEADLINE {
                return Err(format!("answers no request for {} s", DEADLINE.as_secs()));
            }
        }
    }

    /// Takes what has ended from every queue and begins as many requests; whether there was anything.
    fn look(&mut self) -> Result<bool> {
        let mut any = false;
        for index in 0..self.targets.len() {
            for queue in 0..self.targets[index].device.shape().queues {
                let mut now = None;
                while let Some(slot) = self.targets[index].device.next_ended(queue)? {
                    let now = *now.get_or_insert_with(Instant::now);
                    self.end(index, slot, now)?;
                }
                if now.is_some() {
                    self.targets[index].device.kick(queue)?;
                    any = true;
                }
            }
        }
        Ok(any)
    }

    /// Waits for a notification. What ended before raised one, or was looked at after it had been asked for.
    fn sleep(&mut self) -> Result<Woken> {
        let mut events = [EpollEvent::empty(); 8];
        match self
            .epoll
            .wait(&mut events, EpollTimeout::from(PATIENCE_MS))
        {
            Ok(0) => Ok(Woken::TimeIsUp),
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(Woken::Notified),
            Err(error) => Err(format!("epoll: {error}")),
        }
    }

    /// Begins the next request in a slot, if there is one.
    fn begin(&mut self, index: usize, slot: usize, now: Instant) -> Result<()> {
        let Some(at) = self.choose(index) else {
            return Ok(());
        };
        let target = &mut self.targets[index];
        let len = self.load.len;
        let request = match self.load.kind {
            Kind::Read => Request::Read { at, len },
            Kind::Write | Kind::WriteFlush => {
                for (number, block) in (at / BLOCK_LEN..).zip(0..len / BLOCK) {
                    let stamp = Stamp {
                        block: number,
                        generation: self.generation,
                    };
                    target.device.set_stamp(slot, block, stamp.to_bytes());
                }
                let blocks = block_range(at, len);
                target.busy[blocks.clone()].fill(true);
                target.written[blocks].fill(true);
                Request::Write { at, len }
            }
        };
        target.slots[slot] = Some(UnderWay {
            began: now,
            at,
            flushing: false,
        });
        self.under_way += 1;
        target.device.offer(slot, request)
    }

    /// Where the next request goes.
    fn choose(&mut self, index: usize) -> Option<u64> {
        if self.stopping {
            return None;
        }
        let target = &mut self.targets[index];
        let writes = self.load.writes();
        for _ in 0..ATTEMPTS {
            let at = target.places.next()?;
            if !writes || !target.busy[block_range(at, self.load.len)].contains(&true) {
                return Some(at);
            }
        }
        None
    }

    /// The request of a slot has ended.
    fn end(&mut self, index: usize, slot: usize, now: Instant) -> Result<()> {
        let target = &mut self.targets[index];
        let Some(under_way) = target.slots[slot].take() else {
            return Err("ended a request twice".into());
        };
        match self.load.kind {
            Kind::Read => self.verify(index, slot, under_way.at)?,
            Kind::WriteFlush if !under_way.flushing => {
                target.slots[slot] = Some(UnderWay {
                    flushing: true,
                    ..under_way
                });
                return target.device.offer(slot, Request::Flush);
            }
            Kind::Write | Kind::WriteFlush => {
                target.busy[block_range(under_way.at, self.load.len)].fill(false);
            }
        }
        self.under_way -= 1;
        if self.counting {
            self.latencies.add(now.duration_since(under_way.began));
            self.targets[index].ended += 1;
        }
        self.begin(index, slot, now)
    }

    /// Holds what a slot has read against the stamps that have to be there.
    fn verify(&self, index: usize, slot: usize, at: u64) -> Result<()> {
        let target = &self.targets[index];
        for (number, block) in (at / BLOCK_LEN..).zip(0..self.load.len / BLOCK) {
            let written = usize::try_from(number)
                .ok()
                .and_then(|number| target.written.get(number));
            let generation = match written {
                Some(true) => Some(self.generation),
                _ => (target.disk.generation_of)(number),
            };
            let found = Stamp::from_bytes(target.device.stamp(slot, block));
            let right = found.is_some_and(|found| {
                found.block == number
                    && generation.is_none_or(|generation| found.generation == generation)
            });
            if !right {
                return Err(format!(
                    "WRONG DATA: block {number} has {found:?}, not generation {generation:?}"
                ));
            }
        }
        Ok(())
    }
}

fn block_range(at: u64, len: usize) -> std::ops::Range<usize> {
    let first = usize::try_from(at / BLOCK_LEN).unwrap_or(usize::MAX);
    first..first.saturating_add(len / BLOCK)
}

fn thread_cpu() -> Result<Duration> {
    let time =
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_err(|error| error.to_string())?;
    Ok(time.into())
}
