//! The configuration space (virtio 1.3, section 5.2.4) and the feature bits that give it meaning (section
//! 5.2.3).

use virtio_bindings::virtio_blk as spec;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::image::Limits;
use crate::units::SECTOR_SIZE;

/// Bytes in the configuration space, up to and with the field of the last feature offered; further bytes read as
/// zeros.
pub const CONFIG_SIZE: usize = 60;

/// Where the one byte lies that a driver may write: the write cache is on (1) or off (0).
pub const WRITEBACK_OFFSET: u32 = 32;

/// The longest range of one discard or write-zeroes segment, in sectors: 1 GiB.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// The most segments of one discard or write-zeroes request.
pub(super) const MAX_RANGE_SEGMENTS: u32 = 16;

/// What the configuration space says.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The disk's length in bytes; a last part of less than a sector cannot be reached.
    pub disk_len: u64,
    /// The sizes that the image wants told.
    pub limits: Limits,
    /// The most data segments of a request.
    pub seg_max: u32,
    /// Queues that a driver may use.
    pub queue_count: u16,
    /// Whether completed writes may sit in a volatile cache until a flush.
    pub write_cache: WriteCache,
}

/// Whether a completed write is durable at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// Durable after a flush.
    WriteBack,
    /// Durable when it completes.
    WriteThrough,
}

impl Config {
    /// The bytes of the configuration space.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; CONFIG_SIZE] {
        let limits = &self.limits;
        let block_size = limits.logical_block_size.max(1);
        let blocks = |bytes: u32| bytes / block_size;
        let physical_blocks = blocks(limits.physical_block_size).max(1);
        let physical_block_exp = u8::try_from(physical_blocks.ilog2()).expect("at most 31");
        let min_io_size = u16::try_from(physical_blocks).unwrap_or(u16::MAX);
        let sector_size = u32::try_from(SECTOR_SIZE).expect("512");
        let discard_alignment = (limits.discard_granularity / sector_size).max(1);

        let mut bytes = [0; CONFIG_SIZE];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &(self.disk_len / SECTOR_SIZE).to_le_bytes()); // capacity
        put(12, &self.seg_max.to_le_bytes());
        put(20, &block_size.to_le_bytes()); // blk_size
        put(24, &[physical_block_exp, 0]); // physical_block_exp, alignment_offset
        put(26, &min_io_size.to_le_bytes());
        put(28, &blocks(limits.optimal_io_size).to_le_bytes()); // opt_io_size
        put(32, &[u8::from(self.write_cache == WriteCache::WriteBack)]); // writeback
        put(34, &self.queue_count.to_le_bytes()); // num_queues
        put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &MAX_RANGE_SEGMENTS.to_le_bytes()); // max_discard_seg
        put(44, &discard_alignment.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &MAX_RANGE_SEGMENTS.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        bytes
    }

    /// `len` bytes of the configuration space at `offset`, zeros where it has ended.
    #[must_use]
    pub fn read(&self, offset: u32, len: u32) -> Vec<u8> {
        let bytes = self.to_bytes();
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(CONFIG_SIZE);
        let len = usize::try_from(len).unwrap_or(0);
        let mut answer: Vec<u8> = bytes[start..].iter().copied().take(len).collect();
        answer.resize(len, 0);
        answer
    }
}

/// What a driver may do with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    ReadWrite,
    ReadOnly,
}

/// The feature bits of the device, those of its transport aside.
pub(super) fn features(access: Access) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        spec::VIRTIO_BLK_F_SEG_MAX,
        spec::VIRTIO_BLK_F_BLK_SIZE,
        spec::VIRTIO_BLK_F_FLUSH,
        spec::VIRTIO_BLK_F_TOPOLOGY,
        spec::VIRTIO_BLK_F_CONFIG_WCE,
        spec::VIRTIO_BLK_F_MQ,
    ];
    match access {
        Access::ReadOnly => bits.push(spec::VIRTIO_BLK_F_RO),
        Access::ReadWrite => {
            bits.extend([spec::VIRTIO_BLK_F_DISCARD, spec::VIRTIO_BLK_F_WRITE_ZEROES]);
        }
    }
    bits.into_iter()
        .fold(0, |features, bit| features | 1 << bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        disk_len: 3 * 512 + 100,
        limits: Limits {
            logical_block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 65536,
            discard_granularity: 65536,
        },
        seg_max: 254,
        queue_count: 16,
        write_cache: WriteCache::WriteBack,
    };

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let bytes = CONFIG.to_bytes();
        assert_eq!(word(&bytes, 0), 3);
        assert_eq!(word(&bytes, 8), 0, "size_max is not offered");
        assert_eq!(word(&bytes, 12), 254);
        assert_eq!(word(&bytes, 20), 512);
        assert_eq!(bytes[24..28], [3, 0, 8, 0]);
        assert_eq!(word(&bytes, 28), 128);
        assert_eq!(bytes[32..36], [1, 0, 16, 0]);
        assert_eq!(word(&bytes, 44), 128);
        assert_eq!(bytes[56], 1);
    }

    #[test]
    fn reads_answer_the_size_asked_for_at_any_offset() {
        let all = CONFIG.to_bytes();
        for (offset, len) in [
            (0, 36),
            (0, 48),
            (0, 57),
            (0, 60),
            (32, 1),
            (56, 200),
            (60, 4),
            (u32::MAX, 8),
        ] {
            let answer = CONFIG.read(offset, len);
            assert_eq!(answer.len(), len as usize);
            for (i, byte) in answer.iter().enumerate() {
                let at = offset as usize + i;
                assert_eq!(*byte, all.get(at).copied().unwrap_or(0), "byte {at}");
            }
        }
    }

    #[test]
    fn topology_is_true_for_blocks_of_any_size() {
        let limits = Limits {
            logical_block_size: 4096,
            physical_block_size: 4096,
            optimal_io_size: 1 << 20,
            discard_granularity: 512,
        };
        let bytes = Config { limits, ..CONFIG }.to_bytes();
        assert_eq!(bytes[24..28], [0, 0, 1, 0]);
        assert_eq!(word(&bytes, 28), 256);
        assert_eq!(word(&bytes, 44), 1);
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let writable = features(Access::ReadWrite);
        let read_only = features(Access::ReadOnly);
        let bit = |bit: u32| 1u64 << bit;
        let writing = bit(spec::VIRTIO_BLK_F_DISCARD) | bit(spec::VIRTIO_BLK_F_WRITE_ZEROES);
        assert_eq!(writable & writing, writing);
        assert_eq!(writable & bit(spec::VIRTIO_BLK_F_RO), 0);
        assert_eq!(read_only & writing, 0);
        assert_ne!(read_only & bit(spec::VIRTIO_BLK_F_RO), 0);
    }
}
