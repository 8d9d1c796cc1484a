//! The view against stock tools and a real kernel: what it shows can be mounted, what is foreign in it cannot be
//! changed, what is written to it leaves every filesystem consistent.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "view/bed.rs"]
mod bed;
#[path = "view/file_search.rs"]
mod file_search;
#[path = "view/journal.rs"]
mod journal;
#[path = "view/overlay.rs"]
mod overlay;
#[path = "view/refresh.rs"]
mod refresh;
#[path = "view/shared.rs"]
mod shared;
#[path = "common/skip.rs"]
mod skip;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use bed::{Bed, ID, Kernel, Recipe, can_mount, dump, local, make_disk, run};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::error::{Error, ErrorKind};
use seethrough::ext4::layout::Kind;
use seethrough::image::{Image, Mapped, RawImage};
use seethrough::storage::{Access, Delays, FaultStorage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{BlockGroup, FsBlock, GuestOffset};
use seethrough::view::View;
use seethrough::view::declaration::{ChildDeclaration, Extent, Sharing};
use seethrough::view::open::open_base;
use seethrough::view::open::open_child;
use seethrough::view::prepare::{Groups, Preparation, Request, Reserve};
use seethrough::view::refusal::Structure;
use seethrough::view::region_change::{adopt, enlarge};

const DEFAULTS: Recipe = Recipe {
    name: "defaults",
    mke2fs: &["-t", "ext4", "-b", "4096", "-g", "2048", "-J", "size=4"],
    megabytes: 64,
    groups: "6-7",
    start: 0,
};

const RECIPES: &[Recipe] = &[
    DEFAULTS,
    Recipe {
        name: "blocks of 1 KiB",
        mke2fs: &["-t", "ext4", "-b", "1024"],
        megabytes: 64,
        groups: "3,6-7",
        start: 0,
    },
    Recipe {
        name: "blocks of 2 KiB",
        mke2fs: &["-t", "ext4", "-b", "2048", "-g", "4096"],
        megabytes: 40,
        groups: "3-4",
        start: 0,
    },
    Recipe {
        name: "as seed 000",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "4096",
            "-g",
            "2048",
            "-O",
            "^has_journal,^flex_bg,^metadata_csum,^64bit",
        ],
        megabytes: 40,
        groups: "2-3",
        start: 0,
    },
    Recipe {
        name: "as seed 000, 1 KiB",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "^has_journal,^flex_bg,^metadata_csum,^64bit,^resize_inode",
        ],
        megabytes: 40,
        groups: "2-3",
        start: 0,
    },
    Recipe {
        name: "CRC-16 descriptors",
        mke2fs: &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"],
        megabytes: 40,
        groups: "3-4",
        start: 0,
    },
    Recipe {
        name: "orphan file and checksum seed",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "orphan_file,metadata_csum_seed",
        ],
        megabytes: 40,
        groups: "3-4",
        start: 0,
    },
    Recipe {
        name: "meta_bg",
        mke2fs: &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "meta_bg,^resize_inode,^flex_bg",
        ],
        megabytes: 144,
        groups: "15-16",
        start: 0,
    },
    Recipe {
        name: "ext2",
        mke2fs: &["-t", "ext2", "-b", "1024"],
        megabytes: 40,
        groups: "3-4",
        start: 0,
    },
];

const EPERM: i32 = 1;

/// Tries every kind of change below `dir`, which is not this VM's: each fails with EPERM.
fn assert_nothing_can_be_changed(dir: &Path, file: &Path) {
    let mut results = vec![
        ("create", fs::write(dir.join("new"), b"x")),
        ("mkdir", fs::create_dir(dir.join("newdir"))),
        ("unlink", fs::remove_file(file)),
        ("rename", fs::rename(file, dir.join("renamed"))),
        ("link", fs::hard_link(file, dir.join("linked"))),
        ("symlink", symlink("x", dir.join("newlink"))),
        (
            "append",
            OpenOptions::new().append(true).open(file).map(|_| ()),
        ),
        (
            "truncate",
            OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(file)
                .map(|_| ()),
        ),
    ];
    let mut permissions = fs::metadata(file).unwrap().permissions();
    permissions.set_readonly(true);
    results.push(("chmod", fs::set_permissions(file, permissions)));
    for (what, result) in results {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(EPERM), "{what}: {error}");
    }
}

