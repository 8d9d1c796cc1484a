//! Extent trees and block maps: deep ones as the e2fsprogs make them, and each rule of a map broken once.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "ext4/golden.rs"]
mod golden;

use std::fs::File;
use std::os::unix::fs::FileExt;

use golden::{Golden, RECIPES};
use seethrough::error::{Error, ErrorKind};
use seethrough::ext4::extent::{Extent, FileMap, MAX_MAP_BLOCKS};
use seethrough::ext4::inode::{EXTENTS_FL, INLINE_DATA_FL, Inode};
use seethrough::ext4::superblock::Superblock;
use seethrough::units::{FsBlock, InodeNumber};
use tempfile::TempDir;

const FILE: InodeNumber = InodeNumber(20);

/// What debugfs prints for `request` on `golden`, as block numbers in order.
fn printed_blocks(golden: &Golden, request: &str) -> Vec<u64> {
    let printed = golden.tool("debugfs", &["-R", request]);
    let mut blocks: Vec<u64> = printed
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    blocks.sort_unstable();
    blocks
}

fn inode_number(golden: &Golden, path: &str) -> InodeNumber {
    let stat = golden.tool("debugfs", &["-R", &format!("stat {path}")]);
    let word = stat.split_whitespace().nth(1).unwrap();
    InodeNumber(word.parse().unwrap())
}

/// A filesystem with a file of 400 blocks, every other one a hole: its extents fill a tree.
fn with_deep_tree(arguments: &[&str]) -> (Golden, InodeNumber) {
    let contents = TempDir::new().unwrap();
    let path = contents.path().join("file");
    std::fs::write(&path, vec![7; 400 * 1024]).unwrap();
    let mut all = vec!["-b", "1024", "-d", contents.path().to_str().unwrap()];
    all.extend(arguments);
    let golden = Golden::make_empty(&all, "64M");
    let punches: Vec<String> = (0..200)
        .map(|hole| format!("punch file {0} {0}", hole * 2 + 1))
        .collect();
    let punches: Vec<&str> = punches.iter().map(String::as_str).collect();
    golden.debugfs(&punches);
    let number = inode_number(&golden, "file");
    (golden, number)
}

#[test]
fn a_deep_extent_tree_is_walked_in_order() {
    for arguments in [&["-t", "ext4"][..], &["-t", "ext4", "-O", "^metadata_csum"]] {
        let (golden, number) = with_deep_tree(arguments);
        let record = Inode::parse(&golden.inode(number));
        assert!(record.block[6] >= 1, "the tree has levels");
        let extents = golden.extents(number);
        assert_eq!(extents.len(), 200);
        for (index, extent) in (0u32..).zip(&extents) {
            assert_eq!(
                (extent.logical, extent.len, extent.written),
                (index * 2, 1, true)
            );
        }
        let theirs = printed_blocks(&golden, "blocks file");
        assert!(
            extents
                .iter()
                .all(|extent| theirs.binary_search(&extent.start.0).is_ok())
        );
        assert!(
            theirs.len() > 200,
            "debugfs lists the tree's own blocks too"
        );
    }
}

#[test]
fn a_changed_node_of_a_tree_is_corrupt_byte_by_byte() {
    let (golden, number) = with_deep_tree(&["-t", "ext4"]);
    let superblock = golden.superblock();
    let record = Inode::parse(&golden.inode(number));
    let mut node = {
        let map = FileMap::new(&superblock, number, &record).unwrap();
        golden.block(map.next_block().unwrap())
    };
    // Behind the checksum there may be bytes that belong to nothing.
    let covered = (1024 - 12) / 12 * 12 + 12 + 4;
    for at in 0..covered {
        node[at] ^= 1;
        let mut map = FileMap::new(&superblock, number, &record).unwrap();
        assert_eq!(
            map.supply(&node).unwrap_err().kind(),
            ErrorKind::Corrupt,
            "byte {at}"
        );
        node[at] ^= 1;
    }
    let mut map = FileMap::new(&superblock, number, &record).unwrap();
    assert_eq!(
        map.supply(&node[1..]).unwrap_err().kind(),
        ErrorKind::OutOfBounds
    );
}

