//! Scenario 8: a disk of two partitions, the first the base's, the second the children's (seed 000, sections
//! 2.4 and 4.1).

mod common;

use common::{Family, FamilyConfig, Filesystem, Placement, guests_available};

#[test]
fn scenario_8_each_writes_its_partition_and_reads_the_others() {
    if !guests_available() {
        return;
    }
    let mut family = Family::new(FamilyConfig {
        filesystem: Filesystem {
            size_mib: 64,
            ..Filesystem::DEFAULTS
        },
        placement: Placement::ReservedPartition,
        children: &["tom", "ann"],
    });
    family.serve();
    let mut base = family.boot("base");
    let mut tom = family.boot("tom");
    let mut ann = family.boot("ann");

    base.ok("mount -t ext4 /dev/vda1 /mnt && cp -r /usr/share/package-00* /mnt && yes one | head -c 100000 > /mnt/file && umount /mnt");
    for (child, name) in [(&mut tom, "tom"), (&mut ann, "ann")] {
        child.ok(
            "mkdir /base && mount -t ext4 -o ro /dev/vda1 /base && mount -t ext4 /dev/vda2 /mnt",
        );
        child.ok("for p in 0 1 2 3 4 5 6 7 8 9; do diff -r /usr/share/package-00$p /base/package-00$p || exit 1; done");
        child.ok(&format!(
            "cp -r /usr/share/package-01* /mnt && echo {name} > /mnt/name && sync"
        ));
    }

    // As in section 4.1: the base mounts with -o sync, a child drops its caches.
    base.ok("mount -t ext4 -o sync /dev/vda1 /mnt && yes two | head -c 100000 | dd of=/mnt/file conv=notrunc bs=4k");
    tom.ok("yes one | head -c 100 | cmp -n 100 - /base/file || true; echo 3 > /proc/sys/vm/drop_caches");
    tom.ok("yes two | head -c 100000 | cmp - /base/file");
    base.ok("echo new > /mnt/new && umount /mnt");
    tom.ok("umount /base && mount -t ext4 -o ro /dev/vda1 /base");
    assert_eq!(tom.ok("cat /base/new"), "new");

    // Neither can write the other's.
    tom.fails(
        "dd if=/dev/zero of=/dev/vda1 bs=4k seek=100 count=1 oflag=direct conv=notrunc",
        "Input/output error",
    );
    base.fails(
        "dd if=/dev/zero of=/dev/vda2 bs=4k seek=100 count=1 oflag=direct conv=notrunc",
        "Input/output error",
    );
    tom.fails(
        "dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct conv=notrunc",
        "Input/output error",
    );

    for (child, name) in [(&mut tom, "tom"), (&mut ann, "ann")] {
        child.ok("umount /mnt && mount -t ext4 /dev/vda2 /mnt");
        child.ok("for p in 0 1 2 3 4 5 6 7 8 9; do diff -r /usr/share/package-01$p /mnt/package-01$p || exit 1; done");
        assert_eq!(child.ok("cat /mnt/name"), name);
    }
    assert_eq!(
        base.ok("mount -t ext4 -o ro /dev/vda2 /mnt && ls /mnt"),
        "lost+found"
    );
    for guest in [base, tom, ann] {
        guest.shutdown();
    }
    let log = family.finish();
    for vm in ["tom", "base"] {
        assert!(
            log.iter()
                .any(|line| line.contains(&format!("vm {vm}: refused write"))),
            "no refusal of {vm} in the log:\n{}",
            log.join("\n")
        );
    }
}