/// Files, directories, links, and whatever fits until the VM's groups are full.
fn use_directory(dir: &Path, fill: u8) {
    fs::create_dir(dir.join("sub")).unwrap();
    for index in 0..200u32 {
        fs::write(
            dir.join(format!("file{index}")),
            vec![fill; index as usize * 37],
        )
        .unwrap();
    }
    for index in (0..200).step_by(3) {
        fs::remove_file(dir.join(format!("file{index}"))).unwrap();
    }
    fs::rename(dir.join("file1"), dir.join("sub/moved")).unwrap();
    fs::hard_link(dir.join("file2"), dir.join("sub/linked")).unwrap();
    symlink("sub/moved", dir.join("link")).unwrap();
    fs::write(dir.join("sub/large"), vec![fill; 3 << 20]).unwrap();
}

/// Copies a file with its extended attributes, whose block a kernel would like to share.
fn copy_with_attributes(from: &Path, to: &Path) {
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    run("cp", &["--preserve=xattr", from, to]);
}

/// Writes until there is no room; how many bytes there were.
fn fill_up(path: &Path) -> u64 {
    let mut file = fs::File::create(path).unwrap();
    let chunk = vec![0x5a; 64 << 10];
    let mut written = 0;
    loop {
        match file.write(&chunk) {
            Ok(n) => written += n as u64,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
                return written;
            }
        }
    }
}

#[test]
fn a_child_uses_its_region_and_nothing_else() {
    if !can_mount() {
        return;
    }
    for recipe in RECIPES {
        eprintln!("{}", recipe.name);
        let bed = Bed::new(recipe);
        let before = bed.storage.contents();
        let child = bed.child("tom");
        // A guest reads an inode before it reads its attributes; a copy of the disk is in another order.
        dump(&child.view);
        let kernel = Kernel::mount(&bed, &child.view, "tom", "defaults");
        assert_nothing_can_be_changed(&kernel.mount, &kernel.mount.join("top"));
        let share = kernel.mount.join("usr/share");
        assert_nothing_can_be_changed(&share, &share.join("file"));
        assert_eq!(fs::read(kernel.mount.join("link")).unwrap().len(), 10_000);
        use_directory(&kernel.mount.join("local"), 7);
        copy_with_attributes(&kernel.mount.join("top"), &kernel.mount.join("local/copy"));
        let after = kernel.unmount();

        assert_eq!(child.view.refusals().total(), 0, "an honest guest");
        assert!(bed.storage.contents() == before, "the base has changed");
        assert!(dump(&child.view) == after, "the guest reads what it wrote");
        bed.assert_flattened_clean(&child);

        let kernel = Kernel::mount(&bed, &child.view, "tom", "defaults");
        let moved = kernel.mount.join("local/sub/moved");
        assert_eq!(fs::read(moved).unwrap(), [7; 37]);
        assert!(fill_up(&kernel.mount.join("local/full")) > 1 << 20);
        kernel.unmount();
        assert_eq!(child.view.refusals().total(), 0, "an honest guest");
        assert!(bed.storage.contents() == before, "the base has changed");
        bed.assert_flattened_clean(&child);
    }
}

