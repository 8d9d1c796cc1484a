//! Making a [`Layout`] out of a superblock and a descriptor table, all of which is untrusted.
//!
//! The table comes in as many parts as its reader likes. What is regular is put together as it comes, so that the
//! memory in use on the way is about that of the finished layout.

use super::extent::Extent;
use super::features::Feature;
use super::group_descriptor::{self, GroupDescriptor, Locations};
use super::layout::{InternalFiles, Layout, Run, Tag};
use super::locations::LocationTable;
use super::superblock::Superblock;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockGroup, FsBlock};

/// A layout in the making: the descriptors of the first groups have been taken.
#[derive(Debug)]
pub struct LayoutBuilder<'a> {
    superblock: &'a Superblock,
    inode_table_blocks: u32,
    /// The group whose descriptor comes next.
    next: u32,
    runs: Vec<Run>,
    /// The runs of block bitmaps, inode bitmaps and inode tables that the next group may continue.
    open: [Option<Run>; 3],
    locations: LocationTable,
}

impl<'a> LayoutBuilder<'a> {
    /// A layout of the filesystem `superblock`, of which no group is known yet.
    #[must_use]
    pub fn new(superblock: &'a Superblock) -> Self {
        let inode_table_blocks = superblock.inode_table_blocks();
        Self {
            superblock,
            inode_table_blocks,
            next: 0,
            runs: Vec::new(),
            open: [None; 3],
            locations: LocationTable::new(superblock.blocks_per_group, inode_table_blocks),
        }
    }

    /// Takes the descriptors of the next groups, whole ones; what lies behind the last group's is left alone.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the group and the value, if a descriptor's checksum is wrong, or structures
    /// leave the filesystem.
    pub fn add(&mut self, table: &[u8]) -> Result<()> {
        let superblock = self.superblock;
        for bytes in table.chunks_exact(usize::from(superblock.descriptor_size)) {
            if self.next == superblock.group_count {
                break;
            }
            let group = BlockGroup(self.next);
            group_descriptor::verify(&superblock.checksums, group, bytes)?;
            self.add_group(GroupDescriptor::parse(bytes).locations)?;
        }
        Ok(())
    }

    /// Takes the next group, whose structures are `at`.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the group and the value, if they leave the filesystem.
    pub fn add_group(&mut self, at: Locations) -> Result<()> {
        let group = BlockGroup(self.next);
        let structures = [
            (Tag::BlockBitmap, at.block_bitmap, 1),
            (Tag::InodeBitmap, at.inode_bitmap, 1),
            (Tag::InodeTable, at.inode_table, self.inode_table_blocks),
        ];
        for (open, (tag, start, len)) in structures.into_iter().enumerate() {
            let run = run_of_group(self.superblock, group, tag, start, len)?;
            self.add_run(open, run);
        }
        self.locations.push(at);
        self.next += 1;
        Ok(())
    }

    /// The layout, with the blocks of `files` in it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], naming the block, if structures overlap or leave the filesystem;
    /// [`ErrorKind::OutOfBounds`] if descriptors are missing.
    pub fn finish(mut self, files: InternalFiles<'_>) -> Result<Layout> {
        let superblock = self.superblock;
        if self.next != superblock.group_count {
            return Err(Error::new(
                ErrorKind::OutOfBounds,
                format!(
                    "there are descriptors of {} groups, but the filesystem has {}",
                    self.next, superblock.group_count
                ),
            ));
        }
        self.runs.extend(self.open.into_iter().flatten());
        add_heads(superblock, &mut self.runs)?;
        for (tag, extents) in [
            (Tag::Journal, files.journal),
            (Tag::OrphanFile, files.orphan_file),
        ] {
            for extent in extents {
                self.runs.push(run_of_file(superblock, tag, extent)?);
            }
        }
        if let Some(start) = files.mmp {
            let block = Extent {
                logical: 0,
                start,
                len: 1,
                written: true,
            };
            self.runs
                .push(run_of_file(superblock, Tag::MultipleMount, &block)?);
        }
        self.runs.sort_unstable_by_key(|run| run.start);
        self.refuse_overlaps()?;
        let runs = self.merge();
        Layout::of_runs(superblock, runs, self.locations)
    }

    /// Adds the run of one group to the one that it continues, or lets it be continued.
    fn add_run(&mut self, open: usize, run: Run) {
        let inode_table_blocks = u64::from(self.inode_table_blocks);
        let Some(open) = self.open.get_mut(open) else {
            return;
        };
        match open {
            Some(last) if continues(last, &run, inode_table_blocks) => last.end = run.end,
            _ => self.runs.extend(open.replace(run)),
        }
    }

    fn refuse_overlaps(&self) -> Result<()> {
        for pair in self.runs.windows(2) {
            let [before, after] = pair else { continue };
            if after.start < before.end {
                let at = after.start;
                return Err(corrupt(format_args!(
                    "block {at} is both {} and {}",
                    self.describe(before, at),
                    self.describe(after, at)
                )));
            }
        }
        Ok(())
    }

    /// Invariant 1 of the layout: as long as possible.
    fn merge(&mut self) -> Vec<Run> {
        let inode_table_blocks = u64::from(self.inode_table_blocks);
        let mut runs = std::mem::take(&mut self.runs);
        runs.dedup_by(|run, last| {
            let follows = continues(last, run, inode_table_blocks);
            if follows {
                last.end = run.end;
            }
            follows
        });
        runs.shrink_to_fit();
        runs
    }

