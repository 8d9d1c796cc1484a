//! What a new child begins with.
//!
//! A child needs of its own, before its VM first looks: a superblock that says "clean, and so much is free", an
//! empty journal in place of whatever the base's journal holds, and an empty orphan file. Everything else it
//! shares with the base until it writes. That is little, and does not grow with the base: a child is made in
//! milliseconds, while the base's VM runs.

use super::compose::{put_superblock, superblock_in};
use super::declaration::{
    BaseDeclaration, ChildDeclaration, Extent as Part, Region, check_owned_together,
};
use super::grown::{self, Grown};
use super::new_groups::NewGroups;
use super::open::{group_set, place_of};
use super::probe::{Descriptors, Place, Probe, map_file, read_block, read_inode, read_superblock};
use crate::error::{Error, ErrorKind, Result};
use crate::ext4::extent::Extent;
use crate::ext4::group_descriptor::GroupDescriptor;
use crate::ext4::growth::Growth;
use crate::ext4::inode::Inode;
use crate::ext4::jbd2::{self, JOURNAL_SUPERBLOCK_SIZE};
use crate::ext4::mmp;
use crate::ext4::orphan_file;
use crate::ext4::superblock::Superblock;
use crate::ext4::volatile::{self, FreeCounts};
use crate::image::Image;
use crate::storage::ZeroMode;
use crate::sys::IoBuf;
use crate::units::{FsBlock, GuestOffset};

/// Subclusters in a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;
/// The unit of copy-on-write where no filesystem says otherwise.
const DEFAULT_SUBCLUSTER: u64 = 4096;

/// The longest orphan file that kernels take, in bytes.
const MAX_ORPHAN_FILE: u64 = 8 << 20;

/// What a child's overlay is to be and to hold.
#[derive(Debug)]
pub struct NewChild {
    /// What the overlay declares.
    pub declaration: ChildDeclaration,
    /// The overlay's length in bytes: the base's, or more for a child with block groups behind its end.
    pub virtual_size: u64,
    /// The largest unit of copy-on-write that never holds blocks of two owners, in bytes.
    pub subcluster_size: u64,
    /// Ranges that are the child's own and empty.
    zeroes: Vec<(GuestOffset, u64)>,
    /// Blocks that are the child's own.
    blocks: Vec<(GuestOffset, Vec<u8>)>,
}

impl NewChild {
    /// Plans a child of `base` that owns the regions called `names`. The base may be in use.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] for a region that the base does not declare; what reading the base returns.
    pub async fn plan(
        base: &dyn Image,
        declaration: &BaseDeclaration,
        names: &[String],
    ) -> Result<Self> {
        Self::plan_grown(base, declaration, names, None).await
    }

