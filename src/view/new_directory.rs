//! Creating a region's directory in a filesystem that nobody has mounted.
//!
//! Its inode and its block lie in the region's groups, so that they are the children's; its name lies in its
//! parent, so that it is the base's.

use std::time::{SystemTime, UNIX_EPOCH};

use super::changes::Changes;
use super::declaration::GroupList;
use super::groups::Occupants;
use super::probe::{Probe, locate_inode, map_file, read_block, read_inode};
use crate::error::{Error, ErrorKind, Result};
use crate::ext4::directory::{self, Added, Name, Owner};
use crate::ext4::group::{GroupBytes, InodeUse};
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::htree::Descent;
use crate::ext4::inode::{
    CASEFOLD_FL, ENCRYPT_FL, FileType, INDEX_FL, INLINE_DATA_FL, Inode, ROOT,
};
use crate::ext4::new_directory::{self, NewDirectory, Timestamp};
use crate::ext4::superblock::Superblock;
use crate::ext4::volatile::{self, FreeCounts};
use crate::image::Image;
use crate::units::{BlockGroup, FsBlock, InodeNumber};

/// The most blocks of a directory that are searched for a name.
const MAX_DIRECTORY_BLOCKS: u64 = 1 << 16;

/// Flags of directories whose entries are not a plain list.
const SPECIAL_FLAGS: [(u32, &str); 3] = [
    (ENCRYPT_FL, "encrypted"),
    (CASEFOLD_FL, "case-insensitive"),
    (INLINE_DATA_FL, "held in its inode"),
];

/// Where the new name goes.
struct Parent<'a> {
    number: InodeNumber,
    name: Name<'a>,
}

/// Plans the directory `path` in the groups of `list`, which hold nothing yet.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if there is such a name already, no such parent, or no room for the name.
pub(super) async fn plan(
    disk: &dyn Image,
    probe: &Probe,
    list: &GroupList,
    path: &str,
    changes: &mut Changes,
) -> Result<Occupants> {
    let parent = find_parent(disk, probe, path).await?;
    let superblock = probe.superblock();
    let occupants = claim(disk, probe, list, changes).await?;
    let new = NewDirectory {
        inode: occupants.inode,
        block: occupants.block,
        permissions: 0o755,
        // Generations only have to differ from those of an inode's earlier life, and this one had none.
        generation: occupants.inode.0.rotate_left(16),
        time: now(),
    };
    put_inode(disk, probe, &new, changes).await?;
    let mut block = vec![0; superblock.block_size as usize];
    let owner = Owner {
        inode: occupants.inode,
        generation: new.generation,
    };
    directory::put_new(superblock, owner, parent.number, &mut block);
    changes.put(occupants.block, block);
    link(disk, probe, &parent, &new, changes).await?;
    count_in_superblock(disk, superblock, changes).await?;
    Ok(occupants)
}

fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: since.as_secs(),
        nanoseconds: since.subsec_nanos(),
    }
}

/// Follows `path` to the directory that is to hold its last name.
async fn find_parent<'a>(disk: &dyn Image, probe: &Probe, path: &'a str) -> Result<Parent<'a>> {
    let invalid_path = || {
        invalid(format!(
            "\"{}\" is no absolute path of a new directory, like /local",
            path.escape_debug()
        ))
    };
    let mut names = Vec::new();
    for name in path.split('/').filter(|name| !name.is_empty()) {
        names.push(Name::new(name.as_bytes())?);
    }
    let (Some((last, above)), true) = (names.split_last(), path.starts_with('/')) else {
        return Err(invalid_path());
    };
    let mut number = ROOT;
    for name in above {
        number = look_up(disk, probe, number, *name)
            .await?
            .ok_or_else(|| invalid(format!("a directory on the way to {path} is missing")))?;
    }
    if look_up(disk, probe, number, *last).await?.is_some() {
        return Err(invalid(format!(
            "{path} exists already: choose another name, or remove it"
        )));
    }
    Ok(Parent {
        number,
        name: *last,
    })
}

/// The blocks of the directory `number`.
async fn directory_blocks(
    disk: &dyn Image,
    probe: &Probe,
    number: InodeNumber,
) -> Result<(Inode, Vec<FsBlock>)> {
    let superblock = probe.superblock();
    let inode = Inode::parse(&read_inode(disk, probe.place(), superblock, number).await?);
    if inode.file_type() != FileType::Directory {
        return Err(invalid(format!(
            "inode {number} on the way is no directory"
        )));
    }
    let extents = map_file(disk, probe.place(), superblock, Some(number)).await?;
    let total: u64 = extents.iter().map(|extent| u64::from(extent.len)).sum();
    if total > MAX_DIRECTORY_BLOCKS {
        return Err(invalid(format!(
            "directory {number} is too large to be searched"
        )));
    }
    let blocks = extents.iter().flat_map(|extent| {
        (0..u64::from(extent.len)).map(move |index| FsBlock(extent.start.0 + index))
    });
    Ok((inode, blocks.collect()))
}

