//! The cells: which loads run on which disks.
//!
//! Reads through the page cache are judged on the checkout's disk, because rings read tmpfs by kernel workers; writes
//! through the page cache on tmpfs, because the speed of buffered writes to a disk's filesystem depends on how large the
//! folios are that the file happens to have. O_DIRECT has files of its own, which no buffered write touches.

use crate::contender::Cache;
use crate::load::{
    EIGHT_VMS, FOUR_QUEUES, Load, Order, READ_1M, READ_64K, READ_QD1, READ_QD1_POLLING, READ_QD32,
    READ_QD128, WRITE_1M, WRITE_FLUSH, WRITE_QD1, WRITE_QD1_POLLING, WRITE_QD32,
};

/// What kind of disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Image {
    /// A raw file.
    Raw,
    /// A qcow2 image with every cluster allocated.
    Qcow2,
    /// An empty overlay over such an image.
    SeeThrough,
    /// A child of a prepared base: its own block groups, which it has written.
    View,
    /// The same child: a block group of the base.
    ViewOfBase,
    /// An overlay, made anew for each measurement, whose clusters of 64 KiB are copied up.
    FirstWrite,
    /// The same with clusters of 128 KiB and subclusters of 4 KiB.
    FirstWriteSubclusters,
    Deflate,
    Zstd,
    /// A disk of 1 TiB, of which each request needs another part of the L2 tables.
    ColdL2,
    /// Eight images, each of which has an eighth of the clusters.
    Chain,
}

impl Image {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2, allocated",
            Self::SeeThrough => "child, see-through",
            Self::View => "view, own groups",
            Self::ViewOfBase => "view, base's groups",
            Self::FirstWrite => "first write, 64K clusters",
            Self::FirstWriteSubclusters => "first write, 4K subclusters",
            Self::Deflate => "deflate",
            Self::Zstd => "zstd",
            Self::ColdL2 => "1 TiB, cold L2 cache",
            Self::Chain => "chain of 8",
        }
    }

    /// Whether seethrough serves it through a view, and others serve its like without.
    pub(crate) fn has_view(self) -> bool {
        matches!(self, Self::View | Self::ViewOfBase)
    }
}

/// Where the files of a disk lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// On the checkout's disk, in the page cache.
    Disk,
    /// On the checkout's disk, with O_DIRECT.
    Direct,
    /// On tmpfs.
    Memory,
}

impl Place {
    pub(crate) fn cache(self) -> Cache {
        match self {
            Self::Disk | Self::Memory => Cache::PageCache,
            Self::Direct => Cache::Direct,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Disk => "page cache",
            Self::Direct => "O_DIRECT",
            Self::Memory => "tmpfs",
        }
    }
}

/// A cell of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) image: Image,
    pub(crate) place: Place,
    pub(crate) load: Load,
}

impl Cell {
    pub(crate) fn name(&self) -> String {
        format!(
            "{}: {} ({})",
            self.image.name(),
            self.load.name,
            self.place.name()
        )
    }

    /// Whether fio on the raw file does the like of it.
    pub(crate) fn has_bound(&self) -> bool {
        matches!(self.image, Image::Raw | Image::Qcow2 | Image::SeeThrough)
            && self.load.queues == 1
            && self.load.disks == 1
    }
}

const READS: &[Load] = &[
    READ_QD1_POLLING,
    READ_QD1,
    READ_QD32,
    READ_QD128,
    READ_64K,
    READ_1M,
    FOUR_QUEUES,
];
const WRITES: &[Load] = &[
    WRITE_QD1_POLLING,
    WRITE_QD1,
    WRITE_QD32,
    WRITE_FLUSH,
    WRITE_1M,
];
const ONE_CLUSTER_EACH: u64 = 64 << 10;
const ONE_BLOCK_EACH: u64 = 4 << 10;
/// What a slice of 4 KiB of an L2 table maps, with clusters of 64 KiB.
pub(crate) const SLICE: u64 = 32 << 20;

/// Every cell, in the order of the table.
pub(crate) fn all() -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut add = |image, place, loads: &[Load]| {
        cells.extend(loads.iter().map(|load| Cell {
            image,
            place,
            load: *load,
        }));
    };
    for image in [Image::Raw, Image::Qcow2] {
        add(image, Place::Disk, READS);
        add(image, Place::Memory, WRITES);
    }
    add(Image::SeeThrough, Place::Disk, READS);
    add(Image::SeeThrough, Place::Disk, &[EIGHT_VMS]);
    for (image, unit) in [
        (Image::FirstWrite, ONE_CLUSTER_EACH),
        (Image::FirstWriteSubclusters, ONE_BLOCK_EACH),
    ] {
        let once = |load: Load| load.once(unit, Order::RandomInside);
        add(
            image,
            Place::Memory,
            &[once(WRITE_QD1), once(WRITE_QD32), once(WRITE_FLUSH)],
        );
        add(
            image,
            Place::Memory,
            &[WRITE_1M.once(1 << 20, Order::Forward)],
        );
    }
    for image in [Image::Deflate, Image::Zstd] {
        add(
            image,
            Place::Disk,
            &[READ_QD1, READ_QD32].map(Load::everywhere),
        );
        add(
            image,
            Place::Disk,
            &[READ_64K, READ_1M].map(Load::everywhere),
        );
    }
    add(Image::View, Place::Disk, &[READ_QD1_POLLING, READ_QD32]);
    add(Image::View, Place::Memory, &[WRITE_QD1_POLLING, WRITE_QD32]);
    add(
        Image::ViewOfBase,
        Place::Disk,
        &[READ_QD1_POLLING, READ_QD32],
    );
    let cold = |load: Load| load.once(SLICE, Order::Random);
    add(
        Image::ColdL2,
        Place::Disk,
        &[cold(READ_QD1), cold(READ_QD32)],
    );
    add(
        Image::Chain,
        Place::Disk,
        &[READ_QD1_POLLING, READ_QD32, READ_64K, READ_1M],
    );
    for image in [Image::Raw, Image::Qcow2] {
        add(
            image,
            Place::Direct,
            &[READ_QD1, READ_QD32, READ_QD128, READ_64K, READ_1M],
        );
        add(
            image,
            Place::Direct,
            &[WRITE_QD1, WRITE_QD32, WRITE_FLUSH, WRITE_1M],
        );
    }
    add(Image::SeeThrough, Place::Direct, &[READ_QD1, READ_QD32]);
    cells
}
