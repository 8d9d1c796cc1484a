//! Composing superblocks: which fields say what the filesystem *is*, and which say how one VM *uses* it.
//!
//! Structural fields (sizes, features, UUIDs, where things are) come from the base. Volatile fields are those that
//! a kernel writes by itself while it has the filesystem mounted; each VM keeps its own:
//! state, mount count and times, the error record, the list of orphans, free counts, overhead, kilobytes written,
//! where it was last mounted, and the feature bits `needs_recovery` and `orphan_present`.
//!
//! Two things are not as the base has them. `fast_commit` is never shown: such commits are no images of blocks, so that
//! nobody could follow them from outside, and a kernel without the bit commits in full. And where attributes may lie
//! in inodes of their own (`ea_inode`), a child's default mount options say `nombcache`: its kernel would let new files
//! share such an inode of the base's with old ones, and count them there.
//!
//! Some feature bits a kernel sets by itself when a file first needs them. They allow more and change nothing for
//! files without that need, so a VM sees them if either the base or the VM itself has set them.

use std::ops::Range;

use super::features::{Feature, FeatureSet};
use super::fields::{le32, put_le16, put_le32, put_split32, split32};
use super::superblock::{SUPERBLOCK_SIZE, seal};

/// The volatile fields, in their order; runs of neighbours are one range.
const VOLATILE: &[Range<usize>] = &[
    // s_free_blocks_count_lo, s_free_inodes_count
    0x0c..0x14,
    // s_mtime, s_wtime, s_mnt_count
    0x2c..0x36,
    // s_state
    0x3a..0x3c,
    // s_lastcheck
    0x40..0x44,
    // s_last_mounted
    0x88..0xc8,
    // s_last_orphan
    0xe8..0xec,
    // s_free_blocks_count_hi
    0x158..0x15c,
    // s_kbytes_written
    0x178..0x180,
    // s_error_count to s_last_error_func
    0x194..0x200,
    // s_overhead_clusters: what statfs takes off; a kernel that counts otherwise writes its own count
    OVERHEAD..OVERHEAD + 4,
    // s_wtime_hi, s_mtime_hi
    0x274..0x276,
    // s_lastcheck_hi, s_first_error_time_hi, s_last_error_time_hi, s_first_error_errcode, s_last_error_errcode
    0x277..0x27c,
];

/// Feature bits that each VM has for itself.
const OWN_FEATURES: &[Feature] = &[Feature::NEEDS_RECOVERY, Feature::ORPHAN_PRESENT];

/// Feature bits that a kernel sets by itself, and never clears.
const HARMLESS_FEATURES: &[Feature] = &[
    Feature::EXT_ATTR,
    Feature::LARGE_FILE,
    Feature::DIR_NLINK,
    Feature::EXTRA_ISIZE,
];

/// Feature bits that no VM is shown; what is stored stays.
const HIDDEN_FEATURES: &[Feature] = &[Feature::FAST_COMMIT];

/// `s_mount_opts`: mount options that a kernel takes as if they were given, ended by a zero.
const MOUNT_OPTS: Range<usize> = 0x200..0x240;
const NO_SHARED_ATTRIBUTES: &[u8] = b"nombcache";

const R_BLOCKS_LO: usize = 0x08;
const R_BLOCKS_HI: usize = 0x154;
const FREE_BLOCKS_LO: usize = 0x0c;
const FREE_BLOCKS_HI: usize = 0x158;
const FREE_INODES: usize = 0x10;
const OVERHEAD: usize = 0x248;

/// How much of a filesystem one VM may fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Blocks in the VM's own groups.
    pub owned_blocks: u64,
    /// Blocks in all groups.
    pub all_blocks: u64,
}

impl Share {
    /// The VM's part of `blocks`, rounded down.
    fn of(self, blocks: u64) -> u64 {
        let part = u128::from(blocks) * u128::from(self.owned_blocks.min(self.all_blocks));
        let part = part.checked_div(u128::from(self.all_blocks)).unwrap_or(0);
        u64::try_from(part).expect("a part of a 64-bit number fits 64 bits")
    }
}

