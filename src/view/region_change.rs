//! Changing regions that are declared: making one larger, and giving one back.
//!
//! Nothing in the filesystem changes: groups that hold nothing are a region's or the base's by declaration alone. A
//! child keeps to the groups that it was created with until it takes over what its base has added.

use super::choose::choose;
use super::declaration::{BaseDeclaration, ChildDeclaration, Extent, GroupList, Region, Sharing};
use super::lease::held;
use super::new_groups::lengthened;
use super::open::{check_unused, group_set};
use super::prepare::{Groups, check_groups, check_sound};
use super::probe::{Probe, map_file, read_descriptor};
use crate::error::{Error, ErrorKind, Result};
use crate::ext4::group_descriptor::{self, GroupDescriptor};
use crate::image::Image;
use crate::sys::IoBuf;
use crate::units::{BlockGroup, FsBlock, GuestOffset, InodeNumber};

/// Adds groups to the region called `name` of the base on `disk`, which declares `declared`: what it is to declare
/// from now on.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if there is no such region of groups, the filesystem is in use, or the groups cannot
/// be had, saying which can.
pub async fn enlarge(
    disk: &dyn Image,
    declared: &BaseDeclaration,
    name: &str,
    groups: &Groups,
) -> Result<BaseDeclaration> {
    let Extent::Groups { list, .. } = &declared.region(name)?.extent else {
        return Err(invalid(format!(
            "region \"{name}\" is a partition: only regions of block groups can be enlarged"
        )));
    };
    let probe = filesystem_of(disk, declared).await?;
    check_sound(disk, &probe).await?;
    // Bounds the lists before they are walked.
    group_set(&probe, &declared.regions)?;
    let more = match groups {
        Groups::Listed(list) => list.clone(),
        Groups::Sized(size) => choose(disk, &probe, declared, *size).await?,
    };
    check_groups(disk, &probe, declared, &more).await?;
    let whole: GroupList = list.iter().chain(more.iter()).collect();
    let mut enlarged = declared.clone();
    for region in &mut enlarged.regions {
        if let Extent::Groups { list, .. } = &mut region.extent
            && region.name == name
        {
            list.clone_from(&whole);
        }
    }
    Ok(enlarged)
}

/// Gives the region called `name` back to the base on `disk`, which declares `declared`: what it is to declare from
/// now on. The region's directory stays, an empty directory of the base's. Children of the region are children no
/// more: they are refused from then on.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if there is no such region or the filesystem is in use; [`ErrorKind::Refused`] if
/// somebody has used the region's groups in the base.
pub async fn release(
    disk: &dyn Image,
    declared: &BaseDeclaration,
    name: &str,
) -> Result<BaseDeclaration> {
    let region = declared.region(name)?;
    if let Some(lease) = declared.lease(name) {
        return Err(Error::new(ErrorKind::Refused, held(lease)));
    }
    if let Extent::Groups {
        directory,
        inode,
        block,
        ..
    } = &region.extent
    {
        let probe = filesystem_of(disk, declared).await?;
        check_sound(disk, &probe).await?;
        if region.sharing == Sharing::Shared {
            check_directory(disk, &probe, directory, *inode, *block).await?;
        }
        check_unused(disk, &probe, [region]).await?;
    }
    let mut rest = declared.clone();
    rest.regions.retain(|region| region.name != name);
    let has_groups = |region: &Region| matches!(region.extent, Extent::Groups { .. });
    if !rest.regions.iter().any(has_groups) {
        rest.filesystem = None;
    }
    Ok(rest)
}

/// Takes the shared region called `name` from the child that holds it, which is refused from then on: what that has not
/// brought to its place is lost. Returns what the base is to declare from now on, and who held the region.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if there is no such region, or nobody holds it.
pub fn evict(declared: &BaseDeclaration, name: &str) -> Result<(BaseDeclaration, String)> {
    declared.region(name)?;
    let lease = declared
        .lease(name)
        .ok_or_else(|| invalid(format!("nobody holds region \"{name}\"")))?;
    let mut rest = declared.clone();
    rest.leases.retain(|other| other.region != name);
    Ok((rest, lease.holder.clone()))
}

/// Checks that the directory of a shared region is as it was made: a child wrote its inode, and the base is to trust
/// it.
async fn check_directory(
    disk: &dyn Image,
    probe: &Probe,
    directory: &str,
    inode: u32,
    block: u64,
) -> Result<()> {
    let number = InodeNumber(inode);
    let blocks = map_file(disk, probe.place(), probe.superblock(), Some(number)).await?;
    match blocks.as_slice() {
        [only] if only.start == FsBlock(block) && only.len == 1 => Ok(()),
        _ => Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{directory} has grown to more than one block, or lies elsewhere: empty it, and let `e2fsck -fD` on \
                 the base make it small again"
            ),
        )),
    }
}

