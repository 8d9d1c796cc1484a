//! Declaring regions in a base: what may be reserved, and the changes that make it so.
//!
//! Everything is checked, and every change planned in memory, before the first byte is written: a base that is
//! refused is a base unchanged.

use super::changes::Changes;
use super::choose::choose;
use super::declaration::{
    BaseDeclaration, Extent, FilesystemPlace, GroupList, Region, Sharing, check_region_name,
};
use super::groups::Occupants;
use super::new_directory;
use super::open::{check_range, group_set};
use super::probe::{Place, Probe, locate, read_block, read_partitions};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::ext4::jbd2::JournalSuperblock;
use crate::image::Image;
use crate::units::GuestOffset;

/// The most groups that a suggestion names.
const MAX_SUGGESTED: usize = 256;

/// A region that shall be declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its name.
    pub name: String,
    /// Where the children's writes are to be stored.
    pub sharing: Sharing,
    /// What it takes.
    pub reserve: Reserve,
}

/// What a region shall take out of the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// Block groups, and a new directory in them.
    Groups {
        /// Which groups.
        groups: Groups,
        /// The directory's absolute path.
        directory: String,
    },
    /// The partition with this number.
    Partition(u32),
}

/// Which block groups are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Groups {
    /// These.
    Listed(GroupList),
    /// Any that have room for so many bytes.
    Sized(u64),
}

/// A base that can be prepared: nothing has been written yet.
pub struct Preparation {
    declaration: BaseDeclaration,
    changes: Option<Changes>,
}

impl Preparation {
    /// Plans to declare the regions of `requests` on `disk`, on top of what it `declared` already. `partition` says
    /// where the filesystem is, if that is not plain; `id` names the base, if nothing is declared yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for requests that cannot be met, with what to do about it;
    /// [`ErrorKind::Unsupported`], naming them, for features of the filesystem that a view cannot keep apart.
    pub async fn plan(
        disk: &dyn Image,
        declared: Option<BaseDeclaration>,
        id: String,
        requests: &[Request],
        partition: Option<u32>,
    ) -> Result<Self> {
        let mut declaration = declared.unwrap_or(BaseDeclaration {
            id,
            filesystem: None,
            regions: Vec::new(),
            leases: Vec::new(),
        });
        check_names(&declaration, requests)?;
        let takes_groups = requests
            .iter()
            .any(|request| matches!(request.reserve, Reserve::Groups { .. }));
        let mut changes = None;
        if takes_groups {
            let probe = find_filesystem(disk, &mut declaration, partition).await?;
            check_sound(disk, &probe).await?;
            let mut planned = Changes::new(probe.place(), probe.superblock().block_size);
            for request in requests {
                if let Reserve::Groups { groups, directory } = &request.reserve {
                    let list = match groups {
                        Groups::Listed(list) => list.clone(),
                        Groups::Sized(size) => choose(disk, &probe, &declaration, *size).await?,
                    };
                    check_groups(disk, &probe, &declaration, &list).await?;
                    let Occupants { inode, block } =
                        new_directory::plan(disk, &probe, &list, directory, &mut planned)
                            .await
                            .context(|| format!("creating {directory}"))?;
                    declaration.regions.push(Region {
                        name: request.name.clone(),
                        sharing: request.sharing,
                        extent: Extent::Groups {
                            list,
                            directory: directory.clone(),
                            inode: inode.0,
                            block: block.0,
                        },
                    });
                }
            }
            changes = Some(planned);
        }
        for request in requests {
            if let Reserve::Partition(number) = request.reserve {
                let extent = take_partition(disk, &declaration, number).await?;
                declaration.regions.push(Region {
                    name: request.name.clone(),
                    sharing: request.sharing,
                    extent,
                });
            }
        }
        Ok(Self {
            declaration,
            changes,
        })
    }

    /// What the base declares from now on.
    #[must_use]
    pub fn declaration(&self) -> &BaseDeclaration {
        &self.declaration
    }

    /// Makes the planned changes, durably. The declaration is the caller's to store, afterwards.
    ///
    /// # Errors
    /// What writing the disk returns.
    pub async fn apply(&self, disk: &dyn Image) -> Result<()> {
        match &self.changes {
            Some(changes) => changes.write_to(disk).await,
            None => Ok(()),
        }
    }
}

fn check_names(declaration: &BaseDeclaration, requests: &[Request]) -> Result<()> {
    if requests.is_empty() {
        return Err(invalid("no region is given to reserve"));
    }
    for (index, request) in requests.iter().enumerate() {
        let name = &request.name;
        check_region_name(name)?;
        if declaration
            .regions
            .iter()
            .any(|region| region.name == *name)
        {
            return Err(invalid(format!("region \"{name}\" is declared already")));
        }
        if requests[..index].iter().any(|other| other.name == *name) {
            return Err(invalid(format!("region \"{name}\" is given twice")));
        }
    }
    Ok(())
}

