//! Choosing block groups for a region of a given size.

use super::declaration::{BaseDeclaration, GroupList};
use super::open::group_set;
use super::probe::Probe;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::units::BlockGroup;

/// Free groups that have room for `size` bytes: the last of the filesystem that lie side by side, where a base's files
/// come last, or the last there are if none do.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`], saying how much room there is, if all free groups together have less.
pub(super) async fn choose(
    disk: &dyn Image,
    probe: &Probe,
    declaration: &BaseDeclaration,
    size: u64,
) -> Result<GroupList> {
    let superblock = probe.superblock();
    let block_size = u64::from(superblock.block_size);
    let wanted = size.div_ceil(block_size);
    let reserved = group_set(probe, &declaration.regions)?;
    let mut all = Chosen::default();
    let mut side_by_side = Chosen::default();
    // Group 0 holds the root directory.
    for group in (1..superblock.group_count).rev().map(BlockGroup) {
        let room = if reserved.contains(group) {
            None
        } else {
            probe.room_in(disk, group).await?
        };
        let Some(room) = room else {
            side_by_side = Chosen::default();
            continue;
        };
        side_by_side.add(group, room);
        if side_by_side.room >= wanted {
            return Ok(side_by_side.groups.into_iter().collect());
        }
        if all.room < wanted {
            all.add(group, room);
        }
    }
    if all.room >= wanted {
        return Ok(all.groups.into_iter().collect());
    }
    Err(Error::new(
        ErrorKind::InvalidConfig,
        format!(
            "{} has {} bytes in block groups that hold nothing, and {size} are wanted: take less, or make the \
             filesystem larger",
            disk.name(),
            all.room * block_size
        ),
    ))
}

/// Groups, and the free blocks in them.
#[derive(Default)]
struct Chosen {
    groups: Vec<BlockGroup>,
    room: u64,
}

impl Chosen {
    fn add(&mut self, group: BlockGroup, room: u64) {
        self.groups.push(group);
        self.room = self.room.saturating_add(room);
    }
}