/// Free blocks and inodes of some groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FreeCounts {
    /// Free blocks.
    pub blocks: u64,
    /// Free inodes.
    pub inodes: u32,
}

impl FreeCounts {
    /// These counts after a part of what they count has changed from `before` to `after`.
    #[must_use]
    pub fn moved(self, before: Self, after: Self) -> Self {
        Self {
            blocks: self
                .blocks
                .saturating_sub(before.blocks)
                .saturating_add(after.blocks),
            inodes: self
                .inodes
                .saturating_sub(before.inodes)
                .saturating_add(after.inodes),
        }
    }
}

/// Sums, for groups whose counts are added up; what cannot be stays at the largest number.
impl std::iter::Sum for FreeCounts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, next| Self {
            blocks: sum.blocks.saturating_add(next.blocks),
            inodes: sum.inodes.saturating_add(next.inodes),
        })
    }
}

/// What a VM reads as the superblock: the structure of `base`, the volatile fields of `own`, and of the blocks that
/// only the superuser may fill as many as fall to the VM's share (all of a large base's would swallow a small
/// region whole).
///
/// For the base VM both arguments are the stored superblock; see [`hide_free`] for its free counts.
#[must_use]
pub fn compose_superblock(
    base: &[u8; SUPERBLOCK_SIZE],
    own: &[u8; SUPERBLOCK_SIZE],
    share: Share,
) -> [u8; SUPERBLOCK_SIZE] {
    let mut composed = with_volatile(base, own);
    let s_r_blocks_count = split32(base, R_BLOCKS_LO, R_BLOCKS_HI);
    put_split32(
        &mut composed,
        R_BLOCKS_LO,
        R_BLOCKS_HI,
        share.of(s_r_blocks_count),
    );
    if feature_word(base, Feature::EA_INODE) & Feature::EA_INODE.bit() != 0 {
        add_option(&mut composed);
    }
    hide_features(&mut composed);
    composed
}

/// Takes out of a superblock the features that no VM is shown.
pub fn hide_features(superblock: &mut [u8; SUPERBLOCK_SIZE]) {
    for feature in HIDDEN_FEATURES {
        put_feature(superblock, *feature, 0);
    }
    seal(superblock);
}

/// Gives the superblock that a VM wrote the features of `stored` that it was not shown: the reverse of
/// [`hide_features`].
pub fn reveal_features(superblock: &mut [u8; SUPERBLOCK_SIZE], stored: &[u8; SUPERBLOCK_SIZE]) {
    for feature in HIDDEN_FEATURES {
        put_feature(superblock, *feature, feature_word(stored, *feature));
    }
    seal(superblock);
}

/// The default mount options without what is behind them.
fn options(superblock: &[u8; SUPERBLOCK_SIZE]) -> &[u8] {
    let field = &superblock[MOUNT_OPTS];
    let end = field.iter().position(|byte| *byte == 0);
    &field[..end.unwrap_or(field.len())]
}

fn has_option(superblock: &[u8; SUPERBLOCK_SIZE]) -> bool {
    options(superblock)
        .split(|byte| *byte == b',')
        .any(|option| option == NO_SHARED_ATTRIBUTES)
}

/// Whether the default mount options can say that attributes are not to be shared between files.
#[must_use]
pub fn has_room_for_options(superblock: &[u8; SUPERBLOCK_SIZE]) -> bool {
    let needed = options(superblock).len() + NO_SHARED_ATTRIBUTES.len() + ",\0".len();
    has_option(superblock) || needed <= MOUNT_OPTS.len()
}

/// Adds to the default mount options that attributes are not to be shared between files.
fn add_option(superblock: &mut [u8; SUPERBLOCK_SIZE]) {
    if has_option(superblock) || !has_room_for_options(superblock) {
        return;
    }
    let mut all = options(superblock).to_vec();
    if !all.is_empty() {
        all.push(b',');
    }
    all.extend(NO_SHARED_ATTRIBUTES);
    all.resize(MOUNT_OPTS.len(), 0);
    superblock[MOUNT_OPTS].copy_from_slice(&all);
}

