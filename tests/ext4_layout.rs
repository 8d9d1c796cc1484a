//! Where everything is in filesystems that mke2fs makes, against what dumpe2fs and debugfs print; and what becomes of
//! layouts that cannot be.

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
use seethrough::error::{Error, ErrorKind};
use seethrough::ext4::bitmap;
use seethrough::ext4::extent::{Extent, FileMap};
use seethrough::ext4::group_descriptor::{self, GroupDescriptor, Locations};
use seethrough::ext4::inode::Inode;
use seethrough::ext4::layout::{InternalFiles, Kind, Layout};
use seethrough::ext4::records::{RecordKind, Records};
use seethrough::ext4::superblock::{self, Superblock};
use seethrough::units::{BlockGroup, FsBlock, InodeNumber};

/// The block ranges that a line of dumpe2fs names behind `label`, ends included.
fn dumped_range(group: &str, label: &str) -> Option<(u64, u64)> {
    let at = group.find(label)? + label.len();
    let text: String = group[at..]
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == '-')
        .collect();
    let (start, end) = text.split_once('-').unwrap_or((&text, &text));
    Some((start.parse().unwrap(), end.parse().unwrap()))
}

#[test]
fn every_structure_is_where_dumpe2fs_says() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let layout = golden.layout();
        let text = golden.tool("dumpe2fs", &[]);
        let groups = text
            .split("\nGroup ")
            .skip(1)
            .filter(|group| group.starts_with(|first: char| first.is_ascii_digit()));
        for (number, dumped) in (0..).zip(groups) {
            let group = BlockGroup(number);
            let kind_at = |block: u64| layout.classify(FsBlock(block)).unwrap();
            for (label, expected) in [
                ("Block bitmap at ", Kind::BlockBitmap { group }),
                ("Inode bitmap at ", Kind::InodeBitmap { group }),
            ] {
                let (at, _) = dumped_range(dumped, label).unwrap();
                assert_eq!(kind_at(at), (expected, 1), "{recipe:?}");
            }
            let (start, end) = dumped_range(dumped, "Inode table at ").unwrap();
            for (index, block) in (0..).zip(start..=end) {
                let expected = (Kind::InodeTable { group, index }, end - block + 1);
                assert_eq!(kind_at(block), expected, "{recipe:?}");
            }
            if let Some((at, _)) = dumped_range(dumped, "Primary superblock at ") {
                assert_eq!(kind_at(at), (Kind::Superblock, 1), "{recipe:?}");
            }
            if let Some((at, _)) = dumped_range(dumped, "Backup superblock at ") {
                assert_eq!(kind_at(at).0, Kind::Backup { group }, "{recipe:?}");
            }
            for label in [
                "Group descriptors at ",
                "Group descriptor at ",
                "Reserved GDT blocks at ",
            ] {
                let Some((start, end)) = dumped_range(dumped, label) else {
                    continue;
                };
                for block in start..=end {
                    let kind = kind_at(block).0;
                    let fits = match kind {
                        Kind::Backup { group: holder } => holder == group,
                        Kind::ReservedDescriptors => number == 0 && label.starts_with("Reserved"),
                        Kind::Descriptors { index } => {
                            golden.superblock().descriptor_block(index) == FsBlock(block)
                        }
                        _ => false,
                    };
                    assert!(
                        fits,
                        "{recipe:?}: {label}{block} in group {group} is {kind:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn structures_are_in_use_and_make_up_uninitialised_groups() {
    let mut uninitialised = 0;
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let layout = golden.layout();
        for group in superblock.groups() {
            let descriptor = GroupDescriptor::parse(&golden.descriptor(group));
            let blocks = superblock.group_blocks(group);
            let pieces: Vec<_> = layout.pieces(blocks.clone()).collect();
            assert_eq!(
                pieces.iter().map(|piece| piece.2).sum::<u64>(),
                blocks.end - blocks.start
            );
            let structures = pieces
                .iter()
                .filter(|piece| !matches!(piece.0, Kind::Data { .. }));
            if descriptor.block_bitmap_is_uninitialised(&superblock.checksums) {
                let used: u64 = structures.map(|piece| piece.2).sum();
                let free = blocks.end - blocks.start - used;
                assert_eq!(
                    free,
                    u64::from(descriptor.free_blocks_count),
                    "{recipe:?}, group {group}"
                );
                uninitialised += 1;
                continue;
            }
            let bitmap = golden.block(descriptor.locations.block_bitmap);
            for (kind, start, len) in structures {
                for block in start.0..start.0 + len {
                    let index = u32::try_from(block - blocks.start).unwrap();
                    assert!(
                        bitmap::is_set(&bitmap, index),
                        "{recipe:?}: {kind:?} at {block} is free"
                    );
                }
            }
        }
    }
    assert!(uninitialised > 10);
}

#[test]
fn files_are_where_debugfs_says() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let mut checked = 0;
        for number in golden.inodes_in_use() {
            let inode = Inode::parse(&golden.inode(number));
            let mapped = matches!(
                inode.file_type(),
                seethrough::ext4::inode::FileType::Regular
                    | seethrough::ext4::inode::FileType::Directory
            );
            if !mapped
                || inode.flags & seethrough::ext4::inode::INLINE_DATA_FL != 0
                || number.0 == 7
            {
                continue;
            }
            let printed = golden.tool("debugfs", &["-R", &format!("blocks <{number}>")]);
            let mut theirs: Vec<u64> = printed
                .split_whitespace()
                .map(|word| word.parse().unwrap())
                .collect();
            let extents = golden.extents(number);
            let mut ours: Vec<u64> = extents
                .iter()
                .flat_map(|extent| extent.start.0..extent.start.0 + u64::from(extent.len))
                .collect();
            // debugfs lists the blocks of the map too, ours are the file's own.
            let blocks: u64 = inode.size.div_ceil(u64::from(superblock.block_size));
            assert_eq!(
                u64::try_from(ours.len()).unwrap(),
                blocks,
                "{recipe:?}, inode {number}"
            );
            theirs.sort_unstable();
            ours.sort_unstable();
            assert!(
                ours.iter().all(|block| theirs.binary_search(block).is_ok()),
                "inode {number}"
            );
            checked += 1;
        }
        assert!(checked > 3, "{recipe:?}");
    }
}

