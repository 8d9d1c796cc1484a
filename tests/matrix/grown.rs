//! Children with block groups behind the end of their base's filesystem: every row of the matrix again, and such as
//! make a descriptor table find its room in each way.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::panic::catch_unwind;
use std::path::Path;

use rustix::fs::statvfs;
use seethrough::chain::host::{HostOptions, Locking};
use seethrough::chain::registry::{DiskRequest, OpenImage, Registry};
use seethrough::image::{Access, Image};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{BlockGroup, GuestOffset};
use seethrough::view::View;
use seethrough::view::declaration::{BaseDeclaration, ChildDeclaration, Declaration, Extent};
use seethrough::view::declared::{Declared, declaration_of};
use seethrough::view::group_map::GroupMap;
use seethrough::view::open::{SharedBase, child_territory, open_base, open_child};
use seethrough::view::room::Room;

use crate::bed::{Bed, Kernel, dump};
use crate::rows::{GROWN, Mounted, ROWS, Row};
use crate::{assert_nothing_can_be_changed, assert_used, attack, can_mount, use_directory};

/// More than any row's region has room for.
const FILLING: usize = 24 << 20;

/// What the tools say of the child's room.
fn tools_say(bed: &Bed) -> (Room, GroupMap) {
    let registry = Registry::new(HostOptions {
        locking: Locking::ForceShare,
        ..HostOptions::default()
    });
    let request = DiskRequest {
        path: bed.path("tom.qcow2"),
        format: None,
        access: Access::ReadOnly,
    };
    let disk = block_on(registry.open(&request)).unwrap();
    let declared = Declared::of(&disk).unwrap().unwrap();
    let room = block_on(declared.room()).unwrap();
    (room, block_on(declared.group_map()).unwrap())
}

/// What the kernel that has `root` mounted tells its programs.
fn kernel_says(root: &Path) -> [u64; 5] {
    let told = statvfs(root).unwrap();
    [
        told.f_blocks,
        told.f_bfree,
        told.f_bavail,
        told.f_files,
        told.f_ffree,
    ]
}

fn assert_agreed(name: &str, told: [u64; 5], room: &Room) {
    let statfs = room.statfs.unwrap();
    let said = [
        statfs.blocks,
        statfs.free_blocks,
        statfs.available_blocks,
        u64::from(statfs.inodes),
        u64::from(statfs.free_inodes),
    ];
    assert_eq!(said, told, "{name}");
    let grown = room.regions.last().unwrap();
    assert_eq!(grown.region.name, "(grown)", "{name}");
    assert!(grown.size >= 40 << 20, "{name}: {grown:?}");
}

/// One row, from mke2fs to the verdict.
fn pass(row: &'static Row) {
    let name = row.name;
    let bed = Bed::new(row);
    bed.prepare_grown("40M");
    if row.mounted == Mounted::Yes {
        live_in(&bed);
    }
    attack(row, &bed.open());
    bed.assert_sound();
    // The disk of its own has all that the two have free together.
    let (_, map) = tools_say(&bed);
    let free = map
        .groups
        .iter()
        .map(|group| group.blocks.total - group.blocks.used);
    let text = bed.run("dumpe2fs -h flat.raw");
    assert!(
        text.lines().any(|line| line.starts_with("Free blocks:")
            && line.ends_with(&format!(" {}", free.clone().sum::<u64>()))),
        "{name}: {}\n{text}",
        free.sum::<u64>()
    );
}

fn live_in(bed: &Bed) {
    let name = bed.row.name;
    let family = bed.open();
    let stored = dump(&*family.base);
    assert!(family.child_view.virtual_size() >= (stored.len() as u64).max(72 << 20));
    let kernel = Kernel::mount(bed, &family.child_view, "tom");
    assert_nothing_can_be_changed(kernel.root(), &kernel.root().join("top"));
    let local = kernel.root().join("local");
    use_directory(&local, 7, &kernel.root().join("top"));
    fs::write(local.join("filling"), vec![9; FILLING]).unwrap();
    assert_eq!(
        fs::metadata(local.join("filling")).unwrap().size(),
        FILLING as u64
    );
    let after = kernel.unmount();
    assert_eq!(
        family.child_view.refusals().total(),
        0,
        "{name}: an honest guest"
    );
    assert!(
        dump(&*family.base) == stored,
        "{name}: the base has changed"
    );
    assert!(
        dump(&family.child_view) == after,
        "{name}: the guest reads what it wrote"
    );

    let kernel = Kernel::mount(bed, &family.base_view, "base");
    assert!(!kernel.root().join("local/filling").exists(), "{name}");
    fs::create_dir(kernel.root().join("opt")).unwrap();
    use_directory(&kernel.root().join("opt"), 3, &kernel.root().join("top"));
    kernel.unmount();
    assert_eq!(
        family.base_view.refusals().total(),
        0,
        "{name}: an honest guest"
    );

    let kernel = Kernel::mount(bed, &family.child_view, "tom");
    assert_used(&kernel.root().join("local"), 7);
    assert_used(&kernel.root().join("opt"), 3);
    assert!(fs::read(kernel.root().join("local/filling")).unwrap() == vec![9; FILLING]);
    assert_nothing_can_be_changed(&kernel.root().join("opt"), &kernel.root().join("opt/large"));
    fs::remove_dir_all(kernel.root().join("local/many")).unwrap();
    rustix::fs::sync();
    let told = kernel_says(kernel.root());
    kernel.unmount();
    assert_eq!(
        family.child_view.refusals().total(),
        0,
        "{name}: an honest guest"
    );
    drop(family);
    assert_agreed(name, told, &tools_say(bed).0);
}

