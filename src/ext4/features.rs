//! The three feature sets of a superblock, and what this program does with each feature
//! (kernel documentation: "Super Block", `s_feature_compat`, `s_feature_incompat`, `s_feature_ro_compat`).

use std::fmt;

/// Which of the superblock's three sets a feature is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureSet {
    /// `s_feature_compat`: a kernel that does not know the feature may use the filesystem.
    Compat,
    /// `s_feature_incompat`: it may not.
    Incompat,
    /// `s_feature_ro_compat`: it may read it.
    RoCompat,
}

/// One feature: a bit of one of the sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    set: FeatureSet,
    bit: u32,
}

/// Whether filesystems with a feature are taken, and if not, what their owner can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Support {
    Yes,
    /// No, but tune2fs switches the feature off.
    SwitchOff,
    /// No, but e2fsck makes the filesystem one without it.
    Unshare,
    /// No, and a filesystem has it from its making on.
    No,
}

macro_rules! features {
    ($($set:ident { $($constant:ident = $bit:literal, $name:literal, $support:ident, $doc:literal;)* })*) => {
        impl Feature {
            $($(
                #[doc = $doc]
                pub const $constant: Self = Self { set: FeatureSet::$set, bit: $bit };
            )*)*

            /// Every feature with a name, and whether it is supported.
            const KNOWN: &[(Self, &'static str, Support)] =
                &[$($((Self::$constant, $name, Support::$support),)*)*];
        }
    };
}

features! {
    Compat {
        DIR_PREALLOC = 0x1, "dir_prealloc", Yes, "Directory blocks are preallocated; no kernel does.";
        IMAGIC_INODES = 0x2, "imagic_inodes", No, "AFS magic inodes.";
        HAS_JOURNAL = 0x4, "has_journal", Yes, "There is a journal.";
        EXT_ATTR = 0x8, "ext_attr", Yes, "Extended attributes; a kernel sets it with the first one.";
        RESIZE_INODE = 0x10, "resize_inode", Yes, "Blocks behind the descriptor table are kept for its growth.";
        DIR_INDEX = 0x20, "dir_index", Yes, "Large directories are hash trees.";
        LAZY_BG = 0x40, "lazy_bg", No, "Uninitialised groups without checksums; long gone.";
        EXCLUDE_INODE = 0x80, "exclude_inode", No, "Snapshots' exclude inode; never merged.";
        EXCLUDE_BITMAP = 0x100, "snapshot_bitmap", No, "Snapshots' exclude bitmaps; never merged.";
        SPARSE_SUPER2 = 0x200, "sparse_super2", Yes, "Two backup superblocks at most, in named groups.";
        FAST_COMMIT = 0x400, "fast_commit", Yes, "The journal may hold fast commits too; no VM is shown it.";
        STABLE_INODES = 0x800, "stable_inodes", Yes, "Inode numbers and the UUID never change.";
        ORPHAN_FILE = 0x1000, "orphan_file", Yes, "Orphans are listed in a file.";
    }
    Incompat {
        COMPRESSION = 0x1, "compression", No, "Compressed files; never merged.";
        FILETYPE = 0x2, "filetype", Yes, "Directory entries hold the file's type.";
        NEEDS_RECOVERY = 0x4, "needs_recovery", Yes, "The journal has to be replayed; volatile.";
        JOURNAL_DEV = 0x8, "journal_dev", No, "This is not a filesystem but an external journal.";
        META_BG = 0x10, "meta_bg", Yes, "Descriptor blocks lie in the groups that they describe.";
        EXTENTS = 0x40, "extent", Yes, "Files may be mapped by extents.";
        SIXTY_FOUR_BIT = 0x80, "64bit", Yes, "Block numbers have 64 bits, descriptors 64 bytes or more.";
        MMP = 0x100, "mmp", Yes, "A block that every mounter writes guards against several mounts.";
        FLEX_BG = 0x200, "flex_bg", Yes, "A group's bitmaps and inode table may lie in another group.";
        EA_INODE = 0x400, "ea_inode", Yes, "Large attribute values lie in inodes that files share.";
        DIRDATA = 0x1000, "dirdata", No, "Data in directory entries; never merged.";
        CSUM_SEED = 0x2000, "metadata_csum_seed", Yes, "The checksum seed is in the superblock.";
        LARGEDIR = 0x4000, "large_dir", Yes, "Hash trees of three levels, directories beyond 2 GiB.";
        INLINE_DATA = 0x8000, "inline_data", Yes, "Small files lie in their inodes.";
        ENCRYPT = 0x10000, "encrypt", Yes, "Files may be encrypted.";
        CASEFOLD = 0x20000, "casefold", Yes, "Directories may fold case.";
    }
    RoCompat {
        SPARSE_SUPER = 0x1, "sparse_super", Yes, "Backups lie in groups 0, 1 and powers of 3, 5 and 7.";
        LARGE_FILE = 0x2, "large_file", Yes, "Files beyond 2 GiB; a kernel sets it with the first one.";
        BTREE_DIR = 0x4, "btree_dir", No, "Directory B-trees; never merged.";
        HUGE_FILE = 0x8, "huge_file", Yes, "Inodes may count filesystem blocks instead of sectors.";
        GDT_CSUM = 0x10, "uninit_bg", Yes, "Descriptors carry a CRC-16.";
        DIR_NLINK = 0x20, "dir_nlink", Yes, "More than 65000 subdirectories; a kernel sets it by itself.";
        EXTRA_ISIZE = 0x40, "extra_isize", Yes, "Inodes reserve room for extra fields; a kernel sets it by itself.";
        HAS_SNAPSHOT = 0x80, "has_snapshot", No, "Snapshots; never merged.";
        QUOTA = 0x100, "quota", SwitchOff, "The kernel accounts users' blocks in hidden files.";
        BIGALLOC = 0x200, "bigalloc", No, "Blocks are allocated in clusters.";
        METADATA_CSUM = 0x400, "metadata_csum", Yes, "Every structure carries a CRC-32C.";
        REPLICA = 0x800, "replica", No, "Replicas; never merged.";
        READONLY = 0x1000, "read-only", SwitchOff, "The filesystem shall not be mounted for writing.";
        PROJECT = 0x2000, "project", Yes, "Inodes name their project.";
        SHARED_BLOCKS = 0x4000, "shared_blocks", Unshare, "Files share blocks without counting them.";
        VERITY = 0x8000, "verity", Yes, "Files may carry a hash tree.";
        ORPHAN_PRESENT = 0x10000, "orphan_present", Yes, "The orphan file may hold entries; volatile.";
    }
}

impl Feature {
    /// The set that the feature's bit is in.
    #[must_use]
    pub fn set(self) -> FeatureSet {
        self.set
    }

    /// The feature's bit in its set.
    #[must_use]
    pub fn bit(self) -> u32 {
        self.bit
    }

    fn known(self) -> Option<(&'static str, Support)> {
        let known = Self::KNOWN.iter().find(|known| known.0 == self)?;
        Some((known.1, known.2))
    }

    fn is_supported(self) -> bool {
        matches!(self.known(), Some((_, Support::Yes)))
    }

    /// The feature, whose bit is at `position`, and how to be rid of it.
    fn with_remedy(self, position: u32) -> String {
        match self.known() {
            Some((name, Support::SwitchOff)) => {
                format!("{name} (switch it off with tune2fs -O ^{name})")
            }
            Some((name, Support::Unshare)) => {
                format!("{name} (e2fsck -f -E unshare_blocks gives each file its own)")
            }
            Some((name, _)) => format!("{name} (make the filesystem without it)"),
            None => format!(
                "{}{position} (make the filesystem without it)",
                self.set.prefix()
            ),
        }
    }
}

/// The features of one filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// `s_feature_compat`.
    pub compat: u32,
    /// `s_feature_incompat`.
    pub incompat: u32,
    /// `s_feature_ro_compat`.
    pub ro_compat: u32,
}

impl Features {
    /// Whether the filesystem has `feature`.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.word(feature.set) & feature.bit != 0
    }

    fn word(&self, set: FeatureSet) -> u32 {
        match set {
            FeatureSet::Compat => self.compat,
            FeatureSet::Incompat => self.incompat,
            FeatureSet::RoCompat => self.ro_compat,
        }
    }

    /// The features that this program does not handle, as the e2fsprogs spell them, each with what its owner can do; a
    /// bit without a name is named by its set and its position.
    #[must_use]
    pub fn unsupported(&self) -> Vec<String> {
        let mut named = Vec::new();
        for set in [
            FeatureSet::Compat,
            FeatureSet::Incompat,
            FeatureSet::RoCompat,
        ] {
            for position in 0..u32::BITS {
                let feature = Feature {
                    set,
                    bit: 1 << position,
                };
                if self.has(feature) && !feature.is_supported() {
                    named.push(feature.with_remedy(position));
                }
            }
        }
        named
    }
}

