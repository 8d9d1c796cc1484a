//! Little-endian and big-endian fields of on-disk records.
//!
//! ext4 lets records grow: a 32-byte descriptor lacks the upper halves of a 64-byte one, a 128-byte inode the
//! extra fields of a 256-byte one, and a field that is not there counts as zero. These functions say the same:
//! a field that does not lie wholly inside the record reads as zero, and a write to it goes nowhere.

/// The `N` bytes at `at`, or zeros if the record ends before them.
fn array_at<const N: usize>(record: &[u8], at: usize) -> [u8; N] {
    record
        .get(at..)
        .and_then(|tail| tail.first_chunk::<N>())
        .copied()
        .unwrap_or([0; N])
}

/// Writes `value` at `at` if the record has room for all of it.
pub(super) fn put_bytes(record: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = at
        .checked_add(value.len())
        .and_then(|end| record.get_mut(at..end))
    {
        field.copy_from_slice(value);
    }
}

/// The byte at `at`.
pub(super) fn u8_at(record: &[u8], at: usize) -> u8 {
    record.get(at).copied().unwrap_or(0)
}

/// The little-endian 16-bit field at `at`.
pub(super) fn le16(record: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(record, at))
}

/// The little-endian 32-bit field at `at`.
pub(super) fn le32(record: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(record, at))
}

/// The big-endian 16-bit field at `at`.
pub(super) fn be16(record: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array_at(record, at))
}

/// The big-endian 32-bit field at `at`.
pub(super) fn be32(record: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array_at(record, at))
}

/// The 32-bit number whose 16-bit halves lie at `lo` and `hi`.
pub(super) fn split16(record: &[u8], lo: usize, hi: usize) -> u32 {
    u32::from(le16(record, lo)) | (u32::from(le16(record, hi)) << 16)
}

/// The 64-bit number whose 32-bit halves lie at `lo` and `hi`.
pub(super) fn split32(record: &[u8], lo: usize, hi: usize) -> u64 {
    u64::from(le32(record, lo)) | (u64::from(le32(record, hi)) << 32)
}

/// The `N` bytes at `at`.
pub(super) fn bytes_at<const N: usize>(record: &[u8], at: usize) -> [u8; N] {
    array_at(record, at)
}

/// Writes a little-endian 16-bit field.
pub(super) fn put_le16(record: &mut [u8], at: usize, value: u16) {
    put_bytes(record, at, &value.to_le_bytes());
}

/// Writes a little-endian 32-bit field.
pub(super) fn put_le32(record: &mut [u8], at: usize, value: u32) {
    put_bytes(record, at, &value.to_le_bytes());
}

/// Writes a big-endian 32-bit field.
pub(super) fn put_be32(record: &mut [u8], at: usize, value: u32) {
    put_bytes(record, at, &value.to_be_bytes());
}

/// Writes a 32-bit number as two 16-bit halves.
pub(super) fn put_split16(record: &mut [u8], lo: usize, hi: usize, value: u32) {
    put_le16(record, lo, low16(value));
    put_le16(record, hi, low16(value >> 16));
}

/// Writes a 64-bit number as two 32-bit halves.
pub(super) fn put_split32(record: &mut [u8], lo: usize, hi: usize, value: u64) {
    put_le32(record, lo, low32(value));
    put_le32(record, hi, low32(value >> 32));
}

/// The lower half of a 32-bit number.
pub(super) fn low16(value: u32) -> u16 {
    let [a, b, _, _] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// The lower half of a 64-bit number.
pub(super) fn low32(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_behind_the_end_reads_as_zero_and_takes_no_write() {
        let mut record = [0xff; 5];
        assert_eq!(le16(&record, 3), 0xffff);
        assert_eq!(le16(&record, 4), 0);
        assert_eq!(le32(&record, usize::MAX), 0);
        put_le32(&mut record, 2, 0);
        put_le32(&mut record, usize::MAX, 0);
        assert_eq!(record, [0xff; 5]);
    }

    #[test]
    fn halves_are_put_where_they_are_read() {
        let mut record = [0; 16];
        put_split16(&mut record, 2, 12, 0x1234_5678);
        assert_eq!(record[2..4], [0x78, 0x56]);
        assert_eq!(split16(&record, 2, 12), 0x1234_5678);
        put_split32(&mut record, 4, 8, 0x0102_0304_0506_0708);
        assert_eq!(split32(&record, 4, 8), 0x0102_0304_0506_0708);
    }
}
