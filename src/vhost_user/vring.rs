//! One vring as the front-end sets it up, and its worker while it runs.
//!
//! A vring runs when it has been started (its kick descriptor was set after the last stop), is enabled, and lies
//! in guest memory. Every change of anything that a worker uses stops it first; [`Vring::run_if_ready`] starts it
//! again.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::call::Call;
use super::server::Vm;
use super::split_ring::SplitRing;
use super::stop::Stop;
use super::thread_name;
use super::worker::{Setup, Worker};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::keep_this_thread_responsive;

/// Where the three parts of a vring lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) descriptor_table: GuestAddress,
    pub(super) avail_ring: GuestAddress,
    pub(super) used_ring: GuestAddress,
}

struct Running {
    stop: Arc<Stop>,
    thread: JoinHandle<u16>,
    memory: Arc<GuestMemoryMmap>,
}

/// What the vrings of a device have in common.
pub(super) struct Shared<'a> {
    pub(super) vm: &'a Vm,
    pub(super) memory: &'a Arc<GuestMemoryMmap>,
    pub(super) event_idx: EventIdx,
}

/// Whether `VIRTIO_F_EVENT_IDX` was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventIdx {
    On,
    Off,
}

/// A vring.
pub(super) struct Vring {
    index: u16,
    max_size: u16,
    size: u16,
    next_avail: u16,
    addresses: Option<Addresses>,
    kick: Option<Arc<File>>,
    call: Arc<Call>,
    enabled: bool,
    running: Option<Running>,
}

impl Vring {
    pub(super) fn new(index: u16, max_size: u16) -> Self {
        Self {
            index,
            max_size,
            size: max_size,
            next_avail: 0,
            addresses: None,
            kick: None,
            call: Arc::default(),
            enabled: false,
            running: None,
        }
    }

