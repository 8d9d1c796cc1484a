//! Scenarios 4, 5 and 6: VMs write side by side, and each sees what it should: the base's files through the
//! overlay, its own, and nobody else's.

mod common;

use common::oracle::{Ext4, Tolerated};
use common::{Family, Filesystem, Guest, guests_available};

/// Writes files of many sizes, with contents that tell who wrote them.
fn write_files(place: &str, author: &str, count: usize) -> String {
    format!(
        r#"
        set -e
        mkdir -p {place}
        for i in $(seq {count}); do
            yes "{author} $i" | head -c $((i * 97 % 30000 + 1)) > {place}/{author}-$i
        done
        sync
        "#
    )
}

/// Whether what [`write_files`] wrote is there, byte for byte.
fn has_files(place: &str, author: &str, count: usize) -> String {
    format!(
        r#"
        [ $(ls {place} | grep -c '^{author}-') = {count} ] || {{ echo "not {count} files"; exit 1; }}
        for i in $(seq {count}); do
            yes "{author} $i" | head -c $((i * 97 % 30000 + 1)) | cmp - {place}/{author}-$i || exit 1
        done
        "#
    )
}

fn remount(family: &Family, guest: &mut Guest) {
    guest.ok(&format!("umount /mnt && {}", family.mount()));
}

/// A child that is served with refresh=on-mount sees one moment of its base for as long as it is mounted, whatever the
/// base does and whatever it drops from its caches; the next mount, or a command, shows it the present.
#[test]
fn a_view_that_is_refreshed_on_mount_stays_while_it_is_mounted() {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(Filesystem::BLOCKS_4K);
    let control = family.path("control.sock").display().to_string();
    family.serve_with(
        &[("base", ""), ("tom", ",refresh=on-mount")],
        &["--control-socket", &control],
    );
    let publish = |base: &mut Guest, word: &str| {
        base.ok(&format!(
            "yes {word} | head -c 300000 > /mnt/state && touch /mnt/{word} && sync"
        ));
    };
    let sees = |tom: &mut Guest, word: &str, not: &str| {
        tom.ok(&format!(
            "echo 3 > /proc/sys/vm/drop_caches; yes {word} | head -c 300000 | cmp - /mnt/state && \
             [ -e /mnt/{word} ] && [ ! -e /mnt/{not} ]"
        ));
    };
    let mut base = family.boot_mounted("base");
    publish(&mut base, "first");
    let mut tom = family.boot_mounted("tom");
    sees(&mut tom, "first", "second");
    publish(&mut base, "second");
    tom.ok(&write_files("/mnt/local/own", "tom", 10));
    sees(&mut tom, "first", "second");
    remount(&family, &mut tom);
    sees(&mut tom, "second", "third");
    tom.ok(&has_files("/mnt/local/own", "tom", 10));

    tom.ok("umount /mnt");
    publish(&mut base, "third");
    let said = family.seethrough_ok(&["refresh", "--control-socket", &control, "tom"]);
    assert!(said.contains("as it is now"), "{said}");
    tom.ok(&family.mount());
    sees(&mut tom, "third", "fourth");
    tom.shutdown();
    base.shutdown();
    family.stop();
    let left = family.seethrough_ok(&["snapshot", "-l", "base.qcow2"]);
    assert!(!left.contains("seethrough-pin"), "{left}");
    family.check_images(Tolerated::Nothing);
    family.check_filesystems();
}

/// Which inode owns a block, by `debugfs`; `None` when the block is free.
fn owner_of_block(filesystem: &Ext4, block: u64) -> Option<u64> {
    let answer = filesystem.debugfs(&format!("icheck {block}"));
    let line = answer.lines().nth(1).expect("debugfs answers");
    line.split_whitespace()
        .nth(1)
        .expect("debugfs names an inode")
        .parse()
        .ok()
}

