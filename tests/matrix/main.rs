//! Every ext4 that distributions and cloud images ship: filesystems as mke2fs and resize2fs make them, each with a base
//! VM and a child that are driven by a real kernel, attacked, and judged by stock tools.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod bed;
mod grown;
mod rows;
#[path = "../common/skip.rs"]
mod skip;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::panic::catch_unwind;
use std::path::Path;

use bed::{Bed, Family, Kernel, dump};
use rows::{Mounted, REFUSED, ROWS, Row};
use seethrough::ext4::layout::Kind;
use seethrough::image::Image;
use seethrough::sys::{IoBuf, block_on};

const EPERM: i32 = 1;

/// Every kind of change below `dir`, which is not this VM's, fails.
fn assert_nothing_can_be_changed(dir: &Path, file: &Path) {
    let results = [
        ("create", fs::write(dir.join("new"), b"x")),
        ("mkdir", fs::create_dir(dir.join("newdir"))),
        ("unlink", fs::remove_file(file)),
        ("rename", fs::rename(file, dir.join("other-name"))),
        ("link", fs::hard_link(file, dir.join("another-name"))),
        ("write", fs::write(file, b"x")),
    ];
    for (what, result) in results {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(EPERM), "{what}: {error}");
    }
}

/// Files small enough for an inode and larger, directories of one entry and of many, links, large attributes.
fn use_directory(dir: &Path, fill: u8, attributes_from: &Path) {
    fs::create_dir(dir.join("few")).unwrap();
    fs::create_dir(dir.join("many")).unwrap();
    fs::write(dir.join("few/tiny"), [fill; 20]).unwrap();
    for index in 0..60u32 {
        let file = dir.join(format!("many/file-with-a-name-{index}"));
        fs::write(file, vec![fill; index as usize * 97]).unwrap();
    }
    for index in (0..60).step_by(3) {
        fs::remove_file(dir.join(format!("many/file-with-a-name-{index}"))).unwrap();
    }
    fs::rename(dir.join("many/file-with-a-name-1"), dir.join("few/moved")).unwrap();
    fs::hard_link(dir.join("few/tiny"), dir.join("linked")).unwrap();
    symlink("few/tiny", dir.join("link")).unwrap();
    fs::write(dir.join("large"), vec![fill; 1 << 20]).unwrap();
    // A kernel would like two files with the same attributes to share them.
    let output = std::process::Command::new("cp")
        .arg("--preserve=xattr")
        .args([attributes_from, &dir.join("copy")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn assert_used(dir: &Path, fill: u8) {
    assert_eq!(fs::read(dir.join("link")).unwrap(), [fill; 20]);
    assert_eq!(fs::read(dir.join("few/moved")).unwrap(), [fill; 97]);
    assert_eq!(fs::read_dir(dir.join("many")).unwrap().count(), 39);
    assert!(fs::read(dir.join("large")).unwrap() == vec![fill; 1 << 20]);
}

/// What a root user of the child's VM writes straight to its disk reaches nothing foreign.
fn attack(row: &Row, family: &Family) {
    let before = dump(&*family.base);
    let view = &family.child_view;
    let served = dump(view);
    for (kind, at) in family.foreign_blocks() {
        let result = block_on(view.write(at, IoBuf::from_bytes(&[0xa5; 1024])));
        let is_data = matches!(kind, Kind::Data { .. });
        assert_eq!(
            result.is_err(),
            is_data,
            "{}: {kind:?}: {result:?}",
            row.name
        );
    }
    assert!(view.refusals().total() >= 4, "{}", row.name);
    assert!(
        dump(&*family.base) == before,
        "{}: the base has changed",
        row.name
    );
    assert!(
        dump(view) == served,
        "{}: what is read has changed",
        row.name
    );
}

/// One row, from mke2fs to the verdict.
fn pass(row: &'static Row) {
    let bed = Bed::new(row);
    bed.prepare();
    let family = bed.open();
    let stored = dump(&*family.base);
    if row.mounted == Mounted::Yes {
        live_in(&bed, &family, &stored);
    }
    attack(row, &family);
    drop(family);
    bed.assert_sound();
}

fn live_in(bed: &Bed, family: &Family, stored: &[u8]) {
    let name = bed.row.name;
    let kernel = Kernel::mount(bed, &family.child_view, "tom");
    assert_nothing_can_be_changed(kernel.root(), &kernel.root().join("top"));
    let share = kernel.root().join("usr/share");
    assert_nothing_can_be_changed(&share, &share.join("file"));
    assert_nothing_can_be_changed(&kernel.root().join("usr"), &kernel.root().join("usr/small"));
    use_directory(&kernel.root().join("local"), 7, &kernel.root().join("top"));
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
    let local = kernel.root().join("local");
    let error = fs::write(local.join("theirs"), b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(EPERM), "{name}: {error}");
    fs::create_dir(kernel.root().join("opt")).unwrap();
    use_directory(&kernel.root().join("opt"), 3, &kernel.root().join("top"));
    fs::write(kernel.root().join("usr/small"), b"rewritten").unwrap();
    let after = kernel.unmount();
    assert_eq!(
        family.base_view.refusals().total(),
        0,
        "{name}: an honest guest"
    );
    assert!(
        dump(&family.base_view) == after,
        "{name}: the guest reads what it wrote"
    );

    let kernel = Kernel::mount(bed, &family.child_view, "tom");
    assert_used(&kernel.root().join("local"), 7);
    assert_used(&kernel.root().join("opt"), 3);
    assert_eq!(
        fs::read(kernel.root().join("usr/small")).unwrap(),
        b"rewritten"
    );
    assert_nothing_can_be_changed(&kernel.root().join("opt"), &kernel.root().join("opt/large"));
    fs::remove_dir_all(kernel.root().join("local/many")).unwrap();
    kernel.unmount();
    assert_eq!(
        family.child_view.refusals().total(),
        0,
        "{name}: an honest guest"
    );
}

/// Whether this machine can mount; a machine that runs the gate has to.
fn can_mount() -> bool {
    let can =
        Path::new("/dev/loop-control").exists() && fs::metadata("/proc/self").unwrap().uid() == 0;
    if !can {
        skip::skip("no loop mounts here", skip::IN_CI);
    }
    can
}

#[test]
fn every_filesystem_is_shared_between_a_base_and_a_child() {
    if !can_mount() {
        return;
    }
    let wanted = std::env::var("SEETHROUGH_TEST_ROW").unwrap_or_default();
    let rows = ROWS.iter().filter(|row| row.name.contains(&wanted));
    let failed: Vec<&str> = rows
        .inspect(|row| eprintln!("row: {}", row.name))
        .filter(|row| catch_unwind(|| pass(row)).is_err())
        .map(|row| row.name)
        .collect();
    assert!(failed.is_empty(), "failed: {failed:?}");
}

#[test]
fn what_cannot_be_kept_apart_is_refused_with_a_remedy_and_left_as_it_is() {
    for (arguments, remedy) in REFUSED {
        let bed = Bed::refused(arguments);
        let before = fs::read(bed.path("fs.raw")).unwrap();
        let (succeeded, text) = bed.try_run(&[
            "seethrough",
            "prepare",
            "-f",
            "raw",
            "fs.raw",
            "--reserve",
            "local",
            "--size",
            "6M",
            "--dir",
            "/local",
        ]);
        assert!(!succeeded && text.contains(remedy), "{arguments:?}: {text}");
        assert!(
            fs::read(bed.path("fs.raw")).unwrap() == before,
            "{arguments:?}"
        );
    }
}
