//! From what images declare to what a VM owns: the checks before anything is served.

use std::sync::Arc;

use super::declaration::{BaseDeclaration, ChildDeclaration, Extent, GroupList, Region};
use super::disk::{Stores, View};
use super::groups::Occupants;
use super::journal::Committed;
use super::ownership::GroupSet;
use super::probe::{Place, Probe, read_partitions};
use super::refusal::Refusals;
use super::territory::{Area, Filesystem, Owner, Side, Territory};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::ext4::volatile::FreeCounts;
use crate::image::Image;
use crate::units::{BlockGroup, FsBlock, GuestOffset, InodeNumber};

/// A base that several VMs share: all their views are opened on the same one.
pub struct SharedBase {
    disk: Arc<dyn Image>,
    declaration: BaseDeclaration,
    committed: Arc<Committed>,
}

impl SharedBase {
    /// The base stored in `disk`, whose image says of itself what `declaration` holds.
    ///
    /// # Errors
    /// If the declaration does not fit the disk, or the filesystem is not sound enough to be kept apart.
    pub async fn open(disk: Arc<dyn Image>, declaration: BaseDeclaration) -> Result<Self> {
        let committed = async {
            let filesystem = base_filesystem(&*disk, &declaration).await?;
            Committed::open(Arc::clone(&disk), filesystem).await
        };
        let committed = committed
            .await
            .context(|| format!("opening {}", disk.name()))?;
        Ok(Self {
            disk,
            declaration,
            committed: Arc::new(committed),
        })
    }

    /// The disk as its VM has last committed it: what children see.
    #[must_use]
    pub fn committed(&self) -> &Arc<Committed> {
        &self.committed
    }
}

/// The view of the base's own VM, called `vm`.
///
/// # Errors
/// If the declaration does not fit the disk, or the filesystem is not sound enough to be kept apart.
pub async fn open_base(vm: &str, base: &SharedBase) -> Result<View> {
    let disk = &base.disk;
    let territory = base_territory(&**disk, &base.declaration)
        .await
        .context(|| format!("opening {}", disk.name()))?;
    let stores = Stores {
        own: Arc::clone(disk),
        truth: Arc::clone(disk),
        committed: Some(Arc::clone(&base.committed)),
    };
    View::open(stores, territory, Arc::new(Refusals::new(vm))).await
}

/// The view of a child's VM, called `vm`, whose overlay is `overlay`.
///
/// # Errors
/// If the declarations do not fit each other or the disk, or the base has meanwhile used what it had reserved.
pub async fn open_child(
    vm: &str,
    overlay: Arc<dyn Image>,
    child: &ChildDeclaration,
    base: &SharedBase,
) -> Result<View> {
    let territory = child_territory(&*base.disk, &base.declaration, child)
        .await
        .context(|| format!("opening {} on {}", overlay.name(), base.disk.name()))?;
    let stores = Stores {
        own: overlay,
        truth: Arc::clone(&base.committed) as Arc<dyn Image>,
        committed: None,
    };
    View::open(stores, territory, Arc::new(Refusals::new(vm))).await
}

/// What the base's VM owns: everything but the regions.
async fn base_territory(disk: &dyn Image, declaration: &BaseDeclaration) -> Result<Territory> {
    let areas = partition_areas(disk, declaration, &[]).await?;
    let filesystem = base_filesystem(disk, declaration).await?;
    Ok(Territory::new(Side::Base, filesystem, areas))
}

/// The shared filesystem, of which the base's VM owns all groups that no region has.
async fn base_filesystem(
    disk: &dyn Image,
    declaration: &BaseDeclaration,
) -> Result<Option<Filesystem>> {
    let Some(probe) = Probe::of_declared(disk, declaration).await? else {
        return Ok(None);
    };
    let reserved = group_set(&probe, &declaration.regions)?;
    let foreign_free = probe.count_free(disk, reserved.iter()).await?;
    let owned = reserved.complement();
    Ok(Some(Filesystem::new(
        Side::Base,
        probe,
        owned,
        foreign_free,
    )))
}

/// What a child owns: its regions, which the base must not have used.
///
/// # Errors
/// As [`open_child`].
pub async fn child_territory(
    base: &dyn Image,
    declaration: &BaseDeclaration,
    child: &ChildDeclaration,
) -> Result<Territory> {
    child.check_against(declaration)?;
    let areas = partition_areas(base, declaration, &child.regions).await?;
    let Some(probe) = Probe::of_declared(base, declaration).await? else {
        return Ok(Territory::new(Side::Child, None, areas));
    };
    let owned = group_set(&probe, &child.regions)?;
    check_unused(base, &probe, &child.regions).await?;
    let filesystem = Filesystem::new(Side::Child, probe, owned, FreeCounts::default());
    Ok(Territory::new(Side::Child, Some(filesystem), areas))
}

