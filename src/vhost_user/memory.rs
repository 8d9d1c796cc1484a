//! The guest's memory as its front-end has told it: where each region lies for the guest, for the front-end
//! and for us.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{WatchedMemory, exclude_from_core_dumps};

/// The most regions at a time: as many as KVM has had slots for from of old.
pub(super) const MAX_REGIONS: usize = 509;

/// A region, and where it lies in the front-end's own address space.
#[derive(Clone, Debug)]
struct Region {
    user_address: u64,
    /// Before the mapping, which it is about.
    watch: Arc<WatchedMemory>,
    mapping: Arc<GuestRegionMmap>,
}

impl Region {
    fn new(told: &VhostUserMemoryRegion, file: File) -> Result<Self> {
        let start = GuestAddress(told.guest_phys_addr);
        let len = told.memory_size;
        let describe = || {
            format!(
                "guest memory of {:#x} bytes at {:#x} cannot be mapped",
                len, start.0
            )
        };
        let mapped = told.mmap_region(file).map_err(|error| {
            Error::with_source(ErrorKind::InvalidConfig, describe(), error.to_string())
        })?;
        let mapping = GuestRegionMmap::new(mapped, start)
            .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, describe()))?;
        exclude_from_core_dumps(&mapping);
        let watch = WatchedMemory::new(&mapping).context(describe)?;
        Ok(Self {
            user_address: told.user_addr,
            watch: Arc::new(watch),
            mapping: Arc::new(mapping),
        })
    }

    fn is(&self, told: &VhostUserMemoryRegion) -> bool {
        self.user_address == told.user_addr
            && self.mapping.start_addr().0 == told.guest_phys_addr
            && self.mapping.len() == told.memory_size
    }
}

/// The guest's memory. Buffers of I/O under way keep what they use mapped, whatever changes here.
#[derive(Debug, Default)]
pub(super) struct MemoryTable {
    regions: Vec<Region>,
    map: Arc<GuestMemoryMmap>,
}

impl MemoryTable {
    /// The memory by guest address.
    pub(super) fn map(&self) -> &Arc<GuestMemoryMmap> {
        &self.map
    }

    /// Whether the front-end has taken any of it away: what is there instead is zeros.
    pub(super) fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.watch.is_lost())
    }

    /// The guest address of what the front-end knows as `user_address`.
    pub(super) fn guest_address(&self, user_address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = user_address.checked_sub(region.user_address)?;
            if offset >= region.mapping.len() {
                return None;
            }
            region
                .mapping
                .start_addr()
                .0
                .checked_add(offset)
                .map(GuestAddress)
        })
    }

    /// Takes `told` as the whole memory.
    ///
    /// # Errors
    /// If a region cannot be mapped, or two overlap; the table is then as before.
    pub(super) fn replace(
        &mut self,
        told: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<()> {
        if told.len() != files.len() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "{} memory regions came with {} descriptors",
                    told.len(),
                    files.len()
                ),
            ));
        }
        let regions = told
            .iter()
            .zip(files)
            .map(|(told, file)| Region::new(told, file));
        self.adopt(regions.collect::<Result<_>>()?)
    }

    /// Adds a region.
    ///
    /// # Errors
    /// As for [`Self::replace`].
    pub(super) fn add(&mut self, told: &VhostUserMemoryRegion, file: File) -> Result<()> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("more than {MAX_REGIONS} memory regions"),
            ));
        }
        let mut regions = self.regions.clone();
        regions.push(Region::new(told, file)?);
        self.adopt(regions)
    }

    /// Removes a region.
    ///
    /// # Errors
    /// If there is none like it.
    pub(super) fn remove(&mut self, told: &VhostUserMemoryRegion) -> Result<()> {
        let index = self
            .regions
            .iter()
            .position(|region| region.is(told))
            .ok_or_else(|| {
                let start = told.guest_phys_addr;
                Error::new(
                    ErrorKind::InvalidConfig,
                    format!("there is no memory region at {start:#x} to remove"),
                )
            })?;
        let mut regions = self.regions.clone();
        regions.remove(index);
        self.adopt(regions)
    }

    /// Makes `regions` the memory, or leaves everything as it is.
    fn adopt(&mut self, regions: Vec<Region>) -> Result<()> {
        let mut sorted: Vec<_> = regions
            .iter()
            .map(|region| Arc::clone(&region.mapping))
            .collect();
        sorted.sort_by_key(|mapping| mapping.start_addr());
        let map = if sorted.is_empty() {
            Ok(GuestMemoryMmap::new())
        } else {
            GuestMemoryMmap::from_arc_regions(sorted)
        };
        match map {
            Ok(map) => {
                self.regions = regions;
                self.map = Arc::new(map);
                Ok(())
            }
            Err(error) => Err(Error::with_source(
                ErrorKind::InvalidConfig,
                "memory regions overlap",
                error.to_string(),
            )),
        }
    }
}
