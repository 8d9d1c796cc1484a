//! Filesystems made on the fly by mke2fs, in sparse temporary files.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::process::Command;
use std::sync::OnceLock;

use seethrough::ext4::bitmap;
use seethrough::ext4::extent::{Extent, FileMap};
use seethrough::ext4::group_descriptor::GroupDescriptor;
use seethrough::ext4::inode::Inode;
use seethrough::ext4::layout::{InternalFiles, Layout};
use seethrough::ext4::superblock::{SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock};
use seethrough::units::{BlockGroup, FsBlock, InodeNumber};
use tempfile::{NamedTempFile, TempDir};

/// Arguments for mke2fs, and the filesystem's size as it takes it.
#[derive(Debug)]
pub(crate) struct Recipe {
    pub(crate) arguments: &'static [&'static str],
    pub(crate) size: &'static str,
}

macro_rules! recipe {
    ($size:literal $(, $argument:literal)*) => {
        Recipe { arguments: &[$($argument),*], size: $size }
    };
}

/// The features that matter, and their combinations.
pub(crate) const RECIPES: &[Recipe] = &[
    recipe!("1G", "-t", "ext4", "-b", "4096"),
    recipe!("100M", "-t", "ext4", "-b", "1024"),
    recipe!("100M", "-t", "ext4", "-b", "2048", "-g", "4096"),
    recipe!(
        "300M",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-O",
        "^has_journal,^flex_bg,^metadata_csum,^64bit"
    ),
    recipe!(
        "100M",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-O",
        "^has_journal,^flex_bg,^metadata_csum,^64bit,^resize_inode"
    ),
    recipe!(
        "100M",
        "-t",
        "ext4",
        "-b",
        "2048",
        "-O",
        "^has_journal,^flex_bg,^metadata_csum"
    ),
    recipe!(
        "100M",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-O",
        "^metadata_csum,uninit_bg"
    ),
    recipe!(
        "100M",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-O",
        "^metadata_csum,uninit_bg,^64bit"
    ),
    recipe!("100M", "-t", "ext4", "-b", "1024", "-O", "^64bit"),
    recipe!(
        "100M",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-g",
        "1024",
        "-O",
        "meta_bg,^resize_inode"
    ),
    recipe!("100M", "-t", "ext4", "-b", "1024", "-O", "sparse_super2"),
    recipe!(
        "100M",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-O",
        "^sparse_super,^resize_inode"
    ),
    recipe!("100M", "-t", "ext4", "-b", "1024", "-G", "4"),
    recipe!(
        "100M",
        "-t",
        "ext4",
        "-b",
        "1024",
        "-O",
        "metadata_csum_seed,orphan_file"
    ),
    recipe!("100M", "-t", "ext4", "-b", "1024", "-O", "inline_data"),
    recipe!("100M", "-t", "ext4", "-b", "1024", "-I", "128"),
    recipe!(
        "100M", "-t", "ext4", "-b", "4096", "-I", "1024", "-N", "1000"
    ),
    recipe!("100M", "-t", "ext3", "-b", "1024"),
    recipe!("100M", "-t", "ext2", "-b", "1024"),
];

/// One filesystem in a file.
pub(crate) struct Golden {
    file: NamedTempFile,
}

/// What every golden filesystem is filled with: made once.
fn contents() -> &'static TempDir {
    static CONTENTS: OnceLock<TempDir> = OnceLock::new();
    CONTENTS.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        let path = dir.path();
        fs::create_dir_all(path.join("usr/share/doc")).unwrap();
        for number in 0..40 {
            let text = format!("file {number}\n").repeat(1 + number * number);
            fs::write(path.join(format!("usr/share/doc/file-{number}")), text).unwrap();
        }
        symlink("usr/share/doc/file-1", path.join("link")).unwrap();
        symlink("x".repeat(100), path.join("long-link")).unwrap();
        dir
    })
}

impl Golden {
    /// Makes the filesystem of `recipe`, with some files in it.
    pub(crate) fn make(recipe: &Recipe) -> Self {
        let directory = contents().path().to_str().unwrap();
        let arguments: Vec<&str> = ["-d", directory]
            .into_iter()
            .chain(recipe.arguments.iter().copied())
            .collect();
        Self::make_empty(&arguments, recipe.size)
    }

    /// Makes a filesystem of `size` with mke2fs's `arguments`.
    pub(crate) fn make_empty(arguments: &[&str], size: &str) -> Self {
        let file = NamedTempFile::new().unwrap();
        let made = Command::new("mke2fs")
            .args(["-q", "-F"])
            .args(arguments)
            .arg(file.path())
            .arg(size)
            .output()
            .expect("mke2fs is installed");
        let complaint = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(made.status.success(), "{arguments:?}: {complaint}");
        Self { file }
    }

