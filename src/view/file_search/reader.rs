//! Reading what a search needs of the base, no more than it may.

use std::ops::Range;

use super::{MAX_BYTES, Stop};
use crate::error::Result;
use crate::ext4::extent::{Extent, FileMap};
use crate::ext4::group_descriptor::{GroupDescriptor, INODE_UNINIT};
use crate::ext4::inode::{EXTENTS_FL, FileType, INLINE_DATA_FL, Inode};
use crate::image::Image;
use crate::units::{BlockGroup, FsBlock, GuestOffset, InodeNumber};
use crate::view::compose::read_bytes;
use crate::view::probe::{Probe, read_descriptor, read_inode};

/// Bytes of an inode table that are read at once.
const CHUNK: u64 = 64 << 10;
/// A symbolic link shorter than this holds its target in place of a map.
const FAST_SYMLINK: u64 = 60;

/// An inode in use.
#[derive(Debug)]
pub(super) struct File {
    pub(super) number: InodeNumber,
    pub(super) inode: Inode,
}

impl File {
    pub(super) fn is_directory(&self) -> bool {
        self.inode.file_type() == FileType::Directory
    }

    /// Whether `i_block` is the root of a map.
    fn has_map(&self) -> bool {
        let inode = &self.inode;
        inode.flags & INLINE_DATA_FL == 0
            && match inode.file_type() {
                FileType::Regular | FileType::Directory => true,
                FileType::Symlink => inode.flags & EXTENTS_FL != 0 || inode.size >= FAST_SYMLINK,
                FileType::Special | FileType::Unknown => false,
            }
    }
}

/// Where a file's blocks are.
#[derive(Debug, Default)]
pub(super) struct Map {
    pub(super) data: Vec<Extent>,
    /// The blocks of the map itself.
    pub(super) nodes: Vec<FsBlock>,
}

/// The base's filesystem, of which only so much is read.
pub(super) struct Reader<'a> {
    disk: &'a dyn Image,
    probe: &'a Probe,
    /// Bytes that may still be read.
    left: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(disk: &'a dyn Image, probe: &'a Probe) -> Self {
        Self {
            disk,
            probe,
            left: MAX_BYTES,
        }
    }

    /// Allows as much again as at first.
    pub(super) fn refill(&mut self) {
        self.left = MAX_BYTES;
    }

    /// The blocks that the bytes of the disk in `range` fall into.
    pub(super) fn blocks_of(&self, range: &Range<GuestOffset>) -> Range<u64> {
        let superblock = self.probe.superblock();
        let size = u64::from(superblock.block_size);
        let start = self.probe.place().start.0;
        let first = range.start.0.saturating_sub(start) / size;
        let end = range.end.0.saturating_sub(start).div_ceil(size);
        first..end.min(superblock.blocks_count).max(first)
    }

    /// The group that holds a block.
    pub(super) fn group_of(&self, block: u64) -> Option<BlockGroup> {
        self.probe.superblock().group_of(FsBlock(block))
    }

    /// The group that an inode belongs to.
    pub(super) fn group_of_inode(&self, number: InodeNumber) -> Option<BlockGroup> {
        Some(self.probe.superblock().locate_inode(number)?.0)
    }

    /// All groups, in the order of their distance from the nearest of `near`.
    pub(super) fn nearest_first(&self, mut near: Vec<BlockGroup>) -> Vec<BlockGroup> {
        near.sort_unstable();
        near.dedup();
        let mut groups: Vec<BlockGroup> = self.probe.superblock().groups().collect();
        groups.sort_by_cached_key(|group| {
            let next = near.partition_point(|near| near < group);
            let around = near[..next].last().into_iter().chain(near.get(next));
            around.map(|near| near.0.abs_diff(group.0)).min()
        });
        groups
    }

    async fn read(&mut self, at: GuestOffset, len: u64) -> Result<Vec<u8>, Stop> {
        self.left = self.left.checked_sub(len).ok_or(Stop::Limit)?;
        let len = usize::try_from(len).map_err(|_| Stop::Limit)?;
        Ok(read_bytes(self.disk, at, len).await?)
    }

    fn offset_of(&self, block: FsBlock) -> GuestOffset {
        let within = block.0.saturating_mul(self.block_size());
        GuestOffset(self.probe.place().start.0.saturating_add(within))
    }

    fn block_size(&self) -> u64 {
        u64::from(self.probe.superblock().block_size)
    }

    /// A block of the filesystem.
    pub(super) async fn block(&mut self, block: FsBlock) -> Result<Vec<u8>, Stop> {
        self.read(self.offset_of(block), self.block_size()).await
    }

    /// An inode in use; `None` if it is not, or damaged.
    pub(super) async fn file(&mut self, number: InodeNumber) -> Result<Option<File>, Stop> {
        self.left = self
            .left
            .checked_sub(2 * self.block_size())
            .ok_or(Stop::Limit)?;
        let (place, superblock) = (self.probe.place(), self.probe.superblock());
        let record = read_inode(self.disk, place, superblock, number).await;
        let inode = record.ok().map(|bytes| Inode::parse(&bytes));
        let inode = inode.filter(Inode::is_in_use);
        Ok(inode.map(|inode| File { number, inode }))
    }

    /// The inodes in use of a group; none if its descriptor is damaged.
    pub(super) async fn files_of(&mut self, group: BlockGroup) -> Result<Vec<File>, Stop> {
        self.left = self
            .left
            .checked_sub(self.block_size())
            .ok_or(Stop::Limit)?;
        let superblock = self.probe.superblock();
        let bytes = read_descriptor(self.disk, self.probe.place(), superblock, group).await;
        let Ok(bytes) = bytes else {
            return Ok(Vec::new());
        };
        let descriptor = GroupDescriptor::parse(&bytes);
        let used = match descriptor.flags & INODE_UNINIT {
            0 => superblock
                .inodes_per_group
                .saturating_sub(descriptor.itable_unused),
            _ => 0,
        };
        let record = u64::from(superblock.inode_size);
        let end = u64::from(used) * record;
        // As the base had it when it was opened: a table never moves.
        let Some(locations) = self.probe.layout().locations(group) else {
            return Ok(Vec::new());
        };
        let table = self.offset_of(locations.inode_table);
        let mut files = Vec::new();
        let mut done = 0;
        while done < end {
            let len = CHUNK.min(end - done);
            let bytes = self
                .read(GuestOffset(table.0.saturating_add(done)), len)
                .await?;
            let first = u32::try_from(done / record).unwrap_or(u32::MAX);
            let records = bytes.chunks_exact(usize::from(superblock.inode_size));
            files.extend((first..).zip(records).filter_map(|(index, bytes)| {
                let number = superblock.inode_number(group, index);
                let inode = Inode::parse(bytes);
                inode.is_in_use().then_some(File { number, inode })
            }));
            done += len;
        }
        Ok(files)
    }

    /// Where a file's blocks are, as far as its map is sound.
    pub(super) async fn map_of(&mut self, file: &File) -> Result<Map, Stop> {
        let mut nodes = Vec::new();
        if !file.has_map() {
            return Ok(Map::default());
        }
        let Ok(mut map) = FileMap::new(self.probe.superblock(), file.number, &file.inode) else {
            return Ok(Map::default());
        };
        while let Some(block) = map.next_block() {
            nodes.push(block);
            let bytes = self.block(block).await?;
            if map.supply(&bytes).is_err() {
                return Ok(Map {
                    data: Vec::new(),
                    nodes,
                });
            }
        }
        Ok(Map {
            data: map.finish(),
            nodes,
        })
    }
}
