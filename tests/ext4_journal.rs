//! Journal superblocks and orphan files that mke2fs and the e2fsprogs make: read, and made empty for a VM of its own.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "ext4/golden.rs"]
mod golden;

use std::os::unix::fs::FileExt;

use golden::{Golden, RECIPES, Recipe};
use seethrough::error::ErrorKind;
use seethrough::ext4::inode::Inode;
use seethrough::ext4::jbd2::{self, JOURNAL_SUPERBLOCK_SIZE, JournalSuperblock};
use seethrough::ext4::orphan_file;
use seethrough::units::FsBlock;

/// The journal's superblock, where it lies, and the journal's length in blocks.
fn journal_of(golden: &Golden) -> ([u8; JOURNAL_SUPERBLOCK_SIZE], FsBlock, u32) {
    let extents = golden.extents(golden.superblock().journal_inode.unwrap());
    let start = extents[0].start;
    let bytes = golden.block(start)[..JOURNAL_SUPERBLOCK_SIZE]
        .try_into()
        .unwrap();
    (bytes, start, extents.iter().map(|extent| extent.len).sum())
}

fn with_journal() -> impl Iterator<Item = (&'static Recipe, Golden)> {
    RECIPES
        .iter()
        .map(|recipe| (recipe, Golden::make(recipe)))
        .filter(|(_, golden)| golden.superblock().journal_inode.is_some())
}

/// A golden filesystem whose journal holds a transaction that was never replayed, with checksums of version 3.
fn with_open_journal() -> Golden {
    let golden = Golden::make(&RECIPES[1]);
    golden.debugfs(&["jo -c -v 3", "jw -b 7000 /dev/zero", "jc"]);
    golden
}

#[test]
fn fresh_journals_are_empty_and_clean_already() {
    for (recipe, golden) in with_journal() {
        let (bytes, _, blocks) = journal_of(&golden);
        let journal = JournalSuperblock::parse(&golden.superblock(), blocks, &bytes).unwrap();
        assert_eq!(journal.maxlen, blocks, "{recipe:?}");
        assert!(journal.is_empty(), "{recipe:?}");
        assert_eq!(jbd2::clean(&bytes), bytes, "{recipe:?}");
    }
}

#[test]
fn an_open_journal_becomes_one_that_e2fsck_has_nothing_to_say_about() {
    let golden = with_open_journal();
    let (bytes, start, blocks) = journal_of(&golden);
    let superblock = golden.superblock();
    let journal = JournalSuperblock::parse(&superblock, blocks, &bytes).unwrap();
    assert!(!journal.is_empty());
    assert_eq!(
        journal.feature_incompat & 0x10,
        0x10,
        "checksums of version 3"
    );
    assert!(!superblock.is_clean());

    let clean = jbd2::clean(&bytes);
    let journal = JournalSuperblock::parse(&superblock, blocks, &clean).unwrap();
    assert!(journal.is_empty());
    let block_size = u64::from(superblock.block_size);
    golden
        .file()
        .write_all_at(&clean, start.0 * block_size)
        .unwrap();
    let mut bytes = golden.superblock_bytes();
    seethrough::ext4::volatile::put_clean(&mut bytes);
    golden.file().write_all_at(&bytes, 1024).unwrap();
    assert!(golden.superblock().is_clean());
    golden.assert_clean();
}

#[test]
fn a_journal_superblock_with_one_wrong_field_is_corrupt() {
    let golden = Golden::make(&RECIPES[1]);
    let superblock = golden.superblock();
    let (good, _, blocks) = journal_of(&golden);
    for (name, at, value) in [
        ("h_magic", 0x00, 0),
        ("h_blocktype", 0x04, 1),
        ("s_blocksize", 0x0c, 4096),
        ("s_maxlen", 0x10, blocks + 1),
        ("s_maxlen, none", 0x10, 0),
        ("s_first, none", 0x14, 0),
        ("s_first, behind", 0x14, blocks),
        ("s_start", 0x1c, blocks),
    ] {
        let mut bytes = good;
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        let error = JournalSuperblock::parse(&superblock, blocks, &bytes).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
    }
    let mut bytes = good;
    bytes[0x2b] = 0x40;
    let error = JournalSuperblock::parse(&superblock, blocks, &bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn the_log_of_a_journal_with_fast_commits_ends_before_their_blocks() {
    let golden = Golden::make(&RECIPES[1]);
    let superblock = golden.superblock();
    let (mut bytes, _, blocks) = journal_of(&golden);
    let log_end = |bytes: &[u8; JOURNAL_SUPERBLOCK_SIZE]| {
        let journal = JournalSuperblock::parse(&superblock, blocks, bytes).unwrap();
        journal.log_end
    };
    assert_eq!(log_end(&bytes), blocks);
    bytes[0x2b] = 0x20;
    assert_eq!(
        log_end(&bytes),
        blocks - 256,
        "unless the journal says how many"
    );
    bytes[0x54..0x58].copy_from_slice(&100u32.to_be_bytes());
    assert_eq!(log_end(&bytes), blocks - 100);
}

#[test]
fn every_byte_of_a_checksummed_journal_superblock_is_covered() {
    let golden = with_open_journal();
    let superblock = golden.superblock();
    let (good, _, blocks) = journal_of(&golden);
    for at in 0..JOURNAL_SUPERBLOCK_SIZE {
        let mut bytes = good;
        bytes[at] ^= 0x40;
        let parsed = JournalSuperblock::parse(&superblock, blocks, &bytes);
        assert_eq!(
            parsed.unwrap_err().kind(),
            ErrorKind::Corrupt,
            "byte {at:#x}"
        );
    }
}

#[test]
fn empty_orphan_blocks_are_those_that_mke2fs_writes() {
    let golden = Golden::make(&RECIPES[13]);
    let superblock = golden.superblock();
    let number = superblock.orphan_file_inode.unwrap();
    let generation = Inode::parse(&golden.inode(number)).generation;
    for extent in golden.extents(number) {
        for block in (extent.start.0..)
            .take(usize::try_from(extent.len).unwrap())
            .map(FsBlock)
        {
            let stored = golden.block(block);
            assert!(orphan_file::is_empty(&stored).unwrap());
            let mut empty = vec![0xaa; stored.len()];
            orphan_file::put_empty(&superblock.checksums, number, generation, block, &mut empty);
            assert!(empty == stored, "block {block}");
            empty[8] = 12;
            assert!(!orphan_file::is_empty(&empty).unwrap());
        }
    }
    let error = orphan_file::is_empty(&[0; 1024]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(orphan_file::is_empty(&[]).is_err());
}
