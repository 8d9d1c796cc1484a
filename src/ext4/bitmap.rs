//! Block bitmaps and inode bitmaps (kernel documentation: "Block and inode Bitmaps").
//!
//! A bitmap fills one block. Bit `i` of byte `i / 8`, counted from the least significant, is item `i` of its group;
//! the bits behind the group's last item are set. The checksum is in the group's descriptor and covers
//! a whole group's items, even in a last group that is shorter.

use std::ops::Range;

use super::checksum::{Checksums, crc32c};

/// The value of every byte of a bitmap in which nothing is free.
pub const FULL: u8 = 0xff;

/// Whether item `index` is in use; so is whatever lies behind the bitmap's end.
#[must_use]
pub fn is_set(bitmap: &[u8], index: u32) -> bool {
    byte_of(index)
        .and_then(|at| bitmap.get(at))
        .is_none_or(|byte| byte & mask_of(index) != 0)
}

/// Marks item `index` as in use.
pub fn set(bitmap: &mut [u8], index: u32) {
    if let Some(byte) = byte_of(index).and_then(|at| bitmap.get_mut(at)) {
        *byte |= mask_of(index);
    }
}

/// Marks item `index` as free.
pub fn clear(bitmap: &mut [u8], index: u32) {
    if let Some(byte) = byte_of(index).and_then(|at| bitmap.get_mut(at)) {
        *byte &= !mask_of(index);
    }
}

/// Marks all items of `range` as in use.
pub fn set_range(bitmap: &mut [u8], range: Range<u32>) {
    for index in range {
        set(bitmap, index);
    }
}

/// The first free item of `range`.
#[must_use]
pub fn first_free(bitmap: &[u8], range: Range<u32>) -> Option<u32> {
    range.into_iter().find(|index| !is_set(bitmap, *index))
}

/// How many of the first `items` items are free.
#[must_use]
pub fn count_free(bitmap: &[u8], items: u32) -> u32 {
    let whole = usize::try_from(items / 8).unwrap_or(usize::MAX);
    let bytes: u32 = bitmap
        .iter()
        .take(whole)
        .map(|byte| byte.count_zeros())
        .sum();
    let rest = (items - items % 8..items).filter(|index| !is_set(bitmap, *index));
    bytes.saturating_add(u32::try_from(rest.count()).unwrap_or(u32::MAX))
}

/// The first of the first `items` items that is in use in `bitmap` but not in `expected`.
#[must_use]
pub fn first_set_beyond(bitmap: &[u8], expected: &[u8], items: u32) -> Option<u32> {
    let bytes = items.div_ceil(8);
    (0..bytes)
        .filter(|at| {
            let at = usize::try_from(*at).unwrap_or(usize::MAX);
            bitmap.get(at).unwrap_or(&FULL) & !expected.get(at).unwrap_or(&FULL) != 0
        })
        .flat_map(|at| at * 8..(at * 8 + 8).min(items))
        .find(|index| is_set(bitmap, *index) && !is_set(expected, *index))
}

/// The checksum of a bitmap whose groups have `items` items: under `metadata_csum` only. A 32-byte descriptor keeps
/// its lower 16 bits.
#[must_use]
pub fn checksum_of(checksums: &Checksums, bitmap: &[u8], items: u32) -> Option<u32> {
    let len = usize::try_from(items / 8).ok()?.min(bitmap.len());
    checksums.seed().map(|seed| crc32c(seed, &bitmap[..len]))
}

/// The checksum of a bitmap in which nothing is free; 0 where bitmaps carry none.
#[must_use]
pub fn full_checksum(checksums: &Checksums, items: u32) -> u32 {
    // As many bytes as the largest block has.
    checksum_of(checksums, &[FULL; 64 << 10], items).unwrap_or(0)
}

fn byte_of(index: u32) -> Option<usize> {
    usize::try_from(index / 8).ok()
}

fn mask_of(index: u32) -> u8 {
    1 << (index % 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_count_from_the_least_significant() {
        let mut bitmap = [0; 4];
        set_range(&mut bitmap, 3..10);
        assert_eq!(bitmap, [0b1111_1000, 0b0000_0011, 0, 0]);
        clear(&mut bitmap, 4);
        assert_eq!(first_free(&bitmap, 3..32), Some(4));
        assert_eq!(first_free(&bitmap, 5..10), None);
        assert_eq!(count_free(&bitmap, 32), 26);
        assert_eq!(count_free(&bitmap, 11), 5);
    }

    #[test]
    fn what_lies_behind_the_end_is_in_use() {
        let mut bitmap = [0; 1];
        assert!(is_set(&bitmap, 8));
        set(&mut bitmap, 8);
        clear(&mut bitmap, 9);
        assert_eq!(bitmap, [0]);
    }

    #[test]
    fn an_item_beyond_the_expected_ones_is_found() {
        let expected = [0x0f, 0];
        assert_eq!(first_set_beyond(&[0x03, 0], &expected, 16), None);
        assert_eq!(first_set_beyond(&[0x0f, 0x40], &expected, 16), Some(14));
        assert_eq!(first_set_beyond(&[0x0f, 0x40], &expected, 14), None);
    }

    #[test]
    fn the_checksum_covers_the_items_and_no_padding() {
        let checksums = Checksums::Crc32c { seed: 1 };
        let mut bitmap = [FULL; 64];
        assert_eq!(
            checksum_of(&checksums, &bitmap, 256),
            Some(full_checksum(&checksums, 256))
        );
        bitmap[32] = 0;
        assert_eq!(
            checksum_of(&checksums, &bitmap, 256),
            Some(full_checksum(&checksums, 256))
        );
        bitmap[31] = 0;
        assert_ne!(
            checksum_of(&checksums, &bitmap, 256),
            Some(full_checksum(&checksums, 256))
        );
        assert_eq!(checksum_of(&Checksums::None, &bitmap, 256), None);
        assert_eq!(full_checksum(&Checksums::None, 256), 0);
    }
}