/// What is stored when a VM writes the superblock `written`: its volatile fields over `stored`, the rest of which
/// stays.
///
/// For the base VM, [`reveal_free`] makes the counts true before.
#[must_use]
pub fn scatter_superblock(
    stored: &[u8; SUPERBLOCK_SIZE],
    written: &[u8; SUPERBLOCK_SIZE],
) -> [u8; SUPERBLOCK_SIZE] {
    let mut scattered = with_volatile(stored, written);
    seal(&mut scattered);
    scattered
}

/// Whether a write changed nothing that is the base's: every structural field of `written` is as it was `served`.
#[must_use]
pub fn is_honest_write(served: &[u8; SUPERBLOCK_SIZE], written: &[u8; SUPERBLOCK_SIZE]) -> bool {
    let mut kept = with_volatile(served, written);
    seal(&mut kept);
    kept == *written
}

/// Takes the free counts of groups that a VM does not own out of a superblock that counts all groups.
pub fn hide_free(superblock: &mut [u8; SUPERBLOCK_SIZE], foreign: FreeCounts) {
    let free = free_counts(superblock);
    put_free(superblock, free.moved(foreign, FreeCounts::default()));
}

/// Adds the free counts of groups that a VM does not own to a superblock that it wrote: the reverse of [`hide_free`].
pub fn reveal_free(superblock: &mut [u8; SUPERBLOCK_SIZE], foreign: FreeCounts) {
    let free = free_counts(superblock);
    put_free(superblock, free.moved(FreeCounts::default(), foreign));
}

/// The free counts of a superblock.
#[must_use]
pub fn free_counts(superblock: &[u8; SUPERBLOCK_SIZE]) -> FreeCounts {
    FreeCounts {
        blocks: split32(superblock, FREE_BLOCKS_LO, FREE_BLOCKS_HI),
        inodes: le32(superblock, FREE_INODES),
    }
}

/// Sets the free counts of a superblock and its checksum.
pub fn put_free(superblock: &mut [u8; SUPERBLOCK_SIZE], free: FreeCounts) {
    put_split32(superblock, FREE_BLOCKS_LO, FREE_BLOCKS_HI, free.blocks);
    put_le32(superblock, FREE_INODES, free.inodes);
    seal(superblock);
}

/// Says how many blocks no file can have, as far as it can be said.
pub fn put_overhead(superblock: &mut [u8; SUPERBLOCK_SIZE], blocks: u64) {
    put_le32(superblock, OVERHEAD, u32::try_from(blocks).unwrap_or(0));
    seal(superblock);
}

/// Makes `superblock` that of a filesystem which nobody has mounted or is using: clean, without errors and orphans,
/// nothing to recover. The own superblock of a new child begins so.
pub fn put_clean(superblock: &mut [u8; SUPERBLOCK_SIZE]) {
    const STATE: usize = 0x3a;
    const LAST_ORPHAN: usize = 0xe8;
    const ERROR_RECORD: Range<usize> = 0x194..0x200;
    const ERROR_TIMES_AND_CODES: Range<usize> = 0x278..0x27c;
    put_le16(superblock, STATE, 0x1);
    put_le32(superblock, LAST_ORPHAN, 0);
    superblock[ERROR_RECORD].fill(0);
    superblock[ERROR_TIMES_AND_CODES].fill(0);
    for feature in OWN_FEATURES {
        put_feature(superblock, *feature, 0);
    }
    seal(superblock);
}

/// `structure` with the volatile fields of `own`. The checksum is not set.
fn with_volatile(
    structure: &[u8; SUPERBLOCK_SIZE],
    own: &[u8; SUPERBLOCK_SIZE],
) -> [u8; SUPERBLOCK_SIZE] {
    let mut composed = *structure;
    for field in VOLATILE {
        composed[field.clone()].copy_from_slice(&own[field.clone()]);
    }
    for feature in OWN_FEATURES {
        put_feature(&mut composed, *feature, feature_word(own, *feature));
    }
    for feature in HARMLESS_FEATURES {
        let either = feature_word(structure, *feature) | feature_word(own, *feature);
        put_feature(&mut composed, *feature, either);
    }
    composed
}