impl FeatureSet {
    /// What the e2fsprogs put before the number of a feature without a name.
    fn prefix(self) -> &'static str {
        match self {
            Self::Compat => "FEATURE_C",
            Self::Incompat => "FEATURE_I",
            Self::RoCompat => "FEATURE_R",
        }
    }
}

/// The names of all features that are set and have a name, in the order of the sets.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (feature, name, _) in Feature::KNOWN {
            if self.has(*feature) {
                write!(f, "{separator}{name}")?;
                separator = " ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_handled_is_named_with_a_remedy() {
        let features = Features {
            compat: 0x400 | 0x4 | 0x8000_0000,
            incompat: 0x1000 | 0x40,
            ro_compat: 0x4000 | 0x100 | 0x1,
        };
        assert_eq!(
            features.unsupported(),
            [
                "FEATURE_C31 (make the filesystem without it)",
                "dirdata (make the filesystem without it)",
                "quota (switch it off with tune2fs -O ^quota)",
                "shared_blocks (e2fsck -f -E unshare_blocks gives each file its own)",
            ]
        );
    }

    #[test]
    fn no_bit_is_listed_twice() {
        for (index, known) in Feature::KNOWN.iter().enumerate() {
            assert!(known.0.bit().is_power_of_two(), "{}", known.1);
            for other in &Feature::KNOWN[..index] {
                assert_ne!(known.0, other.0, "{} and {}", known.1, other.1);
                assert_ne!(known.1, other.1);
            }
        }
    }

    #[test]
    fn features_print_by_name() {
        let features = Features {
            compat: 0x4,
            incompat: 0x2c2,
            ro_compat: 0x400,
        };
        assert_eq!(
            features.to_string(),
            "has_journal filetype extent 64bit flex_bg metadata_csum"
        );
    }
}