/// Takes over what the base has added to a child's regions: in the child's overlay `own` the groups are as in the
/// base, unused. Returns what the child is to declare from now on, and which groups are new; to be stored after a
/// flush of the overlay.
///
/// # Errors
/// As [`ChildDeclaration::check_against`]; [`ErrorKind::Refused`] if the base has used the groups; what reading and
/// writing the images returns.
pub async fn adopt(
    own: &dyn Image,
    child: &ChildDeclaration,
    base: &dyn Image,
    declared: &BaseDeclaration,
) -> Result<(ChildDeclaration, GroupList)> {
    child.check_against(declared)?;
    let mut adopted = child.clone();
    for region in &mut adopted.regions {
        region.clone_from(declared.region(&region.name)?);
    }
    if adopted == *child {
        return Ok((adopted, GroupList::from_iter([])));
    }
    let probe = filesystem_of(base, declared).await?;
    let is_private = |region: &&Region| region.sharing == Sharing::Private;
    let private: Vec<Region> = adopted.regions.iter().filter(is_private).cloned().collect();
    check_unused(base, &probe, &private).await?;
    let before = group_set(&probe, &child.regions)?;
    let after = group_set(&probe, &adopted.regions)?;
    let new: GroupList = after
        .iter()
        .filter(|group| !before.contains(*group))
        .collect();
    // Those of shared regions stay in the base.
    let private = group_set(&probe, &private)?;
    for group in new.iter().filter(|group| private.contains(*group)) {
        copy_descriptor(&probe, group, base, own).await?;
    }
    lengthen_last_group(probe, child, &new, base, own).await?;
    own.close().await?;
    Ok((adopted, new))
}

/// The last of the base's groups is longer for a child with groups behind it. If it is one of the `new` ones, the
/// child's overlay `own` gets it so.
async fn lengthen_last_group(
    probe: Probe,
    child: &ChildDeclaration,
    new: &GroupList,
    base: &dyn Image,
    own: &dyn Image,
) -> Result<()> {
    let whole = probe.clone().for_child(child)?;
    let Some(growth) = whole.growth() else {
        return Ok(());
    };
    let (last, gained) = growth.last_group();
    if gained.is_empty() || !new.contains(last) {
        return Ok(());
    }
    let bytes = lengthened(base, &probe, growth).await?;
    let superblock = probe.superblock();
    let bitmap = GroupDescriptor::parse(&bytes.descriptor)
        .locations
        .block_bitmap;
    let at = probe.place().start.0 + bitmap.0 * u64::from(superblock.block_size);
    own.write(GuestOffset(at), IoBuf::from_bytes(&bytes.block_bitmap))
        .await?;
    let at = descriptor_offset(&probe, last);
    own.write(at, IoBuf::from_bytes(&bytes.descriptor)).await
}

/// An overlay that has written a block of the descriptor table holds the descriptors of all its groups, and those that
/// were not the child's as they were then.
async fn copy_descriptor(
    probe: &Probe,
    group: BlockGroup,
    base: &dyn Image,
    own: &dyn Image,
) -> Result<()> {
    let superblock = probe.superblock();
    let descriptor = read_descriptor(base, probe.place(), superblock, group).await?;
    group_descriptor::verify(&superblock.checksums, group, &descriptor)?;
    own.write(
        descriptor_offset(probe, group),
        IoBuf::from_bytes(&descriptor),
    )
    .await
}

/// Where the descriptor of `group` lies on the disk.
fn descriptor_offset(probe: &Probe, group: BlockGroup) -> GuestOffset {
    let superblock = probe.superblock();
    let per_block = superblock.descriptors_per_block();
    let block = superblock.descriptor_block(group.0 / per_block);
    let within = u64::from(group.0 % per_block) * u64::from(superblock.descriptor_size);
    GuestOffset(probe.place().start.0 + block.0 * u64::from(superblock.block_size) + within)
}

async fn filesystem_of(disk: &dyn Image, declared: &BaseDeclaration) -> Result<Probe> {
    Probe::of_declared(disk, declared).await?.ok_or_else(|| {
        invalid(format!(
            "{} declares no regions of block groups",
            disk.name()
        ))
    })
}

fn invalid(context: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, context)
}
