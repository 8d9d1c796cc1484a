//! A descriptor chain as two streams of bytes (virtio 1.3, section 2.7): first what the device reads, then
//! what it writes. How a driver frames a request in descriptors carries no meaning (section 2.7.4).

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Descriptors a request may take beside those of its data: header and status.
const EXTRA_DESCRIPTORS: usize = 2;

/// Some of a chain's bytes, in order.
#[derive(Debug, Default)]
pub(super) struct Stream {
    ranges: Vec<(GuestAddress, u32)>,
    first: usize,
}

impl Stream {
    fn clear(&mut self) {
        self.ranges.clear();
        self.first = 0;
    }

    /// Bytes left.
    pub(super) fn len(&self) -> u64 {
        self.rest().map(|(_, len)| u64::from(len)).sum()
    }

    /// The ranges left, in order; none is empty.
    pub(super) fn rest(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.ranges[self.first..]
            .iter()
            .copied()
            .filter(|(_, len)| *len > 0)
    }

    /// Takes `into.len()` bytes off the front, copying them out of guest memory; `None` if there are fewer, or if
    /// they lie outside the guest's memory.
    pub(super) fn take_front(&mut self, memory: &GuestMemoryMmap, into: &mut [u8]) -> Option<()> {
        let mut done = 0;
        while done < into.len() {
            let (address, len) = self.ranges.get_mut(self.first)?;
            let room = u32::try_from(into.len() - done).unwrap_or(u32::MAX);
            let now = (*len).min(room);
            let end = done + usize::try_from(now).ok()?;
            read_guest(memory, *address, &mut into[done..end])?;
            *address = address.checked_add(u64::from(now))?;
            *len -= now;
            if *len == 0 {
                self.first += 1;
            }
            done = end;
        }
        Some(())
    }

    /// Takes the last byte off; its address.
    fn take_last(&mut self) -> Option<GuestAddress> {
        let (address, len) = self.ranges[self.first..]
            .iter_mut()
            .rev()
            .find(|(_, len)| *len > 0)?;
        *len -= 1;
        address.checked_add(u64::from(*len))
    }
}

/// Copies `into.len()` bytes at `at` out of guest memory, mostly from one region, which is then looked for only once.
fn read_guest(memory: &GuestMemoryMmap, at: GuestAddress, into: &mut [u8]) -> Option<()> {
    match memory.get_slice(at, into.len()) {
        Ok(slice) => {
            slice.copy_to(into);
            Some(())
        }
        Err(_) => memory.read_slice(into, at).ok(),
    }
}

/// Takes descriptor chains apart; one per queue, so that its room is there when the next chain comes.
#[derive(Debug)]
pub struct ChainReader {
    pub(super) readable: Stream,
    pub(super) writable: Stream,
    max_descriptors: usize,
}

/// What is known of a chain once it has been walked.
pub(super) struct Walked {
    /// Where the status byte goes.
    pub(super) status_at: Option<GuestAddress>,
    /// Whether the chain has the shape that every request has.
    pub(super) well_formed: bool,
}

impl ChainReader {
    /// A reader for chains with at most `seg_max` data descriptors.
    #[must_use]
    pub fn new(seg_max: u32) -> Self {
        let seg_max = usize::try_from(seg_max).unwrap_or(usize::MAX);
        Self {
            readable: Stream::default(),
            writable: Stream::default(),
            max_descriptors: seg_max.saturating_add(EXTRA_DESCRIPTORS),
        }
    }

    /// Walks `chain` to its end. The chain's own bound on its length (ring or indirect table) bounds the walk;
    /// memory is bounded by the longest well-formed chain.
    pub(super) fn walk(
        &mut self,
        chain: impl Iterator<Item = Descriptor>,
        memory: &GuestMemoryMmap,
    ) -> Walked {
        self.readable.clear();
        self.writable.clear();
        let mut stored = 0;
        let mut in_order = true;
        let mut writable_end = None;
        // An iterator that fails ends as one that is done; an open `next` tells them apart.
        let mut ended = false;
        for descriptor in chain {
            ended = !descriptor.has_next();
            let range = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                if descriptor.len() > 0 {
                    writable_end = range.0.checked_add(u64::from(range.1 - 1));
                }
            } else if writable_end.is_some() {
                in_order = false;
            }
            stored += 1;
            if stored <= self.max_descriptors {
                let stream = if descriptor.is_write_only() {
                    &mut self.writable
                } else {
                    &mut self.readable
                };
                stream.ranges.push(range);
            }
        }
        if !ended {
            // Without the chain's end nobody knows where the status byte is.
            return Walked {
                status_at: None,
                well_formed: false,
            };
        }
        let complete = stored <= self.max_descriptors;
        if complete {
            let _ = self.writable.take_last();
        }
        let status_at = writable_end.filter(|at| memory.address_in_range(*at));
        Walked {
            status_at,
            well_formed: complete && in_order && status_at.is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DATA, Driver, Part};
    use super::*;