    /// Sets the number of entries.
    ///
    /// # Errors
    /// If it is not a power of two, or larger than what was offered.
    pub(super) fn set_size(&mut self, size: u32) -> Result<()> {
        let fits = u16::try_from(size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= self.max_size);
        let Some(size) = fits else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "a ring of {size} entries is no power of two up to {}",
                    self.max_size
                ),
            ));
        };
        self.stop();
        self.size = size;
        Ok(())
    }

    /// Sets where the ring lies.
    pub(super) fn set_addresses(&mut self, addresses: Addresses) {
        self.stop();
        self.addresses = Some(addresses);
    }

    /// Sets which entry of the available ring is next.
    pub(super) fn set_next_avail(&mut self, next_avail: u16) {
        self.stop();
        self.next_avail = next_avail;
    }

    /// Which entry of the available ring is next; of a running ring, the answer would be outdated at once.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Sets the descriptor by which the driver kicks: the ring is started.
    pub(super) fn set_kick(&mut self, kick: File) {
        self.stop();
        self.kick = Some(Arc::new(kick));
    }

    /// Sets the descriptor by which the driver is told. Completions of a moment ago may have gone to the one before,
    /// where nobody listens any more, so the driver of a running ring is told at once.
    ///
    /// # Errors
    /// As [`Call::replace`].
    pub(super) fn set_call(&self, call: Option<&File>) -> Result<()> {
        self.call.replace(call)?;
        if self.running.is_some() {
            self.call.notify();
        }
        Ok(())
    }

    /// Lets the ring run, as far as this goes.
    pub(super) fn enable(&mut self) {
        self.enabled = true;
    }

    /// Stops the ring, until it is enabled again.
    pub(super) fn disable(&mut self) {
        self.stop();
        self.enabled = false;
    }

    /// Stops the ring, until it is set up anew.
    pub(super) fn reset(&mut self) {
        self.stop();
        self.kick = None;
        self.call.clear();
    }

    /// Ends the worker, if there is one, after all requests that it has taken.
    pub(super) fn stop(&mut self) {
        let Some(Running {
            stop,
            thread,
            memory,
        }) = self.running.take()
        else {
            return;
        };
        stop.request();
        self.next_avail = thread.join().unwrap_or_else(|_| {
            // A defect. Requests that were under way are taken once more: none is lost.
            log::error!("the worker of vring {} has panicked", self.index);
            self.used_idx(&memory).unwrap_or(self.next_avail)
        });
    }

    /// Starts the worker, if there is none and nothing is missing.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn run_if_ready(&mut self, shared: &Shared<'_>) -> Result<()> {
        let (Some(addresses), Some(kick), true, None) = (
            self.addresses,
            self.kick.clone(),
            self.enabled,
            &self.running,
        ) else {
            return Ok(());
        };
        let Some(ring) = self.ring(addresses, shared) else {
            log::debug!(
                "{}: vring {} does not lie in guest memory yet",
                shared.vm.name(),
                self.index
            );
            return Ok(());
        };
        let stop = Stop::new().map(Arc::new).map_err(|error| {
            Error::io(format!("{}: making an eventfd", shared.vm.name()), error)
        })?;
        let setup = Setup {
            name: format!("{}: vring {}", shared.vm.name(), self.index),
            ring,
            queue_size: self.size,
            memory: Arc::clone(shared.memory),
            device: Arc::clone(shared.vm.device()),
            kick,
            call: Arc::clone(&self.call),
            stop: Arc::clone(&stop),
            counters: Arc::clone(shared.vm.counters()),
            lines: Arc::clone(shared.vm.lines()),
        };
        let thread = start_worker(
            thread_name(shared.vm.name(), &format!("-q{}", self.index)),
            setup,
        )?;
        let memory = Arc::clone(shared.memory);
        self.running = Some(Running {
            stop,
            thread,
            memory,
        });
        Ok(())
    }

    /// The ring, if it lies in guest memory.
    fn ring(&self, addresses: Addresses, shared: &Shared<'_>) -> Option<SplitRing> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.set_size(self.size);
        queue
            .try_set_desc_table_address(addresses.descriptor_table)
            .ok()?;
        queue
            .try_set_avail_ring_address(addresses.avail_ring)
            .ok()?;
        queue.try_set_used_ring_address(addresses.used_ring).ok()?;
        queue.set_event_idx(shared.event_idx == EventIdx::On);
        queue.set_next_avail(self.next_avail);
        queue.set_ready(true);
        if !queue.is_valid(&**shared.memory) {
            return None;
        }
        let used_idx = queue.used_idx(&**shared.memory, Ordering::Acquire).ok()?;
        queue.set_next_used(used_idx.0);
        let ring = SplitRing::new(&queue);
        ring.areas(shared.memory).is_ok().then_some(ring)
    }

    fn used_idx(&self, memory: &GuestMemoryMmap) -> Option<u16> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue
            .try_set_used_ring_address(self.addresses?.used_ring)
            .ok()?;
        queue
            .used_idx(memory, Ordering::Acquire)
            .ok()
            .map(|index| index.0)
    }
}

impl Drop for Vring {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts a worker's thread, and waits until it serves.
fn start_worker(name: String, setup: Setup) -> Result<JoinHandle<u16>> {
    let (report, started) = sync_channel(1);
    let describe = format!("starting the worker {name}");
    let next_avail = setup.ring.next_avail();
    let thread = Builder::new()
        .name(name)
        .spawn(move || match Worker::new(setup) {
            Ok(worker) => {
                // The session waits for this; it cannot have gone away.
                let _ = report.send(Ok(()));
                keep_this_thread_responsive();
                worker.run()
            }
            Err(error) => {
                let _ = report.send(Err(error));
                next_avail
            }
        })
        .map_err(|error| Error::io(describe.as_str(), error))?;
    match started.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error.context(describe)),
        Err(_) => Err(Error::new(
            ErrorKind::Io,
            format!("{describe}: it has panicked"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_no_powers_of_two_are_refused() {
        let mut vring = Vring::new(0, 256);
        for size in [0, 3, 512, 65536 + 256] {
            assert!(vring.set_size(size).is_err(), "{size}");
        }
        for size in [1, 2, 128, 256] {
            vring.set_size(size).unwrap();
        }
    }
}
