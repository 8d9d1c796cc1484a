//! Finding the ext4 filesystem on a disk and reading what is where in it.
//!
//! This is the trusted moment that ownership rests on: it reads the stored base, before a view of it is served, and
//! keeps what it found.

use super::compose::read_bytes;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::ext4::extent::{Extent, FileMap};
use crate::ext4::features::Feature;
use crate::ext4::group_descriptor::{self, GroupDescriptor};
use crate::ext4::growth::Growth;
use crate::ext4::inode::{self, Inode};
use crate::ext4::jbd2::JournalSuperblock;
use crate::ext4::layout::{InternalFiles, Layout};
use crate::ext4::layout_builder::LayoutBuilder;
use crate::ext4::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use crate::image::Image;
use crate::partition::{Partition, Scan};
use crate::units::{BlockGroup, FsBlock, GuestOffset, InodeNumber};

/// Where a superblock has its magic number, 0xef53.
const MAGIC_OFFSET: usize = 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// A part of the disk that may hold a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its first byte.
    pub start: GuestOffset,
    /// Its length in bytes.
    pub length: u64,
}

/// Finds the filesystem: in partition `wanted`, or, if that is not said, on the whole disk or in the one
/// partition that holds an ext4 filesystem.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if there is none, or more than one, or no such partition.
pub async fn locate(disk: &dyn Image, wanted: Option<u32>) -> Result<Place> {
    let whole = Place {
        start: GuestOffset(0),
        length: disk.virtual_size(),
    };
    if wanted.is_none() && holds_ext4(disk, whole).await? {
        return Ok(whole);
    }
    let partitions = read_partitions(disk).await?;
    if partitions.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "{} holds neither an ext4 filesystem nor partitions",
                disk.name()
            ),
        ));
    }
    let mut found = Vec::new();
    for partition in partitions {
        let place = Place {
            start: partition.start,
            length: partition.len,
        };
        if wanted == Some(partition.number) {
            return Ok(place);
        }
        if wanted.is_none() && holds_ext4(disk, place).await? {
            found.push((partition.number, place));
        }
    }
    let problem = match (wanted, found.as_slice()) {
        (None, [(_, place)]) => return Ok(*place),
        (Some(number), _) => format!("has no partition {number}"),
        (None, []) => "has no partition that holds an ext4 filesystem".to_owned(),
        (None, _) => {
            let numbers: Vec<String> = found.iter().map(|(number, _)| number.to_string()).collect();
            format!(
                "has several partitions that hold an ext4 filesystem: {}; say which with --partition",
                numbers.join(", ")
            )
        }
    };
    Err(Error::new(
        ErrorKind::InvalidConfig,
        format!("{} {problem}", disk.name()),
    ))
}

/// The partitions of a disk, in the order of their numbers: none if it has no partition table.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a damaged table, and what reading the disk returns.
pub async fn read_partitions(disk: &dyn Image) -> Result<Vec<Partition>> {
    let mut scan = Scan::new(disk.virtual_size());
    while let Some((at, len)) = scan.next_read() {
        let bytes = read_bytes(disk, at, len).await?;
        scan.supply(&bytes).context(|| disk.name().to_owned())?;
    }
    Ok(scan.finish())
}

async fn holds_ext4(disk: &dyn Image, place: Place) -> Result<bool> {
    if place.length < SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE as u64 {
        return Ok(false);
    }
    let superblock = read_superblock_bytes(disk, place).await?;
    Ok(superblock[MAGIC_OFFSET..].starts_with(&MAGIC))
}

/// The bytes of the superblock at `place`.
///
/// # Errors
/// What reading the disk returns.
pub async fn read_superblock_bytes(
    disk: &dyn Image,
    place: Place,
) -> Result<[u8; SUPERBLOCK_SIZE]> {
    let at = GuestOffset(place.start.0.saturating_add(SUPERBLOCK_OFFSET));
    let bytes = read_bytes(disk, at, SUPERBLOCK_SIZE)
        .await
        .context(|| format!("reading the superblock of {}", disk.name()))?;
    bytes
        .try_into()
        .map_err(|_| Error::new(ErrorKind::Corrupt, "the superblock is too short"))
}

