//! Block groups that a child alone has, behind the end of its base's filesystem.
//!
//! A child's overlay can be longer than its base. The child's filesystem then has groups that the base's does not have:
//! nothing of them is in the base, and nothing of the base is in them. What is where in them follows from the base's
//! superblock and their number ([`Growth`]), so enforcement rests on the base here as everywhere.
//!
//! # Invariants
//!
//! 1. The base's filesystem is as long as it was when the child was made, and laid out in the same way. Had it grown
//!    since, the same blocks and inodes would mean one thing in the base and another in the child.
//! 2. A region of the base has none of them: regions are held to the groups that the base has.
//! 3. What the last of the base's groups gains by not being the last any more nobody uses. If the group is
//!    a region's, and the child's, it is the child's to use.

use serde::{Deserialize, Serialize};

use super::declaration::{BaseDeclaration, ChildDeclaration, Extent, GroupList, Region, Sharing};
use super::open::group_set;
use super::ownership::GroupSet;
use super::probe::Probe;
use crate::error::{Error, ErrorKind, Result};
use crate::ext4::growth::Growth;
use crate::image::Image;

/// What `regions` and others call the groups that a child alone has. No region can be called so.
pub const NAME: &str = "(grown)";

/// The groups that a child alone has, as its overlay declares them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grown {
    /// How many blocks the base's filesystem has.
    pub from: u64,
    /// How many groups there are behind it.
    pub groups: u32,
    /// [`Growth::fingerprint`].
    pub layout: u32,
}

impl Grown {
    /// What there is to declare of `growth`.
    pub(super) fn of(growth: &Growth) -> Self {
        Self {
            from: growth.before().blocks_count,
            groups: growth.after().group_count - growth.before().group_count,
            layout: growth.fingerprint(),
        }
    }
}

/// Plans groups of at least `bytes` bytes in all behind the end of the filesystem in `probe`, which has to begin where
/// its disk does.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if the filesystem lies in a partition, or no room is asked for; and as
/// [`Growth::plan`].
pub(super) fn plan(probe: &Probe, bytes: u64) -> Result<Growth> {
    let superblock = probe.superblock();
    if probe.place().start.0 != 0 {
        return Err(invalid(
            "the filesystem lies in a partition, whose end the partition table says: groups can be added only to a \
             filesystem that fills its disk; use a base of which it fills the disk",
        ));
    }
    let group_bytes = u64::from(superblock.blocks_per_group) * u64::from(superblock.block_size);
    let groups = u32::try_from(bytes.div_ceil(group_bytes)).unwrap_or(u32::MAX);
    if groups == 0 {
        return Err(invalid("no room is asked for: leave --grow out"));
    }
    Growth::plan(probe.superblock_bytes(), superblock, groups)
}

/// Refuses to let a child have groups of its own beside `regions` if no directory that it alone writes leads to them.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if none of the regions is a private one of block groups, or one is shared.
pub(super) fn check_beside(regions: &[Region]) -> Result<()> {
    let of_groups = |region: &&Region| matches!(region.extent, Extent::Groups { .. });
    if let Some(shared) = regions
        .iter()
        .filter(of_groups)
        .find(|region| region.sharing == Sharing::Shared)
    {
        return Err(invalid(format!(
            "region \"{}\" is shared, and the child's kernel would lay files of it into groups that the child alone \
             has, where others would not find them: grow a child of a private region",
            shared.name
        )));
    }
    if !regions.iter().any(|region| of_groups(&region)) {
        return Err(invalid(
            "the child owns partitions alone, and no directory of the filesystem would be its own: name a region of \
             block groups, too, of which one group is enough",
        ));
    }
    Ok(())
}

impl Probe {
    /// Reads the filesystem that a base declares as it is for `child`: with the groups that the child alone has. `None`
    /// if the base declares none.
    ///
    /// # Errors
    /// As [`Probe::of_declared`] and [`Probe::for_child`].
    pub(super) async fn of_child(
        disk: &dyn Image,
        declaration: &BaseDeclaration,
        child: &ChildDeclaration,
    ) -> Result<Option<Self>> {
        let probe = Self::of_declared(disk, declaration).await?;
        probe.map(|probe| probe.for_child(child)).transpose()
    }

    /// The filesystem with the groups that `child` alone has.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the filesystem is not any more what they were planned for (invariant 1).
    pub(super) fn for_child(self, child: &ChildDeclaration) -> Result<Self> {
        let Some(grown) = child.grown else {
            return Ok(self);
        };
        check_beside(&child.regions)?;
        let blocks = self.superblock().blocks_count;
        if blocks != grown.from {
            return Err(refused(format!(
                "the base's filesystem has {blocks} blocks, and had {} when the child was made, whose own block groups \
                 begin there: make it as long again with resize2fs, or create the child anew",
                grown.from
            )));
        }
        let growth = Growth::plan(self.superblock_bytes(), self.superblock(), grown.groups)?;
        if growth.fingerprint() != grown.layout || grown.groups == 0 {
            return Err(refused(
                "the base's filesystem is laid out otherwise than when the child was made, and the child's own block \
                 groups do not fit it any more: undo what tune2fs has changed, or create the child anew"
                    .to_owned(),
            ));
        }
        self.with(growth)
    }

    /// The groups that a child with these regions owns: theirs, and those that it alone has.
    ///
    /// # Errors
    /// As [`group_set`].
    pub(super) fn groups_of_child(&self, regions: &[Region]) -> Result<GroupSet> {
        let mut set = group_set(self, regions)?;
        for group in self.growth().into_iter().flat_map(Growth::groups) {
            set.insert(group);
        }
        Ok(set)
    }

    /// The groups that a child alone has, as a region: one that its base does not declare. Files come there from the
    /// directories of `regions`.
    pub(super) fn grown_region(&self, regions: &[Region]) -> Option<Region> {
        let growth = self.growth()?;
        let directory = regions.iter().find_map(|region| match &region.extent {
            Extent::Groups { .. } => Some(region.extent.clone()),
            Extent::Partition { .. } => None,
        })?;
        let Extent::Groups {
            directory,
            inode,
            block,
            ..
        } = directory
        else {
            return None;
        };
        Some(Region {
            name: NAME.to_owned(),
            sharing: Sharing::Private,
            extent: Extent::Groups {
                list: growth.groups().collect::<GroupList>(),
                directory,
                inode,
                block,
            },
        })
    }
}

fn invalid(context: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, context)
}

fn refused(context: String) -> Error {
    Error::new(ErrorKind::Refused, context)
}
