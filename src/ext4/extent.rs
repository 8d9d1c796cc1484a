//! Where the blocks of a file are: extent trees (kernel documentation: "Extent Tree") and the block maps of older
//! files ("Indirect Block Map").
//!
//! [`FileMap`] walks either of them. It reads nothing itself: it names the block that it needs next, and its caller
//! hands the bytes in.
//!
//! # Invariants
//!
//! 1. Extents come in the order of the file, without overlap, and lie inside the filesystem.
//! 2. A walk ends: a tree's depth falls with every level and its logical blocks only rise; a block map is no
//!    deeper than three levels and no longer than the file; and neither reads more than [`MAX_MAP_BLOCKS`] blocks nor
//!    yields more than [`MAX_EXTENTS`] extents.

use super::checksum::{Checksums, crc32c};
use super::fields::{le16, le32};
use super::inode::{BLOCK_LEN, EXTENTS_FL, INLINE_DATA_FL, Inode};
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{FsBlock, InodeNumber};

/// The most extents that a file may have which this program has to read: journals, orphan files, directories.
pub const MAX_EXTENTS: usize = 1 << 18;
/// The most blocks of extent tree or block map that a walk reads.
pub const MAX_MAP_BLOCKS: u32 = 1 << 16;

const EXTENT_MAGIC: u16 = 0xf30a;
const MAX_DEPTH: u16 = 5;
/// Bytes of a tree's header, and of each of its entries.
const ENTRY: usize = 12;
/// `ee_len` above this marks an extent that is allocated but not written.
const MAX_WRITTEN_LEN: u16 = 32768;
const DIRECT_BLOCKS: usize = 12;

/// Neighbouring blocks of a file that are neighbours on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first block's index in the file.
    pub logical: u32,
    /// The first block.
    pub start: FsBlock,
    /// How many blocks.
    pub len: u32,
    /// Whether they hold data; an unwritten extent reads as zeros.
    pub written: bool,
}

/// A block of the map that is still to be read.
#[derive(Clone, Copy, Debug)]
struct Pending {
    block: FsBlock,
    /// In an extent tree the depth the node must have; in a block map the levels of pointers, at least 1.
    level: u16,
    /// The index in the file of the first block below it.
    logical: u64,
}

/// A walk over the map of one file.
#[derive(Debug)]
pub struct FileMap {
    inode: InodeNumber,
    blocks_count: u64,
    first_data_block: u64,
    block_size: u32,
    /// Blocks of the file, from its size: a block map is not followed beyond.
    file_blocks: u64,
    /// The seed for the checksums of tree nodes; `None` where they carry none.
    seed: Option<u32>,
    is_tree: bool,
    /// The last is read next.
    pending: Vec<Pending>,
    read: u32,
    extents: Vec<Extent>,
}

