//! The filesystems of the matrix.

/// What happens to a filesystem before it is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Nothing,
    /// resize2fs makes it so many MiB large.
    Grown(u64),
    /// Only the first block of its descriptor table stays where it was, as after a kernel has made it larger than its
    /// table had room for.
    HalfMetaBg,
    /// A kernel mounts and writes it.
    Used,
}

/// Whether the row is mounted: some features depend on how the kernel was built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mounted {
    Yes,
    No,
}

/// One way to make a filesystem.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub mke2fs: &'static [&'static str],
    pub(crate) megabytes: u64,
    /// The filesystem's length, if it is shorter than its disk.
    pub(crate) length: Option<&'static str>,
    pub(crate) then: Then,
    /// The size of the child's region.
    pub(crate) region: &'static str,
    pub(crate) mounted: Mounted,
}

const fn row(name: &'static str, mke2fs: &'static [&'static str]) -> Row {
    Row {
        name,
        mke2fs,
        megabytes: 32,
        length: None,
        then: Then::Nothing,
        region: "6M",
        mounted: Mounted::Yes,
    }
}

const fn large(name: &'static str, mke2fs: &'static [&'static str], megabytes: u64) -> Row {
    let mut row = row(name, mke2fs);
    row.megabytes = megabytes;
    row
}

const fn shorter(mut row: Row, length: &'static str) -> Row {
    row.length = Some(length);
    row
}

const fn then(mut row: Row, then: Then) -> Row {
    row.then = then;
    row
}

const fn unmounted(mut row: Row) -> Row {
    row.mounted = Mounted::No;
    row
}

/// Blocks of 1 KiB make groups of 8 MiB; with larger ones `-g` keeps the groups small.
pub(crate) static ROWS: &[Row] = &[
    row(
        "debian 12",
        &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "2048",
            "-J",
            "size=4",
            "-O",
            "^metadata_csum_seed,^orphan_file",
        ],
    ),
    row(
        "fedora and e2fsprogs 1.47",
        &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "2048",
            "-J",
            "size=4",
            "-O",
            "metadata_csum_seed,orphan_file",
        ],
    ),
    row(
        "ubuntu 22.04",
        &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "2048",
            "-J",
            "size=4",
            "-I",
            "256",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1",
        ],
    ),
    row(
        "alpine",
        &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "2048",
            "-J",
            "size=4",
            "-O",
            "^metadata_csum,uninit_bg,^64bit",
        ],
    ),
    row(
        "blocks of 1 KiB",
        &["-t", "ext4", "-b", "1024", "-J", "size=1"],
    ),
    row(
        "blocks of 2 KiB",
        &["-t", "ext4", "-b", "2048", "-g", "4096", "-J", "size=2"],
    ),
    row(
        "no journal",
        &["-t", "ext4", "-b", "1024", "-O", "^has_journal"],
    ),
    row(
        "no checksums",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^metadata_csum,^uninit_bg",
        ],
    ),
    row(
        "gdt_csum, 64bit",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^metadata_csum,uninit_bg,64bit",
        ],
    ),
    row(
        "descriptors of 32 bytes, checksums",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^64bit,metadata_csum",
        ],
    ),
    row(
        "flex_bg of 2",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-G", "2"],
    ),
    row(
        "flex_bg of 4",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-G", "4"],
    ),
    row(
        "flex_bg of 64",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-G", "64"],
    ),
    row(
        "packed metadata",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-E",
            "packed_meta_blocks=1",
        ],
    ),
    row(
        "no flex_bg",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-O", "^flex_bg"],
    ),
    row(
        "no flex_bg, stride",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^flex_bg",
            "-E",
            "stride=16,stripe_width=64",
        ],
    ),
    row(
        "stride",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-E",
            "stride=32,stripe_width=128",
        ],
    ),
    row(
        "no resize_inode",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^resize_inode",
        ],
    ),
    large(
        "meta_bg",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "1024",
            "-J",
            "size=1",
            "-O",
            "meta_bg,^resize_inode",
        ],
        32,
    ),
    large(
        "meta_bg, no flex_bg, short descriptors",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "1024",
            "-J",
            "size=1",
            "-O",
            "meta_bg,^resize_inode,^flex_bg,^64bit",
        ],
        48,
    ),
    row(
        "no sparse_super",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^sparse_super,^resize_inode",
        ],
    ),
    row(
        "sparse_super2",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "sparse_super2,^resize_inode",
        ],
    ),
    row(
        "sparse_super2, one backup",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "sparse_super2,^resize_inode",
            "-E",
            "num_backup_sb=1",
        ],
    ),
    row(
        "sparse_super2, resize_inode",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "sparse_super2,resize_inode",
        ],
    ),
    row(
        "orphan_file of 1 KiB blocks",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "orphan_file",
        ],
    ),
    row(
        "inline_data",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "inline_data",
        ],
    ),
    row(
        "inline_data, inodes of 1024",
        &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "2048",
            "-J",
            "size=4",
            "-I",
            "1024",
            "-O",
            "inline_data",
        ],
    ),
    row(
        "ea_inode",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-O", "ea_inode"],
    ),
    row(
        "large_dir",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "large_dir",
        ],
    ),
    row(
        "encrypt and stable_inodes",
        &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "2048",
            "-J",
            "size=4",
            "-O",
            "encrypt,stable_inodes",
        ],
    ),
    unmounted(row(
        "casefold",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-O", "casefold"],
    )),
    row(
        "verity",
        &[
            "-t", "ext4", "-b", "4096", "-g", "2048", "-J", "size=4", "-O", "verity",
        ],
    ),
    // Kernels without quotas do not mount it.
    unmounted(row(
        "project",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=1",
            "-O",
            "project,^quota",
        ],
    )),
    // A kernel waits ten seconds at each mount.
    unmounted(row(
        "mmp",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-O", "mmp"],
    )),
    row(
        "fast_commit",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-J",
            "size=2",
            "-O",
            "fast_commit",
        ],
    ),
    then(
        row(
            "fast_commit, used",
            &[
                "-t",
                "ext4",
                "-b",
                "1024",
                "-J",
                "size=2",
                "-O",
                "fast_commit",
            ],
        ),
        Then::Used,
    ),
    row("ext2", &["-t", "ext2", "-b", "1024"]),
    row("ext3", &["-t", "ext3", "-b", "1024", "-J", "size=1"]),
    row(
        "inodes of 128 bytes",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-I", "128"],
    ),
    row(
        "inodes of 512 bytes",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-I", "512"],
    ),
    row(
        "inodes of 1024 bytes",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-I", "1024"],
    ),
    row(
        "few inodes",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-i", "65536"],
    ),
    row(
        "many inodes",
        &["-t", "ext4", "-b", "1024", "-J", "size=1", "-i", "1024"],
    ),
    shorter(
        row(
            "shorter than its disk",
            &["-t", "ext4", "-b", "1024", "-J", "size=1"],
        ),
        "30003",
    ),
    then(
        row(
            "journal of a kernel's making",
            &[
                "-t",
                "ext4",
                "-b",
                "1024",
                "-J",
                "size=1",
                "-O",
                "64bit,metadata_csum",
            ],
        ),
        Then::Used,
    ),
    then(
        row(
            "journal checksums v1, 32 bits",
            &[
                "-t",
                "ext4",
                "-b",
                "1024",
                "-J",
                "size=1",
                "-O",
                "^64bit,^metadata_csum",
            ],
        ),
        Then::Used,
    ),
    then(
        row("grown", &["-t", "ext4", "-b", "1024", "-J", "size=1"]),
        Then::Grown(60),
    ),
    then(
        row(
            "grown without flex_bg",
            &["-t", "ext4", "-b", "1024", "-J", "size=1", "-O", "^flex_bg"],
        ),
        Then::Grown(61),
    ),
    then(
        large(
            "meta_bg from the second block on",
            &[
                "-t",
                "ext4",
                "-b",
                "1024",
                "-g",
                "1024",
                "-J",
                "size=1",
                "-O",
                "meta_bg,^resize_inode",
            ],
            32,
        ),
        Then::HalfMetaBg,
    ),
];

