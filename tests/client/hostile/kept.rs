//! What has to be as it was.

use seethrough::ext4::group_descriptor::{self, GroupDescriptor};
use seethrough::ext4::layout::Kind;
use seethrough::ext4::superblock::{self, SUPERBLOCK_SIZE};
use seethrough::ext4::volatile::{self, FreeCounts};
use seethrough::units::{BlockGroup, FsBlock};
use seethrough::view::declaration::GroupList;
use seethrough::view::probe::Probe;

/// A part of a disk, by what it is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    /// It is no part of the filesystem.
    Outside,
    /// A block that is somebody's as a whole.
    Block(Kind),
    /// A record of the table.
    Descriptor(BlockGroup),
}

impl Part {
    /// The group that it serves, if that alone tells whose it is.
    pub(super) fn served(self) -> Option<BlockGroup> {
        match self {
            Self::Descriptor(group)
            | Self::Block(
                Kind::Data { group }
                | Kind::BlockBitmap { group }
                | Kind::InodeBitmap { group }
                | Kind::InodeTable { group, .. },
            ) => Some(group),
            Self::Outside | Self::Block(_) => None,
        }
    }

    /// Whether a child has it for itself, in its overlay.
    pub(super) fn is_every_childs(self) -> bool {
        matches!(
            self,
            Self::Block(
                Kind::Superblock
                    | Kind::Journal { .. }
                    | Kind::OrphanFile { .. }
                    | Kind::MultipleMount
            )
        )
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("small")
}

/// Calls `each` with every part of the disk of `len` bytes, and where it is.
fn parts(probe: &Probe, len: usize, mut each: impl FnMut(Part, std::ops::Range<usize>)) {
    let superblock = probe.superblock();
    let start = index(probe.place().start.0);
    let size = superblock.block_size as usize;
    each(Part::Outside, 0..start);
    let mut at = start;
    for block in 0..superblock.blocks_count {
        let (kind, _) = probe.layout().classify(FsBlock(block)).expect("a block");
        if let Kind::Descriptors { index } = kind {
            let first = index * superblock.descriptors_per_block();
            let size = usize::from(superblock.descriptor_size);
            let last = superblock
                .group_count
                .min(first + superblock.descriptors_per_block());
            for (group, at) in (first..last).map(BlockGroup).zip((at..).step_by(size)) {
                each(Part::Descriptor(group), at..at + size);
            }
        } else {
            each(Part::Block(kind), at..at + size);
        }
        at += size;
    }
    each(Part::Outside, at..len);
}

/// Whatever `must_stay` names is in `after` as it is in `before`.
pub(super) fn assert_kept(
    probe: &Probe,
    before: &[u8],
    after: &[u8],
    must_stay: impl Fn(Part) -> bool,
) {
    assert_eq!(before.len(), after.len());
    parts(probe, before.len(), |part, at| {
        let same = before[at.clone()] == after[at.clone()];
        assert!(same || !must_stay(part), "{part:?} at {at:?} has changed");
    });
}

fn superblock_of(probe: &Probe, disk: &[u8]) -> [u8; SUPERBLOCK_SIZE] {
    let at = index(probe.place().start.0) + 1024;
    disk[at..at + SUPERBLOCK_SIZE].try_into().expect("as long")
}

/// What children in shared regions may change of what the base keeps for all: descriptors that a kernel can have
/// written, and the count of what is free, which is what the descriptors say.
pub(super) fn assert_counted(probe: &Probe, shared: &GroupList, before: &[u8], after: &[u8]) {
    let [mut old, mut new] = [before, after].map(|disk| superblock_of(probe, disk));
    let mut counted = Vec::new();
    parts(probe, after.len(), |part, at| {
        let Part::Descriptor(group) = part else {
            return;
        };
        let bytes = &after[at];
        counted.push(GroupDescriptor::parse(bytes).free());
        if shared.contains(group) {
            let locations = probe.layout().locations(group).expect("a group");
            assert!(
                group_descriptor::is_sound(probe.superblock(), group, locations, bytes),
                "the descriptor of group {group}: {bytes:x?}"
            );
        }
    });
    let counted: FreeCounts = counted.into_iter().sum();
    assert_eq!(volatile::free_counts(&new), counted);
    for superblock in [&mut old, &mut new] {
        volatile::put_free(superblock, counted);
        superblock::seal(superblock);
    }
    assert!(old == new, "the base's superblock");
}