    /// As [`NewChild::plan`], for a child that has at least `grow` bytes of block groups of its own besides, behind the
    /// end of the base's filesystem.
    ///
    /// # Errors
    /// As [`NewChild::plan`]; [`ErrorKind::InvalidConfig`] and [`ErrorKind::Unsupported`] if there can be no such
    /// groups.
    pub async fn plan_grown(
        base: &dyn Image,
        declaration: &BaseDeclaration,
        names: &[String],
        grow: Option<u64>,
    ) -> Result<Self> {
        let mut regions: Vec<Region> = Vec::new();
        for name in names {
            let region = declaration.region(name)?;
            if !regions.contains(region) {
                regions.push(region.clone());
            }
        }
        if regions.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                "a child needs a region to own",
            ));
        }
        check_owned_together(&regions)?;
        let mut child = Self {
            declaration: ChildDeclaration {
                base: declaration.id.clone(),
                regions,
                nonces: Vec::new(),
                grown: None,
            },
            virtual_size: base.virtual_size(),
            subcluster_size: DEFAULT_SUBCLUSTER,
            zeroes: Vec::new(),
            blocks: Vec::new(),
        };
        let growth = match grow {
            Some(bytes) => Some(child.plan_groups(base, declaration, bytes).await?),
            None => None,
        };
        if let Some(declared) = &declaration.filesystem {
            let place = place_of(base, declared)?;
            child.plan_filesystem(base, place, growth).await?;
        }
        for region in &declaration.regions {
            if let Part::Partition { start, length, .. } = region.extent {
                child.align_to(start);
                child.align_to(start.saturating_add(length));
            }
        }
        Ok(child)
    }

    /// The cluster size that makes subclusters of [`Self::subcluster_size`], in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.subcluster_size * SUBCLUSTERS
    }

    /// Makes subclusters small enough that one begins at `offset`.
    fn align_to(&mut self, offset: u64) {
        if offset != 0 {
            self.subcluster_size = self.subcluster_size.min(1 << offset.trailing_zeros());
        }
    }

    /// Plans block groups of at least `bytes` bytes that the child alone has, and declares them.
    async fn plan_groups(
        &mut self,
        base: &dyn Image,
        declaration: &BaseDeclaration,
        bytes: u64,
    ) -> Result<(Growth, FreeCounts)> {
        let regions = &self.declaration.regions;
        grown::check_beside(regions)?;
        let probe = Probe::of_declared(base, declaration).await?;
        let probe = probe.ok_or_else(|| {
            Error::new(ErrorKind::InvalidConfig, "the base declares no filesystem")
        })?;
        let growth = grown::plan(&probe, bytes)?;
        let new = NewGroups::plan(base, &probe, &growth, &group_set(&probe, regions)?).await?;
        self.declaration.grown = Some(Grown::of(&growth));
        // Nothing may lie where the groups are to be.
        let (place, superblock) = (probe.place(), growth.after());
        self.virtual_size = self
            .virtual_size
            .max(place.start.0.saturating_add(superblock.len_bytes()));
        for (first, len) in new.zeroes {
            self.zero_blocks(place, superblock, first, len);
        }
        for (block, bytes) in new.blocks {
            self.put_block(place, superblock, block, bytes);
        }
        probe.with(growth.clone())?;
        Ok((growth, new.free))
    }

    async fn plan_filesystem(
        &mut self,
        base: &dyn Image,
        place: Place,
        growth: Option<(Growth, FreeCounts)>,
    ) -> Result<()> {
        let (superblock, _) = read_superblock(base, place).await?;
        self.subcluster_size = u64::from(superblock.block_size).min(DEFAULT_SUBCLUSTER * 16);
        self.align_to(place.start.0);
        let free = self.count_free(base, place, &superblock).await?;
        let free = [
            free,
            growth
                .as_ref()
                .map_or_else(FreeCounts::default, |(_, new)| *new),
        ];
        let growth = growth.map(|(growth, _)| growth);
        self.plan_superblock(
            base,
            place,
            &superblock,
            growth.as_ref(),
            free.into_iter().sum(),
        )
        .await?;
        self.plan_journal(base, place, &superblock).await?;
        self.plan_mmp(base, place, &superblock).await?;
        self.plan_orphan_file(base, place, &superblock).await
    }

    /// What is free in the child's groups, reading each block of the descriptor table once.
    async fn count_free(
        &self,
        base: &dyn Image,
        place: Place,
        superblock: &Superblock,
    ) -> Result<FreeCounts> {
        let mut free = FreeCounts::default();
        for region in &self.declaration.regions {
            let Part::Groups { list, .. } = &region.extent else {
                continue;
            };
            super::open::check_range(list, superblock.group_count)?;
            let mut descriptors = Descriptors::of(base, place, superblock);
            for group in list.iter() {
                let counts = GroupDescriptor::parse(descriptors.get(group).await?).free();
                free = [free, counts].into_iter().sum();
            }
        }
        Ok(free)
    }

    async fn plan_superblock(
        &mut self,
        base: &dyn Image,
        place: Place,
        superblock: &Superblock,
        growth: Option<&Growth>,
        free: FreeCounts,
    ) -> Result<()> {
        let number = FsBlock(u64::from(superblock.first_data_block));
        let mut block = read_block(base, place, superblock, number).await?;
        let mut own = match growth {
            Some(growth) => *growth.bytes(),
            None => superblock_in(&block)?,
        };
        let whole = growth.map_or(superblock, Growth::after);
        volatile::put_clean(&mut own);
        // A kernel that counts otherwise than the superblock says writes its count into all backups, which are the
        // base's.
        let journal = map_file(base, place, superblock, superblock.journal_inode).await?;
        let blocks = |sum: u32, extent: &Extent| sum.saturating_add(extent.len);
        volatile::put_overhead(&mut own, whole.overhead(journal.iter().fold(0, blocks)));
        volatile::put_free(&mut own, free);
        put_superblock(&mut block, &own);
        self.put_block(place, superblock, number, block);
        Ok(())
    }

    async fn plan_journal(
        &mut self,
        base: &dyn Image,
        place: Place,
        superblock: &Superblock,
    ) -> Result<()> {
        let journal = map_file(base, place, superblock, superblock.journal_inode).await?;
        let Some(first) = journal.first() else {
            return Ok(());
        };
        let number = first.start;
        for extent in &journal {
            self.zero_extent(place, superblock, extent);
        }
        let mut block = read_block(base, place, superblock, number).await?;
        let Some(own) = block.first_chunk_mut::<JOURNAL_SUPERBLOCK_SIZE>() else {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the journal's blocks are too short",
            ));
        };
        *own = jbd2::clean(own);
        self.put_block(place, superblock, number, block);
        Ok(())
    }

    async fn plan_mmp(
        &mut self,
        base: &dyn Image,
        place: Place,
        superblock: &Superblock,
    ) -> Result<()> {
        let Some(number) = superblock.mmp_block else {
            return Ok(());
        };
        let mut block = read_block(base, place, superblock, number).await?;
        mmp::clean(&superblock.checksums, &mut block)?;
        self.put_block(place, superblock, number, block);
        Ok(())
    }

    async fn plan_orphan_file(
        &mut self,
        base: &dyn Image,
        place: Place,
        superblock: &Superblock,
    ) -> Result<()> {
        let Some(number) = superblock.orphan_file_inode else {
            return Ok(());
        };
        let inode = Inode::parse(&read_inode(base, place, superblock, number).await?);
        if inode.size > MAX_ORPHAN_FILE {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "the orphan file has {} bytes, at most {MAX_ORPHAN_FILE} are allowed",
                    inode.size
                ),
            ));
        }
        let block_size = usize::try_from(superblock.block_size).unwrap_or(usize::MAX);
        for extent in map_file(base, place, superblock, Some(number)).await? {
            for index in 0..u64::from(extent.len) {
                let block = FsBlock(extent.start.0 + index);
                let mut bytes = vec![0; block_size];
                orphan_file::put_empty(
                    &superblock.checksums,
                    number,
                    inode.generation,
                    block,
                    &mut bytes,
                );
                self.put_block(place, superblock, block, bytes);
            }
        }
        Ok(())
    }

    fn put_block(&mut self, place: Place, superblock: &Superblock, block: FsBlock, bytes: Vec<u8>) {
        let at = place.start.0 + block.0 * u64::from(superblock.block_size);
        self.blocks.push((GuestOffset(at), bytes));
    }

    fn zero_extent(&mut self, place: Place, superblock: &Superblock, extent: &Extent) {
        self.zero_blocks(place, superblock, extent.start, u64::from(extent.len));
    }

    fn zero_blocks(&mut self, place: Place, superblock: &Superblock, first: FsBlock, len: u64) {
        let block_size = u64::from(superblock.block_size);
        let at = place.start.0 + first.0 * block_size;
        self.zeroes.push((GuestOffset(at), len * block_size));
    }

    /// Writes what the child begins with into its fresh overlay, and makes it durable.
    ///
    /// # Errors
    /// What writing the overlay returns.
    pub async fn write_to(&self, overlay: &dyn Image) -> Result<()> {
        for &(at, len) in &self.zeroes {
            overlay.write_zeroes(at, len, ZeroMode::MayUnmap).await?;
        }
        for (at, bytes) in &self.blocks {
            overlay.write(*at, IoBuf::from_bytes(bytes)).await?;
        }
        overlay.flush().await
    }
}
