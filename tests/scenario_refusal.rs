//! Scenario 3: what a VM does not own, its own kernel refuses to change, every time and with EPERM; what it
//! owns takes every operation. (Figure 3 of seed 000, where file creation could not be stopped.)

mod common;

use common::oracle;
use common::{Family, FamilyConfig, Filesystem, Guest, Placement, guests_available};

/// How often each operation is tried.
const TIMES: usize = 1000;

/// Files and directories of the base for a child to attack.
const TARGETS: &str = r#"
    set -e
    mkdir /mnt/files /mnt/dir
    for i in $(seq 1000); do echo "content $i" > /mnt/files/f$i; done
    ln -s files/f1 /mnt/link
"#;

/// A thousand files of the VM's own, in `/mnt/<place>/own`.
fn own_files(guest: &mut Guest, place: &str) {
    guest.ok(&format!(
        "mkdir {place}/own && cd {place}/own && for i in $(seq {TIMES}); do echo mine > f$i; done"
    ));
}

/// Operations on the base's files and in its directories, with a child's files where one is needed. Each tries
/// [`TIMES`] changes and prints a line for each failure.
fn illegal_operations() -> Vec<(&'static str, String)> {
    let each = |construct: &str| format!("for i in $(seq {TIMES}); do {construct}; done");
    let on_files = |command: &str| format!("cd /mnt/files; {command}");
    let with_own = |command: &str| format!("cd /mnt/local/own; {command}");
    let in_dir = |command: &str| format!("cd /mnt/dir; {command}");
    vec![
        ("create in the root", each("echo data > /mnt/new$i")),
        ("create in a directory", each("echo data > /mnt/dir/new$i")),
        ("append", each("echo more >> /mnt/files/f$i")),
        ("truncate by opening", each("echo new > /mnt/files/f$i")),
        ("truncate", on_files("truncate -s 0 $FILES")),
        ("unlink", on_files("rm -f $FILES")),
        ("rename within", on_files("mv $FILES /mnt/dir/")),
        ("rename away", on_files("mv $FILES /mnt/local/")),
        ("rename in", with_own("mv $FILES /mnt/dir/")),
        ("hard link within", on_files("ln $FILES /mnt/dir/")),
        ("hard link away", on_files("ln $FILES /mnt/local/")),
        ("hard link in", with_own("ln $FILES /mnt/dir/")),
        ("chmod", on_files("chmod 600 $FILES")),
        ("chown", on_files("chown 1000 $FILES")),
        ("change times", on_files("touch $FILES")),
        ("mkdir", in_dir("mkdir $FILES")),
        ("symbolic link", in_dir("ln -s $FILES /mnt/dir/")),
        ("mknod", each("mknod /mnt/dir/f$i p")),
    ]
}

/// The like, in the base, on the one thing there that is the children's: the directory `/local`.
fn illegal_operations_of_the_base() -> Vec<(&'static str, String)> {
    let each = |construct: &str| format!("for i in $(seq {TIMES}); do {construct}; done");
    let with_own = |command: &str| format!("cd /mnt/own; {command}");
    let in_local = |command: &str| format!("cd /mnt/local; {command}");
    vec![
        ("create", each("echo data > /mnt/local/f$i")),
        ("rename in", with_own("mv $FILES /mnt/local/")),
        ("hard link in", with_own("ln $FILES /mnt/local/")),
        ("mkdir", in_local("mkdir $FILES")),
        ("symbolic link", in_local("ln -s $FILES /mnt/local/")),
        ("mknod", each("mknod /mnt/local/f$i p")),
        ("rename", each("mv /mnt/local /mnt/elsewhere$i")),
        ("rmdir", each("rmdir /mnt/local")),
        ("chmod", each("chmod 777 /mnt/local")),
        ("chown", each("chown 1000 /mnt/local")),
    ]
}

/// Runs it and counts: as many failures as tries, all of them for want of permission.
fn refused_every_time(guest: &mut Guest, what: &str, operation: &str) {
    guest.run(&format!(
        "FILES=$(seq {TIMES} | sed s/^/f/)\n({operation}) > /tmp/errors 2>&1"
    ));
    let refused = guest.number("grep -c 'Operation not permitted' /tmp/errors || true");
    let lines = guest.number("wc -l < /tmp/errors");
    assert_eq!(
        (refused, lines),
        (TIMES as u64, TIMES as u64),
        "{what}: refusals and messages of {TIMES} tries; the first messages:\n{}",
        guest.ok("head -n 3 /tmp/errors")
    );
}