#[test]
fn journal_and_orphan_file_are_known_for_what_they_are() {
    let golden = Golden::make(&RECIPES[13]);
    let superblock = golden.superblock();
    let layout = golden.layout();
    for (number, is_journal) in [
        (superblock.journal_inode, true),
        (superblock.orphan_file_inode, false),
    ] {
        let extents = golden.extents(number.unwrap());
        assert!(!extents.is_empty());
        for extent in extents {
            for offset in 0..extent.len {
                let block = FsBlock(extent.start.0 + u64::from(offset));
                let index = extent.logical + offset;
                let expected = if is_journal {
                    Kind::Journal { index }
                } else {
                    Kind::OrphanFile { index }
                };
                assert_eq!(layout.classify(block).unwrap().0, expected);
                assert_eq!(layout.data_groups(block, 1), None);
            }
        }
    }
}

#[test]
fn data_ranges_name_their_groups_and_structures_end_them() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let layout = golden.layout();
        let end = superblock.blocks_count;
        let mut at = 0;
        while at < end {
            let (kind, len) = layout.classify(FsBlock(at)).unwrap();
            assert!(len > 0 && at + len <= end);
            match kind {
                Kind::Data { group } => {
                    assert_eq!(superblock.group_of(FsBlock(at)), Some(group));
                    assert_eq!(superblock.group_of(FsBlock(at + len - 1)), Some(group));
                    assert_eq!(layout.data_groups(FsBlock(at), len), Some(group..=group));
                    let next = layout.data_groups(FsBlock(at), len + 1);
                    let next_group = match layout.classify(FsBlock(at + len)) {
                        Some((Kind::Data { group }, _)) => Some(group),
                        _ => None,
                    };
                    assert_eq!(next, next_group.map(|last| group..=last));
                }
                _ => assert_eq!(layout.data_groups(FsBlock(at), len), None),
            }
            at += len;
        }
        assert_eq!(layout.classify(FsBlock(end)), None);
        assert_eq!(layout.data_groups(FsBlock(end - 1), 2), None);
        assert_eq!(layout.data_groups(FsBlock(end), 0), None);
        assert_eq!(layout.data_groups(FsBlock(u64::MAX), u64::MAX), None);
    }
}