#[test]
fn a_block_map_of_three_levels_is_walked_in_order() {
    let contents = TempDir::new().unwrap();
    let file = File::create(contents.path().join("file")).unwrap();
    // Pointers of each kind, with 256 in a block: direct, one, two and three levels down.
    let written = [0u64, 11, 12, 267, 268, 5000, 65803, 65804, 70000];
    for block in written {
        file.write_all_at(&[9; 1024], block * 1024).unwrap();
    }
    let directory = contents.path().to_str().unwrap();
    let golden = Golden::make_empty(&["-t", "ext2", "-b", "1024", "-d", directory], "64M");
    let number = inode_number(&golden, "file");
    let blocks: Vec<(u64, FsBlock)> = golden
        .extents(number)
        .iter()
        .flat_map(|extent| {
            (0..u64::from(extent.len)).map(move |offset| {
                (
                    u64::from(extent.logical) + offset,
                    FsBlock(extent.start.0 + offset),
                )
            })
        })
        .filter(|(_, block)| golden.block(*block)[0] == 9)
        .collect();
    let logical: Vec<u64> = blocks.iter().map(|(logical, _)| *logical).collect();
    assert!(
        written.iter().all(|block| logical.contains(block)),
        "{logical:?}"
    );
    let theirs = printed_blocks(&golden, "blocks file");
    assert!(
        blocks
            .iter()
            .all(|(_, block)| theirs.binary_search(&block.0).is_ok())
    );
}

/// An entry of an extent tree: three 32-bit words.
type Entry = [u32; 3];

/// A node: magic number, entries in use, room, depth.
fn node(head: [u16; 4], entries: &[Entry], len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend([0; 4]);
    bytes.extend(entries.iter().flatten().flat_map(|word| word.to_le_bytes()));
    bytes.resize(len, 0);
    bytes
}

fn leaf_entry(logical: u32, len: u16, start: u32) -> Entry {
    [logical, u32::from(len), start]
}

fn index_entry(logical: u32, block: u32) -> Entry {
    [logical, block, 0]
}

fn with_root(root: &[u8]) -> Inode {
    Inode {
        mode: 0x81a4,
        links_count: 1,
        size: 1 << 40,
        dtime: 0,
        flags: EXTENTS_FL,
        generation: 0,
        file_acl: 0,
        block: root.try_into().unwrap(),
    }
}

/// A filesystem of 1 KiB blocks without checksums.
fn plain() -> Superblock {
    Golden::make(&RECIPES[4]).superblock()
}

/// Walks the map of `inode`, whose every further block is `below`.
fn walk(superblock: &Superblock, inode: &Inode, below: &[u8]) -> Result<Vec<Extent>, Error> {
    let mut map = FileMap::new(superblock, FILE, inode)?;
    while map.next_block().is_some() {
        map.supply(below)?;
    }
    Ok(map.finish())
}