#[test]
fn the_base_leaves_reserved_groups_alone_and_its_children_see_its_files() {
    if !can_mount() {
        return;
    }
    for recipe in RECIPES {
        eprintln!("{}", recipe.name);
        let bed = Bed::new(recipe);
        let before = bed.storage.contents();
        let child = bed.child("tom");
        let kernel = Kernel::mount(&bed, &child.view, "tom", "defaults");
        fs::write(kernel.mount.join("local/mine"), vec![9; 300_000]).unwrap();
        kernel.unmount();

        let base = bed.base_view();
        let kernel = Kernel::mount(&bed, &base, "base", "defaults");
        assert_eq!(
            fs::write(kernel.mount.join("local/theirs"), b"x")
                .unwrap_err()
                .raw_os_error(),
            Some(EPERM)
        );
        fs::create_dir(kernel.mount.join("opt")).unwrap();
        use_directory(&kernel.mount.join("opt"), 3);
        fs::write(kernel.mount.join("usr/share/file"), b"rewritten").unwrap();
        fill_up(&kernel.mount.join("full"));
        let after = kernel.unmount();
        assert_eq!(base.refusals().total(), 0, "an honest guest");
        assert!(dump(&base) == after, "the guest reads what it wrote");
        bed.assert_base_clean();
        assert_groups_unchanged(&bed, recipe, &before);

        // A child that mounts now sees what the base has, and still has its own.
        let kernel = Kernel::mount(&bed, &child.view, "tom", "defaults");
        let share = kernel.mount.join("usr/share/file");
        assert_eq!(fs::read(&share).unwrap(), b"rewritten");
        assert_nothing_can_be_changed(&kernel.mount.join("opt"), &kernel.mount.join("opt/file2"));
        assert_eq!(
            fs::read(kernel.mount.join("opt/sub/moved")).unwrap(),
            [3; 37]
        );
        assert_eq!(
            fs::read(kernel.mount.join("local/mine")).unwrap(),
            vec![9; 300_000]
        );
        kernel.unmount();
        assert_eq!(child.view.refusals().total(), 0, "an honest guest");
        bed.assert_flattened_clean(&child);
    }
}

/// Every block of the reserved groups is in the base as it was; so are their bitmaps and inode tables.
fn assert_groups_unchanged(bed: &Bed, recipe: &Recipe, before: &[u8]) {
    let after = bed.storage.contents();
    let probe = bed.probe();
    let superblock = probe.superblock();
    let block_size = u64::from(superblock.block_size);
    let groups: seethrough::view::declaration::GroupList = recipe.groups.parse().unwrap();
    for block in 0..superblock.blocks_count {
        let (kind, _) = probe.layout().classify(FsBlock(block)).unwrap();
        let served = match kind {
            Kind::Data { group }
            | Kind::BlockBitmap { group }
            | Kind::InodeBitmap { group }
            | Kind::InodeTable { group, .. } => group,
            _ => continue,
        };
        if groups.contains(served) {
            let at = usize::try_from(recipe.start + block * block_size).unwrap();
            let end = at + usize::try_from(block_size).unwrap();
            assert!(before[at..end] == after[at..end], "block {block}: {kind:?}");
        }
    }
}

/// Writes `bytes` at `at`, as a guest's root can.
fn write(view: &View, at: u64, bytes: &[u8]) -> Result<(), Error> {
    block_on(view.write(GuestOffset(at), IoBuf::from_bytes(bytes)))
}

fn read(view: &View, at: u64, len: usize) -> Vec<u8> {
    let buf = IoBuf::zeroed(len);
    block_on(view.read(GuestOffset(at), buf.clone())).unwrap();
    buf.to_vec()
}

/// A block of each kind that serves a group.
fn block_of(bed: &Bed, wanted: impl Fn(Kind) -> bool) -> u64 {
    let probe = bed.probe();
    let block = (0..probe.superblock().blocks_count)
        .find(|&block| wanted(probe.layout().classify(FsBlock(block)).unwrap().0))
        .unwrap();
    bed.start + block * u64::from(probe.superblock().block_size)
}