/// Section 2.2 of seed 000. Block 1050 and the inodes that share a block were where two writers met; now the
/// base uses block 1050, the child blocks and inodes of its own groups, and both read what they should.
#[test]
fn scenario_4_no_block_or_inode_is_used_by_two_writers() {
    if !guests_available() {
        return;
    }
    // As in the seed, but for groups of a quarter of the size: the base shall fill its own.
    let mut family = Family::base_and_tom(Filesystem {
        size_mib: 56,
        mkfs: &[
            "-b",
            "4096",
            "-g",
            "2504",
            "-O",
            "^has_journal,^flex_bg,^metadata_csum,^64bit",
        ],
        reserved: (1, 1),
    });
    assert_eq!(
        owner_of_block(&family.base_filesystem(), 1050),
        None,
        "block 1050 is not free at first"
    );

    family.serve();
    let mut base = family.boot_mounted("base");
    let mut tom = family.boot_mounted("tom");
    // In turns, and file by file: the order in which the hazards arose, and its reverse.
    for round in 1..=4 {
        tom.ok(&write_files(
            &format!("/mnt/local/round-{round}"),
            "snapshot_1050",
            20,
        ));
        base.ok(&write_files(
            &format!("/mnt/round-{round}"),
            "base_1050",
            20,
        ));
    }
    // One more file of the base's, of all its other blocks: block 1050 is among them.
    base.ok("mount -o remount,nodelalloc /mnt; echo 0 > /sys/fs/ext4/vda/reserved_clusters");
    base.fails(
        "yes base_1050 | dd of=/mnt/base_1050 bs=1M iflag=fullblock",
        "No space left on device",
    );
    base.ok("sync");
    let base_inodes = inodes(&mut base, "/mnt/round-1 /mnt/round-4");
    let tom_inodes = inodes(&mut tom, "/mnt/local/round-1 /mnt/local/round-4");
    base.shutdown();

    remount(&family, &mut tom);
    for round in 1..=4 {
        tom.ok(&has_files(
            &format!("/mnt/local/round-{round}"),
            "snapshot_1050",
            20,
        ));
        tom.ok(&has_files(&format!("/mnt/round-{round}"), "base_1050", 20));
    }
    tom.ok("yes base_1050 | head -c $(stat -c %s /mnt/base_1050) | cmp - /mnt/base_1050");
    tom.shutdown();
    family.stop();

    let filesystem = family.base_filesystem();
    let layout = filesystem.layout();
    assert!(
        owner_of_block(&filesystem, 1050).is_some(),
        "the base does not use block 1050"
    );
    let own = |inode: &u64| {
        family
            .filesystem
            .reserved()
            .contains(&layout.group_of_inode(*inode))
    };
    assert!(
        !base_inodes.iter().any(own),
        "the base uses inodes of the child's groups: {base_inodes:?}"
    );
    assert!(
        tom_inodes.iter().all(own),
        "the child uses inodes of the base's groups: {tom_inodes:?}"
    );
    let flat = family.flattened("tom");
    for block in blocks_of_file(&flat, "/local/round-1/snapshot_1050-20") {
        assert!(
            family
                .filesystem
                .reserved()
                .any(|group| layout.groups[group].blocks.contains(&block)),
            "the child uses block {block}"
        );
    }
    family.finish();
}

fn inodes(guest: &mut Guest, places: &str) -> Vec<u64> {
    let text = guest.ok(&format!("find {places} -exec stat -c %i {{}} +"));
    text.lines()
        .map(|line| line.parse().expect("an inode number"))
        .collect()
}

fn blocks_of_file(filesystem: &Ext4, path: &str) -> Vec<u64> {
    let text = filesystem.debugfs(&format!("blocks {path}"));
    text.split_whitespace()
        .map(|word| word.parse().expect("a block number"))
        .collect()
}

/// What the base adds, rewrites and removes, a child sees after a remount; and again.
fn child_sees_the_bases_updates(filesystem: Filesystem) {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(filesystem);
    family.serve();
    let mut base = family.boot_mounted("base");
    let mut tom = family.boot_mounted("tom");
    tom.ok(&write_files("/mnt/local", "tom", 50));

    base.ok(&write_files("/mnt/usr", "first", 100));
    base.ok(
        "echo one > /mnt/version; mkdir -p /mnt/deep/er/still; echo deep > /mnt/deep/er/still/file",
    );
    base.ok("sync && umount /mnt");
    remount(&family, &mut tom);
    tom.ok(&has_files("/mnt/usr", "first", 100));
    assert_eq!(
        tom.ok("cat /mnt/version /mnt/deep/er/still/file"),
        "one\ndeep"
    );
    tom.ok(&has_files("/mnt/local", "tom", 50));

    tom.ok(&write_files("/mnt/local", "again", 50));
    base.ok(&family.mount());
    base.ok(&write_files("/mnt/usr", "second", 100));
    base.ok("rm /mnt/usr/first-*; echo two > /mnt/version; mv /mnt/deep /mnt/moved");
    base.ok("sync && umount /mnt");
    remount(&family, &mut tom);
    tom.ok(&has_files("/mnt/usr", "second", 100));
    assert_eq!(tom.ok("ls /mnt/usr | grep -c first || true"), "0");
    assert_eq!(
        tom.ok("cat /mnt/version /mnt/moved/er/still/file"),
        "two\ndeep"
    );
    tom.fails("ls /mnt/deep", "No such file or directory");
    tom.ok(&has_files("/mnt/local", "tom", 50));
    tom.ok(&has_files("/mnt/local", "again", 50));
    base.shutdown();
    tom.shutdown();
    family.finish();
}

