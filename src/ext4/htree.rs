//! Hashed directories (kernel documentation: "Hash Tree Directories"): which block of entries a name belongs to.
//!
//! Looking a name up needs no index, a linear search finds it. A name that is added, however, has to go into the
//! block that its hash asks for. [`Descent`] finds it; it names the block of the directory that it needs next, and its
//! caller hands the bytes in.

use super::checksum::crc32c;
use super::directory::{Name, Owner, corrupt};
use super::dirhash::{HashVersion, dirhash};
use super::fields::{le16, le32, u8_at};
use super::superblock::Superblock;
use crate::error::Result;

/// The most levels of an index: two, three with `large_dir`.
const MAX_LEVELS: u8 = 3;
/// Where the root's entries begin: behind `.`, `..` and eight bytes of `dx_root_info`.
const ROOT_ENTRIES: usize = 0x20;
const ROOT_INFO: usize = 0x18;
/// Where those of other nodes begin: behind one free entry of the block's length.
const NODE_ENTRIES: usize = 0x08;
const ENTRY: usize = 8;
/// Bytes of `dx_tail`.
const TAIL: usize = 8;

/// The way down the index of a directory to the block for a name.
#[derive(Debug)]
pub struct Descent<'a> {
    superblock: &'a Superblock,
    owner: Owner,
    name: Name<'a>,
    /// Blocks in the directory.
    blocks: u32,
    next: u32,
    /// Known once the root is read: the name's hash, and the levels of nodes still below.
    below: Option<(u32, u8)>,
    leaf: Option<u32>,
}

impl<'a> Descent<'a> {
    /// Begins at the root of the index of the directory `owner`, which has `blocks` blocks.
    #[must_use]
    pub fn new(superblock: &'a Superblock, owner: Owner, blocks: u32, name: Name<'a>) -> Self {
        Self {
            superblock,
            owner,
            name,
            blocks,
            next: 0,
            below: None,
            leaf: None,
        }
    }

    /// The index in the directory of the block to hand to [`Descent::supply`] next; `None` once the leaf is known.
    #[must_use]
    pub fn next_block(&self) -> Option<u32> {
        self.leaf.is_none().then_some(self.next)
    }

    /// The index in the directory of the block of entries that the name belongs to, once it is known.
    #[must_use]
    pub fn leaf(&self) -> Option<u32> {
        self.leaf
    }

    /// Takes the bytes of [`Descent::next_block`].
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::Corrupt`] if they are no node of an index,
    /// [`crate::error::ErrorKind::Unsupported`] if names are hashed in a way that this program does not know.
    pub fn supply(&mut self, node: &[u8]) -> Result<()> {
        let (hash, levels, entries) = match self.below {
            Some((hash, levels)) => (hash, levels, NODE_ENTRIES),
            None => self.read_root(node)?,
        };
        let limit = usize::from(le16(node, entries));
        let count = usize::from(le16(node, entries + 2));
        let room = node.len().saturating_sub(entries) / ENTRY;
        if count == 0 || count > limit || limit > room {
            return Err(corrupt(format_args!(
                "{count} of {limit} entries in a node of an index"
            )));
        }
        self.verify(node, entries, limit, count)?;
        // The first entry has no hash of its own: it stands for everything below the second.
        let chosen = (1..count)
            .rev()
            .find(|index| le32(node, entries + index * ENTRY) <= hash)
            .unwrap_or(0);
        let block = le32(node, entries + chosen * ENTRY + 4) & 0x0fff_ffff;
        if block == 0 || block >= self.blocks {
            return Err(corrupt(format_args!(
                "an index names block {block} of {}",
                self.blocks
            )));
        }
        if levels == 0 {
            self.leaf = Some(block);
        } else {
            self.next = block;
            self.below = Some((hash, levels - 1));
        }
        Ok(())
    }

    /// The name's hash, the levels below the root, and where the root's entries begin.
    fn read_root(&self, node: &[u8]) -> Result<(u32, u8, usize)> {
        let hash_version = u8_at(node, ROOT_INFO + 4);
        let info_length = u8_at(node, ROOT_INFO + 5);
        let indirect_levels = u8_at(node, ROOT_INFO + 6);
        if le32(node, ROOT_INFO) != 0 || info_length != 8 || indirect_levels >= MAX_LEVELS {
            return Err(corrupt(format_args!(
                "the root of an index with {indirect_levels} levels and {info_length} bytes of information"
            )));
        }
        let version = HashVersion::new(hash_version, self.superblock.flags)?;
        let hash = dirhash(version, &self.superblock.hash_seed, self.name.as_bytes());
        Ok((hash, indirect_levels, ROOT_ENTRIES))
    }

    fn verify(&self, node: &[u8], entries: usize, limit: usize, count: usize) -> Result<()> {
        let owner = self.owner;
        let Some(seed) = self
            .superblock
            .checksums
            .inode_seed(owner.inode, owner.generation)
        else {
            return Ok(());
        };
        let tail = entries + limit * ENTRY;
        let covered = node
            .get(..entries + count * ENTRY)
            .filter(|_| tail + TAIL <= node.len())
            .ok_or_else(|| corrupt("a node of an index without a checksum"))?;
        let csum = crc32c(crc32c(seed, covered), &node[tail..tail + 4]);
        if crc32c(csum, &[0; 4]) == le32(node, tail + 4) {
            return Ok(());
        }
        Err(corrupt(format_args!(
            "the checksum of a node of the index of inode {} is wrong",
            owner.inode
        )))
    }
}
