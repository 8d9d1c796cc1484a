//! Changing filesystems that mke2fs made: a directory for a region is created in groups of its own, over all features,
//! and e2fsck finds nothing to say.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "ext4/golden.rs"]
mod golden;

use std::os::unix::fs::FileExt;

use golden::{Golden, RECIPES};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::error::ErrorKind;
use seethrough::ext4::directory::{self, Added, Name, Owner};
use seethrough::ext4::dirhash::{HashVersion, dirhash};
use seethrough::ext4::group::{Group, GroupBytes, InUse, InodeUse};
use seethrough::ext4::htree::Descent;
use seethrough::ext4::inode::{self, FileType, INDEX_FL, INLINE_DATA_FL, Inode};
use seethrough::ext4::layout::Layout;
use seethrough::ext4::new_directory::{self, NewDirectory, Timestamp};
use seethrough::ext4::superblock::Superblock;
use seethrough::ext4::volatile::{self, FreeCounts};
use seethrough::units::{BlockGroup, FsBlock, InodeNumber};

const NOW: Timestamp = Timestamp {
    seconds: 1_700_000_000,
    nanoseconds: 123_456_789,
};

fn group_bytes(golden: &Golden, group: BlockGroup) -> GroupBytes {
    let locations = golden.layout().locations(group).unwrap();
    GroupBytes {
        descriptor: golden.descriptor(group),
        block_bitmap: golden.block(locations.block_bitmap),
        inode_bitmap: golden.block(locations.inode_bitmap),
    }
}

fn write_block(golden: &Golden, block: FsBlock, bytes: &[u8]) {
    let size = u64::from(golden.superblock().block_size);
    golden.file().write_all_at(bytes, block.0 * size).unwrap();
}

fn write_group(golden: &Golden, layout: &Layout, group: BlockGroup, bytes: &GroupBytes) {
    let superblock = golden.superblock();
    let locations = layout.locations(group).unwrap();
    write_block(golden, locations.block_bitmap, &bytes.block_bitmap);
    write_block(golden, locations.inode_bitmap, &bytes.inode_bitmap);
    let per_block = superblock.descriptors_per_block();
    let table = superblock.descriptor_block(group.0 / per_block);
    let mut block = golden.block(table);
    let size = usize::from(superblock.descriptor_size);
    let at = usize::try_from(group.0 % per_block).unwrap() * size;
    block[at..at + size].copy_from_slice(&bytes.descriptor);
    write_block(golden, table, &block);
}

fn write_inode(golden: &Golden, layout: &Layout, number: InodeNumber, record: &[u8], fresh: bool) {
    let superblock = golden.superblock();
    let (group, index) = superblock.locate_inode(number).unwrap();
    let per_block = superblock.inodes_per_block();
    let block =
        FsBlock(layout.locations(group).unwrap().inode_table.0 + u64::from(index / per_block));
    let mut bytes = golden.block(block);
    if fresh {
        bytes.fill(0);
    }
    let at = usize::try_from(index % per_block).unwrap() * record.len();
    bytes[at..at + record.len()].copy_from_slice(record);
    write_block(golden, block, &bytes);
}

/// The last group that holds nothing of anyone; if there is none, the last one with room.
fn roomy_group(golden: &Golden, superblock: &Superblock, layout: &Layout) -> BlockGroup {
    let parsed =
        |number| Group::new(superblock, layout, number, group_bytes(golden, number)).unwrap();
    let last = |fits: &dyn Fn(&Group<'_>) -> bool| {
        let numbers: Vec<BlockGroup> = superblock.groups().collect();
        numbers
            .into_iter()
            .rev()
            .find(|number| fits(&parsed(*number)))
    };
    last(&|group| group.first_in_use().is_none())
        .or_else(|| last(&|group| group.free().blocks > 0 && group.free().inodes > 0))
        .unwrap()
}

