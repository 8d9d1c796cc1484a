//! Zero bytes to write, in memory that all writes share.

use std::sync::OnceLock;

use crate::sys::IoBuf;

const LEN: usize = 64 << 10;

/// `len` zero bytes. No one may write into them.
pub(super) fn zeros(len: usize) -> IoBuf {
    static SHARED: OnceLock<IoBuf> = OnceLock::new();
    let shared = SHARED.get_or_init(|| IoBuf::zeroed(LEN));
    let parts = (0..len)
        .step_by(LEN)
        .map(|done| shared.slice(0..LEN.min(len - done)));
    IoBuf::concat(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_is_served() {
        for len in [0, 1, LEN, 3 * LEN + 5] {
            assert_eq!(zeros(len).to_vec(), vec![0; len]);
        }
    }
}
