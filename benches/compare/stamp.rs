//! Stamps: the first bytes of every 4 KiB block of a disk say which block it is and who wrote it, so that whoever reads
//! it can tell.

/// Bytes of a block that has a stamp.
pub(crate) const BLOCK: usize = 4096;
/// The same as a length on a disk.
pub(crate) const BLOCK_LEN: u64 = 4096;
/// Bytes of a stamp.
pub(crate) const STAMP_LEN: usize = 16;

const MAGIC: u32 = 0x7368_7421;

/// What the first bytes of a block say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The block's number: its offset on the disk, divided by its length.
    pub(crate) block: u64,
    /// Tells those apart that wrote it: the layer of a chain, or a measurement.
    pub(crate) generation: u32,
}

impl Stamp {
    pub(crate) fn to_bytes(self) -> [u8; STAMP_LEN] {
        let mut bytes = [0; STAMP_LEN];
        bytes[..8].copy_from_slice(&self.block.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.generation.to_le_bytes());
        bytes[12..].copy_from_slice(&MAGIC.to_le_bytes());
        bytes
    }

    /// The stamp in `bytes`, if there is one.
    pub(crate) fn from_bytes(bytes: [u8; STAMP_LEN]) -> Option<Self> {
        let (block, rest) = bytes.split_first_chunk::<8>()?;
        let (generation, magic) = rest.split_first_chunk::<4>()?;
        (magic == MAGIC.to_le_bytes()).then(|| Self {
            block: u64::from_le_bytes(*block),
            generation: u32::from_le_bytes(*generation),
        })
    }
}

/// Fills `block` with words, which compress about as well as what disks hold, and the stamp of generation 0.
pub(crate) fn fill(number: u64, block: &mut [u8; BLOCK]) {
    const WORDS: [&[u8; 8]; 16] = [
        b"cluster ",
        b"refcount",
        b" of the ",
        b"backing ",
        b"overlay\n",
        b"mapping ",
        b"and then",
        b" a read ",
        b"written ",
        b"inode 0x",
        b", which ",
        b"block 4k",
        b"\0\0\0\0\0\0\0\0",
        b"journal ",
        b"is group",
        b"=65536; ",
    ];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in block.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let choice = usize::from(state.to_le_bytes()[3]);
        // One in eight is noise.
        *chunk = match choice {
            0..32 => state.to_le_bytes(),
            _ => *WORDS[choice % WORDS.len()],
        };
    }
    let stamp = Stamp {
        block: number,
        generation: 0,
    };
    block[..STAMP_LEN].copy_from_slice(&stamp.to_bytes());
}