/// Reads the superblock at `place`, and holds the filesystem to its room.
///
/// The base VM may be writing it: a checksum that is wrong is read again before it is believed.
///
/// # Errors
/// As [`Superblock::parse`]; [`ErrorKind::Corrupt`] if the filesystem is longer than its partition.
pub async fn read_superblock(
    disk: &dyn Image,
    place: Place,
) -> Result<(Superblock, [u8; SUPERBLOCK_SIZE])> {
    const ATTEMPTS: u32 = 3;
    let mut attempt = 1;
    let (superblock, bytes) = loop {
        let bytes = read_superblock_bytes(disk, place).await?;
        match Superblock::parse(&bytes) {
            Ok(superblock) => break (superblock, bytes),
            Err(error) if error.kind() != ErrorKind::Corrupt || attempt == ATTEMPTS => {
                return Err(error.context(disk.name()));
            }
            Err(_) => attempt += 1,
        }
    };
    if superblock.len_bytes() > place.length {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{}: the filesystem has {} bytes, but only {} lie between its start and the end of its \
                 partition or disk",
                disk.name(),
                superblock.len_bytes(),
                place.length
            ),
        ));
    }
    Ok((superblock, bytes))
}

/// A block of the filesystem at `place`.
///
/// # Errors
/// What reading the disk returns.
pub async fn read_block(
    disk: &dyn Image,
    place: Place,
    superblock: &Superblock,
    block: FsBlock,
) -> Result<Vec<u8>> {
    read_blocks(disk, place, superblock, block, 1).await
}

/// `count` blocks of the filesystem at `place` that follow one another.
///
/// # Errors
/// What reading the disk returns.
async fn read_blocks(
    disk: &dyn Image,
    place: Place,
    superblock: &Superblock,
    block: FsBlock,
    count: u32,
) -> Result<Vec<u8>> {
    let at = block
        .0
        .checked_mul(u64::from(superblock.block_size))
        .and_then(|within| place.start.checked_add(within))
        .filter(|_| {
            let end = block.0.checked_add(u64::from(count));
            end.is_some_and(|end| end <= superblock.blocks_count)
        })
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("{}: block {block} lies outside the filesystem", disk.name()),
            )
        })?;
    let len = u64::from(superblock.block_size) * u64::from(count);
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    read_bytes(disk, at, len).await
}

/// Where block `index` of the descriptor table lies, and how many follow it there, as far as they are read at once.
fn descriptor_run(superblock: &Superblock, index: u32) -> (FsBlock, u32) {
    const READ_AT_ONCE: u32 = 1 << 20;
    let first = superblock.descriptor_block(index);
    let most = (READ_AT_ONCE / superblock.block_size)
        .min(superblock.descriptor_blocks().saturating_sub(index))
        .max(1);
    let behind = |len: &u32| {
        let next = superblock.descriptor_block(index.saturating_add(*len));
        next.0 != first.0 + u64::from(*len)
    };
    (first, (1..most).find(behind).unwrap_or(most))
}

/// An ext4 filesystem on a disk: where it is, what it is and what is where in it.
#[derive(Clone, Debug)]
pub struct Probe {
    place: Place,
    superblock: Superblock,
    superblock_bytes: [u8; SUPERBLOCK_SIZE],
    layout: Layout,
    journal: Vec<Extent>,
    orphan_file: Vec<Extent>,
    /// What makes it longer than the filesystem on the disk, for a child that has groups of its own behind that.
    growth: Option<Growth>,
}

impl Probe {
    /// Where the filesystem lies.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    /// Its superblock.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Its superblock's bytes.
    #[must_use]
    pub fn superblock_bytes(&self) -> &[u8; SUPERBLOCK_SIZE] {
        &self.superblock_bytes
    }

