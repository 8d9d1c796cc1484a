//! Chooses where the requests of a disk go.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::load::{Load, Order, Pattern};
use crate::stamp::BLOCK_LEN;

/// The offsets of a disk's requests, one after the other.
pub(crate) struct Places {
    pattern: Pattern,
    /// Bytes of a request.
    len: u64,
    start: u64,
    /// Bytes that requests go to.
    room: u64,
    next: u64,
    /// For [`Pattern::Once`]: the units that are left, the next one last.
    left: Vec<u64>,
    random: StdRng,
}

impl Places {
    /// Places of `load` within the `room` bytes at `start`.
    pub(crate) fn new(load: &Load, start: u64, room: u64, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut left = Vec::new();
        if let Pattern::Once { unit, order } = load.pattern {
            left = (0..room / unit).rev().collect();
            if order != Order::Forward {
                left.shuffle(&mut random);
            }
        }
        Self {
            pattern: load.pattern,
            len: load.len as u64,
            start,
            room,
            next: 0,
            left,
            random,
        }
    }

    /// These offsets, and no more.
    pub(crate) fn these(offsets: Vec<u64>) -> Self {
        Self {
            pattern: Pattern::Once {
                unit: 1,
                order: Order::Forward,
            },
            len: 0,
            start: 0,
            room: 0,
            next: 0,
            left: offsets,
            random: StdRng::seed_from_u64(0),
        }
    }
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let at = match self.pattern {
            Pattern::Random => self.random.random_range(0..self.room / self.len) * self.len,
            Pattern::Sequential => {
                let at = self.next;
                self.next = (at + self.len) % (self.room / self.len * self.len);
                at
            }
            Pattern::Once { unit, order } => {
                let unit_start = self.left.pop()? * unit;
                match order {
                    Order::Forward | Order::Random => unit_start,
                    Order::RandomInside => {
                        let last = (unit - self.len) / BLOCK_LEN;
                        unit_start + self.random.random_range(0..=last) * BLOCK_LEN
                    }
                }
            }
        };
        Some(self.start + at)
    }
}
