//! From what images declare to what a VM owns: the checks before anything is served.

use std::sync::Arc;

use super::declaration::{
    BaseDeclaration, ChildDeclaration, Extent, FilesystemPlace, GroupList, Region, Sharing,
};
use super::disk::{InPlace, Stores, View};
use super::groups::Occupants;
use super::journal::Committed;
use super::lease::{Claimant, Holding, Keeper, Leases, Unmounted};
use super::ledger::{Ledger, Stored};
use super::ownership::GroupSet;
use super::probe::{Place, Probe, read_partitions};
use super::refusal::Refusals;
use super::session::unmounted;
use super::territory::{Area, Filesystem, Owner, Side, Territory};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Image;
use crate::units::{BlockGroup, FsBlock, GuestOffset, InodeNumber};

/// A base that several VMs share: all their views are opened on the same one.
pub struct SharedBase {
    disk: Arc<dyn Image>,
    declaration: BaseDeclaration,
    committed: Arc<Committed>,
    ledger: Arc<Ledger>,
    leases: Arc<Leases>,
}

impl SharedBase {
    /// The base stored in `disk`, whose image says of itself what `declaration` holds.
    ///
    /// # Errors
    /// If the declaration does not fit the disk, or the filesystem is not sound enough to be kept apart.
    pub async fn open(disk: Arc<dyn Image>, declaration: BaseDeclaration) -> Result<Self> {
        Self::open_kept(disk, declaration, None).await
    }