#[test]
fn a_child_of_every_filesystem_has_groups_behind_its_end() {
    if !can_mount() {
        return;
    }
    let wanted = std::env::var("SEETHROUGH_TEST_ROW").unwrap_or_default();
    // Each row does all that the matrix does, on a larger disk: with more rounds, all of them.
    let rounds = std::env::var("SEETHROUGH_TEST_ROUNDS").unwrap_or_default();
    let step = if wanted.is_empty() && rounds.is_empty() {
        5
    } else {
        1
    };
    let rows = ROWS.iter().step_by(step).chain(GROWN);
    let failed: Vec<&str> = rows
        .filter(|row| row.name.contains(&wanted))
        .inspect(|row| eprintln!("row: {}", row.name))
        .filter(|row| catch_unwind(|| pass(row)).is_err())
        .map(|row| row.name)
        .collect();
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// The base, and two children of the same region, each with groups of its own behind the base's end.
fn siblings(
    bed: &Bed,
) -> (
    SharedBase,
    BaseDeclaration,
    Vec<(OpenImage, ChildDeclaration)>,
) {
    bed.prepare_grown("40M");
    bed.run("seethrough create -q -b base.qcow2 --region local --grow 40M ann.qcow2");
    let requests = ["base.qcow2", "tom.qcow2", "ann.qcow2"].map(|name| DiskRequest {
        path: bed.path(name),
        format: None,
        access: Access::ReadWrite,
    });
    let registry = Registry::new(HostOptions::default());
    let mut disks = block_on(registry.open_family(&requests))
        .unwrap()
        .into_iter();
    let base = disks.next().unwrap();
    let Some(Declaration::Base(declaration)) = declaration_of(&base.source).unwrap() else {
        panic!("a base says that it is one");
    };
    let children = disks.map(|disk| match declaration_of(&disk.source).unwrap() {
        Some(Declaration::Child(child)) => (disk, child),
        other => panic!("no child: {other:?}"),
    });
    let children = children.collect();
    let shared = block_on(SharedBase::open(base.image, declaration.clone())).unwrap();
    (shared, declaration, children)
}

#[test]
fn what_lies_behind_a_bases_end_is_one_childs_alone() {
    const WRITTEN: [u8; 512] = [0xa5; 512];
    let bed = Bed::new(&GROWN[0]);
    let (base, _, children) = siblings(&bed);
    let views: Vec<View> = children
        .iter()
        .map(|(disk, child)| block_on(open_child("vm", disk.image.clone(), child, &base)).unwrap())
        .collect();
    let base_view = block_on(open_base("base", &base)).unwrap();
    let before = [dump(&base_view), dump(&views[1])];
    let end = base_view.virtual_size();
    // Descriptors, bitmaps, inode tables, copies and data alike: all of a new group is its owner's.
    for at in (end..views[0].virtual_size()).step_by(1024) {
        let buf = IoBuf::from_bytes(&WRITTEN);
        block_on(views[0].write(GuestOffset(at), buf.clone())).unwrap();
        assert!(block_on(base_view.write(GuestOffset(at), buf)).is_err());
    }
    assert_eq!(views[0].refusals().total(), 0);
    assert!([dump(&base_view), dump(&views[1])] == before);
    let own = dump(&views[0]);
    let own = &own[usize::try_from(end).unwrap()..];
    assert!(own.chunks(1024).all(|chunk| chunk.starts_with(&WRITTEN)));
}

#[test]
fn no_region_reaches_into_groups_that_a_child_alone_has() {
    let bed = Bed::new(&GROWN[0]);
    let (base, mut declaration, mut children) = siblings(&bed);
    let (_, child) = &mut children[0];
    let disk = base.committed();
    block_on(child_territory(&**disk, &declaration, child)).unwrap();
    // Both say so: a region with the first of the new groups.
    for region in declaration.regions.iter_mut().chain(&mut child.regions) {
        if let Extent::Groups { list, .. } = &mut region.extent {
            let new = u32::try_from(bed.row.megabytes).unwrap();
            *list = list.iter().chain([BlockGroup(new)]).collect();
        }
    }
    let error = block_on(child_territory(&**disk, &declaration, child)).unwrap_err();
    assert!(
        error.to_string().contains("there is no block group"),
        "{error}"
    );
}
