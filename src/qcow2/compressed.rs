//! Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor"): where one lies, and its bytes.
//!
//! ```text
//! bit 63  62   61                       x  x-1                        0      x = 62 - (cluster_bits - 8)
//!     0   1    additional sectors          host offset, in bytes
//! ```
//!
//! Pure functions: descriptors and compressed bytes come from a hostile image, and never lead to more than one
//! cluster of output. Any thread may call them: [`compress`] and [`Decompressor::decompress`] take the time that
//! matters.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe;

use super::header::{CompressionType, MAX_HOST_OFFSET};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HostOffset, SECTOR_SIZE};

/// The logarithm of the window of deflated data: stock QEMU's, so that every reader's window is large enough.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// The compressed bit of an L2 entry.
const COMPRESSED: u64 = 1 << 62;

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
    /// Where `len` compressed bytes lie that begin at `at`: to the end of their last sector.
    #[must_use]
    pub fn holding(at: HostOffset, len: u64) -> Self {
        let end = (at.0 + len).next_multiple_of(SECTOR_SIZE);
        Self {
            at,
            len: end - at.0,
        }
    }

    /// The L2 entry that leads here; `None` where the offset or the length is beyond the entry's fields.
    #[must_use]
    pub fn encode(self, cluster_bits: u32) -> Option<u64> {
        let (sectors_bits, offset_bits) = widths(cluster_bits);
        let last_sector = (self.end().0 - 1) / SECTOR_SIZE;
        let additional_sectors = last_sector - self.at.0 / SECTOR_SIZE;
        let fits = self.at.0 < MAX_HOST_OFFSET
            && self.at.0 >> offset_bits == 0
            && additional_sectors >> sectors_bits == 0;
        fits.then_some(COMPRESSED | additional_sectors << offset_bits | self.at.0)
    }

    /// Reads the descriptor in an L2 entry that has the compressed bit.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the host offset needs more than 56 bits, or is 0, where the header lies.
    pub fn decode(entry: u64, cluster_bits: u32) -> Result<Self> {
        let (sectors_bits, offset_bits) = widths(cluster_bits);
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

/// How many bits of an entry are the number of additional sectors, and how many the host offset.
fn widths(cluster_bits: u32) -> (u32, u32) {
    let sectors_bits = cluster_bits - 8;
    (sectors_bits, 62 - sectors_bits)
}

/// Compresses a whole cluster into the beginning of `out` and returns how many bytes it takes there; `None` if it
/// does not become smaller than the cluster, or does not fit.
#[must_use]
pub fn compress(
    compression_type: CompressionType,
    cluster: &[u8],
    out: &mut [u8],
) -> Option<usize> {
    let most = out.len().min(cluster.len().checked_sub(1)?);
    let out = out.get_mut(..most)?;
    match compression_type {
        CompressionType::Deflate => {
            let level = Compression::default();
            let mut stream = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS);
            match stream.compress(cluster, out, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => usize::try_from(stream.total_out()).ok(),
                _ => None,
            }
        }
        CompressionType::Zstd => {
            zstd_safe::compress(out, cluster, zstd::DEFAULT_COMPRESSION_LEVEL).ok()
        }
    }
}

/// What decompresses clusters; it keeps its memory from one to the next.
pub struct Decompressor {
    inflate: Decompress,
    zstd: Option<zstd_safe::DCtx<'static>>,
}

impl Default for Decompressor {
    fn default() -> Self {
        Self {
            inflate: Decompress::new(false),
            zstd: None,
        }
    }
}

impl Decompressor {
    /// Fills at least the first `wanted` bytes of `cluster` from compressed bytes, which may be followed by others.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if they do not decompress to as many bytes.
    pub fn decompress(
        &mut self,
        compression_type: CompressionType,
        compressed: &[u8],
        cluster: &mut [u8],
        wanted: usize,
    ) -> Result<()> {
        match compression_type {
            CompressionType::Deflate => {
                let prefix = cluster.get_mut(..wanted).unwrap_or_default();
                self.inflate(compressed, prefix)
            }
            CompressionType::Zstd => self.decompress_zstd(compressed, cluster, wanted),
        }
    }

    fn inflate(&mut self, compressed: &[u8], out: &mut [u8]) -> Result<()> {
        let stream = &mut self.inflate;
        stream.reset(false);
        stream
            .decompress(compressed, out, FlushDecompress::Finish)
            .map_err(|error| damaged("deflate", error))?;
        // What is wanted is all that counts, also when the stream would go on: stock QEMU reads it so.
        if stream.total_out() == out.len() as u64 {
            Ok(())
        } else {
            Err(too_short("deflate", stream.total_out(), out.len()))
        }
    }

