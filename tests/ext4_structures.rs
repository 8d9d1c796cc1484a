//! The structures of filesystems that mke2fs makes, over its features: what this program reads and computes against
//! what dumpe2fs and debugfs print.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "ext4/golden.rs"]
mod golden;

use golden::{Golden, RECIPES};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::error::ErrorKind;
use seethrough::ext4::checksum::Checksums;
use seethrough::ext4::group_descriptor::{self, GroupDescriptor, Locations};
use seethrough::ext4::superblock::{self, SUPERBLOCK_SIZE, Superblock};
use seethrough::ext4::volatile::FreeCounts;
use seethrough::ext4::{bitmap, inode, xattr_block};
use seethrough::units::{BlockGroup, FsBlock, InodeNumber};

/// What dumpe2fs prints about one group.
#[derive(Debug, PartialEq)]
struct Dumped {
    block_bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free_blocks: u32,
    free_inodes: u32,
    directories: u32,
}

/// The number that follows `label` in `text`.
fn number_after(text: &str, label: &str) -> u64 {
    let at = text
        .find(label)
        .unwrap_or_else(|| panic!("{label} in {text}"));
    let digits: String = text[at + label.len()..]
        .trim_start()
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap()
}

/// The number before `label` in `text`.
fn number_before(text: &str, label: &str) -> u32 {
    let at = text
        .find(label)
        .unwrap_or_else(|| panic!("{label} in {text}"));
    let word = text[..at].split_whitespace().next_back().unwrap();
    word.parse().unwrap()
}

fn dumped_groups(golden: &Golden) -> Vec<Dumped> {
    let text = golden.tool("dumpe2fs", &[]);
    text.split("\nGroup ")
        .skip(1)
        .filter(|group| group.starts_with(|first: char| first.is_ascii_digit()))
        .map(|group| Dumped {
            block_bitmap: number_after(group, "Block bitmap at"),
            inode_bitmap: number_after(group, "Inode bitmap at"),
            inode_table: number_after(group, "Inode table at"),
            free_blocks: number_before(group, " free blocks"),
            free_inodes: number_before(group, " free inodes"),
            directories: number_before(group, " directories"),
        })
        .collect()
}

#[test]
fn superblocks_say_what_dumpe2fs_says() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let text = golden.tool("dumpe2fs", &["-h"]);
        for (label, value) in [
            ("Inode count:", u64::from(superblock.inodes_count)),
            ("Block count:", superblock.blocks_count),
            ("Reserved block count:", superblock.reserved_blocks_count),
            ("Free blocks:", superblock.free_blocks_count),
            ("Free inodes:", u64::from(superblock.free_inodes_count)),
            ("First block:", u64::from(superblock.first_data_block)),
            ("Block size:", u64::from(superblock.block_size)),
            ("Blocks per group:", u64::from(superblock.blocks_per_group)),
            ("Inodes per group:", u64::from(superblock.inodes_per_group)),
            (
                "Inode blocks per group:",
                u64::from(superblock.inode_table_blocks()),
            ),
            ("Inode size:", u64::from(superblock.inode_size)),
            ("First inode:", u64::from(superblock.first_inode.0)),
        ] {
            assert_eq!(value, number_after(&text, label), "{recipe:?}: {label}");
        }
        let line = text
            .lines()
            .find(|line| line.starts_with("Filesystem features:"))
            .unwrap();
        let mut theirs: Vec<&str> = line.split_whitespace().skip(2).collect();
        let ours = superblock.features.to_string();
        let mut ours: Vec<&str> = ours.split(' ').collect();
        theirs.sort_unstable();
        ours.sort_unstable();
        assert_eq!(ours, theirs, "{recipe:?}");
        assert!(superblock.is_clean(), "{recipe:?}");
    }
}

