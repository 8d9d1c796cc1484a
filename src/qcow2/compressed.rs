//! Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor"): where one lies, and its bytes.
//!
//! ```text
//! bit 63  62   61                       x  x-1                        0      x = 62 - (cluster_bits - 8)
//!     0   1    additional sectors          host offset, in bytes
//! ```
//!
//! Pure functions: descriptors and compressed bytes come from a hostile image, and never lead to more than one
//! cluster of output.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::zstd_safe;

use super::header::{CompressionType, MAX_HOST_OFFSET};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HostOffset, SECTOR_SIZE};

/// Where a compressed cluster lies in the host file: nowhere aligned, and perhaps behind the file's end with its
/// last sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedExtent {
    /// The first byte.
    pub at: HostOffset,
    /// Bytes from there to the end of the last sector in use; the compressed data may end before. More than 0,
    /// less than two clusters.
    pub len: u64,
}

impl CompressedExtent {
    /// Reads the descriptor in an L2 entry that has the compressed bit.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the host offset needs more than 56 bits, or is 0, where the header lies.
    pub fn decode(entry: u64, cluster_bits: u32) -> Result<Self> {
        let sectors_bits = cluster_bits - 8;
        let offset_bits = 62 - sectors_bits;
        let at = entry & ((1 << offset_bits) - 1);
        if at == 0 || at >= MAX_HOST_OFFSET {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("a compressed cluster at host offset {at:#x}: the entry is {entry:#x}"),
            ));
        }
        let additional_sectors = (entry >> offset_bits) & ((1 << sectors_bits) - 1);
        Ok(Self {
            at: HostOffset(at),
            len: (additional_sectors + 1) * SECTOR_SIZE - at % SECTOR_SIZE,
        })
    }

    /// The byte behind the last.
    #[must_use]
    pub fn end(self) -> HostOffset {
        HostOffset(self.at.0 + self.len)
    }
}

/// Fills `cluster` from compressed bytes, which may be followed by others.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if they do not decompress to a whole cluster.
pub fn decompress(
    compression_type: CompressionType,
    compressed: &[u8],
    cluster: &mut [u8],
) -> Result<()> {
    match compression_type {
        CompressionType::Deflate => inflate(compressed, cluster),
        CompressionType::Zstd => decompress_zstd(compressed, cluster),
    }
}

fn inflate(compressed: &[u8], cluster: &mut [u8]) -> Result<()> {
    let mut stream = Decompress::new(false);
    let status = stream
        .decompress(compressed, cluster, FlushDecompress::Finish)
        .map_err(|error| damaged("deflate", error))?;
    // A full cluster is all that counts, also when the stream would go on: stock QEMU reads it so.
    let complete = stream.total_out() == cluster.len() as u64;
    match status {
        Status::Ok | Status::BufError | Status::StreamEnd if complete => Ok(()),
        _ => Err(too_short("deflate", stream.total_out(), cluster)),
    }
}

/// Frame by frame and straight into the cluster, so that no frame can ask for a window in memory.
fn decompress_zstd(mut compressed: &[u8], cluster: &mut [u8]) -> Result<()> {
    let mut context = zstd_safe::DCtx::try_create()
        .ok_or_else(|| Error::new(ErrorKind::Io, "no memory to decompress a cluster (zstd)"))?;
    let mut done = 0;
    while done < cluster.len() {
        if compressed.is_empty() {
            return Err(too_short("zstd", done as u64, cluster));
        }
        let frame = zstd_safe::find_frame_compressed_size(compressed).map_err(zstd_damaged)?;
        let (frame, rest) = compressed
            .split_at_checked(frame)
            .ok_or_else(|| too_short("zstd", done as u64, cluster))?;
        let room = cluster.get_mut(done..).unwrap_or_default();
        done += context.decompress(room, frame).map_err(zstd_damaged)?;
        compressed = rest;
    }
    Ok(())
}