#[test]
fn foreign_records_are_dropped_and_answered_ok() {
    for recipe in RECIPES {
        eprintln!("{}", recipe.name);
        let bed = Bed::new(recipe);
        let before = bed.storage.contents();
        let child = bed.child("tom");
        let foreign = BlockGroup(0);
        let block = usize::try_from(bed.probe().superblock().block_size).unwrap();
        let cases = [
            (
                Structure::BlockBitmap,
                block_of(&bed, |kind| kind == Kind::BlockBitmap { group: foreign }),
            ),
            (
                Structure::InodeBitmap,
                block_of(&bed, |kind| kind == Kind::InodeBitmap { group: foreign }),
            ),
            (
                Structure::Inode,
                block_of(&bed, |kind| {
                    kind == Kind::InodeTable {
                        group: foreign,
                        index: 0,
                    }
                }),
            ),
            (
                Structure::GroupDescriptor,
                block_of(&bed, |kind| matches!(kind, Kind::Descriptors { .. })),
            ),
        ];
        let overlay = child.overlay.written_blocks();
        for (structure, at) in cases {
            let served = read(&child.view, at, block);
            write(&child.view, at, &served).unwrap();
            assert_eq!(
                child.view.refusals().count(structure),
                0,
                "what is served is honest"
            );
            let mut hostile = served.clone();
            hostile[1] ^= 0xff;
            write(&child.view, at, &hostile).unwrap();
            assert_eq!(child.view.refusals().count(structure), 1, "{structure:?}");
            write(&child.view, at + 512, &hostile[512..1024]).unwrap();
            assert_eq!(child.view.refusals().count(structure), 1, "{structure:?}");
            assert!(
                read(&child.view, at, block) == served,
                "{structure:?} has changed"
            );
            assert!(
                block_on(child.view.discard(GuestOffset(at), block as u64)).is_ok(),
                "{structure:?}"
            );
            assert!(
                read(&child.view, at, block) == served,
                "{structure:?} has changed"
            );
        }
        assert_eq!(
            child.overlay.written_blocks(),
            overlay,
            "nothing was stored"
        );
        assert!(bed.storage.contents() == before, "the base has changed");
    }
}

#[test]
fn zeroing_a_foreign_inode_table_drops_every_inode_in_use() {
    let bed = Bed::new(&DEFAULTS);
    let child = bed.child("tom");
    let at = block_of(&bed, |kind| {
        kind == Kind::InodeTable {
            group: BlockGroup(0),
            index: 0,
        }
    });
    let served = read(&child.view, at, 64 << 10);
    block_on(
        child
            .view
            .write_zeroes(GuestOffset(at), 64 << 10, ZeroMode::MayUnmap),
    )
    .unwrap();
    let in_use = served
        .chunks(256)
        .filter(|inode| inode.iter().any(|&byte| byte != 0))
        .count();
    assert!(in_use > 10);
    assert_eq!(child.view.refusals().count(Structure::Inode), in_use as u64);
    assert!(read(&child.view, at, 64 << 10) == served);
}

#[test]
fn a_foreign_block_of_attributes_reads_as_shared_to_the_full_once_its_inode_was_read() {
    let bed = Bed::new(&DEFAULTS);
    let child = bed.child("tom");
    let magic = 0xea02_0000_u32.to_le_bytes();
    let stored = bed.storage.contents();
    let at = (0..stored.len())
        .step_by(4096)
        .find(|&at| stored[at..at + 4] == magic)
        .unwrap();
    let read_block = || read(&child.view, at as u64 - 4096, 3 * 4096)[4096..8192].to_vec();
    assert!(
        read_block() == stored[at..at + 4096],
        "nothing says yet what it is"
    );
    let table = block_of(&bed, |kind| {
        kind == Kind::InodeTable {
            group: BlockGroup(0),
            index: 0,
        }
    });
    read(&child.view, table, 4096);
    let served = read_block();
    assert_eq!(served[4..8], 1024_u32.to_le_bytes(), "h_refcount");
    assert!(served[32..] == stored[at + 32..at + 4096]);
    let error = write(&child.view, at as u64, &served).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(read(&bed.base_view(), at as u64, 4096) == stored[at..at + 4096]);
}