#[test]
fn each_broken_rule_of_a_tree_is_corrupt() {
    const MAGIC: u16 = 0xf30a;
    let superblock = plain();
    let end = u32::try_from(superblock.blocks_count).unwrap();
    let good_leaf = node([MAGIC, 1, 84, 0], &[leaf_entry(10, 5, 500)], 1024);
    let root = |head, entries: &[Entry]| with_root(&node(head, entries, 60));
    let one_level = root([MAGIC, 1, 4, 1], &[index_entry(10, 400)]);
    let found = walk(&superblock, &one_level, &good_leaf).unwrap();
    let expected = Extent {
        logical: 10,
        start: FsBlock(500),
        len: 5,
        written: true,
    };
    assert_eq!(found, [expected]);

    let leaves = |entries: &[Entry]| {
        let count = u16::try_from(entries.len()).unwrap();
        root([MAGIC, count, 4, 0], entries)
    };
    for (name, inode) in [
        ("magic number", root([0xf30b, 0, 4, 0], &[])),
        ("more entries than room", root([MAGIC, 5, 4, 0], &[])),
        ("more room than bytes", root([MAGIC, 0, 5, 0], &[])),
        ("index without entries", root([MAGIC, 0, 4, 1], &[])),
        (
            "index out of order",
            root(
                [MAGIC, 2, 4, 1],
                &[index_entry(5, 400), index_entry(5, 401)],
            ),
        ),
        (
            "node behind the end",
            root([MAGIC, 1, 4, 1], &[index_entry(0, end)]),
        ),
        (
            "node in the first block",
            root([MAGIC, 1, 4, 1], &[index_entry(0, 1)]),
        ),
        ("node far away", root([MAGIC, 1, 4, 1], &[[0, 400, 0xffff]])),
        ("extent without blocks", leaves(&[leaf_entry(0, 0, 500)])),
        (
            "extent behind the end",
            leaves(&[leaf_entry(0, 2, end - 1)]),
        ),
        ("extent in the first block", leaves(&[leaf_entry(0, 1, 0)])),
        (
            "extents overlap",
            leaves(&[leaf_entry(0, 5, 500), leaf_entry(4, 1, 600)]),
        ),
        (
            "extents out of order",
            leaves(&[leaf_entry(9, 1, 500), leaf_entry(4, 1, 600)]),
        ),
        (
            "extent behind the largest file",
            leaves(&[leaf_entry(u32::MAX, 2, 500)]),
        ),
    ] {
        let error = walk(&superblock, &inode, &good_leaf).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
    }
    for (name, leaf) in [
        (
            "another depth",
            node([MAGIC, 1, 84, 1], &[index_entry(10, 400)], 1024),
        ),
        ("leaf without entries", node([MAGIC, 0, 84, 0], &[], 1024)),
        (
            "more room than bytes",
            node([MAGIC, 1, 85, 0], &[leaf_entry(10, 5, 500)], 1024),
        ),
        (
            "before its index entry",
            node([MAGIC, 1, 84, 0], &[leaf_entry(9, 5, 500)], 1024),
        ),
    ] {
        let error = walk(&superblock, &one_level, &leaf).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
    }
    // The same leaf below two entries: its extents come twice.
    let twice = root(
        [MAGIC, 2, 4, 1],
        &[index_entry(3, 400), index_entry(4, 400)],
    );
    assert_eq!(
        walk(&superblock, &twice, &good_leaf).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}

#[test]
fn a_tree_may_be_five_levels_deep_and_no_deeper() {
    let superblock = plain();
    for (depth, possible) in [(5, true), (6, false)] {
        let root = with_root(&node([0xf30a, 1, 4, depth], &[index_entry(0, 400)], 60));
        assert_eq!(
            FileMap::new(&superblock, FILE, &root).is_ok(),
            possible,
            "{depth}"
        );
    }
}

#[test]
fn unwritten_extents_are_told_apart() {
    let root = node(
        [0xf30a, 2, 4, 0],
        &[leaf_entry(0, 5, 500), leaf_entry(5, 32768 + 7, 505)],
        60,
    );
    let extents = walk(&plain(), &with_root(&root), &[]).unwrap();
    assert_eq!(extents.len(), 2);
    assert_eq!((extents[1].len, extents[1].written), (7, false));
    // 32768 is a length of its own, not an unwritten extent without blocks.
    let root = node([0xf30a, 1, 4, 0], &[leaf_entry(0, 32768, 500)], 60);
    let extents = walk(&plain(), &with_root(&root), &[]).unwrap();
    assert_eq!((extents[0].len, extents[0].written), (32768, true));
}

#[test]
fn a_block_map_that_leads_in_circles_ends() {
    let mut inode = with_root(&[0; 60]);
    inode.flags = 0;
    // The pointer three levels up leads to a block all of whose pointers lead to itself.
    inode.block[56..60].copy_from_slice(&400u32.to_le_bytes());
    let circle: Vec<u8> = std::iter::repeat_n(400u32.to_le_bytes(), 256)
        .flatten()
        .collect();
    let superblock = plain();
    let mut map = FileMap::new(&superblock, FILE, &inode).unwrap();
    let mut reads = 0;
    let error = loop {
        assert!(map.next_block().is_some());
        reads += 1;
        if let Err(error) = map.supply(&circle) {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(reads <= MAX_MAP_BLOCKS + 1);
    // A file as short as its size says is not followed further.
    inode.size = 12 * 1024;
    assert_eq!(walk(&superblock, &inode, &circle).unwrap(), []);
}

#[test]
fn a_block_map_of_empty_blocks_without_end_is_given_up() {
    let mut inode = with_root(&[0; 60]);
    inode.flags = 0;
    inode.block[56..60].copy_from_slice(&400u32.to_le_bytes());
    let pointers: Vec<u8> = std::iter::repeat_n(400u32.to_le_bytes(), 256)
        .flatten()
        .collect();
    let empty = vec![0; 1024];
    let mut map = FileMap::new(&plain(), FILE, &inode).unwrap();
    for read in 0..=MAX_MAP_BLOCKS {
        // One block of the third level; below it blocks of the second, each before its 256 of the first.
        let is_leaf = read > 0 && (read - 1) % 257 > 0;
        let result = map.supply(if is_leaf { &empty } else { &pointers });
        if read < MAX_MAP_BLOCKS {
            result.unwrap();
        } else {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}

#[test]
fn a_block_map_that_leaves_the_filesystem_is_corrupt() {
    let superblock = plain();
    let end = u32::try_from(superblock.blocks_count).unwrap();
    for at in [0, 44, 48, 52, 56] {
        let mut inode = with_root(&[0; 60]);
        inode.flags = 0;
        inode.block[at..at + 4].copy_from_slice(&end.to_le_bytes());
        let error = walk(&superblock, &inode, &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "pointer at {at}: {error}");
    }
    let mut inode = with_root(&[0; 60]);
    inode.flags = 0;
    inode.block[48..52].copy_from_slice(&400u32.to_le_bytes());
    let below: Vec<u8> = std::iter::repeat_n(end.to_le_bytes(), 256)
        .flatten()
        .collect();
    assert_eq!(
        walk(&superblock, &inode, &below).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}

#[test]
fn a_file_in_its_inode_has_no_map() {
    let mut inode = with_root(&[0; 60]);
    inode.flags = INLINE_DATA_FL;
    assert_eq!(
        walk(&plain(), &inode, &[]).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
}
