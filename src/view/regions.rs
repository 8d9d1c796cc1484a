//! What the regions of a base or a child are, and how full they are.

use super::declaration::{BaseDeclaration, Extent, Region, Sharing};
use super::grown::NAME;
use super::open::group_set;
use super::probe::Probe;
use crate::error::Result;
use crate::ext4::volatile::FreeCounts;
use crate::image::Image;

/// A region and how full it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionUse {
    /// The region.
    pub region: Region,
    /// Who holds it, if it is shared.
    pub holder: Option<String>,
    /// Bytes in it, the filesystem's own structures included.
    pub size: u64,
    /// What is free in it; `None` for a partition, into which nobody looks.
    pub free: Option<Free>,
}

/// What is free in a region of block groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Free {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u32,
}

/// Where regions are looked at.
pub struct Place<'a> {
    /// Private ones: for a base itself, what a new child begins with; for a child's overlay what is its own.
    pub own: &'a dyn Image,
    /// Shared ones.
    pub base: &'a dyn Image,
    /// What the base declares.
    pub declaration: &'a BaseDeclaration,
}

/// How full `regions` are in what is stored of the filesystem in `probe`. While a VM runs, it is what that has brought
/// to its place.
///
/// # Errors
/// If the regions do not fit the filesystem, and what reading the disk returns.
pub async fn usage(
    place: &Place<'_>,
    probe: Option<&Probe>,
    regions: &[Region],
) -> Result<Vec<RegionUse>> {
    if let Some(probe) = probe {
        // Bounds the lists before they are walked.
        let declared: Vec<Region> = regions.iter().filter(|r| r.name != NAME).cloned().collect();
        group_set(probe, &declared)?;
    }
    let mut all = Vec::new();
    for region in regions {
        let disk = match region.sharing {
            Sharing::Private => place.own,
            Sharing::Shared => place.base,
        };
        let lease = place.declaration.lease(&region.name);
        let (size, free) = match (&region.extent, probe) {
            (Extent::Partition { length, .. }, _) => (*length, None),
            (Extent::Groups { .. }, None) => (0, None),
            (Extent::Groups { list, .. }, Some(probe)) => {
                let superblock = probe.superblock();
                let block_size = u64::from(superblock.block_size);
                let blocks = list.iter().map(|group| {
                    let blocks = superblock.group_blocks(group);
                    blocks.end - blocks.start
                });
                let size = blocks.sum::<u64>() * block_size;
                let FreeCounts { blocks, inodes } = probe.count_free(disk, list.iter()).await?;
                let bytes = blocks.saturating_mul(block_size);
                (size, Some(Free { bytes, inodes }))
            }
        };
        all.push(RegionUse {
            region: region.clone(),
            holder: lease.map(|lease| lease.holder.clone()),
            size,
            free,
        });
    }
    Ok(all)
}