#[test]
fn descriptors_say_what_dumpe2fs_says_and_their_checksums_are_right() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let dumped = dumped_groups(&golden);
        assert_eq!(
            u32::try_from(dumped.len()).unwrap(),
            superblock.group_count,
            "{recipe:?}"
        );
        let mut sum = Vec::new();
        for (group, expected) in superblock.groups().zip(dumped) {
            let bytes = golden.descriptor(group);
            group_descriptor::verify(&superblock.checksums, group, &bytes).unwrap();
            let descriptor = GroupDescriptor::parse(&bytes);
            let found = Dumped {
                block_bitmap: descriptor.locations.block_bitmap.0,
                inode_bitmap: descriptor.locations.inode_bitmap.0,
                inode_table: descriptor.locations.inode_table.0,
                free_blocks: descriptor.free_blocks_count,
                free_inodes: descriptor.free_inodes_count,
                directories: descriptor.used_dirs_count,
            };
            assert_eq!(found, expected, "{recipe:?}, group {group}");
            sum.push(descriptor.free());
            let mut rewritten = bytes.clone();
            descriptor.write_to(&mut rewritten);
            assert_eq!(rewritten, bytes, "{recipe:?}, group {group}");
        }
        let sum: FreeCounts = sum.into_iter().sum();
        assert_eq!(sum.blocks, superblock.free_blocks_count, "{recipe:?}");
        assert_eq!(sum.inodes, superblock.free_inodes_count, "{recipe:?}");
    }
}

#[test]
fn bitmaps_count_and_sum_as_their_descriptors_say() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let checksums = &superblock.checksums;
        let half = if superblock.descriptor_size < 64 {
            0xffff
        } else {
            u32::MAX
        };
        for group in superblock.groups() {
            let descriptor = GroupDescriptor::parse(&golden.descriptor(group));
            if !descriptor.block_bitmap_is_uninitialised(checksums) {
                let bytes = golden.block(descriptor.locations.block_bitmap);
                let blocks = superblock.group_blocks(group);
                let items = u32::try_from(blocks.end - blocks.start).unwrap();
                assert_eq!(
                    bitmap::count_free(&bytes, items),
                    descriptor.free_blocks_count
                );
                if let Some(sum) =
                    bitmap::checksum_of(checksums, &bytes, superblock.blocks_per_group)
                {
                    assert_eq!(
                        sum & half,
                        descriptor.block_bitmap_csum,
                        "{recipe:?}, group {group}"
                    );
                }
            }
            if !descriptor.inode_bitmap_is_uninitialised(checksums) {
                let bytes = golden.block(descriptor.locations.inode_bitmap);
                let items = superblock.inodes_per_group;
                assert_eq!(
                    bitmap::count_free(&bytes, items),
                    descriptor.free_inodes_count
                );
                if let Some(sum) = bitmap::checksum_of(checksums, &bytes, items) {
                    assert_eq!(
                        sum & half,
                        descriptor.inode_bitmap_csum,
                        "{recipe:?}, group {group}"
                    );
                }
            }
        }
    }
}

#[test]
fn inode_checksums_are_right_and_cover_every_byte() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let mut in_use = 0;
        for number in golden.inodes_in_use() {
            let mut bytes = golden.inode(number);
            assert!(
                inode::is_intact(&superblock.checksums, number, &bytes),
                "{recipe:?}, inode {number}"
            );
            in_use += 1;
            if matches!(superblock.checksums, Checksums::Crc32c { .. }) {
                assert!(!inode::is_intact(
                    &superblock.checksums,
                    InodeNumber(number.0 + 1),
                    &bytes
                ));
                let good = bytes.clone();
                for at in 0..bytes.len() {
                    bytes[at] ^= 0x80;
                    let error = inode::verify(&superblock.checksums, number, &bytes).unwrap_err();
                    assert_eq!(error.kind(), seethrough::error::ErrorKind::Corrupt);
                    bytes[at] ^= 0x80;
                }
                inode::seal(&superblock.checksums, number, &mut bytes);
                assert_eq!(bytes, good);
            }
        }
        assert!(in_use > 10, "{recipe:?}");
    }
}

#[test]
fn foreign_inodes_are_immutable_and_foreign_symlinks_take_no_more_names() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let mut symlinks = 0;
        for number in golden.inodes_in_use() {
            let stored = golden.inode(number);
            let mut served = stored.clone();
            inode::foreign(&superblock, number, &mut served);
            inode::verify(&superblock.checksums, number, &served).unwrap();
            let before = inode::Inode::parse(&stored);
            let after = inode::Inode::parse(&served);
            let links = before.links_count;
            let (expected, links) = match before.file_type() {
                _ if number.0 < 11 && number.0 != 2 => (0, links),
                _ if !before.is_in_use() => (0, links),
                inode::FileType::Symlink => {
                    symlinks += 1;
                    // Kernels refuse a link to it: EXT4_LINK_MAX.
                    (inode::NOATIME_FL, 65000)
                }
                _ => (inode::NOATIME_FL | inode::IMMUTABLE_FL, links),
            };
            assert_eq!(
                after.flags,
                before.flags | expected,
                "{recipe:?}, inode {number}"
            );
            assert_eq!(after.links_count, links, "{recipe:?}, inode {number}");
            let flagged = inode::Inode {
                flags: before.flags,
                links_count: before.links_count,
                ..after
            };
            assert_eq!(flagged, before, "{recipe:?}, inode {number}");
            let mut again = served.clone();
            inode::foreign(&superblock, number, &mut again);
            assert_eq!(again, served, "serving twice changes nothing more");
        }
        assert!(symlinks > 0, "{recipe:?}");
    }
}