/// Every operation, in a place that is the VM's own, works every time.
fn allowed_every_time(guest: &mut Guest, place: &str) {
    guest.ok(&format!(
        r#"
        set -e
        FILES=$(seq {TIMES} | sed s/^/f/)
        mkdir {place}/files {place}/dir
        cd {place}/files
        for i in $(seq {TIMES}); do echo "data $i" > f$i; done
        for i in $(seq {TIMES}); do echo more >> f$i; done
        for i in $(seq {TIMES}); do printf "data $i\nmore\n"; done > /tmp/expected
        cat $FILES | cmp - /tmp/expected
        truncate -s 3 $FILES
        [ $(cat $FILES | wc -c) = {truncated} ]
        chmod 600 $FILES
        [ $(find . -type f -perm 600 | wc -l) = {TIMES} ]
        mv $FILES ../dir
        ( cd ../dir; ln $FILES ../files )
        [ $(find . -type f -links 2 | wc -l) = {TIMES} ]
        mkdir $(seq {TIMES} | sed s/^/d/)
        ln -s $(seq {TIMES} | sed s/^/s/) {place}/dir/
        rm $FILES
        [ $(find . -type f | wc -l) = 0 ]
        [ $(find ../dir -type f -links 1 | wc -l) = {TIMES} ]
        "#,
        truncated = 3 * TIMES,
    ));
}

fn children_can_change_only_what_is_theirs(filesystem: Filesystem, placement: Placement) {
    if !guests_available() {
        return;
    }
    let mut family = Family::new(FamilyConfig {
        filesystem,
        placement,
        children: &["tom"],
    });
    family.serve();
    let mut base = family.boot_mounted("base");
    base.ok(TARGETS);
    base.shutdown();
    family.stop();
    let base_image = oracle::sha256(&family.image("base"));

    family.serve_only(&["tom"]);
    let mut tom = family.boot_mounted("tom");
    own_files(&mut tom, "/mnt/local");
    for (what, operation) in illegal_operations() {
        refused_every_time(&mut tom, what, &operation);
    }
    allowed_every_time(&mut tom, "/mnt/local");
    tom.ok("sync; echo 3 > /proc/sys/vm/drop_caches");
    tom.ok(&format!(
        r#"for i in $(seq {TIMES}); do echo "content $i" | cmp - /mnt/files/f$i || exit 1; done
           cd /mnt/local/own; [ $(cat * | grep -c mine) = {TIMES} ]"#
    ));
    assert_eq!(
        tom.ok("ls /mnt/dir; ls /mnt"),
        "dir\nfiles\nlink\nlocal\nlost+found"
    );
    tom.shutdown();
    let log = family.stop();
    assert!(
        !log.iter().any(|line| line.contains("refused")),
        "an honest child was refused:\n{}",
        log.join("\n")
    );
    assert_eq!(
        oracle::sha256(&family.image("base")),
        base_image,
        "the base image changed"
    );
    family.finish();
}

#[test]
fn scenario_3_child_as_in_figure_3() {
    children_can_change_only_what_is_theirs(Filesystem::SEED, Placement::WholeDisk);
}

#[test]
fn scenario_3_child_with_default_features() {
    children_can_change_only_what_is_theirs(Filesystem::DEFAULTS, Placement::WholeDisk);
}

#[test]
fn scenario_3_child_in_a_gpt_partition() {
    children_can_change_only_what_is_theirs(Filesystem::BLOCKS_4K, Placement::Gpt);
}

#[test]
fn scenario_3_child_in_an_mbr_partition() {
    children_can_change_only_what_is_theirs(Filesystem::BLOCKS_2K, Placement::Mbr);
}

/// The base is confined like its children: their groups, and the directory in them, are not its to change.
#[test]
fn scenario_3_base_cannot_change_what_is_the_childrens() {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(Filesystem::DEFAULTS);
    family.serve();
    let mut base = family.boot_mounted("base");
    own_files(&mut base, "/mnt");
    for (what, operation) in illegal_operations_of_the_base() {
        refused_every_time(&mut base, what, &operation);
    }
    assert_eq!(base.ok("ls /mnt/local"), "");
    allowed_every_time(&mut base, "/mnt/own");
    base.shutdown();
    let log = family.finish();
    assert!(
        !log.iter().any(|line| line.contains("refused")),
        "an honest base was refused:\n{}",
        log.join("\n")
    );
}