#[test]
fn what_is_read_does_not_depend_on_where_requests_begin_and_end() {
    let seed = rand::random::<u64>();
    eprintln!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for recipe in &RECIPES[..3] {
        let bed = Bed::new(recipe);
        let child = bed.child("tom");
        dump(&child.view);
        let whole = dump(&child.view);
        // Most of what is composed lies in front.
        for _ in 0..500 {
            let reach = [16 << 10, 1 << 20, whole.len()][random.random_range(0..3)] / 512;
            let first = random.random_range(0..reach);
            let len = random.random_range(1..200).min(whole.len() / 512 - first);
            let (at, len) = (first * 512, len * 512);
            assert!(
                read(&child.view, at as u64, len) == whole[at..at + len],
                "{len} bytes at {at}, {}",
                recipe.name
            );
        }
    }
}

#[test]
fn foreign_data_is_refused_whole_and_nothing_of_the_request_is_applied() {
    let bed = Bed::new(&DEFAULTS);
    let before = bed.storage.contents();
    let child = bed.child("tom");
    let groups = bed.probe().superblock().clone();
    let foreign = u64::from(groups.block_size) * groups.group_blocks(BlockGroup(6)).start - 4096;
    let overlay = child.overlay.written_blocks();
    // The last block of a foreign group and the first one of the child's own.
    let own = read(&child.view, foreign + 4096, 4096);
    let refused = write(&child.view, foreign, &[0xee; 8192]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(refused.to_string().contains("block group 5"), "{refused}");
    for result in [
        block_on(
            child
                .view
                .write_zeroes(GuestOffset(foreign), 8192, ZeroMode::KeepAllocated),
        ),
        block_on(child.view.discard(GuestOffset(foreign), 8192)),
        block_on(
            child
                .view
                .discard(GuestOffset(0), child.view.virtual_size()),
        ),
    ] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Refused);
    }
    assert!(matches!(
        child.view.map_write(GuestOffset(foreign), 8192),
        Mapped::Slow
    ));
    assert_eq!(child.view.refusals().total(), 4);
    assert!(read(&child.view, foreign + 4096, 4096) == own);
    assert_eq!(child.overlay.written_blocks(), overlay);
    assert!(bed.storage.contents() == before);

    let base = bed.base_view();
    let refused = write(&base, foreign + 4096, &[0xee; 4096]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(bed.storage.contents() == before);
}

#[test]
fn backups_boot_sectors_and_the_room_for_descriptors_are_the_bases() {
    for recipe in &RECIPES[..2] {
        let bed = Bed::new(recipe);
        let child = bed.child("tom");
        let backup = block_of(&bed, |kind| matches!(kind, Kind::Backup { .. }));
        let room = block_of(&bed, |kind| kind == Kind::ReservedDescriptors);
        for (at, structure) in [
            (backup, Structure::Backup),
            (room, Structure::Backup),
            (0, Structure::Superblock),
        ] {
            let before = child.view.refusals().count(structure);
            let served = read(&child.view, at, 512);
            let answer = write(&child.view, at, &[0xee; 512]);
            match structure {
                // A kernel's journal may bring them; an error would stop its filesystem.
                Structure::Backup => answer.unwrap(),
                _ => assert_eq!(answer.unwrap_err().kind(), ErrorKind::Refused),
            }
            assert!(
                read(&child.view, at, 512) == served,
                "nothing of it is kept"
            );
            assert_eq!(child.view.refusals().count(structure), before + 1);
            let bytes = bed.storage.contents();
            write(&bed.base_view(), at, &[0xee; 512]).unwrap();
            assert!(bed.storage.contents() != bytes, "the base may write there");
        }
    }
}

#[test]
fn a_childs_superblock_keeps_its_structure_and_its_boot_sectors_whatever_is_written() {
    let bed = Bed::new(&DEFAULTS);
    let child = bed.child("tom");
    let served = read(&child.view, 0, 4096);
    // s_blocks_count, s_uuid, and a boot sector.
    for at in [1024 + 4, 1024 + 0x68, 3] {
        let before = child.view.refusals().count(Structure::Superblock);
        let mut hostile = served.clone();
        hostile[at] ^= 0xff;
        write(&child.view, 0, &hostile).unwrap();
        assert_eq!(
            child.view.refusals().count(Structure::Superblock),
            before + 1,
            "byte {at}"
        );
        assert!(read(&child.view, 0, 4096) == served, "byte {at}");
    }
}