/// The filesystem that is declared already, or the one that is found; it is entered in the declaration.
async fn find_filesystem(
    disk: &dyn Image,
    declaration: &mut BaseDeclaration,
    partition: Option<u32>,
) -> Result<Probe> {
    if let Some(probe) = Probe::of_declared(disk, declaration).await? {
        if partition.is_some() && locate(disk, partition).await? != probe.place() {
            return Err(invalid(
                "regions are declared for the filesystem of another partition already",
            ));
        }
        return Ok(probe);
    }
    let place = locate(disk, partition).await?;
    if let Some(region) = overlapping(declaration, place) {
        return Err(invalid(format!(
            "the filesystem lies in the partition that is region \"{}\" already",
            region.name
        )));
    }
    let probe = Probe::read(disk, place).await?;
    declaration.filesystem = Some(FilesystemPlace {
        uuid: probe.uuid(),
        start: place.start.0,
        length: place.length,
    });
    Ok(probe)
}

/// Refuses a filesystem that is in use, was not left clean, or has a journal that a view cannot keep apart.
pub(super) async fn check_sound(disk: &dyn Image, probe: &Probe) -> Result<()> {
    let superblock = probe.superblock();
    if !superblock.is_clean() {
        return Err(invalid(format!(
            "the filesystem on {} is mounted, or was not unmounted cleanly: mount and unmount it, or run e2fsck, \
             and prepare it then",
            disk.name()
        )));
    }
    if let Some(first) = probe.journal().first() {
        let block = read_block(disk, probe.place(), superblock, first.start).await?;
        let bytes = block
            .first_chunk()
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "the journal's blocks are too short"))?;
        let journal = JournalSuperblock::parse(superblock, probe.journal_blocks(), bytes)?;
        if !journal.is_empty() {
            return Err(invalid(format!(
                "the journal on {} has not been replayed: mount and unmount the filesystem, or run e2fsck",
                disk.name()
            )));
        }
    }
    Ok(())
}

/// Refuses groups that do not exist, that a region has already, or that hold anything.
pub(super) async fn check_groups(
    disk: &dyn Image,
    probe: &Probe,
    declaration: &BaseDeclaration,
    list: &GroupList,
) -> Result<()> {
    check_range(list, probe.superblock().group_count)?;
    for region in &declaration.regions {
        if let Extent::Groups { list: taken, .. } = &region.extent
            && let Some(group) = taken.first_in_common(list)
        {
            return Err(invalid(format!(
                "block group {group} belongs to region \"{}\" already",
                region.name
            )));
        }
    }
    let in_use = probe.groups_in_use(disk, list, None).await?;
    if in_use.count() == 0 {
        return Ok(());
    }
    let free = suggest(disk, probe, declaration).await?;
    let advice = if free.count() == 0 {
        "no block group is free: make the filesystem larger".to_owned()
    } else {
        format!("free are block groups {free}")
    };
    Err(invalid(format!(
        "block groups {in_use} hold data of the base and cannot be reserved; {advice}"
    )))
}

/// The first groups that could be reserved.
async fn suggest(
    disk: &dyn Image,
    probe: &Probe,
    declaration: &BaseDeclaration,
) -> Result<GroupList> {
    let superblock = probe.superblock();
    let reserved = group_set(probe, &declaration.regions)?;
    let mut free = Vec::new();
    for group in superblock.groups().skip(1) {
        let candidate = GroupList::from_iter([group]);
        if !reserved.contains(group)
            && probe.groups_in_use(disk, &candidate, None).await?.count() == 0
        {
            free.push(group);
            if free.len() == MAX_SUGGESTED {
                break;
            }
        }
    }
    Ok(free.into_iter().collect())
}

/// The partition that becomes a region.
async fn take_partition(
    disk: &dyn Image,
    declaration: &BaseDeclaration,
    number: u32,
) -> Result<Extent> {
    let table = read_partitions(disk).await?;
    let partition = table
        .iter()
        .find(|partition| partition.number == number)
        .ok_or_else(|| invalid(format!("{} has no partition {number}", disk.name())))?;
    let place = Place {
        start: partition.start,
        length: partition.len,
    };
    if let Some(region) = overlapping(declaration, place) {
        return Err(invalid(format!(
            "partition {number} is region \"{}\" already",
            region.name
        )));
    }
    if let Some(filesystem) = &declaration.filesystem
        && overlap(place, filesystem.start, filesystem.length)
    {
        return Err(invalid(format!(
            "partition {number} holds the filesystem whose block groups are reserved"
        )));
    }
    Ok(Extent::Partition {
        number,
        start: partition.start.0,
        length: partition.len,
    })
}

/// A declared partition that shares bytes with `place`.
fn overlapping(declaration: &BaseDeclaration, place: Place) -> Option<&Region> {
    declaration
        .regions
        .iter()
        .find(|region| match region.extent {
            Extent::Partition { start, length, .. } => overlap(place, start, length),
            Extent::Groups { .. } => false,
        })
}

fn overlap(place: Place, start: u64, length: u64) -> bool {
    let GuestOffset(own) = place.start;
    own < start.saturating_add(length) && start < own.saturating_add(place.length)
}

fn invalid(context: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::InvalidConfig, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_do_not_overlap() {
        let place = Place {
            start: GuestOffset(100),
            length: 50,
        };
        assert!(!overlap(place, 150, 10));
        assert!(!overlap(place, 90, 10));
        assert!(overlap(place, 149, 1));
        assert!(overlap(place, 0, 101));
    }
}