pub(super) async fn check_unused(
    base: &dyn Image,
    probe: &Probe,
    regions: &[Region],
) -> Result<()> {
    for region in regions {
        let Extent::Groups { list, .. } = &region.extent else {
            continue;
        };
        let in_use = probe.groups_in_use(base, list, occupants(region)).await?;
        if in_use.count() > 0 {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "block groups {in_use} are reserved for region \"{}\", but the base has used them: it has been \
                     written without its view. Delete what lies there, or create the child on another region",
                    region.name
                ),
            ));
        }
    }
    Ok(())
}

/// What of the base's making lies in a region's groups.
fn occupants(region: &Region) -> Option<Occupants> {
    match region.extent {
        Extent::Groups { inode, block, .. } => Some(Occupants {
            inode: InodeNumber(inode),
            block: FsBlock(block),
        }),
        Extent::Partition { .. } => None,
    }
}

/// The groups of all `regions`.
///
/// # Errors
/// If one of them is not a group of the filesystem, is group 0, or is in two regions.
pub(super) fn group_set(probe: &Probe, regions: &[Region]) -> Result<GroupSet> {
    let group_count = probe.superblock().group_count;
    let mut set = GroupSet::none(group_count);
    for region in regions {
        let Extent::Groups { list, .. } = &region.extent else {
            continue;
        };
        check_range(list, group_count)?;
        for group in list.iter() {
            if set.contains(group) {
                return Err(invalid(format!("block group {group} is in two regions")));
            }
            set.insert(group);
        }
    }
    Ok(set)
}

/// Holds a list of groups to those that a region may take.
pub(super) fn check_range(list: &GroupList, group_count: u32) -> Result<()> {
    let last = list
        .last()
        .ok_or_else(|| invalid("the region has no block group"))?;
    if last.0 >= group_count {
        return Err(invalid(format!(
            "there is no block group {last}: the filesystem has groups 0 to {}",
            group_count.saturating_sub(1)
        )));
    }
    if list.contains(BlockGroup(0)) {
        return Err(invalid(
            "block group 0 holds the root directory and cannot be reserved",
        ));
    }
    Ok(())
}

/// The partitions that the base gives up, and which of them are `own`.
async fn partition_areas(
    disk: &dyn Image,
    declaration: &BaseDeclaration,
    own: &[Region],
) -> Result<Vec<Area>> {
    let mut areas = Vec::new();
    let mut table = None;
    for region in &declaration.regions {
        let Extent::Partition {
            number,
            start,
            length,
        } = region.extent
        else {
            continue;
        };
        if table.is_none() {
            table = Some(read_partitions(disk).await?);
        }
        let start = GuestOffset(start);
        let unchanged = table
            .iter()
            .flatten()
            .any(|p| p.number == number && p.start == start && p.len == length);
        if !unchanged {
            return Err(invalid(format!(
                "partition {number} is no longer where it was when region \"{}\" was declared; restore the \
                 partition table",
                region.name
            )));
        }
        let owner = if own.iter().any(|other| other.name == region.name) {
            Owner::Own
        } else {
            Owner::Foreign
        };
        areas.push(Area {
            start,
            end: GuestOffset(start.0.saturating_add(length)),
            owner,
        });
    }
    Ok(areas)
}

impl Probe {
    /// Reads the filesystem that a base declares, if it declares one.
    pub(super) async fn of_declared(
        disk: &dyn Image,
        declaration: &BaseDeclaration,
    ) -> Result<Option<Self>> {
        let Some(declared) = &declaration.filesystem else {
            return Ok(None);
        };
        let place = Place {
            start: GuestOffset(declared.start),
            length: declared.length,
        };
        let end = place.start.checked_add(place.length);
        if end.is_none_or(|end| end.0 > disk.virtual_size()) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the declared filesystem does not lie on the disk",
            ));
        }
        let probe = Self::read(disk, place).await?;
        if probe.uuid() != declared.uuid {
            return Err(invalid(format!(
                "the filesystem has UUID {}, but regions were declared for {}; it has been made anew since: \
                 prepare the base again",
                probe.uuid(),
                declared.uuid
            )));
        }
        Ok(Some(probe))
    }
}

fn invalid(context: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, context)
}
