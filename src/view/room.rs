//! How full a declared image is: as its guest is told, region by region, and group by group.
//!
//! What a VM that is running has committed to its journal counts, though it may not have come to its place: in
//! the base's image and in a child's overlay alike.

use std::sync::Arc;

use super::declared::Declared;
use super::group_map::{GroupMap, Looked};
use super::journal::Committed;
use super::open::{SharedBase, open_base, open_child};
use super::ownership::GroupSet;
use super::probe::Probe;
use super::regions::{Place, RegionUse, usage};
use super::statfs::Statfs;
use super::territory::{Filesystem, Side};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;

/// How full an image is.
#[derive(Clone, Debug)]
pub struct Room {
    /// What its guest is told; `None` if no filesystem is shared, but partitions alone.
    pub statfs: Option<Statfs>,
    /// Its regions.
    pub regions: Vec<RegionUse>,
}

/// The images as their VMs have last committed them.
struct Settled {
    base: Arc<dyn Image>,
    own: Arc<dyn Image>,
}

impl Declared {
    /// How full the image is.
    ///
    /// # Errors
    /// If what is declared does not fit the disk, and what reading the images returns.
    pub async fn room(&self) -> Result<Room> {
        let settled = self.settled().await?;
        let probe = self.probe(&*settled.base).await?;
        let regions = self.regions(probe.as_ref());
        let place = Place {
            own: &*settled.own,
            base: &*settled.base,
            declaration: &self.declaration,
        };
        let regions = usage(&place, probe.as_ref(), &regions).await?;
        let statfs = match &probe {
            Some(probe) => Some(self.statfs(&settled, probe).await?),
            None => None,
        };
        Ok(Room { statfs, regions })
    }

    async fn statfs(&self, settled: &Settled, probe: &Probe) -> Result<Statfs> {
        let base = SharedBase::open(Arc::clone(&settled.base), self.declaration.clone()).await?;
        let vm = self.own.name();
        let view = match &self.child {
            Some(child) => open_child(vm, Arc::clone(&settled.own), child, &base).await?,
            None => open_base(vm, &base).await?,
        };
        Statfs::of(&view, probe).await
    }

    /// Who writes each block group, and how full it is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if no filesystem is shared; as [`Declared::room`] besides.
    pub async fn group_map(&self) -> Result<GroupMap> {
        let settled = self.settled().await?;
        let probe = self.probe(&*settled.base).await?;
        let probe = probe.ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidConfig,
                "it shares partitions and no filesystem: there are no block groups to show",
            )
        })?;
        let child = self.child.as_ref();
        let looked = Looked {
            base: &*settled.base,
            probe: &probe,
            regions: &self.declaration.regions,
            child: child.map(|child| (&*settled.own, child.regions.as_slice())),
        };
        looked.map().await
    }

    async fn settled(&self) -> Result<Settled> {
        let base = SharedBase::open(Arc::clone(&self.base), self.declaration.clone()).await?;
        let base = Arc::clone(base.committed()) as Arc<dyn Image>;
        let Some(child) = &self.child else {
            let own = Arc::clone(&base);
            return Ok(Settled { base, own });
        };
        let filesystem = match self.probe(&*base).await? {
            Some(probe) => {
                let owned = probe.groups_of_child(&child.regions)?;
                let in_place = GroupSet::none(probe.superblock().group_count);
                Some(Filesystem::new(Side::Child, probe, owned, in_place))
            }
            None => None,
        };
        let own = Committed::open(Arc::clone(&self.own), filesystem).await?;
        Ok(Settled {
            base,
            own: Arc::new(own),
        })
    }
}
