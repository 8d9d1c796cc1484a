//! Changed blocks of a filesystem, held in memory until all are known.

use std::collections::{BTreeMap, BTreeSet};

use super::probe::{Place, read_block};
use crate::error::Result;
use crate::ext4::superblock::Superblock;
use crate::image::Image;
use crate::sys::IoBuf;
use crate::units::{FsBlock, GuestOffset};

/// Blocks as they are to become.
///
/// They are written in two steps, each durable before what follows: first all that prepare a new file, then those
/// that give it its name. A power cut in between leaves a file without a name, which e2fsck finds.
#[derive(Debug)]
pub(super) struct Changes {
    place: Place,
    block_size: u32,
    blocks: BTreeMap<FsBlock, Vec<u8>>,
    /// Those that hold names.
    last: BTreeSet<FsBlock>,
}

impl Changes {
    /// No change yet to the filesystem at `place`.
    pub(super) fn new(place: Place, block_size: u32) -> Self {
        Self {
            place,
            block_size,
            blocks: BTreeMap::new(),
            last: BTreeSet::new(),
        }
    }

    /// The block as it is to become, to be read or changed.
    pub(super) async fn block(
        &mut self,
        disk: &dyn Image,
        superblock: &Superblock,
        block: FsBlock,
    ) -> Result<&mut Vec<u8>> {
        if !self.blocks.contains_key(&block) {
            let bytes = read_block(disk, self.place, superblock, block).await?;
            self.blocks.insert(block, bytes);
        }
        Ok(self.blocks.entry(block).or_default())
    }

    /// Replaces a whole block.
    pub(super) fn put(&mut self, block: FsBlock, bytes: Vec<u8>) {
        self.blocks.insert(block, bytes);
    }

    /// Has a block written in the second step.
    pub(super) fn write_last(&mut self, block: FsBlock) {
        self.last.insert(block);
    }

    /// Writes all of it, durably.
    pub(super) async fn write_to(&self, disk: &dyn Image) -> Result<()> {
        for holds_names in [false, true] {
            for (block, bytes) in &self.blocks {
                if self.last.contains(block) == holds_names {
                    let at = self.place.start.0 + block.0 * u64::from(self.block_size);
                    disk.write(GuestOffset(at), IoBuf::from_bytes(bytes))
                        .await?;
                }
            }
            disk.flush().await?;
        }
        Ok(())
    }
}