#[test]
fn scenario_5_child_sees_the_bases_updates_after_a_remount() {
    child_sees_the_bases_updates(Filesystem::DEFAULTS);
}

#[test]
fn scenario_5_child_sees_the_bases_updates_with_4k_blocks() {
    child_sees_the_bases_updates(Filesystem::BLOCKS_4K);
}

#[test]
fn scenario_5_child_sees_the_bases_updates_without_a_journal() {
    child_sees_the_bases_updates(Filesystem::SEED);
}

/// Section 4.2.4 of seed 000: a file's content refreshes once the caches are dropped, without a remount.
#[test]
fn scenario_5_content_refreshes_after_dropping_caches() {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(Filesystem::DEFAULTS);
    family.serve();
    let mut base = family.boot_mounted("base");
    base.ok("yes old | head -c 100000 > /mnt/file; sync");
    let mut tom = family.boot_mounted("tom");
    tom.ok("yes old | head -c 100000 | cmp - /mnt/file; echo own > /mnt/local/own");
    for content in ["new", "hot"] {
        base.ok(&format!(
            "yes {content} | head -c 100000 | dd of=/mnt/file conv=notrunc,fsync bs=4k"
        ));
        tom.ok("sync; echo 3 > /proc/sys/vm/drop_caches");
        tom.ok(&format!("yes {content} | head -c 100000 | cmp - /mnt/file"));
        assert_eq!(tom.ok("cat /mnt/local/own"), "own");
    }
    base.shutdown();
    tom.shutdown();
    family.finish();
}

#[test]
fn scenario_6_siblings_write_at_once_and_do_not_see_each_other() {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_tom_and_ann(Filesystem::DEFAULTS);
    family.serve();
    let mut base = family.boot_mounted("base");
    let mut tom = family.boot_mounted("tom");
    let mut ann = family.boot_mounted("ann");
    // The same names, so that nothing but the contents tells them apart.
    let same_names = |author: &str| {
        format!(
            r#"set -e
            for i in $(seq 300); do yes "{author} $i" | head -c $((i * 61 % 20000 + 1)) > /mnt/local/file-$i; done
            sync"#
        )
    };
    let has_own = |author: &str| {
        format!(
            r#"[ "$(ls /mnt/local | wc -l)" = 300 ] || exit 1
            for i in $(seq 300); do
                yes "{author} $i" | head -c $((i * 61 % 20000 + 1)) | cmp - /mnt/local/file-$i || exit 1
            done"#
        )
    };
    tom.start(&same_names("tom"));
    ann.start(&same_names("ann"));
    assert_eq!(tom.wait().status, 0);
    assert_eq!(ann.wait().status, 0);
    for _ in 0..2 {
        tom.ok(&has_own("tom"));
        ann.ok(&has_own("ann"));
        assert_eq!(base.ok("ls /mnt/local"), "");
        for guest in [&mut tom, &mut ann, &mut base] {
            remount(&family, guest);
        }
    }
    for guest in [tom, ann, base] {
        guest.shutdown();
    }
    family.finish();
}

/// What the base has committed to its journal and not yet brought to its place is what a child sees at its next mount:
/// while the base runs, after its VM was killed, and after the daemon was.
#[test]
fn scenario_10_children_see_the_bases_journal() {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(Filesystem::DEFAULTS);
    family.serve();
    let mut base = family.boot_mounted("base");
    let mut tom = family.boot_mounted("tom");
    // Nothing but a commit: a sync of everything would bring it to its place.
    for round in 1..=3 {
        base.ok(&format!(
            "mkdir /mnt/in-journal-{round} && yes committed-{round} | head -c 30000 > /mnt/in-journal-{round}/file && \
             sync /mnt/in-journal-{round}/file /mnt/in-journal-{round}"
        ));
        remount(&family, &mut tom);
        tom.ok(&has_committed(round));
    }
    base.kill();
    remount(&family, &mut tom);
    tom.ok(&has_committed(3));
    family.kill_daemon();
    tom.kill();

    let in_place = family.base_filesystem().debugfs("ls -p /");
    assert!(
        in_place.contains("/local/") && !in_place.contains("/in-journal-3/"),
        "it has come to its place, so that nothing is shown here: {in_place}"
    );
    family.serve();
    let mut tom = family.boot_mounted("tom");
    tom.ok(&has_committed(3));
    let mut base = family.boot_mounted("base");
    base.ok(&has_committed(3));
    remount(&family, &mut tom);
    tom.ok(&has_committed(3));
    base.shutdown();
    remount(&family, &mut tom);
    tom.ok(&has_committed(3));
    tom.shutdown();
    family.stop();
    family.check_images(common::oracle::Tolerated::Leaks);
    family.check_filesystems();
}

