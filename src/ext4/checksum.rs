//! The two checksums of ext4 metadata, and which of them a filesystem uses
//! (kernel documentation: "Checksums").
//!
//! With `metadata_csum` every structure carries a CRC-32C that starts from a seed of the filesystem; with the older
//! `uninit_bg` (`gdt_csum`) only group descriptors carry a CRC-16. Neither inverts its result.

use crc::{Algorithm, CRC_16_MODBUS, Crc, Table};

/// CRC-32C as the kernel's `crc32c()` computes it: the seed goes in as it is, and nothing is inverted at the end.
const CRC32C_RAW: Algorithm<u32> = Algorithm {
    width: 32,
    poly: 0x1edc_6f41,
    init: 0,
    refin: true,
    refout: true,
    xorout: 0,
    check: 0x58e3_fa20,
    residue: 0,
};

static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC32C_RAW);
static CRC16: Crc<u16> = Crc::<u16>::new(&CRC_16_MODBUS);

/// The kernel's `crc32c(seed, bytes)`; results chain as the seed of what follows.
#[must_use]
pub fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    // The crate takes the initial value in the polynomial's bit order and reflects it itself.
    let mut digest = CRC32C.digest_with_initial(seed.reverse_bits());
    digest.update(bytes);
    digest.finalize()
}

/// The kernel's `crc16(~0, …)` over the concatenation of `parts`.
#[must_use]
pub fn crc16(parts: &[&[u8]]) -> u16 {
    let mut digest = CRC16.digest();
    for part in parts {
        digest.update(part);
    }
    digest.finalize()
}

/// How a filesystem protects its metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksums {
    /// Not at all.
    None,
    /// `uninit_bg`: a CRC-16 in each group descriptor, that starts from the filesystem's UUID.
    DescriptorCrc16 {
        /// `s_uuid`.
        uuid: [u8; 16],
    },
    /// `metadata_csum`: a CRC-32C in every structure.
    Crc32c {
        /// `s_checksum_seed`, or the CRC of the UUID.
        seed: u32,
    },
}

impl Checksums {
    /// The seed for structures that only `metadata_csum` protects; `None` if they carry no checksum.
    #[must_use]
    pub fn seed(&self) -> Option<u32> {
        match self {
            Self::Crc32c { seed } => Some(*seed),
            Self::None | Self::DescriptorCrc16 { .. } => None,
        }
    }

    /// Whether group descriptors carry a checksum, and their UNINIT flags therefore mean something.
    #[must_use]
    pub fn covers_descriptors(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// The seed for what belongs to one inode: its own record, its extent blocks and directory blocks.
    #[must_use]
    pub fn inode_seed(&self, inode: crate::units::InodeNumber, i_generation: u32) -> Option<u32> {
        let seed = crc32c(self.seed()?, &inode.0.to_le_bytes());
        Some(crc32c(seed, &i_generation.to_le_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_is_the_standard_one_without_the_final_inversion() {
        // The check value of CRC-32/ISCSI, from its catalogue.
        assert_eq!(!crc32c(u32::MAX, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn crc32c_chains_through_its_seed() {
        let whole = crc32c(u32::MAX, b"block group");
        assert_eq!(crc32c(crc32c(u32::MAX, b"block"), b" group"), whole);
        assert_eq!(crc32c(0x1234_5678, b""), 0x1234_5678);
    }

    #[test]
    fn crc16_is_modbus_and_ignores_where_parts_end() {
        assert_eq!(crc16(&[b"123456789"]), 0x4b37);
        assert_eq!(crc16(&[b"1234", b"", b"56789"]), 0x4b37);
    }

    #[test]
    fn only_metadata_csum_seeds_inodes() {
        let inode = crate::units::InodeNumber(12);
        assert_eq!(Checksums::None.inode_seed(inode, 1), None);
        assert_eq!(
            Checksums::DescriptorCrc16 { uuid: [1; 16] }.inode_seed(inode, 1),
            None
        );
        let seeded = Checksums::Crc32c { seed: 7 };
        assert_ne!(seeded.inode_seed(inode, 1), seeded.inode_seed(inode, 2));
    }
}