    /// Frame by frame and straight into the cluster, so that no frame can ask for a window in memory.
    fn decompress_zstd(
        &mut self,
        mut compressed: &[u8],
        cluster: &mut [u8],
        wanted: usize,
    ) -> Result<()> {
        let context = match &mut self.zstd {
            Some(context) => context,
            none => none.insert(zstd_safe::DCtx::try_create().ok_or_else(|| {
                Error::new(ErrorKind::Io, "no memory to decompress a cluster (zstd)")
            })?),
        };
        let mut done = 0;
        while done < wanted {
            if compressed.is_empty() {
                return Err(too_short("zstd", done as u64, wanted));
            }
            let frame = zstd_safe::find_frame_compressed_size(compressed).map_err(zstd_damaged)?;
            let (frame, rest) = compressed
                .split_at_checked(frame)
                .ok_or_else(|| too_short("zstd", done as u64, wanted))?;
            let room = cluster.get_mut(done..).unwrap_or_default();
            done += context.decompress(room, frame).map_err(zstd_damaged)?;
            compressed = rest;
        }
        Ok(())
    }
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

fn too_short(method: &str, bytes: u64, wanted: usize) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "a compressed cluster ends after {bytes} bytes, and {wanted} are wanted ({method})"
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

    fn decompress(
        compression_type: CompressionType,
        compressed: &[u8],
        cluster: &mut [u8],
    ) -> Result<()> {
        let wanted = cluster.len();
        Decompressor::default().decompress(compression_type, compressed, cluster, wanted)
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
    fn descriptors_read_back_as_they_were_written_at_every_cluster_size() {
        for cluster_bits in 9..=21 {
            let cluster = 1u64 << cluster_bits;
            // The first byte of cluster 1, the last before a sector and a cluster, and the last that fits.
            let last = (1u64 << (62 - (cluster_bits - 8)).min(56)) - 1;
            for at in [cluster, cluster + 511, 2 * cluster - 1, last] {
                for len in [1, 2, 511, 512, 513, cluster - 1] {
                    let extent = CompressedExtent::holding(HostOffset(at), len.min(cluster - 1));
                    let entry = extent.encode(cluster_bits).unwrap();
                    assert_eq!(entry >> 62, 1, "compressed, and not COPIED");
                    let read = CompressedExtent::decode(entry, cluster_bits).unwrap();
                    assert_eq!(read, extent, "{at:#x} {len} in clusters of {cluster}");
                    assert!(extent.end().0.is_multiple_of(512) && extent.end().0 - 512 < at + len);
                }
            }
            let beyond = CompressedExtent::holding(HostOffset(last + 1), 1);
            assert_eq!(beyond.encode(cluster_bits), None);
        }
    }

    #[test]
    fn more_sectors_than_the_field_takes_have_no_descriptor() {
        let extent = CompressedExtent::holding(HostOffset(512), 2 * 512 + 1);
        assert_eq!(extent.encode(9), None);
    }

    #[test]
    fn what_is_compressed_decompresses_and_what_does_not_shrink_is_not_compressed() {
        let mut random = vec![0; CLUSTER];
        StdRng::seed_from_u64(1).fill(&mut random[..]);
        for compression_type in BOTH {
            let mut out = vec![0; CLUSTER];
            let len = compress(compression_type, &pattern(), &mut out).unwrap();
            assert!(len < CLUSTER / 2);
            let mut cluster = vec![0; CLUSTER];
            decompress(compression_type, &out[..len], &mut cluster).unwrap();
            assert!(cluster == pattern(), "{compression_type:?}");
            assert_eq!(compress(compression_type, &random, &mut out), None);
            let mut longer = vec![0; 2 * CLUSTER];
            assert_eq!(compress(compression_type, &random, &mut longer), None);
            assert_eq!(
                compress(compression_type, &pattern(), &mut out[..len - 1]),
                None
            );
            assert_eq!(compress(compression_type, &[], &mut out), None);
        }
    }

    /// Readers may take no more memory than stock QEMU's, which has a window of 4 KiB.
    #[test]
    fn deflated_data_reaches_back_no_further_than_stock_readers_remember() {
        let mut unit = vec![0; 5000];
        StdRng::seed_from_u64(2).fill(&mut unit[..]);
        let cluster: Vec<u8> = unit.iter().copied().cycle().take(CLUSTER).collect();
        let mut out = vec![0; CLUSTER];
        // It repeats itself, but only beyond the window.
        assert_eq!(compress(CompressionType::Deflate, &cluster, &mut out), None);
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
    fn a_prefix_is_the_whole_clusters_and_what_follows_it_may_be_damaged() {
        let mut decompressor = Decompressor::default();
        for compression_type in BOTH {
            let mut input = compressed(compression_type, &pattern());
            for wanted in [0, 1, 4095, CLUSTER / 2, CLUSTER] {
                let mut cluster = vec![0xee; CLUSTER];
                decompressor
                    .decompress(compression_type, &input, &mut cluster, wanted)
                    .unwrap();
                assert!(
                    cluster[..wanted] == pattern()[..wanted],
                    "{compression_type:?}"
                );
            }
            let end = input.len() - 8;
            input.truncate(end);
            let mut cluster = vec![0; CLUSTER];
            let prefix = decompressor.decompress(compression_type, &input, &mut cluster, 4096);
            // A frame of zstd is a whole.
            assert_eq!(prefix.is_ok(), compression_type == CompressionType::Deflate);
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