fn damaged(method: &str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::with_source(
        ErrorKind::Corrupt,
        format!("a compressed cluster does not decompress ({method})"),
        cause,
    )
}

fn zstd_damaged(code: zstd_safe::ErrorCode) -> Error {
    damaged("zstd", zstd_safe::get_error_name(code))
}

fn too_short(method: &str, bytes: u64, cluster: &[u8]) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "a compressed cluster decompresses to {bytes} bytes, not to {} ({method})",
            cluster.len()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::DeflateEncoder;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use std::io::Write;

    const CLUSTER: usize = 65536;

    fn pattern() -> Vec<u8> {
        (0..251)
            .flat_map(|byte| [byte; 100])
            .cycle()
            .take(CLUSTER)
            .collect()
    }

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn compressed(compression_type: CompressionType, bytes: &[u8]) -> Vec<u8> {
        match compression_type {
            CompressionType::Deflate => deflated(bytes),
            CompressionType::Zstd => zstd::bulk::compress(bytes, 3).unwrap(),
        }
    }

    const BOTH: [CompressionType; 2] = [CompressionType::Deflate, CompressionType::Zstd];

    #[test]
    fn descriptors_split_where_the_cluster_size_says() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of sectors.
        let entry = 1 << 62 | 3 << 54 | 0x12345;
        let extent = CompressedExtent::decode(entry, 16).unwrap();
        assert_eq!(extent.at, HostOffset(0x12345));
        assert_eq!(extent.len, 4 * 512 - 0x145);
        assert_eq!(extent.end(), HostOffset(0x12a00));
        // 512-byte clusters: one bit of sectors, and an offset field wider than offsets are.
        let small = CompressedExtent::decode(1 << 62 | 1 << 61 | 0x200, 9).unwrap();
        assert_eq!((small.at, small.len), (HostOffset(0x200), 1024));
        // 2 MiB clusters: 13 bits of sectors.
        let large = CompressedExtent::decode(1 << 62 | 0x1fff << 49 | 1, 21).unwrap();
        assert_eq!((large.at, large.len), (HostOffset(1), 8192 * 512 - 1));
    }

    #[test]
    fn offsets_that_cannot_be_are_corrupt() {
        for entry in [1 << 62 | 1 << 56, 1 << 62] {
            let error = CompressedExtent::decode(entry, 9).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn both_types_decompress_and_ignore_what_follows() {
        for compression_type in BOTH {
            let mut input = compressed(compression_type, &pattern());
            input.extend([0xa5; 700]);
            let mut cluster = vec![0; CLUSTER];
            decompress(compression_type, &input, &mut cluster).unwrap();
            assert!(cluster == pattern(), "{compression_type:?}");
        }
    }

    #[test]
    fn data_of_another_length_than_a_cluster_is_corrupt() {
        for compression_type in BOTH {
            let input = compressed(compression_type, &pattern()[..CLUSTER - 1]);
            let mut cluster = vec![0; CLUSTER];
            let error = decompress(compression_type, &input, &mut cluster).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{compression_type:?}");
            let whole = compressed(compression_type, &pattern());
            for end in [0, 1, 5, whole.len() / 2, whole.len() - 5] {
                assert!(decompress(compression_type, &whole[..end], &mut cluster).is_err());
            }
        }
    }

    #[test]
    fn damaged_data_never_does_worse_than_an_error() {
        let seed = 7;
        let mut rng = StdRng::seed_from_u64(seed);
        for compression_type in BOTH {
            let whole = compressed(compression_type, &pattern());
            let mut cluster = vec![0; CLUSTER];
            for _ in 0..500 {
                let mut input = whole.clone();
                for _ in 0..rng.random_range(1..4) {
                    let at = rng.random_range(0..input.len());
                    input[at] = rng.random();
                }
                let _ = decompress(compression_type, &input, &mut cluster);
            }
        }
    }
}
