//! One type for every address space, and every conversion between them.
//!
//! A byte offset in a guest's disk and one in a host file are both 64-bit numbers; mixing them up is a
//! corruption. Indices, counts and byte lengths are kept apart in the same way: lengths in bytes are
//! plain `u64`, positions never are.

use std::fmt;

/// Bytes in a virtio sector (virtio 1.3, section 5.2): the unit of request addresses, whatever the
/// device's logical block size.
pub const SECTOR_SIZE: u64 = 512;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl $name {
            /// The address `len` units further on; `None` past the end of the address space.
            #[must_use]
            pub fn checked_add(self, len: $inner) -> Option<Self> {
                self.0.checked_add(len).map(Self)
            }

            /// How far this address lies behind `start`; `None` if it lies before it.
            #[must_use]
            pub fn checked_sub(self, start: Self) -> Option<$inner> {
                self.0.checked_sub(start.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

address!(
    /// A byte offset in a virtual disk, as its guest sees it.
    GuestOffset(u64)
);
address!(
    /// A byte offset in a host file.
    HostOffset(u64)
);
address!(
    /// The index of a cluster of a virtual disk.
    GuestCluster(u64)
);
address!(
    /// The index of a cluster of a qcow2 file.
    HostCluster(u64)
);
address!(
    /// The number of a 512-byte sector, as virtio-blk requests address a disk.
    Sector(u64)
);
address!(
    /// The number of a block of an ext4 filesystem, counted from the filesystem's start.
    FsBlock(u64)
);
address!(
    /// The number of a block of an ext4 journal, counted from the journal's superblock.
    LogBlock(u32)
);
address!(
    /// The number of an ext4 block group.
    BlockGroup(u32)
);
address!(
    /// The number of an ext4 inode; the first is 1.
    InodeNumber(u32)
);

impl Sector {
    /// The sector's first byte; `None` past the end of the address space.
    #[must_use]
    pub fn to_guest_offset(self) -> Option<GuestOffset> {
        self.0.checked_mul(SECTOR_SIZE).map(GuestOffset)
    }
}