async fn look_up(
    disk: &dyn Image,
    probe: &Probe,
    number: InodeNumber,
    name: Name<'_>,
) -> Result<Option<InodeNumber>> {
    let (_, blocks) = directory_blocks(disk, probe, number).await?;
    for block in blocks {
        let bytes = read_block(disk, probe.place(), probe.superblock(), block).await?;
        if let Some(found) = directory::find(&bytes, name)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Takes an inode and a block out of the groups.
async fn claim(
    disk: &dyn Image,
    probe: &Probe,
    list: &GroupList,
    changes: &mut Changes,
) -> Result<Occupants> {
    let mut inode = None;
    let mut block = None;
    for number in list.iter() {
        let mut group = probe.group(disk, number).await?;
        if block.is_none() {
            block = group.allocate_block();
        }
        if inode.is_none() {
            inode = group.allocate_inode(InodeUse::Directory);
        }
        put_group(
            disk,
            probe.superblock(),
            number,
            group.into_bytes(),
            changes,
        )
        .await?;
        if let (Some(inode), Some(block)) = (inode, block) {
            return Ok(Occupants { inode, block });
        }
    }
    Err(invalid(format!(
        "block groups {list} have no room for a directory"
    )))
}

/// Puts a group's changed bitmaps and descriptor in their places.
async fn put_group(
    disk: &dyn Image,
    superblock: &Superblock,
    group: BlockGroup,
    bytes: GroupBytes,
    changes: &mut Changes,
) -> Result<()> {
    let locations = GroupDescriptor::parse(&bytes.descriptor).locations;
    changes.put(locations.block_bitmap, bytes.block_bitmap);
    changes.put(locations.inode_bitmap, bytes.inode_bitmap);
    let per_block = superblock.descriptors_per_block();
    let size = usize::from(superblock.descriptor_size);
    let start = (group.0 % per_block) as usize * size;
    let table = superblock.descriptor_block(group.0 / per_block);
    let block = changes.block(disk, superblock, table).await?;
    block[start..start + size].copy_from_slice(&bytes.descriptor);
    Ok(())
}

/// Writes the new inode. Nothing else is in its block of the table, which may never have been written.
async fn put_inode(
    disk: &dyn Image,
    probe: &Probe,
    new: &NewDirectory,
    changes: &mut Changes,
) -> Result<()> {
    let superblock = probe.superblock();
    let (block, within) = locate_inode(disk, probe.place(), superblock, new.inode).await?;
    let mut bytes = vec![0; superblock.block_size as usize];
    let record = new_directory::inode_record(superblock, new)?;
    bytes[within..within + record.len()].copy_from_slice(&record);
    changes.put(block, bytes);
    Ok(())
}

/// Enters the new directory in its parent.
async fn link(
    disk: &dyn Image,
    probe: &Probe,
    parent: &Parent<'_>,
    new: &NewDirectory,
    changes: &mut Changes,
) -> Result<()> {
    let superblock = probe.superblock();
    let (parent_inode, blocks) = directory_blocks(disk, probe, parent.number).await?;
    for (flag, what) in SPECIAL_FLAGS {
        if parent_inode.flags & flag != 0 {
            return Err(invalid(format!(
                "its parent directory is {what}, and entries are only added to plain ones: choose a directory elsewhere"
            )));
        }
    }
    let owner = Owner {
        inode: parent.number,
        generation: parent_inode.generation,
    };
    let candidates = if parent_inode.flags & INDEX_FL != 0 {
        vec![indexed_block(disk, superblock, owner, parent.name, &blocks, changes).await?]
    } else {
        blocks
    };
    let mut entered = false;
    for block in candidates {
        let bytes = changes.block(disk, superblock, block).await?;
        if directory::find(bytes, parent.name)?.is_some() {
            return Err(invalid("the directory is given twice"));
        }
        let file_type = FileType::Directory;
        if directory::add(superblock, owner, bytes, parent.name, new.inode, file_type)?
            == Added::Yes
        {
            changes.write_last(block);
            entered = true;
            break;
        }
    }
    if !entered {
        return Err(invalid(
            "its parent directory has no room for another entry: choose a directory below a smaller one",
        ));
    }
    let (block, within) = locate_inode(disk, probe.place(), superblock, parent.number).await?;
    let bytes = changes.block(disk, superblock, block).await?;
    let record = &mut bytes[within..within + usize::from(superblock.inode_size)];
    new_directory::add_subdirectory(superblock, parent.number, record, new.time)?;
    changes.write_last(block);
    Ok(())
}

/// The block of an indexed directory that the name's hash asks for.
async fn indexed_block(
    disk: &dyn Image,
    superblock: &Superblock,
    owner: Owner,
    name: Name<'_>,
    blocks: &[FsBlock],
    changes: &mut Changes,
) -> Result<FsBlock> {
    let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
    let at = |index: u32| {
        let block = usize::try_from(index)
            .ok()
            .and_then(|index| blocks.get(index));
        block.copied().ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "directory {} has no block {index}; e2fsck may repair it",
                    owner.inode
                ),
            )
        })
    };
    let mut descent = Descent::new(superblock, owner, count, name);
    while let Some(index) = descent.next_block() {
        descent.supply(changes.block(disk, superblock, at(index)?).await?)?;
    }
    at(descent.leaf().unwrap_or_default())
}

/// One block and one inode fewer are free.
async fn count_in_superblock(
    disk: &dyn Image,
    superblock: &Superblock,
    changes: &mut Changes,
) -> Result<()> {
    let number = FsBlock(u64::from(superblock.first_data_block));
    let block = changes.block(disk, superblock, number).await?;
    let mut bytes = super::compose::superblock_in(block)?;
    let taken = FreeCounts {
        blocks: 1,
        inodes: 1,
    };
    volatile::hide_free(&mut bytes, taken);
    super::compose::put_superblock(block, &bytes);
    Ok(())
}

fn invalid(context: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, context)
}