/// Adds an entry for `child` to the directory `owner`.
fn link(
    golden: &Golden,
    superblock: &Superblock,
    parent: InodeNumber,
    name: &[u8],
    child: InodeNumber,
) {
    let record = Inode::parse(&golden.inode(parent));
    let owner = Owner {
        inode: parent,
        generation: record.generation,
    };
    let name = Name::new(name).unwrap();
    let blocks: Vec<FsBlock> = golden
        .extents(parent)
        .iter()
        .flat_map(|extent| (extent.start.0..extent.start.0 + u64::from(extent.len)).map(FsBlock))
        .collect();
    for block in &blocks {
        assert_eq!(directory::find(&golden.block(*block), name).unwrap(), None);
    }
    let candidates = if record.flags & INDEX_FL == 0 {
        blocks
    } else {
        let count = u32::try_from(blocks.len()).unwrap();
        let mut descent = Descent::new(superblock, owner, count, name);
        while let Some(next) = descent.next_block() {
            descent
                .supply(&golden.block(blocks[usize::try_from(next).unwrap()]))
                .unwrap();
        }
        vec![blocks[usize::try_from(descent.leaf().unwrap()).unwrap()]]
    };
    for block in candidates {
        let mut bytes = golden.block(block);
        let added = directory::add(
            superblock,
            owner,
            &mut bytes,
            name,
            child,
            FileType::Directory,
        )
        .unwrap();
        if added == Added::Yes {
            assert_eq!(directory::find(&bytes, name).unwrap(), Some(child));
            directory::verify(superblock, owner, &bytes).unwrap();
            write_block(golden, block, &bytes);
            return;
        }
        assert_eq!(bytes, golden.block(block), "unchanged");
    }
    panic!("no room in directory inode {parent}");
}

/// Creates the directory `name` in `parent`, its inode and block in a group that holds nothing else.
fn create(golden: &Golden, parent: InodeNumber, name: &[u8]) -> (BlockGroup, InodeNumber, FsBlock) {
    let superblock = golden.superblock();
    let layout = golden.layout();
    let number = roomy_group(golden, &superblock, &layout);
    let mut group = Group::new(&superblock, &layout, number, group_bytes(golden, number)).unwrap();
    let inode = group.allocate_inode(InodeUse::Directory).unwrap();
    let block = group.allocate_block().unwrap();
    let fresh = !group.has_neighbour_in_table(inode);
    assert!(fresh || group.first_in_use().is_some());
    write_group(golden, &layout, number, &group.into_bytes());

    let new = NewDirectory {
        inode,
        block,
        permissions: 0o755,
        generation: 0x1234_5678,
        time: NOW,
    };
    let record = new_directory::inode_record(&superblock, &new).unwrap();
    write_inode(golden, &layout, inode, &record, fresh);
    let mut first = vec![0xaa; usize::try_from(superblock.block_size).unwrap()];
    let owner = Owner {
        inode,
        generation: new.generation,
    };
    directory::put_new(&superblock, owner, parent, &mut first);
    write_block(golden, block, &first);

    link(golden, &superblock, parent, name, inode);
    let mut record = golden.inode(parent);
    new_directory::add_subdirectory(&superblock, parent, &mut record, NOW).unwrap();
    write_inode(golden, &layout, parent, &record, false);

    let mut bytes = golden.superblock_bytes();
    let free = FreeCounts {
        blocks: superblock.free_blocks_count - 1,
        inodes: superblock.free_inodes_count - 1,
    };
    volatile::put_free(&mut bytes, free);
    golden.file().write_all_at(&bytes, 1024).unwrap();
    (number, inode, block)
}

#[test]
fn a_regions_directory_is_sound_over_all_features() {
    let mut unused = 0;
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let root = Inode::parse(&golden.inode(inode::ROOT));
        if root.flags & INLINE_DATA_FL != 0 {
            continue;
        }
        let (group, inode, block) = create(&golden, inode::ROOT, b"local");
        assert_eq!(superblock.group_of(block), Some(group), "{recipe:?}");
        assert_eq!(
            superblock.locate_inode(inode).unwrap().0,
            group,
            "{recipe:?}"
        );
        golden.assert_clean();
        let stat = golden.tool("debugfs", &["-R", "stat /local"]);
        for text in [
            format!("Inode: {inode} "),
            "directory".to_owned(),
            "0755".to_owned(),
            "Links: 2".to_owned(),
        ] {
            assert!(stat.contains(&text), "{recipe:?}: {text} in {stat}");
        }
        assert!(
            stat.contains("0x6553f100"),
            "{recipe:?}: the time in {stat}"
        );
        let layout = golden.layout();
        let taken = Group::new(&superblock, &layout, group, group_bytes(&golden, group)).unwrap();
        assert!(taken.first_in_use().is_some(), "{recipe:?}");
        unused += usize::from(taken.first_in_use() == Some(InUse::Block(block)));
    }
    assert!(
        unused > 10,
        "most had a group for nothing but the directory"
    );
}

