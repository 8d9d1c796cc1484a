//! The hashes of names in hashed directories (kernel documentation: "Hash Tree Directories"): a legacy one, one made of
//! half of MD4's rounds, and one made of the Tiny Encryption Algorithm. Each takes a name's bytes as signed or as
//! unsigned numbers, as the machine did that made the filesystem.

use crate::error::{Error, ErrorKind, Result};

/// `s_flags`: bytes of names are unsigned.
const FLAGS_UNSIGNED_HASH: u32 = 0x2;
/// What the largest hash, kept for the end of a directory, becomes.
const HASH_EOF: u32 = 0x7fff_ffff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Legacy,
    HalfMd4,
    Tea,
}

/// How names are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashVersion {
    algorithm: Algorithm,
    unsigned: bool,
}

impl HashVersion {
    /// The version that an index's root names, with the superblock's `s_flags`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for one that this program does not know.
    pub fn new(hash_version: u8, s_flags: u32) -> Result<Self> {
        let algorithm = match hash_version % 3 {
            0 => Algorithm::Legacy,
            1 => Algorithm::HalfMd4,
            _ => Algorithm::Tea,
        };
        match hash_version {
            0..=2 => Ok(Self {
                algorithm,
                unsigned: s_flags & FLAGS_UNSIGNED_HASH != 0,
            }),
            3..=5 => Ok(Self {
                algorithm,
                unsigned: true,
            }),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "names are hashed by version {hash_version}, which is not handled; take another directory"
                ),
            )),
        }
    }

    /// A byte of a name as a number.
    fn widen(self, byte: u8) -> u32 {
        if self.unsigned {
            u32::from(byte)
        } else {
            i32::from(byte.cast_signed()).cast_unsigned()
        }
    }
}

/// The hash of `name`; its lowest bit is always clear. `s_hash_seed` is used unless it is all zeros.
#[must_use]
pub fn dirhash(version: HashVersion, s_hash_seed: &[u32; 4], name: &[u8]) -> u32 {
    const MD4_START: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
    let mut state = if s_hash_seed.iter().any(|word| *word != 0) {
        *s_hash_seed
    } else {
        MD4_START
    };
    let hash = match version.algorithm {
        Algorithm::Legacy => legacy(version, name),
        Algorithm::HalfMd4 => {
            for at in chunks(name, 32) {
                half_md4(&mut state, &words::<8>(version, &name[at..]));
            }
            state[1]
        }
        Algorithm::Tea => {
            for at in chunks(name, 16) {
                tea(&mut state, &words::<4>(version, &name[at..]));
            }
            state[0]
        }
    } & !1;
    if hash == HASH_EOF << 1 {
        (HASH_EOF - 1) << 1
    } else {
        hash
    }
}

/// Where the pieces of `len` bytes begin that a name is hashed in.
fn chunks(name: &[u8], len: usize) -> impl Iterator<Item = usize> {
    (0..name.len()).step_by(len)
}

/// The first `N` words of what is left of a name, filled up with its length.
fn words<const N: usize>(version: HashVersion, rest: &[u8]) -> [u32; N] {
    let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    let pad = len | (len << 8);
    let pad = pad | (pad << 16);
    let mut words = [pad; N];
    for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
        for byte in bytes {
            *word = version.widen(*byte).wrapping_add(*word << 8);
        }
    }
    words
}

fn legacy(version: HashVersion, name: &[u8]) -> u32 {
    let (mut hash0, mut hash1) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
    for byte in name {
        let mixed = version.widen(*byte).wrapping_mul(7_152_373);
        let mut hash = hash1.wrapping_add(hash0 ^ mixed);
        if hash & 0x8000_0000 != 0 {
            hash = hash.wrapping_sub(0x7fff_ffff);
        }
        hash1 = hash0;
        hash0 = hash;
    }
    hash0 << 1
}

fn tea(state: &mut [u32; 4], key: &[u32; 4]) {
    const DELTA: u32 = 0x9e37_79b9;
    let [mut b0, mut b1, ..] = *state;
    let mut sum = 0u32;
    for _ in 0..16 {
        sum = sum.wrapping_add(DELTA);
        let mix = |b: u32, k0: u32, k1: u32| {
            (b << 4).wrapping_add(k0) ^ b.wrapping_add(sum) ^ (b >> 5).wrapping_add(k1)
        };
        b0 = b0.wrapping_add(mix(b1, key[0], key[1]));
        b1 = b1.wrapping_add(mix(b0, key[2], key[3]));
    }
    state[0] = state[0].wrapping_add(b0);
    state[1] = state[1].wrapping_add(b1);
}

/// One of MD4's rounds: its function, its constant, the order of the words, and the rotations.
type Round = (fn(u32, u32, u32) -> u32, u32, [usize; 8], [u32; 4]);

fn half_md4(state: &mut [u32; 4], input: &[u32; 8]) {
    const ROUNDS: [Round; 3] = [
        (
            |x, y, z| z ^ (x & (y ^ z)),
            0,
            [0, 1, 2, 3, 4, 5, 6, 7],
            [3, 7, 11, 19],
        ),
        (
            |x, y, z| (x & y).wrapping_add((x ^ y) & z),
            0x5a82_7999,
            [1, 3, 5, 7, 0, 2, 4, 6],
            [3, 5, 9, 13],
        ),
        (
            |x, y, z| x ^ y ^ z,
            0x6ed9_eba1,
            [3, 7, 2, 6, 1, 5, 0, 4],
            [3, 9, 11, 15],
        ),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (function, constant, order, rotations) in ROUNDS {
        for (step, word) in order.into_iter().enumerate() {
            let mixed = a
                .wrapping_add(function(b, c, d))
                .wrapping_add(input[word])
                .wrapping_add(constant)
                .rotate_left(rotations[step % 4]);
            // The next step takes the four in the order d, a, b, c.
            (a, b, c, d) = (d, mixed, b, c);
        }
    }
    for (word, mixed) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(mixed);
    }
}