    fn walk(driver: &Driver, parts: &[Part], seg_max: u32) -> (Walked, ChainReader) {
        let mut reader = ChainReader::new(seg_max);
        let walked = reader.walk(driver.chain(parts), driver.memory());
        (walked, reader)
    }

    #[test]
    fn status_is_the_last_writable_byte_whatever_the_framing() {
        let driver = Driver::new();
        let (walked, reader) = walk(
            &driver,
            &[
                Part::Out(DATA, 16),
                Part::In(DATA + 0x100, 513),
                Part::In(DATA + 0x1000, 0),
            ],
            8,
        );
        assert!(walked.well_formed);
        assert_eq!(walked.status_at, Some(GuestAddress(DATA + 0x100 + 512)));
        assert_eq!(reader.writable.len(), 512);
        assert_eq!(reader.readable.len(), 16);
    }

    #[test]
    fn a_header_split_over_descriptors_is_read_whole() {
        let driver = Driver::new();
        driver
            .memory()
            .write_slice(b"abcdefgh", GuestAddress(DATA))
            .unwrap();
        let (_, mut reader) = walk(
            &driver,
            &[
                Part::Out(DATA, 3),
                Part::Out(DATA, 0),
                Part::Out(DATA + 3, 5),
                Part::In(DATA, 1),
            ],
            8,
        );
        let mut bytes = [0; 6];
        reader
            .readable
            .take_front(driver.memory(), &mut bytes)
            .unwrap();
        assert_eq!(&bytes, b"abcdef");
        assert_eq!(
            reader.readable.rest().collect::<Vec<_>>(),
            [(GuestAddress(DATA + 6), 2)]
        );
        assert!(
            reader
                .readable
                .take_front(driver.memory(), &mut [0; 3])
                .is_none()
        );
    }

    #[test]
    fn readable_after_writable_is_malformed_but_has_a_status_byte() {
        let driver = Driver::new();
        let (walked, _) = walk(&driver, &[Part::In(DATA, 1), Part::Out(DATA, 16)], 8);
        assert!(!walked.well_formed);
        assert_eq!(walked.status_at, Some(GuestAddress(DATA)));
    }

    #[test]
    fn too_many_segments_are_malformed_without_being_stored() {
        let driver = Driver::new();
        let mut parts = vec![Part::Out(DATA, 16); 7];
        parts.push(Part::In(DATA + 0x100, 1));
        let (walked, reader) = walk(&driver, &parts, 4);
        assert!(!walked.well_formed);
        assert_eq!(walked.status_at, Some(GuestAddress(DATA + 0x100)));
        assert_eq!(reader.readable.ranges.len(), 6);
        let (walked, _) = walk(&driver, &parts, 6);
        assert!(walked.well_formed);
    }

    #[test]
    fn a_chain_that_loops_or_leaves_memory_has_no_status_byte() {
        let driver = Driver::new();
        for broken in [
            Driver::looping_chain,
            Driver::indirect_in_nowhere,
            Driver::nested_indirect,
        ] {
            let mut reader = ChainReader::new(8);
            let walked = reader.walk(broken(&driver), driver.memory());
            assert!(!walked.well_formed);
            assert_eq!(walked.status_at, None);
        }
    }

    #[test]
    fn a_status_byte_outside_memory_is_none() {
        let driver = Driver::new();
        let (walked, _) = walk(&driver, &[Part::Out(DATA, 16), Part::In(1 << 40, 1)], 8);
        assert!(!walked.well_formed);
        assert_eq!(walked.status_at, None);
    }

    #[test]
    fn a_chain_without_writable_bytes_is_malformed() {
        let driver = Driver::new();
        let (walked, _) = walk(&driver, &[Part::Out(DATA, 16), Part::In(DATA, 0)], 8);
        assert!(!walked.well_formed);
        assert_eq!(walked.status_at, None);
    }
}