#[test]
fn a_group_with_one_block_in_use_has_a_bitmap_that_was_written() {
    let golden = Golden::make(&RECIPES[1]);
    let superblock = golden.superblock();
    let layout = golden.layout();
    let is_unwritten = |group: &BlockGroup| golden.descriptor(*group)[0x12] & 0x2 != 0;
    let number = superblock.groups().find(is_unwritten).unwrap();
    let mut group = Group::new(&superblock, &layout, number, group_bytes(&golden, number)).unwrap();
    let block = group.allocate_block().unwrap();
    let bytes = group.into_bytes();
    assert_eq!(bytes.descriptor[0x12] & 0x2, 0);
    let group = Group::new(&superblock, &layout, number, bytes).unwrap();
    assert_eq!(group.first_in_use(), Some(InUse::Block(block)));
}

#[test]
fn inodes_share_their_block_of_the_table_with_those_in_use() {
    let golden = Golden::make(&RECIPES[1]);
    let superblock = golden.superblock();
    let layout = golden.layout();
    let number = roomy_group(&golden, &superblock, &layout);
    let mut group = Group::new(&superblock, &layout, number, group_bytes(&golden, number)).unwrap();
    let per_block = superblock.inodes_per_block();
    let first = group.allocate_inode(InodeUse::Directory).unwrap();
    assert!(!group.has_neighbour_in_table(first));
    for offset in 1..per_block {
        assert!(group.has_neighbour_in_table(InodeNumber(first.0 + offset)));
    }
    assert!(!group.has_neighbour_in_table(InodeNumber(first.0 + per_block)));
    assert_eq!(group.first_in_use(), Some(InUse::Inode(first)));
}

#[test]
fn groups_come_back_as_they_were() {
    for recipe in RECIPES {
        let golden = Golden::make(recipe);
        let superblock = golden.superblock();
        let layout = golden.layout();
        for group in superblock.groups() {
            let before = group_bytes(&golden, group);
            let parsed = Group::new(&superblock, &layout, group, before.clone()).unwrap();
            let after = parsed.into_bytes();
            assert_eq!(
                after.descriptor, before.descriptor,
                "{recipe:?}, group {group}"
            );
            write_group(&golden, &layout, group, &after);
        }
        golden.assert_clean();
    }
}

#[test]
fn a_filled_group_has_no_more_to_give() {
    let golden = Golden::make(&RECIPES[1]);
    let superblock = golden.superblock();
    let layout = golden.layout();
    let number = roomy_group(&golden, &superblock, &layout);
    let mut group = Group::new(&superblock, &layout, number, group_bytes(&golden, number)).unwrap();
    let free = group.free();
    for _ in 0..free.blocks {
        group.allocate_block().unwrap();
    }
    assert_eq!(group.allocate_block(), None);
    for _ in 0..free.inodes {
        group.allocate_inode(InodeUse::Other).unwrap();
    }
    assert_eq!(group.allocate_inode(InodeUse::Other), None);
    assert_eq!(group.free(), FreeCounts::default());
    let bytes = group.into_bytes();
    assert!(bytes.block_bitmap.iter().all(|byte| *byte == 0xff));
    Group::new(&superblock, &layout, number, bytes).unwrap();
}

#[test]
fn reserved_inodes_are_not_given_out() {
    let golden = Golden::make_empty(&["-t", "ext4", "-b", "1024"], "64M");
    let superblock = golden.superblock();
    let layout = golden.layout();
    let mut group = Group::new(
        &superblock,
        &layout,
        BlockGroup(0),
        group_bytes(&golden, BlockGroup(0)),
    )
    .unwrap();
    assert!(group.allocate_inode(InodeUse::Other).unwrap() > superblock.first_inode);
}