#[test]
fn a_damaged_foreign_inode_is_served_as_it_is() {
    let golden = Golden::make(&RECIPES[0]);
    let superblock = golden.superblock();
    let mut damaged = golden.inode(inode::ROOT);
    damaged[5] ^= 1;
    let mut served = damaged.clone();
    inode::foreign(&superblock, inode::ROOT, &mut served);
    assert_eq!(served, damaged);
}

#[test]
fn a_foreign_attribute_block_is_shared_to_the_full() {
    for recipe in [&RECIPES[0], &RECIPES[4]] {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let checksums = &superblock.checksums;
        let value = "v".repeat(400);
        golden.debugfs(&[&format!("ea_set /usr/share/doc/file-3 user.large {value}")]);
        let stat = golden.tool("debugfs", &["-R", "stat /usr/share/doc/file-3"]);
        let number = InodeNumber(u32::try_from(number_after(&stat, "Inode:")).unwrap());
        let block = FsBlock(inode::Inode::parse(&golden.inode(number)).file_acl);
        assert_eq!(block.0, number_after(&stat, "File ACL:"));
        let stored = golden.block(block);
        assert!(
            xattr_block::is_intact(checksums, block, &stored),
            "{recipe:?}"
        );
        let mut served = stored.clone();
        xattr_block::foreign(checksums, block, &mut served);
        assert!(xattr_block::is_intact(checksums, block, &served));
        assert_eq!(served[4..8], 1024u32.to_le_bytes());
        assert_eq!(
            (&served[..4], &served[8..0x10]),
            (&stored[..4], &stored[8..0x10])
        );
        assert_eq!(served[0x14..], stored[0x14..]);
        let again = served.clone();
        xattr_block::foreign(checksums, block, &mut served);
        assert_eq!(served, again);

        let mut other = golden.block(FsBlock(block.0 + 1));
        let before = other.clone();
        xattr_block::foreign(checksums, block, &mut other);
        assert_eq!(other, before, "no attribute block");
        if checksums.seed().is_some() {
            let mut moved = stored.clone();
            xattr_block::foreign(checksums, FsBlock(block.0 + 1), &mut moved);
            assert_eq!(moved, stored, "its checksum is wrong");
        }
    }
}

#[test]
fn a_full_descriptor_depends_on_locations_alone() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let group = BlockGroup(0);
        let stored = GroupDescriptor::parse(&golden.descriptor(group));
        let size = usize::from(superblock.descriptor_size);
        let (mut from_zeros, mut from_ones) = (vec![0; size], vec![0xff; size]);
        group_descriptor::full(&superblock, group, stored.locations, &mut from_zeros);
        group_descriptor::full(&superblock, group, stored.locations, &mut from_ones);
        assert_eq!(from_zeros, from_ones, "{recipe:?}");
        group_descriptor::verify(&superblock.checksums, group, &from_zeros).unwrap();
        let full = GroupDescriptor::parse(&from_zeros);
        assert_eq!(full.locations, stored.locations);
        assert_eq!(
            (
                full.free_blocks_count,
                full.free_inodes_count,
                full.itable_unused
            ),
            (0, 0, 0)
        );
        let ones = vec![bitmap::FULL; usize::try_from(superblock.block_size).unwrap()];
        if let Some(sum) =
            bitmap::checksum_of(&superblock.checksums, &ones, superblock.inodes_per_group)
        {
            let half = if size < 64 { 0xffff } else { u32::MAX };
            assert_eq!(full.inode_bitmap_csum, sum & half);
        }
        let elsewhere = Locations {
            block_bitmap: FsBlock(9),
            ..stored.locations
        };
        group_descriptor::full(&superblock, group, elsewhere, &mut from_ones);
        assert_ne!(from_zeros, from_ones);
    }
}

/// Writes `value` at `at` of a superblock, as wide as it is, and seals it.
fn mutated(superblock: &[u8; SUPERBLOCK_SIZE], at: usize, value: &[u8]) -> [u8; SUPERBLOCK_SIZE] {
    let mut bytes = *superblock;
    bytes[at..at + value.len()].copy_from_slice(value);
    superblock::seal(&mut bytes);
    bytes
}