#[test]
fn while_a_journal_is_replayed_refused_writes_are_dropped() {
    let bed = Bed::new(&DEFAULTS);
    let before = bed.storage.contents();
    let child = bed.child("tom");
    let probe = bed.probe();
    let journal = probe.journal()[0].start.0 * 4096;
    let foreign = probe.superblock().group_blocks(BlockGroup(6)).start * 4096 - 4096;
    let clean = read(&child.view, journal, 4096);
    let mut open = clean.clone();
    // s_start, big-endian, and the checksum that covers it.
    open[0x1c..0x20].copy_from_slice(&1u32.to_be_bytes());
    reseal_journal(&mut open);
    write(&child.view, journal, &open).unwrap();
    assert!(
        write(&child.view, foreign, &[1; 4096]).is_err(),
        "this session began clean"
    );

    let view = bed.open_child("tom", &child.overlay, &child.declaration);
    assert!(
        write(&view, foreign, &[1; 4096]).is_err(),
        "a guest that stays mounted reads no journal"
    );
    assert!(matches!(
        view.map_read(GuestOffset(journal), 4096),
        Mapped::Slow
    ));
    assert_eq!(read(&view, journal, 1024), open[..1024]);
    let failed = view.refusals().count(Structure::Data);
    assert!(matches!(
        view.map_write(GuestOffset(foreign + 4096), 4096),
        Mapped::Slow
    ));
    write(&view, foreign, &[7; 8192]).unwrap();
    assert_eq!(view.refusals().count(Structure::Data), failed + 1);
    assert_eq!(
        read(&view, foreign + 4096, 4096),
        [7; 4096],
        "its own is written"
    );
    assert!(bed.storage.contents() == before);
    assert!(read(&view, foreign, 4096) != [7; 4096]);

    write(&view, journal + 8192, &[0; 4096]).unwrap();
    assert!(
        write(&view, foreign, &[7; 4096]).is_err(),
        "a guest that commits has recovered"
    );
    read(&view, journal + 512, 512);
    write(&view, foreign, &[7; 4096]).unwrap();
    write(&view, journal, &clean).unwrap();
    read(&view, journal, 4096);
    assert_eq!(
        write(&view, foreign, &[7; 4096]).unwrap_err().kind(),
        ErrorKind::Refused
    );
    write(&view, journal, &open).unwrap();
    read(&view, journal, 4096);
    write(&view, foreign, &[7; 4096]).unwrap();
    block_on(view.begin_session()).unwrap();
    assert!(
        write(&view, foreign, &[7; 4096]).is_err(),
        "another guest, which has read no journal yet"
    );
}

