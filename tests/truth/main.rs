//! After any sequence of operations by any mix of VMs, every filesystem is whole: the base alone, and each child merged
//! with it, pass `e2fsck -fn`, every image passes `qemu-img check`, and each VM reads what was written.
//!
//! Kernels drive the views themselves, request by request: each VM is this host's ext4, mounted from a loop device on a
//! file whose reads and writes are the view's. Programs work in it at random and in a model at the same time; VMs
//! mount and unmount, sync, lose their power, and trespass; the daemon is restarted, or dies with all of them. Regions
//! are private or shared, and passed on; they get more groups; children see the base live or with pins. By hand, for
//! longer:
//!
//!     SEETHROUGH_TEST_ROUNDS=50 cargo test --release --test truth
//!
//! The order of operations is the seed's; when a kernel writes out what is its own affair.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../engine/mod.rs"]
mod engine;
mod fuse;
mod host;
mod model;
mod sequence;
#[path = "../common/skip.rs"]
mod skip;
mod vm;
mod work;

use std::path::Path;

use engine::{for_each_seed, run};
use host::{Place, Recipe};
use seethrough::chain::format::Format;
use seethrough::view::declaration::Sharing;
use sequence::run_sequence;

const DEFAULTS: Recipe = Recipe {
    name: "defaults",
    mke2fs: &["-t", "ext4", "-b", "4096", "-g", "1024", "-J", "size=4"],
    megabytes: 48,
    regions: ["2-4", "8-9"],
    format: Format::Qcow2,
    has_journal: true,
    sharing: Sharing::Private,
    place: Place::WholeDisk,
};

const JOURNALED: &[Recipe] = &[
    DEFAULTS,
    Recipe {
        name: "blocks of 1 KiB, raw",
        mke2fs: &["-t", "ext4", "-b", "1024", "-g", "4096", "-J", "size=1"],
        megabytes: 32,
        regions: ["3-4", "6"],
        format: Format::Raw,
        ..DEFAULTS
    },
    Recipe {
        name: "no flex_bg, no checksums",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "4096",
            "-J",
            "size=1",
            "-O",
            "^flex_bg,^metadata_csum,^64bit",
        ],
        megabytes: 24,
        regions: ["3", "4-5"],
        ..DEFAULTS
    },
    Recipe {
        name: "orphan file, checksum seed, flex_bg of 4",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "4096",
            "-G",
            "4",
            "-J",
            "size=1",
            "-O",
            "orphan_file,metadata_csum_seed",
        ],
        megabytes: 32,
        regions: ["3-4", "6"],
        ..DEFAULTS
    },
    Recipe {
        name: "ext3",
        mke2fs: &["-t", "ext3", "-b", "1024", "-g", "4096", "-J", "size=1"],
        megabytes: 24,
        regions: ["3", "4-5"],
        format: Format::Raw,
        ..DEFAULTS
    },
    Recipe {
        name: "in a partition",
        place: Place::Partition,
        ..DEFAULTS
    },
];

/// With regions that their children write in the base.
const SHARED: &[Recipe] = &[
    Recipe {
        name: "shared",
        sharing: Sharing::Shared,
        ..DEFAULTS
    },
    Recipe {
        name: "shared, in a partition of a raw disk",
        mke2fs: &["-t", "ext4", "-b", "1024", "-g", "4096", "-J", "size=1"],
        megabytes: 32,
        regions: ["3-4", "6"],
        format: Format::Raw,
        sharing: Sharing::Shared,
        place: Place::Partition,
        ..DEFAULTS
    },
    Recipe {
        name: "shared, no journal",
        mke2fs: UNJOURNALED[0].mke2fs,
        has_journal: false,
        sharing: Sharing::Shared,
        ..DEFAULTS
    },
    Recipe {
        name: "shared, orphan file, checksum seed, flex_bg of 4",
        sharing: Sharing::Shared,
        ..JOURNALED[3]
    },
];

const UNJOURNALED: &[Recipe] = &[
    Recipe {
        name: "no journal",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "1024",
            "-O",
            "^has_journal",
        ],
        has_journal: false,
        ..DEFAULTS
    },
    Recipe {
        name: "as seed 000",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "4096",
            "-O",
            "^has_journal,^flex_bg,^metadata_csum,^64bit",
        ],
        megabytes: 24,
        regions: ["3", "4-5"],
        format: Format::Raw,
        has_journal: false,
        ..DEFAULTS
    },
    Recipe {
        name: "blocks of 2 KiB, CRC-16 descriptors",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "2048",
            "-g",
            "2048",
            "-O",
            "^has_journal,^metadata_csum,uninit_bg",
        ],
        megabytes: 32,
        regions: ["3-4", "6"],
        has_journal: false,
        ..DEFAULTS
    },
    Recipe {
        name: "ext2",
        mke2fs: &["-t", "ext2", "-b", "1024", "-g", "4096"],
        megabytes: 24,
        regions: ["3", "4-5"],
        format: Format::Raw,
        has_journal: false,
        ..DEFAULTS
    },
];

/// Whether this machine can do it.
fn can_run() -> bool {
    let is_root = run("id", &["-u"]).1.trim() == "0";
    let can = is_root && Path::new("/dev/loop-control").exists() && Path::new("/dev/fuse").exists();
    if !can {
        skip::skip("no loop mounts on FUSE here", skip::IN_CI);
    }
    can
}

fn run_all(recipes: &[Recipe], usual: u64) {
    if !can_run() {
        return;
    }
    for_each_seed(usual, "sequences", |seed| {
        let index = usize::try_from(seed).unwrap() % recipes.len();
        run_sequence(recipes[index], seed);
    });
}

#[test]
fn any_mix_of_vms_with_journals_leaves_every_filesystem_whole() {
    run_all(JOURNALED, 24);
}

#[test]
fn any_mix_of_vms_without_journals_leaves_every_filesystem_whole() {
    run_all(UNJOURNALED, 12);
}

#[test]
fn any_mix_of_writers_of_shared_regions_leaves_every_filesystem_whole() {
    run_all(SHARED, 12);
}