fn word_offset(feature: Feature) -> usize {
    match feature.set() {
        FeatureSet::Compat => 0x5c,
        FeatureSet::Incompat => 0x60,
        FeatureSet::RoCompat => 0x64,
    }
}

fn feature_word(superblock: &[u8; SUPERBLOCK_SIZE], feature: Feature) -> u32 {
    le32(superblock, word_offset(feature))
}

/// Sets the feature's bit as it is in `word`.
fn put_feature(superblock: &mut [u8; SUPERBLOCK_SIZE], feature: Feature, word: u32) {
    let others = feature_word(superblock, feature) & !feature.bit();
    put_le32(
        superblock,
        word_offset(feature),
        others | (word & feature.bit()),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: Share = Share {
        owned_blocks: 500,
        all_blocks: 1000,
    };

    fn filled(byte: u8) -> [u8; SUPERBLOCK_SIZE] {
        let mut superblock = [byte; SUPERBLOCK_SIZE];
        // metadata_csum, so that checksums are set.
        put_le32(&mut superblock, 0x64, 0x400);
        put_le32(&mut superblock, 0x60, 0x2c2);
        put_le32(&mut superblock, 0x5c, 0x3c);
        seal(&mut superblock);
        superblock
    }

    #[test]
    fn structure_comes_from_the_base_and_the_volatile_from_the_vm() {
        let composed = compose_superblock(&filled(1), &filled(2), HALF);
        for (at, byte) in composed[..0x3fc].iter().enumerate() {
            let volatile = VOLATILE.iter().any(|field| field.contains(&at));
            let special = (0x5c..0x68).contains(&at)
                || (0x08..0x0c).contains(&at)
                || (0x154..0x158).contains(&at);
            if !special {
                assert_eq!(*byte, if volatile { 2 } else { 1 }, "byte {at:#x}");
            }
        }
    }

    #[test]
    fn no_vm_is_shown_fast_commits_and_what_is_stored_keeps_them() {
        let mut base = filled(0);
        put_feature(&mut base, Feature::FAST_COMMIT, u32::MAX);
        seal(&mut base);
        let composed = compose_superblock(&base, &base, HALF);
        assert_eq!(feature_word(&composed, Feature::FAST_COMMIT), 0x3c);
        assert!(is_honest_write(&composed, &composed));
        let scattered = scatter_superblock(&base, &composed);
        assert_eq!(feature_word(&scattered, Feature::FAST_COMMIT), 0x43c);

        let mut served = base;
        hide_features(&mut served);
        assert_eq!(feature_word(&served, Feature::FAST_COMMIT), 0x3c);
        reveal_features(&mut served, &base);
        assert_eq!(served, base);
    }

    #[test]
    fn where_attributes_may_lie_in_inodes_a_child_shares_none() {
        let with = |options: &[u8]| {
            let mut base = filled(0);
            put_feature(&mut base, Feature::EA_INODE, u32::MAX);
            base[MOUNT_OPTS][..options.len()].copy_from_slice(options);
            base
        };
        let composed = |options: &[u8]| {
            let base = with(options);
            let composed = compose_superblock(&base, &base, HALF);
            super::options(&composed).to_vec()
        };
        assert_eq!(composed(b""), b"nombcache");
        assert_eq!(composed(b"discard"), b"discard,nombcache");
        assert_eq!(composed(b"nombcache,discard"), b"nombcache,discard");
        assert!(has_room_for_options(&with(&[b'x'; 53])));
        assert!(!has_room_for_options(&with(&[b'x'; 54])));
        assert_eq!(composed(&[b'x'; 54]), [b'x'; 54]);
        let plain = filled(0);
        let composed = compose_superblock(&plain, &plain, HALF);
        assert_eq!(composed[MOUNT_OPTS], plain[MOUNT_OPTS]);
    }

    #[test]
    fn a_vm_reserves_its_share_of_the_blocks() {
        let mut base = filled(0);
        put_split32(&mut base, R_BLOCKS_LO, R_BLOCKS_HI, 0x1_0000_0001);
        let composed = compose_superblock(&base, &filled(0), HALF);
        assert_eq!(split32(&composed, R_BLOCKS_LO, R_BLOCKS_HI), 0x8000_0000);
        let nothing = Share {
            owned_blocks: 0,
            all_blocks: 0,
        };
        let composed = compose_superblock(&base, &filled(0), nothing);
        assert_eq!(split32(&composed, R_BLOCKS_LO, R_BLOCKS_HI), 0);
    }

    #[test]
    fn recovery_is_each_vms_own_and_harmless_features_add_up() {
        let mut base = filled(0);
        put_feature(&mut base, Feature::NEEDS_RECOVERY, u32::MAX);
        put_feature(&mut base, Feature::LARGE_FILE, u32::MAX);
        let mut own = filled(0);
        put_feature(&mut own, Feature::ORPHAN_PRESENT, u32::MAX);
        put_feature(&mut own, Feature::DIR_NLINK, u32::MAX);
        put_feature(&mut own, Feature::QUOTA, u32::MAX);
        let composed = compose_superblock(&base, &own, HALF);
        assert_eq!(le32(&composed, 0x60), 0x2c2);
        assert_eq!(le32(&composed, 0x64), 0x400 | 0x10000 | 0x2 | 0x20);
    }

    #[test]
    fn a_write_keeps_what_is_structural_as_it_is_stored() {
        let stored = filled(1);
        let scattered = scatter_superblock(&stored, &filled(2));
        assert_eq!(scattered[0..0x0c], stored[0..0x0c]);
        assert_eq!(scattered[0x0c..0x14], [2; 8]);
        let mut sealed = scattered;
        seal(&mut sealed);
        assert_eq!(sealed, scattered);
    }

    #[test]
    fn a_write_of_volatile_fields_is_honest_and_one_of_others_is_not() {
        let served = filled(1);
        assert!(is_honest_write(&served, &served));
        let mut written = served;
        written[0x3a] = 9;
        put_feature(&mut written, Feature::NEEDS_RECOVERY, u32::MAX);
        put_feature(&mut written, Feature::LARGE_FILE, u32::MAX);
        seal(&mut written);
        assert!(is_honest_write(&served, &written));
        for (at, name) in [
            (0x04, "s_blocks_count"),
            (0x08, "s_r_blocks_count"),
            (0x68, "s_uuid"),
        ] {
            let mut written = served;
            written[at] ^= 1;
            seal(&mut written);
            assert!(!is_honest_write(&served, &written), "{name}");
        }
    }

    #[test]
    fn hidden_free_counts_come_back() {
        let foreign = FreeCounts {
            blocks: 0x1_0000_0000,
            inodes: 77,
        };
        let mut superblock = filled(3);
        let before = superblock;
        hide_free(&mut superblock, foreign);
        assert_ne!(superblock, before);
        reveal_free(&mut superblock, foreign);
        assert_eq!(superblock, before);
    }

    #[test]
    fn free_counts_stop_at_zero() {
        let mut superblock = filled(0);
        hide_free(
            &mut superblock,
            FreeCounts {
                blocks: 5,
                inodes: 5,
            },
        );
        assert_eq!(split32(&superblock, FREE_BLOCKS_LO, FREE_BLOCKS_HI), 0);
        assert_eq!(le32(&superblock, FREE_INODES), 0);
    }

    #[test]
    fn a_clean_superblock_has_no_past() {
        let mut superblock = filled(0xff);
        put_feature(&mut superblock, Feature::NEEDS_RECOVERY, u32::MAX);
        put_clean(&mut superblock);
        assert_eq!(superblock[0x3a..0x3c], [1, 0]);
        assert_eq!(le32(&superblock, 0xe8), 0);
        assert_eq!(le32(&superblock, 0x194), 0);
        assert_eq!(le32(&superblock, 0x60), 0x2c2);
    }
}