    /// What is where in it.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Its UUID, as 32 hexadecimal digits.
    #[must_use]
    pub fn uuid(&self) -> String {
        self.superblock
            .uuid
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Where the journal's blocks are.
    #[must_use]
    pub fn journal(&self) -> &[Extent] {
        &self.journal
    }

    /// How many blocks the journal has.
    #[must_use]
    pub fn journal_blocks(&self) -> u32 {
        self.journal
            .iter()
            .fold(0, |sum: u32, extent| sum.saturating_add(extent.len))
    }

    /// Reads the filesystem at `place`.
    ///
    /// # Errors
    /// As [`read_superblock`], and for whatever in the filesystem cannot be.
    pub async fn read(disk: &dyn Image, place: Place) -> Result<Self> {
        let (superblock, superblock_bytes) = read_superblock(disk, place).await?;
        let mut builder = LayoutBuilder::new(&superblock);
        let mut index = 0;
        while index < superblock.descriptor_blocks() {
            let (first, len) = descriptor_run(&superblock, index);
            let part = read_blocks(disk, place, &superblock, first, len).await?;
            builder
                .add(&part)
                .context(|| format!("the filesystem on {}", disk.name()))?;
            index += len;
        }
        let journal = map_file(disk, place, &superblock, superblock.journal_inode).await?;
        refuse_fast_commits(disk, place, &superblock, &journal).await?;
        let orphan_file = map_file(disk, place, &superblock, superblock.orphan_file_inode).await?;
        let files = InternalFiles {
            journal: &journal,
            orphan_file: &orphan_file,
            mmp: superblock.mmp_block,
        };
        let layout = builder
            .finish(files)
            .context(|| format!("the filesystem on {}", disk.name()))?;
        Ok(Self {
            place,
            superblock,
            superblock_bytes,
            layout,
            journal,
            orphan_file,
            growth: None,
        })
    }

    /// The filesystem made longer by `growth`, which was planned for it.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if something of the filesystem lies where the new groups are to be.
    pub(super) fn with(self, growth: Growth) -> Result<Self> {
        let superblock = growth.after().clone();
        let mut builder = LayoutBuilder::new(&superblock);
        for group in superblock.groups() {
            let at = growth
                .locations(group)
                .or_else(|| self.layout.locations(group));
            let at = at.ok_or_else(|| {
                Error::new(
                    ErrorKind::OutOfBounds,
                    format!("nothing is known of block group {group}"),
                )
            })?;
            builder.add_group(at)?;
        }
        let layout = builder.finish(InternalFiles {
            journal: &self.journal,
            orphan_file: &self.orphan_file,
            mmp: superblock.mmp_block,
        })?;
        Ok(Self {
            place: Place {
                start: self.place.start,
                length: superblock.len_bytes(),
            },
            superblock_bytes: *growth.bytes(),
            superblock,
            layout,
            growth: Some(growth),
            ..self
        })
    }

    /// What makes the filesystem longer than the one on the base.
    pub(super) fn growth(&self) -> Option<&Growth> {
        self.growth.as_ref()
    }

    /// How many groups the filesystem on the base has.
    pub(super) fn base_group_count(&self) -> u32 {
        match &self.growth {
            Some(growth) => growth.before().group_count,
            None => self.superblock.group_count,
        }
    }
}

/// Refuses a filesystem whose recovery would replay fast commits. No view lets a kernel write them, and nobody but a
/// kernel can follow them; but the base may have been used, and lost its power, without its view.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`], saying what to do, if there is one; what reading the disk returns.
async fn refuse_fast_commits(
    disk: &dyn Image,
    place: Place,
    superblock: &Superblock,
    journal: &[Extent],
) -> Result<()> {
    let first = journal.iter().find(|extent| extent.logical == 0);
    let (true, Some(first)) = (superblock.features.has(Feature::NEEDS_RECOVERY), first) else {
        return Ok(());
    };
    let block = read_block(disk, place, superblock, first.start).await?;
    let len = journal
        .iter()
        .fold(0, |sum: u32, extent| sum.saturating_add(extent.len));
    let parsed = block.first_chunk();
    let parsed = parsed.and_then(|bytes| JournalSuperblock::parse(superblock, len, bytes).ok());
    // A journal whose superblock is damaged is not replayed by anybody.
    let Some((log, at)) = parsed.and_then(|log| log.fast_commits().map(|at| (log, at))) else {
        return Ok(());
    };
    let holder = journal.iter().find_map(|extent| {
        let within = at.checked_sub(extent.logical)?;
        (within < extent.len).then(|| FsBlock(extent.start.0.saturating_add(u64::from(within))))
    });
    let Some(block) = holder else {
        return Ok(());
    };
    if log.is_fast_commit(&read_block(disk, place, superblock, block).await?) {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "the journal on {} holds fast commits: it has been used without its view, and not been unmounted; \
                 run e2fsck -p on it, or mount and unmount it once",
                disk.name()
            ),
        ));
    }
    Ok(())
}