/// Section 2.4 of seed 000, with block groups in place of partitions: each of three siblings writes a region of its own
/// in the base, and reads those of the others.
#[test]
fn scenario_11_siblings_write_their_shared_regions_and_read_the_others() {
    const SHARED: [(&str, &str, &str); 3] = [
        ("tom", "photos", "20-21"),
        ("ann", "videos", "22"),
        ("kim", "music", "23"),
    ];
    if !guests_available() {
        return;
    }
    let mut family = Family::with_shared_regions(Filesystem::DEFAULTS, &SHARED);
    // One more child that may write what tom writes, when tom does not.
    family.create_child_of("tim", "photos");
    family.serve_only(&["base", "tom", "ann", "kim"]);
    let again =
        family.seethrough_refuses(&["serve", "--vm", "name=tim,image=tim.qcow2,socket=tim.sock"]);
    assert!(
        again.contains("base.qcow2: cannot get the \"write\" lock"),
        "{again}"
    );

    let mut base = family.boot_mounted("base");
    let mut guests: Vec<(Guest, &str, &str)> = SHARED
        .iter()
        .map(|(child, region, _)| (family.boot_mounted(child), *child, *region))
        .collect();
    for round in 1..=2 {
        base.start(&write_files(&format!("/mnt/usr-{round}"), "base", 60));
        for (guest, child, region) in &mut guests {
            guest.start(&write_files(&format!("/mnt/{region}/{round}"), child, 60));
        }
        assert_eq!(base.wait().status, 0);
        for (guest, ..) in &mut guests {
            assert_eq!(guest.wait().status, 0);
        }
        // All stay mounted while each in turn looks at what the others have brought to its place.
        remount(&family, &mut base);
        for (guest, ..) in &mut guests {
            remount(&family, guest);
        }
        for (child, region, _) in SHARED {
            let has_all = has_files(&format!("/mnt/{region}/{round}"), child, 60);
            base.ok(&has_all);
            base.fails(
                &format!("touch /mnt/{region}/new"),
                "Operation not permitted",
            );
            for (guest, name, _) in &mut guests {
                guest.ok(&has_all);
                guest.ok(&has_files(&format!("/mnt/usr-{round}"), "base", 60));
                if *name != child {
                    guest.fails(
                        &format!("touch /mnt/{region}/new"),
                        "Operation not permitted",
                    );
                }
            }
        }
    }

    // Tom is cut off while it writes, and so is the daemon: tim has to wait until tom was there again.
    let (mut tom, ..) = guests.remove(0);
    tom.start(
        "i=0; while true; do i=$((i + 1)); mkdir /mnt/photos/d-$i && sync /mnt/photos/d-$i && echo made $i.; done",
    );
    tom.wait_for("made 20.");
    for (guest, ..) in guests {
        guest.shutdown();
    }
    base.shutdown();
    family.kill_daemon();
    tom.kill();
    let held =
        family.seethrough_refuses(&["serve", "--vm", "name=tim,image=tim.qcow2,socket=tim.sock"]);
    assert!(held.contains("held by tom.qcow2"), "{held}");
    assert!(
        family
            .seethrough_refuses(&["flatten", "ann.qcow2", "no"])
            .contains("held by tom.qcow2")
    );

    family.serve_only(&["base", "tom", "ann", "kim"]);
    let mut tom = family.boot_mounted("tom");
    tom.ok("for i in $(seq 20); do [ -d /mnt/photos/d-$i ] || exit 1; done");
    tom.ok(&has_files("/mnt/photos/2", "tom", 60));
    tom.shutdown();
    family.stop();
    family.serve_only(&["tim", "ann"]);
    let mut tim = family.boot_mounted("tim");
    tim.ok("rm -r /mnt/photos/d-* /mnt/photos/1 && echo tim > /mnt/photos/name");
    let mut ann = family.boot_mounted("ann");
    ann.ok(&has_files("/mnt/photos/2", "tom", 60));
    tim.shutdown();
    remount(&family, &mut ann);
    assert_eq!(
        ann.ok("cat /mnt/photos/name; echo $(ls /mnt/photos)"),
        "tim\n2 name"
    );
    ann.shutdown();
    family.stop();
    let regions = family.seethrough_ok(&["regions", "base.qcow2"]);
    assert!(
        regions.contains("shared;") && !regions.contains("held by"),
        "{regions}"
    );
    family.check_images(common::oracle::Tolerated::Leaks);
    family.check_filesystems();
}

/// Whether a child reads all that the base committed up to a round.
fn has_committed(rounds: usize) -> String {
    format!(
        "for i in $(seq {rounds}); do \
         yes committed-$i | head -c 30000 | cmp - /mnt/in-journal-$i/file || exit 1; done"
    )
}
