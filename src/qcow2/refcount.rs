//! Refcounts of every width inside a refcount block (qcow2 specification, "Refcounts").
//!
//! Widths of a byte and more are big-endian numbers; narrower ones are packed, the first entry in the least
//! significant bits of its byte.

use super::geometry::to_usize;

/// The refcount at `index` of `block`, with entries of 2 to the power of `order` bits; 0 outside the block.
pub(super) fn get(block: &[u8], index: u64, order: u32) -> u64 {
    let (start, len, shift) = place(index, order);
    let Some(bytes) = block.get(start..start + len) else {
        return 0;
    };
    let value = bytes
        .iter()
        .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    if order < 3 {
        value >> shift & low_bits(order)
    } else {
        value
    }
}

/// Sets the refcount at `index` of `block`. Nothing happens outside the block; the caller has checked that the
/// value fits the width.
pub(super) fn set(block: &mut [u8], index: u64, order: u32, value: u64) {
    let (start, len, shift) = place(index, order);
    let Some(bytes) = block.get_mut(start..start + len) else {
        return;
    };
    if order < 3 {
        let [byte, ..] = bytes else { return };
        let mask = low_bits(order) << shift;
        let [.., low] = (u64::from(*byte) & !mask | value << shift & mask).to_be_bytes();
        *byte = low;
    } else {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
}

/// The largest refcount of 2 to the power of `order` bits.
pub(super) fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1u32 << order.min(6)))
}

/// The bytes of `block` that hold the refcount at `index`: where they start, and how many they are.
pub(super) fn bytes_of(index: u64, order: u32) -> std::ops::Range<usize> {
    let (start, len, _) = place(index, order);
    start..start + len
}

/// Start and length in bytes, and the shift inside a byte for widths below a byte.
fn place(index: u64, order: u32) -> (usize, usize, u32) {
    let bit = index << order;
    let len = 1usize << order.saturating_sub(3);
    let shift = u32::try_from(bit & 7).expect("three bits");
    (to_usize(bit >> 3), len, shift)
}

fn low_bits(order: u32) -> u64 {
    (1 << (1 << order)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_refcounts_are_packed_from_the_least_significant_bits() {
        let mut block = [0u8; 2];
        set(&mut block, 0, 0, 1);
        set(&mut block, 9, 0, 1);
        assert_eq!(block, [0b1, 0b10]);
        let mut block = [0u8; 2];
        set(&mut block, 1, 1, 3);
        set(&mut block, 3, 2, 0xa);
        assert_eq!(block, [0b1100, 0xa0]);
        assert_eq!(get(&block, 1, 1), 3);
        assert_eq!(get(&block, 3, 2), 0xa);
    }

    #[test]
    fn wide_refcounts_are_big_endian() {
        for order in 3..=6 {
            let mut block = [0u8; 32];
            set(&mut block, 2, order, 0x7f);
            let width = 1 << (order - 3);
            assert_eq!(block[3 * width - 1], 0x7f, "order {order}");
            assert_eq!(get(&block, 2, order), 0x7f);
            assert_eq!(get(&block, 1, order), 0);
        }
    }

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let mut block = vec![0xff; 64];
            set(&mut block, 3, order, 0);
            for index in 0..(64 * 8) >> order {
                let expected = if index == 3 { 0 } else { max(order) };
                assert_eq!(get(&block, index, order), expected);
            }
        }
    }

    #[test]
    fn an_index_outside_the_block_is_zero_and_changes_nothing() {
        let mut block = [0xff; 8];
        set(&mut block, 8, 3, 0);
        assert_eq!(get(&block, 8, 3), 0);
        assert_eq!(block, [0xff; 8]);
    }
}