/// Filesystems for children with groups behind the end: a block of descriptors is for 16 or 32 groups of 1 MiB.
pub(crate) static GROWN: &[Row] = &[
    row(
        "small groups, resize_inode",
        &["-t", "ext4", "-b", "1024", "-g", "1024", "-J", "size=1"],
    ),
    row(
        "small groups, resize_inode, short descriptors, no checksums",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^64bit,^metadata_csum,^uninit_bg,^flex_bg",
        ],
    ),
    row(
        "small groups, nothing kept for descriptors",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "1024",
            "-J",
            "size=1",
            "-O",
            "^resize_inode,sparse_super2",
        ],
    ),
    row(
        "small groups, resize_inode, sparse_super2, crc16",
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "1024",
            "-J",
            "size=1",
            "-O",
            "sparse_super2,^metadata_csum,uninit_bg",
        ],
    ),
    row(
        "small groups, blocks of 2 KiB",
        &["-t", "ext4", "-b", "2048", "-g", "512", "-J", "size=2"],
    ),
    row(
        "small groups, blocks of 4 KiB",
        &[
            "-t", "ext4", "-b", "4096", "-g", "256", "-J", "size=4", "-i", "32768",
        ],
    ),
];

/// What is refused: how it is made, and what its refusal has to say.
pub(crate) static REFUSED: &[(&[&str], &str)] = &[
    (&["-O", "quota"], "tune2fs -O ^quota"),
    (&["-O", "quota,project"], "tune2fs -O ^quota"),
    (
        &["-C", "16384", "-O", "bigalloc"],
        "bigalloc (make the filesystem without it)",
    ),
];