    /// As [`SharedBase::open`]; `keeper` stores who holds its shared regions.
    ///
    /// # Errors
    /// As [`SharedBase::open`].
    pub async fn open_kept(
        disk: Arc<dyn Image>,
        declaration: BaseDeclaration,
        keeper: Option<Arc<dyn Keeper>>,
    ) -> Result<Self> {
        let name = disk.name().to_owned();
        let opened = async {
            let ledger = open_ledger(&*disk, &declaration).await?;
            let filesystem = base_filesystem(&*disk, &declaration).await?;
            let committed = Committed::open(Arc::clone(&disk), filesystem).await?;
            Ok::<_, Error>((ledger, committed))
        };
        let (ledger, committed) = opened.await.context(|| format!("opening {name}"))?;
        Ok(Self {
            disk,
            committed: Arc::new(committed),
            ledger: Arc::new(ledger),
            leases: Arc::new(Leases::new(declaration.clone(), keeper)),
            declaration,
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
    open_base_through(vm, base, Arc::clone(&base.disk)).await
}

/// As [`open_base`], for a VM that uses the base's disk through `disk`, which may refuse it to write.
///
/// # Errors
/// As [`open_base`].
pub async fn open_base_through(vm: &str, base: &SharedBase, disk: Arc<dyn Image>) -> Result<View> {
    let territory = base_territory(&*disk, &base.declaration)
        .await
        .context(|| format!("opening {}", disk.name()))?;
    let stores = Stores {
        own: Arc::clone(&disk),
        truth: disk,
        committed: Some(Arc::clone(&base.committed)),
        ledger: Arc::clone(&base.ledger),
        in_place: None,
        holding: None,
    };
    Ok(View::new(stores, territory, Arc::new(Refusals::new(vm))))
}

/// The view of a child's VM, called `vm`, whose overlay is `overlay`; for a child that writes no shared region, because
/// it owns none or is read-only.
///
/// # Errors
/// If the declarations do not fit each other or the disk, or the base has meanwhile used what it had reserved;
/// [`ErrorKind::InvalidConfig`] for a child that is to be opened with [`open_holder`].
pub async fn open_child(
    vm: &str,
    overlay: Arc<dyn Image>,
    child: &ChildDeclaration,
    base: &SharedBase,
) -> Result<View> {
    open_claiming(vm, overlay, child, base, None).await
}

/// As [`open_child`], for a child that owns shared regions, which `claimant` wants to write.
///
/// # Errors
/// As [`open_child`]; [`ErrorKind::Refused`] if somebody else holds one of the regions.
pub async fn open_holder(
    vm: &str,
    overlay: Arc<dyn Image>,
    child: &ChildDeclaration,
    base: &SharedBase,
    claimant: &Claimant,
) -> Result<View> {
    open_claiming(vm, overlay, child, base, Some(claimant)).await
}

async fn open_claiming(
    vm: &str,
    overlay: Arc<dyn Image>,
    child: &ChildDeclaration,
    base: &SharedBase,
    claimant: Option<&Claimant>,
) -> Result<View> {
    let name = overlay.name().to_owned();
    let opened = async {
        let territory = child_territory(&*base.disk, &base.declaration, child).await?;
        check_length(&*overlay, &territory)?;
        let holding = claim(&*overlay, &territory, child, base, claimant).await?;
        let has_shared = child.shared_regions().next().is_some();
        let stores = Stores {
            own: overlay,
            truth: Arc::clone(&base.committed) as Arc<dyn Image>,
            committed: None,
            ledger: Arc::default(),
            in_place: has_shared.then(|| InPlace {
                disk: Arc::clone(&base.disk),
                ledger: Arc::clone(&base.ledger),
            }),
            holding,
        };
        let refusals = Arc::new(Refusals::new(vm));
        Ok::<_, Error>(View::new(stores, territory, refusals))
    };
    opened
        .await
        .context(|| format!("opening {name} on {}", base.disk.name()))
}

/// Holds an overlay to the length of its filesystem, which may go beyond the base's end.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`] if it is shorter.
pub(super) fn check_length(overlay: &dyn Image, territory: &Territory) -> Result<()> {
    let needed = territory
        .filesystem()
        .map_or(0, |filesystem| filesystem.range().end.0);
    let size = overlay.virtual_size();
    if size >= needed {
        return Ok(());
    }
    Err(invalid(format!(
        "the child's disk has {size} bytes, and its filesystem {needed}: make it as long with `seethrough resize`"
    )))
}

/// The right to write what the child shares, if it is going to.
async fn claim(
    overlay: &dyn Image,
    territory: &Territory,
    child: &ChildDeclaration,
    base: &SharedBase,
    claimant: Option<&Claimant>,
) -> Result<Option<Holding>> {
    let Some(shared) = child.shared_regions().next() else {
        return Ok(None);
    };
    if overlay.is_read_only() {
        return Ok(None);
    }
    let Some(claimant) = claimant else {
        return Err(invalid(format!(
            "region \"{}\" is shared: a child that writes it has to claim it",
            shared.name
        )));
    };
    if base.disk.is_read_only() {
        return Err(invalid(format!(
            "region \"{}\" is stored in {}, which is open read-only",
            shared.name,
            base.disk.name()
        )));
    }
    let unmounted = match territory.filesystem() {
        Some(filesystem) => unmounted(overlay, filesystem).await?,
        None => Unmounted::Cleanly,
    };
    let holding = base.leases.claim(child, unmounted, claimant).await?;
    Ok(Some(holding))
}

/// What the base's VM owns: everything but the regions.
async fn base_territory(disk: &dyn Image, declaration: &BaseDeclaration) -> Result<Territory> {
    let areas = partition_areas(disk, declaration, &[]).await?;
    let filesystem = base_filesystem(disk, declaration).await?;
    Ok(Territory::new(Side::Base, filesystem, areas))
}

/// The shared filesystem, of which the base's VM owns all groups that no region has.
pub(super) async fn base_filesystem(
    disk: &dyn Image,
    declaration: &BaseDeclaration,
) -> Result<Option<Filesystem>> {
    let Some(probe) = Probe::of_declared(disk, declaration).await? else {
        return Ok(None);
    };
    let owned = group_set(&probe, &declaration.regions)?.complement();
    let in_place = GroupSet::none(probe.superblock().group_count);
    Ok(Some(Filesystem::new(Side::Base, probe, owned, in_place)))
}

/// What the writers of a base's disk have to agree on.
async fn open_ledger(disk: &dyn Image, declaration: &BaseDeclaration) -> Result<Ledger> {
    let Some(probe) = Probe::of_declared(disk, declaration).await? else {
        return Ok(Ledger::default());
    };
    let reserved = group_set(&probe, &declaration.regions)?;
    let is_shared = |region: &Region| region.sharing == Sharing::Shared;
    let stored = if declaration.regions.iter().any(is_shared) {
        Stored::ByChildren
    } else {
        Stored::ByBase
    };
    Ledger::open(disk, &probe, &reserved, stored).await
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
    // Bounds the lists before they are walked.
    group_set(&probe, &child.regions)?;
    let shared: Vec<Region> = child.shared_regions().cloned().collect();
    let private = child.regions.iter().filter(|one| !shared.contains(one));
    check_unused(base, &probe, private).await?;
    let probe = probe.for_child(child)?;
    let owned = probe.groups_of_child(&child.regions)?;
    let in_place = group_set(&probe, &shared)?;
    let filesystem = Filesystem::new(Side::Child, probe, owned, in_place);
    Ok(Territory::new(Side::Child, Some(filesystem), areas))
}

pub(super) async fn check_unused(
    base: &dyn Image,
    probe: &Probe,
    regions: impl IntoIterator<Item = &Region>,
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
/// If one of them is not a group of the base's filesystem, is group 0, or is in two regions.
pub(super) fn group_set(probe: &Probe, regions: &[Region]) -> Result<GroupSet> {
    let group_count = probe.base_group_count();
    let mut set = GroupSet::none(probe.superblock().group_count);
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
        let owner = match own.iter().find(|other| other.name == region.name) {
            Some(own) if own.sharing == Sharing::Shared => Owner::OwnInPlace,
            Some(_) => Owner::Own,
            None => Owner::Foreign,
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
        let probe = Self::read(disk, place_of(disk, declared)?).await?;
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

/// Where a declared filesystem lies on `disk`. One that begins where the disk does may have been made longer with it.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if the disk is shorter than when it was declared.
pub(super) fn place_of(disk: &dyn Image, declared: &FilesystemPlace) -> Result<Place> {
    let place = Place {
        start: GuestOffset(declared.start),
        length: declared.length,
    };
    let size = disk.virtual_size();
    let end = place.start.checked_add(place.length);
    if end.is_none_or(|end| end.0 > size) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the declared filesystem does not lie on the disk",
        ));
    }
    Ok(match declared.start {
        0 => Place {
            length: size,
            ..place
        },
        _ => place,
    })
}

fn invalid(context: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, context)
}
