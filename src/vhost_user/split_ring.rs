//! A split virtqueue as its worker goes through it (virtio 1.3, section 2.7).
//!
//! `virtio_queue::Queue` looks for the region of guest memory with each access to the ring, which is more work than the
//! rest of a small request. Here the three areas are found once for a whole batch ([`Areas`]), and accesses are loads
//! and stores in them.
//!
//! # Invariants
//!
//! 1. Whatever the driver has written is read once, and the copy judged: it may change at any moment.
//! 2. A chain ends: it has at most as many descriptors as its table has.
//! 3. A used element is written before the index that shows it to the driver.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

/// Memory of the guest.
type Slice<'m> = vm_memory::VolatileSlice<'m>;

const FLAGS: usize = 0;
const INDEX: usize = 2;
const ELEMENTS: usize = 4;
const DESCRIPTOR_LEN: usize = size_of::<Descriptor>();
const AVAIL_ELEMENT_LEN: usize = 2;
const USED_ELEMENT_LEN: usize = 8;
/// `used_event` and `avail_event`, behind the elements.
const EVENT_LEN: usize = 2;

/// How a driver broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Broken {
    #[error("the available index went beyond the ring's size")]
    AvailIndex,
    #[error("descriptor {0} is outside the ring")]
    Head(u16),
    #[error("the ring does not lie in guest memory")]
    Memory,
}

impl From<vm_memory::VolatileMemoryError> for Broken {
    fn from(_: vm_memory::VolatileMemoryError) -> Self {
        Self::Memory
    }
}

/// How far device and driver have come.
#[derive(Debug)]
pub(super) struct SplitRing {
    size: u16,
    has_event_idx: bool,
    descriptor_table: GuestAddress,
    avail_ring: GuestAddress,
    used_ring: GuestAddress,
    /// The next element of the available ring to take.
    next_avail: Wrapping<u16>,
    /// Where the driver's available elements end, as far as anyone has looked.
    seen_avail: Wrapping<u16>,
    /// The next element of the used ring to fill.
    next_used: Wrapping<u16>,
    /// `next_used` when it was last considered whether to notify the driver.
    considered: Wrapping<u16>,
}

/// The parts of a ring in guest memory.
pub(super) struct Areas<'m> {
    memory: &'m GuestMemoryMmap,
    descriptors: Slice<'m>,
    avail: Slice<'m>,
    used: Slice<'m>,
}

impl SplitRing {
    /// The ring that `queue` describes.
    pub(super) fn new(queue: &Queue) -> Self {
        Self {
            size: queue.size(),
            has_event_idx: queue.event_idx_enabled(),
            descriptor_table: GuestAddress(queue.desc_table()),
            avail_ring: GuestAddress(queue.avail_ring()),
            used_ring: GuestAddress(queue.used_ring()),
            next_avail: Wrapping(queue.next_avail()),
            seen_avail: Wrapping(queue.next_avail()),
            next_used: Wrapping(queue.next_used()),
            considered: Wrapping(queue.next_used()),
        }
    }

