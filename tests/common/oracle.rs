//! What stock tools say about images and filesystems. Each function fails the test with the tool's own
//! words, or returns what the tool found.

use std::ffi::OsStr;
use std::fs::File;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use super::requirements::find_tool;

/// What `qemu-img check` may find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tolerated {
    Nothing,
    /// Space that is allocated and not used: what a power cut may leave.
    Leaks,
}

/// Runs a tool to its end.
pub fn run<S: AsRef<OsStr>>(tool: &str, arguments: impl IntoIterator<Item = S>) -> Output {
    let path = find_tool(tool).unwrap_or_else(|| panic!("{tool} is not installed"));
    Command::new(path)
        .args(arguments)
        .env("E2FSCK_TIME", an_hour_on())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{tool} does not run: {e}"))
}

/// What e2fsck is to take for the present: the clock of an emulated guest may be ahead of this machine's, and e2fsck
/// complains of times in the future.
fn an_hour_on() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    (now.unwrap_or_default().as_secs() + 3600).to_string()
}

/// Runs a tool that must succeed; its standard output.
pub fn ok<S: AsRef<OsStr>>(tool: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let arguments: Vec<S> = arguments.into_iter().collect();
    let shown: Vec<_> = arguments
        .iter()
        .map(|a| a.as_ref().to_string_lossy().into_owned())
        .collect();
    let output = run(tool, arguments);
    assert!(
        output.status.success(),
        "{tool} {} ended with {}:\n{}",
        shown.join(" "),
        output.status,
        both(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn both(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// `qemu-img check` finds the image consistent.
pub fn qemu_img_check(image: &Path, tolerated: Tolerated) {
    const ONLY_LEAKS: i32 = 3;
    let output = run(
        "qemu-img",
        [
            OsStr::new("check"),
            OsStr::new("-f"),
            OsStr::new("qcow2"),
            image.as_os_str(),
        ],
    );
    let clean = output.status.success()
        || (tolerated == Tolerated::Leaks && output.status.code() == Some(ONLY_LEAKS));
    assert!(
        clean,
        "qemu-img check {}: {}\n{}",
        image.display(),
        output.status,
        both(&output)
    );
}

/// What a VM would read from the image, backing files included, as a raw file.
pub fn to_raw(image: &Path, raw: &Path) {
    let (image, raw) = (image.as_os_str(), raw.as_os_str());
    ok(
        "qemu-img",
        [
            OsStr::new("convert"),
            OsStr::new("-f"),
            OsStr::new("qcow2"),
            OsStr::new("-O"),
            OsStr::new("raw"),
            image,
            raw,
        ],
    );
}

/// Both images read the same.
pub fn images_read_the_same(one: &Path, other: &Path) {
    ok(
        "qemu-img",
        [OsStr::new("compare"), one.as_os_str(), other.as_os_str()],
    );
}

/// The digest of a file's bytes.
pub fn sha256(file: &Path) -> String {
    let text = ok("sha256sum", [file]);
    text.split_whitespace()
        .next()
        .expect("sha256sum prints a digest")
        .to_owned()
}

/// An ext4 filesystem in a raw file.
#[derive(Debug, Clone)]
pub struct Ext4 {
    pub file: PathBuf,
    /// Where it begins, in bytes.
    pub offset: u64,
}

impl Ext4 {
    pub fn at(file: &Path, offset: u64) -> Ext4 {
        Ext4 {
            file: file.to_owned(),
            offset,
        }
    }

    /// As e2fsprogs name it.
    fn name(&self) -> String {
        format!("{}?offset={}", self.file.display(), self.offset)
    }

    /// `e2fsck -fn` has no complaint at all.
    pub fn check_clean(&self) {
        let output = run("e2fsck", ["-fn", &self.name()]);
        let text = both(&output);
        let complaints: Vec<&str> = text.lines().filter(|line| !is_progress(line)).collect();
        assert!(
            output.status.success() && complaints.is_empty(),
            "e2fsck -fn {}: {}\n{text}",
            self.name(),
            output.status
        );
    }

    /// Every complaint of `e2fsck -fn`, for a filesystem that may have some.
    pub fn complaints(&self) -> Vec<String> {
        let text = both(&run("e2fsck", ["-fn", &self.name()]));
        text.lines()
            .filter(|line| !is_progress(line))
            .map(str::to_owned)
            .collect()
    }

    /// What `debugfs` answers to a request.
    pub fn debugfs(&self, request: &str) -> String {
        ok("debugfs", ["-R", request, &self.name()])
    }

    /// The layout, as `dumpe2fs` prints it.
    pub fn layout(&self) -> Layout {
        let text = ok("dumpe2fs", [self.name()]);
        let mut layout = Layout::parse(&text);
        if text.contains("has_journal") {
            layout.journal = ranges_of(self.debugfs("blocks <8>").split_whitespace());
        }
        layout
    }

    /// The bytes of these blocks, one after the other.
    pub fn read_blocks(&self, block_size: u64, blocks: &[RangeInclusive<u64>]) -> Vec<u8> {
        let file = File::open(&self.file).expect("the raw image can be read");
        let mut bytes = Vec::new();
        for range in blocks {
            let start = bytes.len();
            let count = range.end() - range.start() + 1;
            bytes.resize(
                start + usize::try_from(count * block_size).expect("fits memory"),
                0,
            );
            file.read_exact_at(
                &mut bytes[start..],
                self.offset + range.start() * block_size,
            )
            .expect("the blocks lie in the image");
        }
        bytes
    }
}

/// What e2fsck says when all is well.
fn is_progress(line: &str) -> bool {
    line.is_empty()
        || line.starts_with("Pass ")
        || line.starts_with("e2fsck ")
        || line.contains(" files (")
}

/// One block group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub blocks: RangeInclusive<u64>,
    pub block_bitmap: u64,
    pub inode_bitmap: u64,
    pub inode_table: RangeInclusive<u64>,
    pub free_blocks: u64,
    pub free_inodes: u64,
    /// All that dumpe2fs prints of it: counts, flags, checksums, free lists.
    pub text: String,
}

/// A filesystem's layout.
#[derive(Debug, Clone)]
pub struct Layout {
    pub block_size: u64,
    pub groups: Vec<Group>,
    pub inodes_per_group: u64,
    pub descriptor_size: u64,
    /// The superblock, the descriptor table and their reserve, in group 0.
    pub global: RangeInclusive<u64>,
    pub journal: Vec<RangeInclusive<u64>>,
}

impl Layout {
    fn parse(text: &str) -> Layout {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let value = line.unwrap_or_else(|| panic!("dumpe2fs prints {name}"));
            value.trim().parse().expect("a number")
        };
        let (_, groups) = text.split_once("\n\n").expect("dumpe2fs prints groups");
        Layout {
            descriptor_size: if text.contains("Group descriptor size:") {
                field("Group descriptor size:")
            } else {
                32
            },
            block_size: field("Block size:"),
            inodes_per_group: field("Inodes per group:"),
            groups: split_groups(groups)
                .iter()
                .map(|text| parse_group(text))
                .collect(),
            global: field("First block:")..=last_global_block(groups),
            journal: Vec::new(),
        }
    }

    /// The blocks that belong to these groups: their bitmaps and inode tables wherever they lie, and all of
    /// their range that holds no other group's bitmaps or tables.
    pub fn blocks_of(&self, wanted: &[usize]) -> Vec<RangeInclusive<u64>> {
        let mut kept = Vec::new();
        for &index in wanted {
            let group = &self.groups[index];
            kept.push(group.block_bitmap..=group.block_bitmap);
            kept.push(group.inode_bitmap..=group.inode_bitmap);
            kept.push(group.inode_table.clone());
            kept.extend(self.data_blocks_of(index));
        }
        kept
    }

    /// The blocks in a group's range that hold nobody's bitmaps, inode tables, descriptors or journal.
    pub fn data_blocks_of(&self, group: usize) -> Vec<RangeInclusive<u64>> {
        let mut taken: Vec<RangeInclusive<u64>> = vec![self.global.clone()];
        taken.extend(self.journal.iter().cloned());
        for group in &self.groups {
            taken.push(group.block_bitmap..=group.block_bitmap);
            taken.push(group.inode_bitmap..=group.inode_bitmap);
            taken.push(group.inode_table.clone());
        }
        taken.sort_by_key(|range| *range.start());
        let range = &self.groups[group].blocks;
        let (mut at, mut kept) = (*range.start(), Vec::new());
        for hole in taken {
            if hole.end() < &at || hole.start() > range.end() {
                continue;
            }
            if hole.start() > &at {
                kept.push(at..=hole.start() - 1);
            }
            at = hole.end() + 1;
        }
        if at <= *range.end() {
            kept.push(at..=*range.end());
        }
        kept
    }

    /// The first block of the descriptor table, right after the superblock's.
    pub fn first_descriptor_block(&self) -> u64 {
        self.global.start() + 1
    }

    /// The group that an inode belongs to.
    pub fn group_of_inode(&self, inode: u64) -> usize {
        usize::try_from((inode - 1) / self.inodes_per_group).expect("few groups")
    }
}

fn split_groups(text: &str) -> Vec<String> {
    let mut groups: Vec<String> = Vec::new();
    for line in text.lines() {
        if line.starts_with("Group ") {
            groups.push(String::new());
        }
        if let Some(group) = groups.last_mut() {
            group.push_str(line);
            group.push('\n');
        }
    }
    groups
}

fn parse_group(text: &str) -> Group {
    let after = |what: &str| {
        let at = text
            .find(what)
            .unwrap_or_else(|| panic!("dumpe2fs prints {what:?} in:\n{text}"));
        numbers(&text[at + what.len()..])
    };
    let counts = text
        .lines()
        .find(|line| line.contains(" free blocks, "))
        .expect("dumpe2fs prints counts");
    let counts = numbers_in(counts);
    Group {
        blocks: after("(Blocks "),
        block_bitmap: *after("Block bitmap at ").start(),
        inode_bitmap: *after("Inode bitmap at ").start(),
        inode_table: after("Inode table at "),
        free_blocks: counts[0],
        free_inodes: counts[1],
        text: text.to_owned(),
    }
}

/// The last block of group 0's superblock, descriptors and their reserve.
fn last_global_block(groups: &str) -> u64 {
    let group = groups
        .lines()
        .skip_while(|line| !line.starts_with("Group 0:"));
    group
        .take_while(|line| !line.starts_with("Group 1:"))
        .filter_map(|line| {
            let line = line.trim();
            ["Primary superblock at ", "Reserved GDT blocks at "]
                .iter()
                .find_map(|what| line.strip_prefix(what))
        })
        .flat_map(|rest| numbers_in(rest.split(" (+").next().unwrap_or_default()))
        .max()
        .expect("group 0 has a superblock")
}

/// `N` or `N-M` at the beginning of a text.
fn numbers(text: &str) -> RangeInclusive<u64> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '-')
        .unwrap_or(text.len());
    let (first, last) = text[..end]
        .split_once('-')
        .unwrap_or((&text[..end], &text[..end]));
    first.parse().expect("a block number")..=last.parse().expect("a block number")
}

fn numbers_in(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect()
}

/// Numbers in ascending order, as ranges.
fn ranges_of<'a>(numbers: impl Iterator<Item = &'a str>) -> Vec<RangeInclusive<u64>> {
    let mut ranges: Vec<RangeInclusive<u64>> = Vec::new();
    for number in numbers.map(|word| word.parse::<u64>().expect("debugfs prints block numbers")) {
        match ranges.last_mut() {
            Some(last) if *last.end() + 1 == number => *last = *last.start()..=number,
            _ => ranges.push(number..=number),
        }
    }
    ranges
}