#[test]
fn a_superblock_with_one_wrong_field_is_corrupt() {
    let good = Golden::make(&RECIPES[1]).superblock_bytes();
    Superblock::parse(&good).unwrap();
    let wrong: &[(&str, usize, &[u8])] = &[
        ("s_inodes_count", 0x00, &[1]),
        ("s_blocks_count, none", 0x04, &[0; 4]),
        ("s_blocks_count, one group more", 0x04, &[0, 0x20, 0x03, 0]),
        ("s_first_data_block", 0x14, &[0]),
        ("s_log_block_size", 0x18, &[7]),
        ("s_log_block_size, huge", 0x18, &[0xff; 4]),
        ("s_log_cluster_size", 0x1c, &[1]),
        ("s_blocks_per_group, none", 0x20, &[0; 4]),
        ("s_blocks_per_group, not a byte", 0x20, &[0xff, 0x1f]),
        ("s_clusters_per_group", 0x24, &[0, 0x10]),
        ("s_inodes_per_group", 0x28, &[0; 4]),
        ("s_magic", 0x38, &[0]),
        ("s_inode_size, small", 0x58, &[64, 0]),
        ("s_inode_size, no power", 0x58, &[0x80, 1]),
        ("s_inode_size, large", 0x58, &[0, 8]),
        ("s_journal_inum", 0xe0, &[0xff; 4]),
        ("s_desc_size, small", 0xfe, &[32, 0]),
        ("s_desc_size, no power", 0xfe, &[65, 0]),
        ("s_desc_size, large", 0xfe, &[0, 8]),
        ("s_blocks_count_hi", 0x150, &[0xff; 4]),
        ("s_checksum_type", 0x175, &[2]),
    ];
    for (name, at, value) in wrong {
        let error = Superblock::parse(&mutated(&good, *at, value)).expect_err(name);
        let expected = if *name == "s_blocks_count_hi" {
            ErrorKind::Unsupported
        } else {
            ErrorKind::Corrupt
        };
        assert_eq!(error.kind(), expected, "{name}: {error}");
    }
}

#[test]
fn every_byte_of_a_superblock_is_under_its_checksum() {
    let good = Golden::make(&RECIPES[0]).superblock_bytes();
    for at in 0..SUPERBLOCK_SIZE {
        let mut bytes = good;
        bytes[at] ^= 0x01;
        // Clearing the feature itself would switch the checksum off.
        let error = Superblock::parse(&bytes).expect_err("checksummed");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {at:#x}");
    }
}

#[test]
fn features_that_a_view_cannot_keep_apart_are_refused_by_name() {
    for (arguments, name) in [
        (&["-t", "ext4", "-O", "bigalloc"][..], "bigalloc"),
        (&["-t", "ext4", "-O", "quota"], "quota"),
        (&["-t", "ext4", "-O", "quota,project"], "quota"),
        (&["-t", "ext4", "-O", "journal_dev"], "journal_dev"),
    ] {
        let golden = Golden::make_empty(arguments, "64M");
        let bytes = golden.superblock_bytes();
        let error = Superblock::parse(&bytes).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{name}: {error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    for name in ["mmp", "ea_inode", "fast_commit"] {
        let golden = Golden::make_empty(&["-t", "ext4", "-O", name], "64M");
        Superblock::parse(&golden.superblock_bytes()).expect(name);
    }
    let good = Golden::make(&RECIPES[0]).superblock_bytes();
    let error = Superblock::parse(&mutated(&good, 0xe0, &[0; 4])).unwrap_err();
    assert!(error.to_string().contains("external journal"), "{error}");
}

#[test]
fn random_damage_to_a_superblock_never_panics() {
    let good = Golden::make(&RECIPES[9]).superblock_bytes();
    let seed = 0x5eed_0001;
    println!("seed {seed:#x}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..20_000 {
        let mut bytes = good;
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..0x180);
            bytes[at] = random.random();
        }
        superblock::seal(&mut bytes);
        if let Ok(superblock) = Superblock::parse(&bytes) {
            let last = BlockGroup(superblock.group_count - 1);
            assert!(
                superblock.group_of(FsBlock(superblock.group_blocks(last).start)) == Some(last)
            );
            let _ = superblock.descriptor_block(superblock.descriptor_blocks() - 1);
            let _ = superblock.group_head(last);
        }
    }
}