    /// The next element of the available ring to take.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    /// Where the ring lies.
    ///
    /// # Errors
    /// [`Broken::Memory`] unless each part lies in one region.
    pub(super) fn areas<'m>(&self, memory: &'m GuestMemoryMmap) -> Result<Areas<'m>, Broken> {
        let size = usize::from(self.size);
        let find = |at, len| memory.get_slice(at, len).map_err(|_| Broken::Memory);
        Ok(Areas {
            memory,
            descriptors: find(self.descriptor_table, size * DESCRIPTOR_LEN)?,
            avail: find(
                self.avail_ring,
                ELEMENTS + size * AVAIL_ELEMENT_LEN + EVENT_LEN,
            )?,
            used: find(
                self.used_ring,
                ELEMENTS + size * USED_ELEMENT_LEN + EVENT_LEN,
            )?,
        })
    }

    /// Takes the next chain that the driver has offered: its head, and its descriptors.
    ///
    /// # Errors
    /// [`Broken`]; nothing more is to be taken then.
    pub(super) fn take<'m>(
        &mut self,
        areas: &Areas<'m>,
    ) -> Result<Option<(u16, Chain<'m>)>, Broken> {
        if self.next_avail == self.seen_avail && !self.look_for_more(areas)? {
            return Ok(None);
        }
        let at = ELEMENTS + self.place_of(self.next_avail) * AVAIL_ELEMENT_LEN;
        let head = u16::from_le(areas.avail.get_ref::<u16>(at)?.load());
        if head >= self.size {
            return Err(Broken::Head(head));
        }
        self.next_avail += 1;
        Ok(Some((head, Chain::new(areas, head, self.size))))
    }

    fn look_for_more(&mut self, areas: &Areas<'_>) -> Result<bool, Broken> {
        self.seen_avail = avail_index(areas, Ordering::Acquire)?;
        let offered = (self.seen_avail - self.next_avail).0;
        if offered > self.size {
            return Err(Broken::AvailIndex);
        }
        Ok(offered > 0)
    }

    /// Gives the chain at `head` back, into which `len` bytes have been written.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn give_back(
        &mut self,
        areas: &Areas<'_>,
        head: u16,
        len: u32,
    ) -> Result<(), Broken> {
        let at = ELEMENTS + self.place_of(self.next_used) * USED_ELEMENT_LEN;
        areas
            .used
            .get_ref::<u32>(at)?
            .store(u32::from(head).to_le());
        areas.used.get_ref::<u32>(at + 4)?.store(len.to_le());
        self.next_used += 1;
        // Invariant 3: the release.
        areas
            .used
            .store(self.next_used.0.to_le(), INDEX, Ordering::Release)?;
        Ok(())
    }

    /// Whether the driver wants to be told of what was given back since this was last asked (section 2.7.7).
    pub(super) fn needs_notification(&mut self, areas: &Areas<'_>) -> Result<bool, Broken> {
        let added = self.next_used - std::mem::replace(&mut self.considered, self.next_used);
        // The driver says what it wants and then looks at the used ring; here it is the other way round.
        fence(Ordering::SeqCst);
        if !self.has_event_idx {
            let flags = u16::from_le(areas.avail.load(FLAGS, Ordering::Relaxed)?);
            return Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let at = ELEMENTS + usize::from(self.size) * AVAIL_ELEMENT_LEN;
        let used_event = Wrapping(u16::from_le(areas.avail.load(at, Ordering::Relaxed)?));
        Ok(self.next_used - used_event - Wrapping(1) < added)
    }

    /// Asks the driver not to kick (section 2.7.10).
    pub(super) fn suppress_kicks(&self, areas: &Areas<'_>) -> Result<(), Broken> {
        if !self.has_event_idx {
            let flags = u16::try_from(VRING_USED_F_NO_NOTIFY).map_err(|_| Broken::Memory)?;
            areas.used.store(flags.to_le(), FLAGS, Ordering::Relaxed)?;
        }
        // With event indices a kick comes once for each time that it is asked for.
        Ok(())
    }

    /// Asks to be kicked for the next chain; whether the ring is empty still.
    pub(super) fn request_kicks(&self, areas: &Areas<'_>) -> Result<bool, Broken> {
        if self.has_event_idx {
            let at = ELEMENTS + usize::from(self.size) * USED_ELEMENT_LEN;
            areas
                .used
                .store(self.next_avail.0.to_le(), at, Ordering::Relaxed)?;
        } else {
            areas.used.store(0u16, FLAGS, Ordering::Relaxed)?;
        }
        // The driver makes a chain available and then looks whether to kick; here it is the other way round.
        fence(Ordering::SeqCst);
        Ok(avail_index(areas, Ordering::Relaxed)? == self.next_avail)
    }

    fn place_of(&self, index: Wrapping<u16>) -> usize {
        // The size is a power of two.
        usize::from(index.0 & (self.size - 1))
    }
}

fn avail_index(areas: &Areas<'_>, order: Ordering) -> Result<Wrapping<u16>, Broken> {
    Ok(Wrapping(u16::from_le(areas.avail.load(INDEX, order)?)))
}