#[test]
fn a_group_that_contradicts_itself_is_corrupt() {
    let golden = Golden::make(&RECIPES[4]);
    let superblock = golden.superblock();
    let layout = golden.layout();
    let good = group_bytes(&golden, BlockGroup(1));
    let parse = |bytes: GroupBytes| Group::new(&superblock, &layout, BlockGroup(1), bytes);
    parse(good.clone()).unwrap();
    let mut freed = good.clone();
    freed.block_bitmap[0] &= !1;
    assert_eq!(parse(freed).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut miscounted = good.clone();
    miscounted.descriptor[0x0c] ^= 1;
    assert_eq!(parse(miscounted).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut miscounted = good.clone();
    miscounted.descriptor[0x0e] ^= 1;
    assert_eq!(parse(miscounted).unwrap_err().kind(), ErrorKind::Corrupt);
    let mut short = good;
    short.inode_bitmap.pop();
    assert_eq!(parse(short).unwrap_err().kind(), ErrorKind::OutOfBounds);

    let golden = Golden::make(&RECIPES[1]);
    let superblock = golden.superblock();
    let layout = golden.layout();
    for inode_bitmap in [false, true] {
        let mut bytes = group_bytes(&golden, BlockGroup(0));
        let bitmap = if inode_bitmap {
            &mut bytes.inode_bitmap
        } else {
            &mut bytes.block_bitmap
        };
        bitmap[2] ^= 1;
        let error = Group::new(&superblock, &layout, BlockGroup(0), bytes).unwrap_err();
        assert!(error.to_string().contains("checksum"), "{error}");
    }
}

/// A golden filesystem whose directory /many has an index, and that directory's inode.
fn with_index(arguments: &[&str], hash: &str, s_flags: u32, names: u32) -> (Golden, InodeNumber) {
    let golden = Golden::make_empty(arguments, "100M");
    let mut requests = vec![
        format!("set_super_value flags {s_flags}"),
        format!("set_super_value def_hash_version {hash}"),
        "mkdir /many".to_owned(),
        "cd /many".to_owned(),
    ];
    requests.extend((0..names).map(|number| format!("symlink a-rather-long-name-{number:05} x")));
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    golden.debugfs(&requests);
    // Fills in what debugfs leaves out, and builds the index.
    golden.optimise_directories();
    let number = golden
        .inodes_in_use()
        .into_iter()
        .find(|number| {
            number.0 > 11 && Inode::parse(&golden.inode(*number)).file_type() == FileType::Directory
        })
        .unwrap();
    assert_ne!(
        Inode::parse(&golden.inode(number)).flags & INDEX_FL,
        0,
        "{arguments:?}"
    );
    (golden, number)
}

#[test]
fn names_go_into_the_leaf_that_their_hash_asks_for() {
    const SIGNED: u32 = 1;
    const UNSIGNED: u32 = 2;
    for (arguments, hash, s_flags, names) in [
        (
            &["-t", "ext4", "-b", "1024", "-N", "8000"][..],
            "half_md4",
            SIGNED,
            300,
        ),
        (
            &["-t", "ext4", "-b", "1024", "-N", "8000"],
            "half_md4",
            UNSIGNED,
            6000,
        ),
        (
            &["-t", "ext4", "-b", "2048", "-O", "^metadata_csum"],
            "tea",
            UNSIGNED,
            300,
        ),
        (&["-t", "ext3", "-b", "1024"], "legacy", UNSIGNED, 300),
    ] {
        let (golden, many) = with_index(arguments, hash, s_flags, names);
        // The room is what an index leaves in its leaves: a few names have to fit.
        for number in 0..5 {
            create(&golden, many, format!("\u{e4}{number}\u{f6}").as_bytes());
            golden.assert_clean();
        }
    }
}

#[test]
fn hashes_are_those_that_debugfs_prints() {
    let golden = Golden::make_empty(&["-t", "ext4", "-b", "1024"], "64M");
    let superblock = golden.superblock();
    let text = golden.tool("dumpe2fs", &["-h"]);
    let line = text
        .lines()
        .find(|line| line.starts_with("Directory Hash Seed"))
        .unwrap();
    let seed = line.split_whitespace().last().unwrap();
    let names = [
        "a",
        "local",
        "a name of more than thirty-two bytes, to take two rounds",
        "\u{e4}\u{f6}\u{fc}",
    ];
    for (code, algorithm) in [(0, "legacy"), (1, "half_md4"), (2, "tea")] {
        for name in names {
            let request = format!("dx_hash -h {algorithm} -s {seed} \"{name}\"");
            let printed = golden.tool("debugfs", &["-R", &request]);
            let theirs = printed
                .split("0x")
                .nth(1)
                .unwrap()
                .split_whitespace()
                .next()
                .unwrap();
            let theirs = u32::from_str_radix(theirs, 16).unwrap();
            let version = HashVersion::new(code, 0).unwrap();
            let ours = dirhash(version, &superblock.hash_seed, name.as_bytes());
            assert_eq!(ours, theirs, "{algorithm} of {name}: {printed}");
        }
    }
    assert_eq!(
        HashVersion::new(6, 0).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
}

#[test]
fn names_that_no_file_can_have_are_refused() {
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert_eq!(
            Name::new(name).unwrap_err().kind(),
            ErrorKind::InvalidConfig
        );
    }
    Name::new(&[b'x'; 255]).unwrap();
    Name::new(b"...").unwrap();
}

#[test]
fn a_full_block_takes_no_more_and_a_damaged_one_nothing() {
    let golden = Golden::make(&RECIPES[1]);
    let superblock = golden.superblock();
    let owner = Owner {
        inode: InodeNumber(100),
        generation: 7,
    };
    let mut block = vec![0; 1024];
    directory::put_new(&superblock, owner, inode::ROOT, &mut block);
    let mut count = 0;
    loop {
        let name = format!("name-{count}");
        let name = Name::new(name.as_bytes()).unwrap();
        match directory::add(
            &superblock,
            owner,
            &mut block,
            name,
            InodeNumber(50),
            FileType::Regular,
        )
        .unwrap()
        {
            Added::Yes => count += 1,
            Added::NoRoom => break,
        }
    }
    // 1024 less the tail, the dots' 24, and names of 8 + 6 or 7 bytes in 16 each.
    assert_eq!(count, (1024 - 12 - 24) / 16);
    let good = block.clone();
    for at in 0..block.len() {
        block[at] ^= 1;
        let name = Name::new(b"x").unwrap();
        let result = directory::add(
            &superblock,
            owner,
            &mut block,
            name,
            InodeNumber(50),
            FileType::Regular,
        );
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Corrupt, "byte {at}");
        block[at] ^= 1;
        assert_eq!(block, good);
    }
    let stranger = Owner {
        inode: InodeNumber(101),
        ..owner
    };
    assert!(directory::verify(&superblock, stranger, &block).is_err());
}

#[test]
fn random_damage_to_directories_never_panics_and_ends() {
    let (golden, many) = with_index(&["-t", "ext3", "-b", "1024"], "half_md4", 1, 300);
    let superblock = golden.superblock();
    let owner = Owner {
        inode: many,
        generation: 0,
    };
    let start = golden.extents(many)[0].start;
    let blocks = [golden.block(start), golden.block(FsBlock(start.0 + 1))];
    let seed = 0x5eed_0005;
    println!("seed {seed:#x}");
    let mut random = StdRng::seed_from_u64(seed);
    let name = Name::new(b"a-new-name").unwrap();
    for round in 0..20_000 {
        let mut block = blocks[round % 2].clone();
        for _ in 0..random.random_range(1..6) {
            let at = random.random_range(0..block.len());
            block[at] = random.random();
        }
        let _ = directory::find(&block, name);
        let mut descent = Descent::new(&superblock, owner, 9, name);
        for _ in 0..10 {
            if descent.next_block().is_none() || descent.supply(&block).is_err() {
                break;
            }
        }
        let _ = directory::add(
            &superblock,
            owner,
            &mut block,
            name,
            InodeNumber(20),
            FileType::Directory,
        );
    }
}