/// Where the blocks of an internal file are; nowhere if there is no such file.
///
/// # Errors
/// If the inode is damaged or does not map its blocks.
pub async fn map_file(
    disk: &dyn Image,
    place: Place,
    superblock: &Superblock,
    inode: Option<InodeNumber>,
) -> Result<Vec<Extent>> {
    let Some(number) = inode else {
        return Ok(Vec::new());
    };
    let bytes = read_inode(disk, place, superblock, number).await?;
    let mut map = FileMap::new(superblock, number, &Inode::parse(&bytes))?;
    while let Some(block) = map.next_block() {
        map.supply(&read_block(disk, place, superblock, block).await?)?;
    }
    Ok(map.finish())
}

/// The record of an inode, its checksum verified.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if there is no such inode or its checksum is wrong.
pub async fn read_inode(
    disk: &dyn Image,
    place: Place,
    superblock: &Superblock,
    number: InodeNumber,
) -> Result<Vec<u8>> {
    let (block, within) = locate_inode(disk, place, superblock, number).await?;
    let block = read_block(disk, place, superblock, block).await?;
    let bytes = block[within..within + usize::from(superblock.inode_size)].to_vec();
    inode::verify(&superblock.checksums, number, &bytes)?;
    Ok(bytes)
}

/// The block that holds an inode, and where in it.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if there is no such inode or its group's descriptor is damaged.
pub async fn locate_inode(
    disk: &dyn Image,
    place: Place,
    superblock: &Superblock,
    number: InodeNumber,
) -> Result<(FsBlock, usize)> {
    let (group, index) = superblock.locate_inode(number).ok_or_else(|| {
        Error::new(
            ErrorKind::Corrupt,
            format!("{}: there is no inode {number}", disk.name()),
        )
    })?;
    let bytes = read_descriptor(disk, place, superblock, group).await?;
    let table = GroupDescriptor::parse(&bytes).locations.inode_table;
    let per_block = superblock.inodes_per_block();
    let block = FsBlock(table.0.saturating_add(u64::from(index / per_block)));
    let within = (index % per_block) as usize * usize::from(superblock.inode_size);
    Ok((block, within))
}

/// The descriptor of `group`, its checksum verified.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if its checksum is wrong.
pub async fn read_descriptor(
    disk: &dyn Image,
    place: Place,
    superblock: &Superblock,
    group: BlockGroup,
) -> Result<Vec<u8>> {
    let mut descriptors = Descriptors::of(disk, place, superblock);
    Ok(descriptors.get(group).await?.to_vec())
}

/// Descriptors that are asked for one after the other: a block of the table that holds several is read once.
pub(super) struct Descriptors<'a> {
    disk: &'a dyn Image,
    place: Place,
    superblock: &'a Superblock,
    /// The block of the table that was read last.
    index: Option<u32>,
    block: Vec<u8>,
}

impl<'a> Descriptors<'a> {
    /// Those of the filesystem at `place`.
    pub(super) fn of(disk: &'a dyn Image, place: Place, superblock: &'a Superblock) -> Self {
        Self {
            disk,
            place,
            superblock,
            index: None,
            block: Vec::new(),
        }
    }

    /// The descriptor of `group`, its checksum verified.
    ///
    /// # Errors
    /// As [`read_descriptor`].
    pub(super) async fn get(&mut self, group: BlockGroup) -> Result<&[u8]> {
        let superblock = self.superblock;
        let per_block = superblock.descriptors_per_block();
        let index = group.0 / per_block;
        if self.index != Some(index) {
            let block = superblock.descriptor_block(index);
            self.block = read_block(self.disk, self.place, superblock, block).await?;
            self.index = Some(index);
        }
        let size = usize::from(superblock.descriptor_size);
        let start = (group.0 % per_block) as usize * size;
        let descriptor = &self.block[start..start + size];
        group_descriptor::verify(&superblock.checksums, group, descriptor)?;
        Ok(descriptor)
    }
}