    /// What an e2fsprogs tool prints about the filesystem.
    pub(crate) fn tool(&self, program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program)
            .args(arguments)
            .arg(self.file.path())
            .env("LC_ALL", "C")
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs debugfs's `requests` on the filesystem, for writing.
    pub(crate) fn debugfs(&self, requests: &[&str]) {
        let mut script = NamedTempFile::new().unwrap();
        writeln!(script, "{}", requests.join("\n")).unwrap();
        let output = Command::new("debugfs")
            .args(["-w", "-f"])
            .arg(script.path())
            .arg(self.file.path())
            .output()
            .expect("debugfs is installed");
        assert!(output.status.success(), "{requests:?}");
    }

    /// Lets e2fsck repair the filesystem and build indices of its directories.
    pub(crate) fn optimise_directories(&self) {
        let status = Command::new("e2fsck")
            .args(["-f", "-y", "-D"])
            .arg(self.file.path())
            .output()
            .expect("e2fsck is installed")
            .status;
        assert!(status.code().is_some_and(|code| code <= 1), "{status}");
    }

    /// Fails if e2fsck has anything to say about the filesystem.
    pub(crate) fn assert_clean(&self) {
        let output = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(self.file.path())
            .env("LC_ALL", "C")
            .output()
            .expect("e2fsck is installed");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// The file that holds the filesystem.
    pub(crate) fn file(&self) -> &File {
        self.file.as_file()
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub(crate) fn superblock_bytes(&self) -> [u8; SUPERBLOCK_SIZE] {
        self.read(SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE)
            .try_into()
            .unwrap()
    }

    pub(crate) fn superblock(&self) -> Superblock {
        Superblock::parse(&self.superblock_bytes()).unwrap()
    }

    pub(crate) fn block(&self, block: FsBlock) -> Vec<u8> {
        let size = self.superblock().block_size;
        self.read(block.0 * u64::from(size), usize::try_from(size).unwrap())
    }

    /// The bytes of the descriptor of `group`.
    pub(crate) fn descriptor(&self, group: BlockGroup) -> Vec<u8> {
        let superblock = self.superblock();
        let per_block = superblock.descriptors_per_block();
        let block = superblock.descriptor_block(group.0 / per_block);
        let size = usize::from(superblock.descriptor_size);
        let within = u64::from(group.0 % per_block) * u64::from(superblock.descriptor_size);
        self.read(block.0 * u64::from(superblock.block_size) + within, size)
    }

    /// The bytes of an inode.
    pub(crate) fn inode(&self, number: InodeNumber) -> Vec<u8> {
        let superblock = self.superblock();
        let (group, index) = superblock.locate_inode(number).unwrap();
        let table = GroupDescriptor::parse(&self.descriptor(group))
            .locations
            .inode_table;
        let at = table.0 * u64::from(superblock.block_size)
            + u64::from(index) * u64::from(superblock.inode_size);
        self.read(at, usize::from(superblock.inode_size))
    }

    /// The inodes that the bitmaps say are in use and that hold something.
    pub(crate) fn inodes_in_use(&self) -> Vec<InodeNumber> {
        let superblock = self.superblock();
        let mut found = Vec::new();
        for group in superblock.groups() {
            let descriptor = GroupDescriptor::parse(&self.descriptor(group));
            if descriptor.inode_bitmap_is_uninitialised(&superblock.checksums) {
                continue;
            }
            let bytes = self.block(descriptor.locations.inode_bitmap);
            found.extend(
                (0..superblock.inodes_per_group)
                    .filter(|index| bitmap::is_set(&bytes, *index))
                    .map(|index| superblock.inode_number(group, index)),
            );
        }
        found
    }

    /// The descriptor table, whole blocks.
    pub(crate) fn table(&self) -> Vec<u8> {
        let superblock = self.superblock();
        (0..superblock.descriptor_blocks())
            .flat_map(|index| self.block(superblock.descriptor_block(index)))
            .collect()
    }

    /// Where the blocks of a file are.
    pub(crate) fn extents(&self, number: InodeNumber) -> Vec<Extent> {
        let superblock = self.superblock();
        let inode = Inode::parse(&self.inode(number));
        let mut map = FileMap::new(&superblock, number, &inode).unwrap();
        while let Some(block) = map.next_block() {
            map.supply(&self.block(block)).unwrap();
        }
        map.finish()
    }

    pub(crate) fn layout(&self) -> Layout {
        let superblock = self.superblock();
        let extents = |number: Option<InodeNumber>| number.map_or(Vec::new(), |n| self.extents(n));
        let files = InternalFiles {
            journal: &extents(superblock.journal_inode),
            orphan_file: &extents(superblock.orphan_file_inode),
            mmp: None,
        };
        Layout::new(&superblock, &self.table(), files).unwrap()
    }
}
