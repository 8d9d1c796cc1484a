//! A hash for host offsets and cluster numbers: two multiplications. An image's maker can choose collisions, which
//! slow down the use of that image alone.

use std::hash::Hasher;

/// Hashes one 64-bit number.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // The table takes the top bits and the bottom ones, and offsets differ in the middle: mix twice.
        let mixed = (self.0 ^ number).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 32).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = mixed ^ mixed >> 31;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn offsets_a_power_of_two_apart_spread_over_high_and_low_bits() {
        let hash = |number: u64| {
            let mut hasher = AddressHasher::default();
            hasher.write_u64(number);
            hasher.finish()
        };
        for shift in [9, 14, 16, 21, 30] {
            let hashes: Vec<u64> = (1..=256u64).map(|i| hash(i << shift)).collect();
            let low: HashSet<u64> = hashes.iter().map(|h| h & 0xff).collect();
            let high: HashSet<u64> = hashes.iter().map(|h| h >> 57).collect();
            assert!(
                low.len() > 128 && high.len() > 64,
                "shift {shift}: {} {}",
                low.len(),
                high.len()
            );
        }
    }
}
