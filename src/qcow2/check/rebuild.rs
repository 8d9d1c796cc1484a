//! Making all refcounts anew, where those that an image has cannot be mended in place.
//!
//! ```text
//! ├─ the file as it is ─┼─ refcount blocks … ─┼─ refcount table ─┤
//! ```
//!
//! # Invariants
//!
//! 1. Table and blocks are written behind the end of the file and made durable; then one write of the header brings
//!    them into force. Before it the old ones are in force, untouched.
//! 2. They count neither the old table nor its blocks, which are free from then on.

use super::super::geometry::to_usize;
use super::super::header::MAX_REFCOUNT_TABLE_BYTES;
use super::super::refcount;
use super::checker::Checker;
use super::counts::{CHUNK, Counts};
use super::report::Severity;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{HostCluster, HostOffset};

/// Refcounts on their way to the disk, in the order of the clusters.
struct Writer {
    /// The first cluster of the new structures.
    base: u64,
    /// Clusters of these so far.
    written: u64,
    /// Offsets of the blocks.
    table: Vec<u64>,
    /// The block that is being filled.
    current: Option<(u64, Vec<u8>)>,
}

impl Checker<'_> {
    /// Makes all refcounts anew.
    ///
    /// # Errors
    /// The storage's; [`ErrorKind::Unsupported`] for a file longer than the largest refcount table can describe.
    pub(super) async fn rebuild_refcounts(&mut self) -> Result<()> {
        self.tell(Severity::Repair, "all refcounts, in a new place".into());
        let mut writer = Writer {
            // A reference may leave the file by less than a cluster.
            base: self.storage.len().div_ceil(self.header.cluster_size()) + 1,
            written: 0,
            table: Vec::new(),
            current: None,
        };
        let mut start = 0;
        while start < u64::MAX {
            let mut counts = Counts::new(HostCluster(start), self.memory);
            self.walk_references(&mut counts).await?;
            self.write_window(&mut counts, &mut writer).await?;
            start = counts.window().end;
        }
        let (at, clusters) = self.finish_rebuild(writer).await?;
        self.storage.flush().await?;
        self.header.refcount_table_offset = at;
        self.header.refcount_table_clusters = clusters;
        self.write_header().await
    }

    async fn write_window(&mut self, counts: &mut Counts, writer: &mut Writer) -> Result<()> {
        let max = self.refcount_max();
        for number in counts.chunks_in(&counts.window()) {
            for index in 0..to_usize(CHUNK) {
                let count = counts.chunk_mut(number).map_or(0, |chunk| chunk.get(index));
                if count > 0 {
                    let cluster = number * CHUNK + index as u64;
                    self.put_refcount(writer, cluster, count.min(max)).await?;
                }
            }
        }
        Ok(())
    }

    /// Sets a refcount; clusters come in their order.
    async fn put_refcount(&mut self, writer: &mut Writer, cluster: u64, count: u64) -> Result<()> {
        let per_block = self.bounds.geometry.block_entries();
        let block = cluster / per_block;
        if writer
            .current
            .as_ref()
            .is_none_or(|(index, _)| *index != block)
        {
            self.write_block(writer).await?;
            writer.current = Some((block, vec![0; to_usize(self.header.cluster_size())]));
        }
        if let Some((_, bytes)) = &mut writer.current {
            let order = self.header.refcount_order;
            refcount::set(bytes, cluster % per_block, order, count);
        }
        Ok(())
    }

    async fn write_block(&mut self, writer: &mut Writer) -> Result<()> {
        let Some((index, bytes)) = writer.current.take() else {
            return Ok(());
        };
        let cluster = HostCluster(writer.base + writer.written);
        let at = self.bounds.geometry.host_start(cluster);
        self.write(at, &bytes).await?;
        writer.written += 1;
        if (index + 1) * 8 > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the file is longer than any refcount table can describe: copy the disk with `seethrough convert`",
            ));
        }
        let index = to_usize(index);
        writer.table.resize(writer.table.len().max(index + 1), 0);
        if let Some(word) = writer.table.get_mut(index) {
            *word = at.0;
        }
        Ok(())
    }

    /// Writes the refcounts of the new structures themselves, and the table: where it lies, and its clusters.
    async fn finish_rebuild(&mut self, mut writer: Writer) -> Result<(HostOffset, u32)> {
        let size = self.header.cluster_size();
        let per_block = self.bounds.geometry.block_entries();
        // A block that describes some of the new clusters is still to be written, and counts among the missing.
        let first = writer.base / per_block;
        if writer
            .current
            .as_ref()
            .is_some_and(|(index, _)| *index != first)
        {
            self.write_block(&mut writer).await?;
        }
        let (mut blocks, mut table_clusters) = (1, 1);
        let end = loop {
            let end = writer.base + writer.written + blocks + table_clusters;
            let needed = (end - 1) / per_block + 1;
            if needed - first > blocks {
                blocks += 1;
            } else if needed * 8 > table_clusters * size {
                table_clusters += 1;
            } else {
                break end;
            }
        };
        for cluster in writer.base..end {
            self.put_refcount(&mut writer, cluster, 1).await?;
        }
        self.write_block(&mut writer).await?;
        let at = HostCluster(end - table_clusters);
        let at = self.bounds.geometry.host_start(at);
        writer.table.resize(to_usize(table_clusters * size / 8), 0);
        let bytes: Vec<u8> = writer
            .table
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect();
        self.write(at, &bytes).await?;
        Ok((at, u32::try_from(table_clusters).unwrap_or(u32::MAX)))
    }
}
