//! The requests that a worker has taken from its ring and not answered yet.

use vm_memory::GuestAddress;

use crate::image::InFlight;
use crate::virtio_blk::Status;

/// What it takes to answer a request.
#[derive(Debug)]
pub(super) struct Reply {
    /// The head of its descriptor chain.
    pub(super) head: u16,
    /// Where its status byte goes, if it has one.
    pub(super) status_at: Option<GuestAddress>,
    /// Bytes that the device wrote to guest memory, the status byte aside.
    pub(super) written_len: u32,
}

/// A request whose reply is due.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) token: u64,
    pub(super) status: Status,
}

#[derive(Debug)]
struct Pending {
    reply: Reply,
    /// Holds the host range of a request on the fast path in place.
    _guard: InFlight,
}

/// Requests under way, by token. There is room for as many as a ring can hold, and never for more: a driver that
/// offers a descriptor twice waits.
#[derive(Debug)]
pub(super) struct PendingRequests {
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
}

impl PendingRequests {
    /// Room for the requests of a ring of `queue_size` entries.
    pub(super) fn new(queue_size: u16) -> Self {
        let mut slots = Vec::new();
        slots.resize_with(usize::from(queue_size), || None);
        let free = (0..slots.len()).rev().collect();
        Self { slots, free }
    }

    /// Requests under way.
    pub(super) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether no more can be taken.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Notes a request, which keeps `guard` until it has ended; the token to end it with.
    ///
    /// # Panics
    /// If there is no room, which the caller has looked at.
    pub(super) fn begin(&mut self, reply: Reply, guard: InFlight) -> u64 {
        let slot = self.free.pop().expect("the caller has seen room");
        self.slots[slot] = Some(Pending {
            reply,
            _guard: guard,
        });
        u64::try_from(slot).expect("at most 65535 slots")
    }

    /// Takes the request of `token`, which has ended.
    pub(super) fn end(&mut self, token: u64) -> Option<Reply> {
        let slot = usize::try_from(token).ok()?;
        let pending = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(pending.reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(head: u16) -> Reply {
        Reply {
            head,
            status_at: None,
            written_len: 0,
        }
    }

    #[test]
    fn there_is_room_for_a_ring_and_no_more() {
        let mut pending = PendingRequests::new(2);
        let first = pending.begin(reply(7), InFlight::none());
        let second = pending.begin(reply(8), InFlight::none());
        assert!(pending.is_full());
        assert_eq!(pending.end(first).unwrap().head, 7);
        assert!(pending.end(first).is_none(), "a request ends once");
        assert_eq!(pending.count(), 1);
        let third = pending.begin(reply(9), InFlight::none());
        assert_eq!(pending.end(second).unwrap().head, 8);
        assert_eq!(pending.end(third).unwrap().head, 9);
        assert!(pending.end(u64::MAX).is_none());
    }

    #[test]
    fn the_guard_is_held_until_the_request_ends() {
        let token: std::sync::Arc<dyn Send + Sync + std::any::Any> = std::sync::Arc::new(());
        let mut pending = PendingRequests::new(1);
        let request = pending.begin(reply(0), InFlight::holding(std::sync::Arc::clone(&token)));
        assert_eq!(std::sync::Arc::strong_count(&token), 2);
        pending.end(request);
        assert_eq!(std::sync::Arc::strong_count(&token), 1);
    }
}