#[test]
fn records_cover_every_descriptor_and_inode_once() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let layout = golden.layout();
        let mut descriptors = Vec::new();
        let mut inodes = Vec::new();
        let mut superblocks = 0;
        for block in 0..superblock.blocks_count {
            let (kind, _) = layout.classify(FsBlock(block)).unwrap();
            let Some(records) = Records::of(&superblock, kind) else {
                continue;
            };
            let bytes = golden.block(FsBlock(block));
            for record in records.iter() {
                let bytes = &bytes[record.bytes.clone()];
                match record.kind {
                    RecordKind::Superblock => {
                        assert_eq!(bytes, golden.superblock_bytes());
                        superblocks += 1;
                    }
                    RecordKind::Descriptor => {
                        let group = record.group.unwrap();
                        assert_eq!(bytes, golden.descriptor(group));
                        descriptors.push(group.0);
                    }
                    RecordKind::Inode(number) => {
                        assert_eq!(
                            superblock.locate_inode(number).unwrap().0,
                            record.group.unwrap()
                        );
                        inodes.push(number.0);
                    }
                    RecordKind::BlockBitmap | RecordKind::InodeBitmap => {
                        assert_eq!(bytes.len(), usize::try_from(superblock.block_size).unwrap());
                    }
                }
            }
        }
        assert_eq!(superblocks, 1);
        assert!(
            descriptors.into_iter().eq(0..superblock.group_count),
            "{recipe:?}"
        );
        inodes.sort_unstable();
        assert!(
            inodes.into_iter().eq(1..=superblock.inodes_count),
            "{recipe:?}"
        );
    }
}

#[test]
fn a_part_of_a_block_touches_the_records_it_overlaps() {
    let superblock = Golden::make(&RECIPES[0]).superblock();
    let kind = Kind::InodeTable {
        group: BlockGroup(1),
        index: 2,
    };
    let records = Records::of(&superblock, kind).unwrap();
    assert_eq!(records.len(), 16);
    let touched: Vec<_> = records
        .overlapping(300..513)
        .map(|record| record.bytes)
        .collect();
    assert_eq!(touched, [256..512, 512..768]);
    assert_eq!(records.overlapping(512..512).count(), 0);
    let first = records.get(0).unwrap();
    let number = superblock.inodes_per_group + 2 * 16 + 1;
    assert_eq!(first.kind, RecordKind::Inode(InodeNumber(number)));
    let records = Records::of(&superblock, Kind::Superblock).unwrap();
    assert_eq!(records.overlapping(0..1024).count(), 0);
    assert_eq!(records.overlapping(1000..1025).count(), 1);
    assert_eq!(records.overlapping(2048..4096).count(), 0);
}

/// The layout of `golden` with the structures of group 1 at `locations`, its descriptor sealed again.
fn layout_with(golden: &Golden, locations: Locations) -> Result<Layout, Error> {
    let superblock = golden.superblock();
    let mut table = golden.table();
    let size = usize::from(superblock.descriptor_size);
    let bytes = &mut table[size..2 * size];
    let descriptor = GroupDescriptor {
        locations,
        ..GroupDescriptor::parse(bytes)
    };
    descriptor.write_to(bytes);
    group_descriptor::seal(&superblock.checksums, BlockGroup(1), bytes);
    Layout::new(&superblock, &table, InternalFiles::default())
}

fn locations(golden: &Golden, group: u32) -> Locations {
    GroupDescriptor::parse(&golden.descriptor(BlockGroup(group))).locations
}

