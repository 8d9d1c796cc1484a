//! Scenario 9: the daemon is killed while guests write. Whatever a guest was told is on disk, is on disk.

mod common;

use common::oracle::Tolerated;
use common::{Family, Filesystem, Guest, guests_available};

/// Writes files without end, and says of each when it is on disk: by turns the file alone is made so, and
/// everything.
fn writer(place: &str, author: &str, first: usize) -> String {
    format!(
        r#"
        i={first}
        while true; do
            yes "{author} $i" | head -c $((i * 389 % 50000 + 1)) > {place}/{author}-$i || exit 1
            if [ $((i % 2)) = 0 ]; then sync; else sync {place}/{author}-$i; fi || exit 1
            echo "synced $i."
            i=$((i + 1))
        done
        "#
    )
}

/// Checks every file up to and including `last`.
fn has_files(place: &str, author: &str, last: usize) -> String {
    format!(
        r#"for i in $(seq {last}); do
            yes "{author} $i" | head -c $((i * 389 % 50000 + 1)) | cmp - {place}/{author}-$i || exit 1
        done"#
    )
}

/// The last file that the writer reported, or the last one of the round before.
fn last_synced(output: &str, before: usize) -> usize {
    let reported = output
        .lines()
        .filter_map(|line| line.strip_prefix("synced ")?.strip_suffix('.'));
    reported
        .filter_map(|number| number.parse().ok())
        .next_back()
        .unwrap_or(before)
}

#[test]
fn scenario_9_synced_files_survive_the_daemons_death() {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(Filesystem::DEFAULTS);
    let (mut base_last, mut tom_last) = (0, 0);
    for files in [7, 30] {
        family.serve();
        let (mut base, mut tom) = boot_and_verify(&family, base_last, tom_last);
        base.start(&writer("/mnt", "base", base_last + 1));
        tom.start(&writer("/mnt/local", "tom", tom_last + 1));
        base.wait_for(&format!("synced {}.", base_last + files));
        tom.wait_for(&format!("synced {}.", tom_last + files));
        family.kill_daemon();
        base_last = last_synced(&base.kill_and_read(), base_last);
        tom_last = last_synced(&tom.kill_and_read(), tom_last);
        family.check_images(Tolerated::Leaks);
    }
    family.serve();
    let (base, tom) = boot_and_verify(&family, base_last, tom_last);
    base.shutdown();
    tom.shutdown();
    family.stop();
    family.check_images(Tolerated::Leaks);
    family.check_filesystems();
}

/// Boots both, whose journals recover, and looks for every file that was synced.
fn boot_and_verify(family: &Family, base_last: usize, tom_last: usize) -> (Guest, Guest) {
    let mut base = family.boot_mounted("base");
    let mut tom = family.boot_mounted("tom");
    base.ok(&has_files("/mnt", "base", base_last));
    tom.ok(&has_files("/mnt/local", "tom", tom_last));
    // What the base recovered, the child sees as well, after a remount.
    base.ok(&format!("umount /mnt && {}", family.mount()));
    tom.ok(&format!("umount /mnt && {}", family.mount()));
    tom.ok(&has_files("/mnt", "base", base_last));
    for guest in [&mut base, &mut tom] {
        // A guest that takes the disk for a write-through one sends no flush.
        assert_eq!(
            guest.ok("cat /sys/block/vda/queue/write_cache"),
            "write back"
        );
    }
    (base, tom)
}