impl FileMap {
    /// Begins a walk at the map's root in `inode`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the root breaks the rules, [`ErrorKind::Unsupported`] if the file lies in its inode.
    pub fn new(superblock: &Superblock, number: InodeNumber, inode: &Inode) -> Result<Self> {
        let mut map = Self {
            inode: number,
            blocks_count: superblock.blocks_count,
            first_data_block: u64::from(superblock.first_data_block),
            block_size: superblock.block_size,
            file_blocks: inode.size.div_ceil(u64::from(superblock.block_size)),
            seed: seed_of(&superblock.checksums, number, inode),
            is_tree: inode.flags & EXTENTS_FL != 0,
            pending: Vec::new(),
            read: 0,
            extents: Vec::new(),
        };
        if inode.flags & INLINE_DATA_FL != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("inode {number} holds its data itself; it has no blocks to map"),
            ));
        }
        if map.is_tree {
            map.add_node(&inode.block, None, 0)?;
        } else {
            map.add_root_pointers(&inode.block)?;
        }
        Ok(map)
    }

    /// The block to hand to [`FileMap::supply`] next; `None` once the walk is complete.
    #[must_use]
    pub fn next_block(&self) -> Option<FsBlock> {
        self.pending.last().map(|pending| pending.block)
    }

    /// Takes the bytes of [`FileMap::next_block`].
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if they break the rules of a map, [`ErrorKind::Unsupported`] if the map is larger than
    /// this program reads, [`ErrorKind::OutOfBounds`] if they are not one whole block.
    pub fn supply(&mut self, bytes: &[u8]) -> Result<()> {
        if u32::try_from(bytes.len()).ok() != Some(self.block_size) {
            return Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "{} bytes are not a block of {}",
                    bytes.len(),
                    self.block_size
                ),
            ));
        }
        let Some(pending) = self.pending.pop() else {
            return Ok(());
        };
        self.read += 1;
        if self.read > MAX_MAP_BLOCKS {
            return Err(self.too_large());
        }
        if self.is_tree {
            self.verify_node(bytes)?;
            self.add_node(bytes, Some(pending.level), pending.logical)
        } else {
            let pointers = bytes.chunks_exact(4).map(|pointer| le32(pointer, 0));
            self.add_pointers(pointers, pending.level - 1, pending.logical)
        }
    }

    /// The file's extents, in its order.
    ///
    /// # Panics
    /// If the walk is not complete.
    #[must_use]
    pub fn finish(self) -> Vec<Extent> {
        assert!(self.pending.is_empty(), "the walk is complete");
        self.extents
    }

    fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "the block map of inode {}: {what}; e2fsck may repair it",
                self.inode
            ),
        )
    }

    fn too_large(&self) -> Error {
        Error::new(
            ErrorKind::Unsupported,
            format!("inode {} lies in too many pieces to be mapped", self.inode),
        )
    }

    /// Takes a node of an extent tree: the root if `depth` is not known yet.
    fn add_node(&mut self, node: &[u8], depth: Option<u16>, logical: u64) -> Result<()> {
        let eh_magic = le16(node, 0);
        let eh_entries = usize::from(le16(node, 2));
        let eh_max = usize::from(le16(node, 4));
        let eh_depth = le16(node, 6);
        if eh_magic != EXTENT_MAGIC {
            return Err(self.corrupt(format_args!("magic number {eh_magic:#06x} of a node")));
        }
        if eh_entries > eh_max || (eh_max + 1) * ENTRY > node.len() {
            return Err(self.corrupt(format_args!("{eh_entries} entries in a node for {eh_max}")));
        }
        if eh_depth > MAX_DEPTH || depth.is_some_and(|depth| depth != eh_depth) {
            return Err(self.corrupt(format_args!("depth {eh_depth} of a node")));
        }
        if eh_entries == 0 && (depth.is_some() || eh_depth > 0) {
            return Err(self.corrupt("a node without entries"));
        }
        let entries = node[ENTRY..].chunks_exact(ENTRY).take(eh_entries);
        if eh_depth == 0 {
            return self.add_leaf(entries, logical);
        }
        let mut below = Vec::with_capacity(eh_entries);
        let mut expected = logical;
        for entry in entries {
            let ei_block = u64::from(le32(entry, 0));
            let ei_leaf = u64::from(le32(entry, 4)) | (u64::from(le16(entry, 8)) << 32);
            if ei_block < expected {
                return Err(self.corrupt(format_args!("index entries out of order at {ei_block}")));
            }
            expected = ei_block + 1;
            self.check_blocks(ei_leaf, 1)?;
            below.push(Pending {
                block: FsBlock(ei_leaf),
                level: eh_depth - 1,
                logical: ei_block,
            });
        }
        self.pending.extend(below.into_iter().rev());
        Ok(())
    }

    fn add_leaf<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a [u8]>,
        logical: u64,
    ) -> Result<()> {
        for entry in entries {
            let ee_block = le32(entry, 0);
            let ee_len = le16(entry, 4);
            let ee_start = u64::from(le32(entry, 8)) | (u64::from(le16(entry, 6)) << 32);
            let written = ee_len <= MAX_WRITTEN_LEN;
            let len = if written {
                ee_len
            } else {
                ee_len - MAX_WRITTEN_LEN
            };
            if u64::from(ee_block) < logical || len == 0 {
                return Err(self.corrupt(format_args!("extent of {len} blocks at {ee_block}")));
            }
            self.push(Extent {
                logical: ee_block,
                start: FsBlock(ee_start),
                len: u32::from(len),
                written,
            })?;
        }
        Ok(())
    }

    /// Invariant 1, for the next extent; neighbours become one.
    fn push(&mut self, extent: Extent) -> Result<()> {
        self.check_blocks(extent.start.0, extent.len)?;
        let end = u64::from(extent.logical) + u64::from(extent.len);
        if end > u64::from(u32::MAX) {
            return Err(self.corrupt(format_args!("an extent up to block {end} of the file")));
        }
        if let Some(last) = self.extents.last_mut() {
            let last_end = u64::from(last.logical) + u64::from(last.len);
            if u64::from(extent.logical) < last_end {
                let at = extent.logical;
                return Err(
                    self.corrupt(format_args!("extents overlap or are out of order at {at}"))
                );
            }
            let follows = u64::from(extent.logical) == last_end
                && last.start.checked_add(u64::from(last.len)) == Some(extent.start)
                && last.written == extent.written;
            if follows {
                last.len += extent.len;
                return Ok(());
            }
        }
        if self.extents.len() == MAX_EXTENTS {
            return Err(self.too_large());
        }
        self.extents.push(extent);
        Ok(())
    }

    fn check_blocks(&self, start: u64, len: u32) -> Result<()> {
        let inside = start > self.first_data_block
            && start
                .checked_add(u64::from(len))
                .is_some_and(|end| end <= self.blocks_count);
        if inside {
            return Ok(());
        }
        Err(self.corrupt(format_args!(
            "{len} blocks at {start} of {}",
            self.blocks_count
        )))
    }

    fn verify_node(&self, node: &[u8]) -> Result<()> {
        let Some(seed) = self.seed else {
            return Ok(());
        };
        let eh_max = usize::from(le16(node, 4));
        let tail = (eh_max + 1) * ENTRY;
        let covered = node
            .get(..tail)
            .filter(|_| tail + 4 <= node.len())
            .ok_or_else(|| self.corrupt(format_args!("a node for {eh_max} entries")))?;
        if crc32c(seed, covered) == le32(node, tail) {
            return Ok(());
        }
        Err(self.corrupt("the checksum of a node is wrong"))
    }

    /// The fifteen pointers in the inode: twelve to data, then one of each depth.
    fn add_root_pointers(&mut self, i_block: &[u8; BLOCK_LEN]) -> Result<()> {
        let pointer = |index: usize| le32(i_block, index * 4);
        self.add_pointers((0..DIRECT_BLOCKS).map(pointer), 0, 0)?;
        let mut logical = DIRECT_BLOCKS as u64;
        let mut below = Vec::new();
        for level in 1..=3u16 {
            let block = pointer(DIRECT_BLOCKS + usize::from(level) - 1);
            if block != 0 && logical < self.file_blocks {
                self.check_blocks(u64::from(block), 1)?;
                below.push(Pending {
                    block: FsBlock(u64::from(block)),
                    level,
                    logical,
                });
            }
            logical = logical.saturating_add(self.blocks_below(level));
        }
        self.pending.extend(below.into_iter().rev());
        Ok(())
    }

    /// How many blocks of the file a pointer with `level` levels below it stands for.
    fn blocks_below(&self, level: u16) -> u64 {
        u64::from(self.block_size / 4).saturating_pow(u32::from(level))
    }

    fn add_pointers(
        &mut self,
        pointers: impl Iterator<Item = u32>,
        level: u16,
        mut logical: u64,
    ) -> Result<()> {
        let step = self.blocks_below(level);
        let mut below = Vec::new();
        for pointer in pointers {
            if logical >= self.file_blocks {
                break;
            }
            if pointer != 0 && level == 0 {
                let logical = u32::try_from(logical)
                    .map_err(|_| self.corrupt(format_args!("block {logical} of the file")))?;
                self.push(Extent {
                    logical,
                    start: FsBlock(u64::from(pointer)),
                    len: 1,
                    written: true,
                })?;
            } else if pointer != 0 {
                self.check_blocks(u64::from(pointer), 1)?;
                below.push(Pending {
                    block: FsBlock(u64::from(pointer)),
                    level,
                    logical,
                });
            }
            logical = logical.saturating_add(step);
        }
        self.pending.extend(below.into_iter().rev());
        Ok(())
    }
}

/// The seed for the checksums of what belongs to an inode.
fn seed_of(checksums: &Checksums, number: InodeNumber, inode: &Inode) -> Option<u32> {
    checksums.inode_seed(number, inode.generation)
}
