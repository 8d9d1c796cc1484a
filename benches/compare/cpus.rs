//! Which CPUs the client and a contender run on: the client has the last one for itself, a contender the others, or
//! all where it needs more than one.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::Result;

/// Where a contender may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// On every CPU but the client's.
    Beside,
    /// On every CPU: work for several threads, with the client on one of the CPUs that they use.
    Everywhere,
}

/// The CPUs that this process was given.
pub(crate) struct Cpus {
    all: Vec<usize>,
}

impl Cpus {
    pub(crate) fn new() -> Result<Self> {
        let set = sched_getaffinity(this_thread()).map_err(|error| format!("CPUs: {error}"))?;
        let all = (0..CpuSet::count())
            .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
            .collect();
        Ok(Self { all })
    }

    pub(crate) fn count(&self) -> usize {
        self.all.len()
    }

    pub(crate) fn contenders(&self, room: Room) -> &[usize] {
        match self.all.split_last() {
            Some((_, others)) if room == Room::Beside && !others.is_empty() => others,
            _ => &self.all,
        }
    }

    /// Runs `start` where a contender belongs, so that what it starts stays there, and goes to the client's CPU.
    pub(crate) fn start_on<T>(&self, room: Room, start: impl FnOnce() -> T) -> Result<T> {
        go_to(self.contenders(room))?;
        let started = start();
        go_to(&self.all[self.all.len().saturating_sub(1)..])?;
        Ok(started)
    }

    /// Lets the calling thread run anywhere again.
    pub(crate) fn release(&self) -> Result<()> {
        go_to(&self.all)
    }
}

fn go_to(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu).map_err(|error| error.to_string())?;
    }
    sched_setaffinity(this_thread(), &set).map_err(|error| format!("CPUs: {error}"))
}

fn this_thread() -> Pid {
    Pid::from_raw(0)
}