fn reseal_journal(bytes: &mut [u8]) {
    if u32::from_be_bytes(bytes[0x28..0x2c].try_into().unwrap()) & 0x18 != 0 {
        bytes[0xfc..0x100].fill(0);
        let checksum = seethrough::ext4::checksum::crc32c(u32::MAX, &bytes[..1024]);
        bytes[0xfc..0x100].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The base's view of a storage whose operations overtake each other.
fn dawdling_base_view(bed: &Bed, seed: u64) -> View {
    let storage = FaultStorage::with_delays(bed.storage.clone(), Delays::up_to(3, seed));
    let image = RawImage::new(Arc::new(storage), Access::ReadWrite);
    block_on(open_base("base", &bed.share(Arc::new(image)))).unwrap()
}

#[test]
fn concurrent_writes_of_one_shared_block_lose_nothing() {
    let bed = Bed::new(&DEFAULTS);
    let at = block_of(&bed, |kind| matches!(kind, Kind::Descriptors { .. }));
    let size = 64;
    for seed in 0..16 {
        let view = dawdling_base_view(&bed, seed);
        // Two of the base's descriptors, each changed by a write of its own while the other's is under way.
        let before = read(&view, at, 4096);
        let mut changed = before.clone();
        changed[size + 0x0c] ^= 1;
        changed[3 * size + 0x0c] ^= 1;
        let middle = 2 * size;
        let first = view.write(GuestOffset(at), IoBuf::from_bytes(&changed[..middle]));
        let second = view.write(
            GuestOffset(at + middle as u64),
            IoBuf::from_bytes(&changed[middle..]),
        );
        block_on(async {
            let (mut first, mut second) = (first, second);
            let mut done = (false, false);
            std::future::poll_fn(|context| {
                done.0 = done.0 || first.as_mut().poll(context).is_ready();
                done.1 = done.1 || second.as_mut().poll(context).is_ready();
                if done == (true, true) {
                    std::task::Poll::Ready(())
                } else {
                    std::task::Poll::Pending
                }
            })
            .await;
        });
        assert!(read(&view, at, 4096) == changed, "seed {seed}");
        // Sound checksums again, for the next to open.
        write(&view, at, &before).unwrap();
    }
}

#[test]
fn what_cannot_be_prepared_is_left_as_it_is() {
    let cases: [(&str, &str, &str); 6] = [
        ("0-1", "/local", "root directory"),
        ("5-99", "/local", "no block group 99"),
        ("1-5", "/local", "free are block groups"),
        ("5-6", "/usr", "exists already"),
        ("5-6", "/nowhere/local", "is missing"),
        ("5-6", "local", "absolute path"),
    ];
    let (_dir, storage, base) = make_disk(&DEFAULTS);
    let before = storage.contents();
    for (groups, directory, expected) in cases {
        let request = Request {
            name: "local".into(),
            sharing: Sharing::Private,
            reserve: Reserve::Groups {
                groups: Groups::Listed(groups.parse().unwrap()),
                directory: directory.into(),
            },
        };
        let planned = block_on(Preparation::plan(&*base, None, ID.into(), &[request], None));
        let error = planned.err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(storage.contents() == before);
}

#[test]
fn a_filesystem_that_is_mounted_or_has_unsupported_features_is_refused_by_name() {
    let (_dir, storage, base) = make_disk(&DEFAULTS);
    let mut bytes = storage.contents();
    let incompat = 1024 + 0x60;
    bytes[incompat] |= 0x4;
    reseal_superblock(&mut bytes);
    write_all(&*base, &bytes[..4096]);
    let error = plan_local(&*base, "5-6").err().unwrap();
    assert!(
        error.to_string().contains("mount and unmount it"),
        "{error}"
    );

    bytes[incompat] &= !0x4;
    bytes[1024 + 0x65] |= 0x2;
    reseal_superblock(&mut bytes);
    write_all(&*base, &bytes[..4096]);
    let error = plan_local(&*base, "5-6").err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("bigalloc"), "{error}");
}

fn plan_local(base: &dyn Image, groups: &str) -> Result<Preparation, Error> {
    block_on(Preparation::plan(
        base,
        None,
        ID.into(),
        &[local(groups)],
        None,
    ))
}

fn write_all(image: &dyn Image, bytes: &[u8]) {
    block_on(image.write(GuestOffset(0), IoBuf::from_bytes(bytes))).unwrap();
}

fn reseal_superblock(bytes: &mut [u8]) {
    let superblock: &mut [u8; 1024] = (&mut bytes[1024..2048]).try_into().unwrap();
    seethrough::ext4::superblock::seal(superblock);
}

#[test]
fn a_second_region_joins_the_first_but_never_overlaps_it() {
    let bed = Bed::new(&DEFAULTS);
    let more = |groups: &str, name: &str, directory: &str| {
        let request = Request {
            name: name.into(),
            sharing: Sharing::Private,
            reserve: Reserve::Groups {
                groups: Groups::Listed(groups.parse().unwrap()),
                directory: directory.into(),
            },
        };
        block_on(Preparation::plan(
            &*bed.base,
            Some(bed.declaration.clone()),
            String::new(),
            &[request],
            None,
        ))
    };
    let error = more("2,7", "other", "/other").err().unwrap();
    assert!(
        error.to_string().contains("belongs to region \"local\""),
        "{error}"
    );
    let error = more("2-3", "local", "/other").err().unwrap();
    assert!(error.to_string().contains("declared already"), "{error}");
    let second = more("2-3", "other", "/usr/other").unwrap();
    block_on(second.apply(&*bed.base)).unwrap();
    assert_eq!(second.declaration().regions.len(), 2);
    assert_eq!(second.declaration().id, ID);
    bed.assert_base_clean();
}

#[test]
fn a_child_is_not_served_once_the_base_has_used_its_groups() {
    if !can_mount() {
        return;
    }
    let bed = Bed::new(&DEFAULTS);
    let child = bed.child("tom");
    let kernel = Kernel::mount(&bed, &*bed.base, "base without its view", "defaults");
    fill_up(&kernel.mount.join("full"));
    kernel.unmount();
    let opened = block_on(open_child(
        "tom",
        child.overlay.clone(),
        &child.declaration,
        bed.shared(),
    ));
    let error = opened.err().unwrap();
    assert!(error.to_string().contains("block groups 6-7"), "{error}");
}

#[test]
fn a_child_of_another_base_or_of_changed_regions_is_refused() {
    let bed = Bed::new(&DEFAULTS);
    let child = bed.child("tom");
    let open = |declaration: &ChildDeclaration| {
        block_on(open_child(
            "tom",
            child.overlay.clone(),
            declaration,
            bed.shared(),
        ))
        .err()
        .unwrap()
        .to_string()
    };
    let mut other = child.declaration.clone();
    other.base = "ff".repeat(16);
    assert!(open(&other).contains("backing image"));
    let mut changed = child.declaration.clone();
    let Extent::Groups { list, .. } = &mut changed.regions[0].extent else {
        unreachable!()
    };
    *list = "1-7".parse().unwrap();
    assert!(open(&changed).contains("declared otherwise"));
}

#[test]
fn groups_that_a_child_takes_over_are_as_the_base_left_them() {
    if !can_mount() {
        return;
    }
    let recipe = Recipe {
        groups: "6",
        ..DEFAULTS
    };
    let bed = Bed::new(&recipe);
    let mut child = bed.child("tom");
    // The child writes a block of the descriptor table while the base uses group 7, which the base leaves later.
    let view = bed.base_view();
    let kernel = Kernel::mount(&bed, &view, "base", "defaults");
    fill_up(&kernel.mount.join("full"));
    kernel.unmount();
    let kernel = Kernel::mount(&bed, &child.view, "tom", "defaults");
    fs::write(kernel.mount.join("local/file"), [7; 5000]).unwrap();
    kernel.unmount();
    let kernel = Kernel::mount(&bed, &view, "base", "defaults");
    fs::remove_file(kernel.mount.join("full")).unwrap();
    kernel.unmount();

    let groups = Groups::Listed("7".parse().unwrap());
    let declaration = block_on(enlarge(&*bed.base, &bed.declaration, "local", &groups)).unwrap();
    let (adopted, new) = block_on(adopt(
        &*child.overlay,
        &child.declaration,
        &*bed.base,
        &declaration,
    ))
    .unwrap();
    assert_eq!(new.to_string(), "7");
    let bed = bed.declaring(declaration);
    child.declaration = adopted;
    bed.assert_flattened_clean(&child);

    let view = bed.open_child("tom", &child.overlay, &child.declaration);
    let kernel = Kernel::mount(&bed, &view, "tom", "defaults");
    // More than one group has.
    fs::write(kernel.mount.join("local/large"), vec![7; 10 << 20]).unwrap();
    kernel.unmount();
    assert_eq!(view.refusals().total(), 0);
    bed.assert_flattened_clean(&child);
    bed.assert_base_clean();
}