    /// For a message: what block `at` of a run is.
    fn describe(&self, run: &Run, at: u64) -> String {
        let name = run.tag.name();
        let within = at - run.start;
        let groups = match run.tag {
            Tag::Backup => 0,
            Tag::BlockBitmap | Tag::InodeBitmap => within,
            Tag::InodeTable => within / u64::from(self.inode_table_blocks),
            _ => return name.to_owned(),
        };
        format!("{name} of group {}", u64::from(run.first) + groups)
    }
}

/// Whether `run` goes on where `last` ends, in place and in what it serves.
fn continues(last: &Run, run: &Run, inode_table_blocks: u64) -> bool {
    let len = last.end - last.start;
    let next = match run.tag {
        Tag::InodeTable => len / inode_table_blocks,
        Tag::BlockBitmap | Tag::InodeBitmap | Tag::Descriptors => len,
        Tag::Journal | Tag::OrphanFile => len,
        Tag::Backup => 0,
        Tag::Boot | Tag::Superblock | Tag::ReservedDescriptors | Tag::MultipleMount => {
            return false;
        }
    };
    last.tag == run.tag
        && last.end == run.start
        && u64::from(last.first) + next == u64::from(run.first)
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{what}; e2fsck may repair it"))
}

/// Superblock, descriptor table and their copies.
fn add_heads(superblock: &Superblock, runs: &mut Vec<Run>) -> Result<()> {
    let first = u64::from(superblock.first_data_block);
    let mut add = |tag: Tag, start: u64, len: u64, first: u32| {
        if len > 0 {
            runs.push(Run {
                start,
                end: start.saturating_add(len),
                tag,
                first,
            });
        }
    };
    add(Tag::Boot, 0, first, 0);
    for group in superblock.groups() {
        let head = superblock.group_head(group);
        let blocks = superblock.group_blocks(group);
        if head.len() > blocks.end - blocks.start {
            return Err(corrupt(format_args!(
                "group {group} begins with {} blocks of backups, but has only {}",
                head.len(),
                blocks.end - blocks.start
            )));
        }
        let mut at = blocks.start;
        if head.superblock {
            let tag = if group.0 == 0 {
                Tag::Superblock
            } else {
                Tag::Backup
            };
            add(tag, at, 1, group.0);
            at += 1;
        }
        let descriptors = u64::from(head.descriptor_blocks);
        match primary_descriptors(superblock, group, at) {
            Some(index) => add(Tag::Descriptors, at, descriptors, index),
            None => add(Tag::Backup, at, descriptors, group.0),
        }
        let tag = if group.0 == 0 {
            Tag::ReservedDescriptors
        } else {
            Tag::Backup
        };
        add(
            tag,
            at + descriptors,
            u64::from(head.reserved_blocks),
            group.0,
        );
    }
    Ok(())
}

/// Which block of the descriptor table the copy at `block` in `group` begins with, if it is the one in use.
fn primary_descriptors(superblock: &Superblock, group: BlockGroup, block: u64) -> Option<u32> {
    if group.0 == 0 {
        return (superblock.descriptor_block(0).0 == block).then_some(0);
    }
    // Outside group 0 only meta_bg puts a block of the table in use: in the first group that it describes.
    let index = group.0 / superblock.descriptors_per_block();
    (superblock.features.has(Feature::META_BG) && superblock.descriptor_block(index).0 == block)
        .then_some(index)
}

/// A bitmap or inode table of `group`, if it may lie where it is said to lie.
fn run_of_group(
    superblock: &Superblock,
    group: BlockGroup,
    tag: Tag,
    start: FsBlock,
    len: u32,
) -> Result<Run> {
    let allowed = if superblock.features.has(Feature::FLEX_BG) {
        u64::from(superblock.first_data_block)..superblock.blocks_count
    } else {
        superblock.group_blocks(group)
    };
    let end = start
        .0
        .checked_add(u64::from(len))
        .filter(|end| start.0 >= allowed.start && *end <= allowed.end)
        .ok_or_else(|| {
            corrupt(format_args!(
                "group {group}: {} at block {start}, outside blocks {} to {}",
                tag.name(),
                allowed.start,
                allowed.end
            ))
        })?;
    Ok(Run {
        start: start.0,
        end,
        tag,
        first: group.0,
    })
}

fn run_of_file(superblock: &Superblock, tag: Tag, extent: &Extent) -> Result<Run> {
    let end = extent
        .start
        .0
        .checked_add(u64::from(extent.len))
        .filter(|end| *end <= superblock.blocks_count && extent.len > 0)
        .ok_or_else(|| {
            corrupt(format_args!(
                "{}: {} blocks at {}, outside the filesystem",
                tag.name(),
                extent.len,
                extent.start
            ))
        })?;
    Ok(Run {
        start: extent.start.0,
        end,
        tag,
        first: extent.logical,
    })
}

impl Tag {
    /// For a message.
    fn name(self) -> &'static str {
        match self {
            Self::Boot => "the boot block",
            Self::Superblock => "the superblock",
            Self::Descriptors => "the descriptor table",
            Self::ReservedDescriptors => "room for descriptors",
            Self::Backup => "the backups",
            Self::BlockBitmap => "the block bitmap",
            Self::InodeBitmap => "the inode bitmap",
            Self::InodeTable => "the inode table",
            Self::Journal => "the journal",
            Self::OrphanFile => "the orphan file",
            Self::MultipleMount => "the block of multiple mount protection",
        }
    }
}