#[test]
fn structures_that_overlap_or_leave_the_filesystem_are_corrupt() {
    let golden = Golden::make(&RECIPES[0]);
    let end = golden.superblock().blocks_count;
    let good = locations(&golden, 1);
    let other = locations(&golden, 0);
    layout_with(&golden, good).unwrap();
    let block_bitmap = |block: u64| Locations {
        block_bitmap: FsBlock(block),
        ..good
    };
    let inode_table = |block: u64| Locations {
        inode_table: FsBlock(block),
        ..good
    };
    for (name, locations) in [
        ("on the superblock", block_bitmap(0)),
        ("on the descriptors", block_bitmap(1)),
        ("behind the end", block_bitmap(end)),
        ("partly behind the end", inode_table(end - 1)),
        ("far away", inode_table(u64::MAX)),
        (
            "on another group's bitmap",
            block_bitmap(other.block_bitmap.0),
        ),
        (
            "in another group's table",
            block_bitmap(other.inode_table.0 + 5),
        ),
    ] {
        let error = layout_with(&golden, locations).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
        assert!(error.to_string().contains("group 1"), "{name}: {error}");
    }
    let mut table = golden.table();
    table[3] ^= 1;
    let error = Layout::new(&golden.superblock(), &table, InternalFiles::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let short = &golden.table()[..64];
    let error = Layout::new(&golden.superblock(), short, InternalFiles::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfBounds);
}

#[test]
fn without_flex_bg_structures_stay_in_their_group() {
    let golden = Golden::make(&RECIPES[3]);
    let start = golden.superblock().group_start(BlockGroup(2)).0;
    let good = locations(&golden, 1);
    layout_with(&golden, good).unwrap();
    let outside = Locations {
        block_bitmap: FsBlock(start + 3000),
        ..good
    };
    assert_eq!(
        layout_with(&golden, outside).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}

#[test]
fn internal_files_on_top_of_structures_are_corrupt() {
    let golden = Golden::make(&RECIPES[0]);
    let superblock = golden.superblock();
    let table = golden.table();
    let bitmap = locations(&golden, 0).block_bitmap;
    for (start, len) in [
        (bitmap.0, 1),
        (bitmap.0 - 1, 2),
        (superblock.blocks_count - 1, 2),
        (u64::MAX, 2),
        (9000, 0),
    ] {
        let journal = [Extent {
            logical: 0,
            start: FsBlock(start),
            len,
            written: true,
        }];
        let files = InternalFiles {
            journal: &journal,
            orphan_file: &[],
            mmp: None,
        };
        let error = Layout::new(&superblock, &table, files).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{start} {len}: {error}");
    }
}

#[test]
fn random_damage_to_descriptors_never_panics() {
    let golden = Golden::make(&RECIPES[5]);
    let superblock = golden.superblock();
    let good = golden.table();
    let seed = 0x5eed_0002;
    println!("seed {seed:#x}");
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..3_000 {
        let mut table = good.clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..table.len());
            table[at] = random.random();
        }
        if let Ok(layout) = Layout::new(&superblock, &table, InternalFiles::default()) {
            let blocks: u64 = layout
                .pieces(0..superblock.blocks_count)
                .map(|piece| piece.2)
                .sum();
            assert_eq!(blocks, superblock.blocks_count);
        }
    }
}

#[test]
fn random_damage_to_maps_never_panics_and_ends() {
    let golden = Golden::make(&RECIPES[17]);
    let superblock = golden.superblock();
    let seed = 0x5eed_0003;
    println!("seed {seed:#x}");
    let mut random = StdRng::seed_from_u64(seed);
    for number in [
        superblock.journal_inode.unwrap(),
        InodeNumber(2),
        InodeNumber(50),
    ] {
        let good = golden.inode(number);
        for extents in [false, true] {
            for _ in 0..2_000 {
                let mut bytes = good.clone();
                for _ in 0..random.random_range(1..6) {
                    bytes[random.random_range(0x28..0x64)] = random.random();
                }
                let mut inode = Inode::parse(&bytes);
                if extents {
                    inode.flags |= seethrough::ext4::inode::EXTENTS_FL;
                    inode.block[..4].copy_from_slice(&[0x0a, 0xf3, 1, 0]);
                }
                let Ok(mut map) = FileMap::new(&superblock, number, &inode) else {
                    continue;
                };
                while let Some(block) = map.next_block() {
                    let mut bytes = golden.block(block);
                    if random.random_bool(0.5) {
                        let at = random.random_range(0..bytes.len());
                        bytes[at] = random.random();
                    }
                    if map.supply(&bytes).is_err() {
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn a_filesystem_of_sixteen_terabytes_has_a_layout() {
    let golden = Golden::make_empty(
        &[
            "-t",
            "ext4",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1",
            "-O",
            "^has_journal",
        ],
        "16T",
    );
    let superblock = golden.superblock();
    assert_eq!(superblock.group_count, 131_072);
    let table = golden.table();
    let started = std::time::Instant::now();
    let layout = Layout::new(&superblock, &table, InternalFiles::default()).unwrap();
    println!("read in {:?}", started.elapsed());
    let pieces = layout.pieces(0..superblock.blocks_count);
    assert_eq!(
        pieces.map(|piece| piece.2).sum::<u64>(),
        superblock.blocks_count
    );
}

#[test]
fn more_groups_than_memory_should_hold_are_refused() {
    let golden = Golden::make(&RECIPES[0]);
    let mut bytes = golden.superblock_bytes();
    bytes[0x150..0x154].copy_from_slice(&[0, 0, 1, 0]);
    superblock::seal(&mut bytes);
    assert_eq!(
        Superblock::parse(&bytes).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
}