/// The descriptors of a chain, in order, those of an indirect table in place of the one that refers to it.
///
/// Ends early at whatever breaks a rule; its last descriptor then says that another follows.
pub(super) struct Chain<'m> {
    memory: &'m GuestMemoryMmap,
    table: Slice<'m>,
    /// Entries of the table.
    table_size: u16,
    next: u16,
    /// Descriptors that may follow (invariant 2).
    left: u16,
    is_indirect: bool,
    /// Bytes of all descriptors so far; a chain longer than 2^32 bytes is illegal (section 2.7.5.2).
    bytes: u32,
}

impl<'m> Chain<'m> {
    fn new(areas: &Areas<'m>, head: u16, size: u16) -> Self {
        Self {
            memory: areas.memory,
            table: areas.descriptors,
            table_size: size,
            next: head,
            left: size,
            is_indirect: false,
            bytes: 0,
        }
    }

    fn enter_indirect_table(&mut self, descriptor: &Descriptor) -> Option<()> {
        let len = usize::try_from(descriptor.len()).ok()?;
        if self.is_indirect || !len.is_multiple_of(DESCRIPTOR_LEN) {
            return None;
        }
        self.table_size = u16::try_from(len / DESCRIPTOR_LEN).ok()?;
        self.table = self.memory.get_slice(descriptor.addr(), len).ok()?;
        self.next = 0;
        self.left = self.table_size;
        self.is_indirect = true;
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        loop {
            if self.left == 0 || self.next >= self.table_size {
                return None;
            }
            let at = usize::from(self.next) * DESCRIPTOR_LEN;
            let descriptor = self.table.get_ref::<Descriptor>(at).ok()?.load();
            if descriptor.refers_to_indirect_table() {
                self.enter_indirect_table(&descriptor)?;
                continue;
            }
            self.bytes = self.bytes.checked_add(descriptor.len())?;
            if descriptor.has_next() {
                self.next = descriptor.next();
                self.left -= 1;
            } else {
                self.left = 0;
            }
            return Some(descriptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use virtio_queue::QueueOwnedT;
    use virtio_queue::desc::RawDescriptor;

    use super::*;

    const SIZE: u16 = 8;
    const TABLE: u64 = 0x0;
    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const INDIRECT: u64 = 0x3000;
    const LEN: usize = 0x4000;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LEN)]).unwrap()
    }

    fn queue(event_idx: bool, start: u16) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(TABLE))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(AVAIL))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_next_avail(start);
        queue.set_next_used(start);
        queue.set_ready(true);
        queue
    }

    fn put(memory: &GuestMemoryMmap, at: u64, value: u16) {
        memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Descriptors as a careless or hostile driver may leave them.
    fn random_table(rng: &mut StdRng, memory: &GuestMemoryMmap, table: u64, count: u16) {
        for index in 0..count {
            let flags = rng.random_range(0..4) | if rng.random_bool(0.2) { 4 } else { 0 };
            let len = match rng.random_range(0..8) {
                0 => u32::MAX,
                1 => 17,
                _ => 16 * rng.random_range(0..6),
            };
            let at = if rng.random_bool(0.1) {
                1 << 40
            } else {
                INDIRECT
            };
            let next = rng.random_range(0..SIZE + 1);
            let descriptor = RawDescriptor::from(Descriptor::new(at, len, flags, next));
            let place = GuestAddress(table + u64::from(index) * 16);
            memory.write_obj(descriptor, place).unwrap();
        }
    }

    fn parts(descriptor: Descriptor) -> (u64, u32, u16, u16) {
        (
            descriptor.addr().0,
            descriptor.len(),
            descriptor.flags(),
            descriptor.next(),
        )
    }

    fn bytes(memory: &GuestMemoryMmap) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    #[test]
    fn whatever_the_driver_does_is_taken_as_virtio_queue_takes_it() {
        for seed in 0..2000 {
            let mut rng = StdRng::seed_from_u64(seed);
            let memory = memory();
            let event_idx = rng.random_bool(0.5);
            let start = (u16::MAX - 1).wrapping_add(rng.random_range(0..4));
            let mut theirs = queue(event_idx, start);
            let mut ours = SplitRing::new(&theirs);
            let mut end = start;
            for _ in 0..20 {
                random_table(&mut rng, &memory, TABLE, SIZE);
                random_table(&mut rng, &memory, INDIRECT, 6);
                for place in 0..SIZE {
                    let head = rng.random_range(0..SIZE);
                    put(&memory, AVAIL + 4 + 2 * u64::from(place), head);
                }
                end = end.wrapping_add(rng.random_range(0..4));
                put(&memory, AVAIL + 2, end);
                put(
                    &memory,
                    AVAIL + 4 + 2 * u64::from(SIZE),
                    end.wrapping_sub(1),
                );
                step(seed, &memory, &mut theirs, &mut ours);
            }
        }
    }

    /// Takes and gives back all that is there, both ways.
    fn step(seed: u64, memory: &GuestMemoryMmap, theirs: &mut Queue, ours: &mut SplitRing) {
        let areas = ours.areas(memory).unwrap();
        let mut heads = Vec::new();
        while let Some((head, chain)) = ours.take(&areas).unwrap() {
            let expected = theirs.iter(memory).unwrap().next().unwrap();
            assert_eq!(head, expected.head_index(), "seed {seed}");
            let expected: Vec<_> = expected.map(parts).collect();
            let found: Vec<_> = chain.map(parts).collect();
            assert_eq!(found, expected, "seed {seed}");
            heads.push(head);
        }
        assert!(theirs.iter(memory).unwrap().next().is_none());
        for head in heads {
            theirs.add_used(memory, head, 17).unwrap();
            let after = bytes(memory);
            ours.give_back(&areas, head, 17).unwrap();
            assert_eq!(bytes(memory), after, "seed {seed}");
        }
        if theirs.event_idx_enabled() {
            let wanted = theirs.needs_notification(memory).unwrap();
            assert_eq!(ours.needs_notification(&areas), Ok(wanted), "seed {seed}");
        }
        theirs.disable_notification(memory).unwrap();
        let after = bytes(memory);
        ours.suppress_kicks(&areas).unwrap();
        assert_eq!(bytes(memory), after, "seed {seed}");
        let more = theirs.enable_notification(memory).unwrap();
        let after = bytes(memory);
        assert_eq!(ours.request_kicks(&areas), Ok(!more), "seed {seed}");
        assert_eq!(bytes(memory), after, "seed {seed}");
    }

    #[test]
    fn without_event_indices_the_driver_says_by_a_flag_whether_to_be_told() {
        let memory = memory();
        let mut ring = SplitRing::new(&queue(false, 0));
        let areas = ring.areas(&memory).unwrap();
        assert_eq!(ring.needs_notification(&areas), Ok(true));
        put(&memory, AVAIL, 1);
        assert_eq!(ring.needs_notification(&areas), Ok(false));
    }

    #[test]
    fn an_index_beyond_the_ring_and_a_head_outside_it_break_the_ring() {
        let memory = memory();
        let mut ring = SplitRing::new(&queue(true, 0));
        let areas = ring.areas(&memory).unwrap();
        put(&memory, AVAIL + 2, SIZE + 1);
        assert_eq!(ring.take(&areas).err(), Some(Broken::AvailIndex));
        let mut ring = SplitRing::new(&queue(true, 0));
        put(&memory, AVAIL + 2, 1);
        put(&memory, AVAIL + 4, SIZE);
        assert_eq!(ring.take(&areas).err(), Some(Broken::Head(SIZE)));
    }

    #[test]
    fn a_ring_across_two_regions_is_none() {
        let ranges = [(GuestAddress(0), 0x1008), (GuestAddress(0x1008), 0x3000)];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let ring = SplitRing::new(&queue(true, 0));
        assert_eq!(ring.areas(&memory).err(), Some(Broken::Memory));
    }
}
