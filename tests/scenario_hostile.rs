//! Scenario 7: a child whose root, or whose kernel, does not play by the rules. Everything that is not its own
//! stays as it is, what it tried is in the daemon's log, and its own files outlive the attempt.

mod common;

use common::oracle::{self, Ext4, Layout, Tolerated};
use common::{Family, Filesystem, Guest, guests_available};

const VICTIMS: &str = r#"
    set -e
    mkdir /mnt/victims
    for name in overwritten truncated deleted renamed raw; do
        yes "$name" | head -c 50000 > /mnt/victims/$name
    done
    ln -s overwritten /mnt/victims/link
    sync
"#;

const VICTIMS_ARE_WHOLE: &str = r#"
    for name in overwritten truncated deleted renamed raw; do
        yes "$name" | head -c 50000 | cmp - /mnt/victims/$name || exit 1
    done
    [ "$(readlink /mnt/victims/link)" = overwritten ] && [ "$(stat -c %u /mnt/victims/link)" = 0 ]
"#;

const OWN_FILES: &str = r#"
    set -e
    for i in $(seq 50); do yes "own $i" | head -c $((i * 977)) > /mnt/local/own-$i; done
    sync
"#;

const OWN_FILES_ARE_WHOLE: &str = r#"
    for i in $(seq 50); do yes "own $i" | head -c $((i * 977)) | cmp - /mnt/local/own-$i || exit 1; done
"#;

const LATE_FILES: &str = r#"
    set -e
    for i in $(seq 20); do
        yes "late $i" | head -c $((i * 1977)) > /mnt/local/late-$i
        sync /mnt/local/late-$i
    done
    head -c 4096 /dev/zero > /mnt/local/scratch
    sync
"#;

const LATE_FILES_ARE_WHOLE: &str = r#"
    for i in $(seq 20); do yes "late $i" | head -c $((i * 1977)) | cmp - /mnt/local/late-$i || exit 1; done
"#;

/// The images that a hostile child must not change.
fn digests(family: &Family) -> [String; 2] {
    ["base", "ann"].map(|member| oracle::sha256(&family.image(member)))
}

/// A base with victims, a child `ann` with files of her own, a child `tom` with files of his own and about to
/// turn hostile.
fn family_before_the_attack(filesystem: Filesystem) -> Family {
    let mut family = Family::base_tom_and_ann(filesystem);
    family.serve();
    let mut base = family.boot_mounted("base");
    base.ok(VICTIMS);
    base.shutdown();
    for member in ["tom", "ann"] {
        let mut child = family.boot_mounted(member);
        child.ok(OWN_FILES);
        child.shutdown();
    }
    let log = family.stop();
    assert!(
        !log.iter().any(|line| line.contains("refused")),
        "refused too early:\n{}",
        log.join("\n")
    );
    family
}

/// The checks after an attack by `tom`: as after every scenario, but his own groups may have leaked.
fn finish(family: &Family, untouched: &[String; 2]) {
    assert_eq!(
        &digests(family),
        untouched,
        "the base or the sibling changed"
    );
    family.check_images(Tolerated::Nothing);
    family.base_filesystem().check_clean();
    family.flattened("ann").check_clean();
    let flat = family.flattened("tom");
    let layout = flat.layout();
    for complaint in flat.complaints() {
        assert!(
            is_leak_in(&complaint, &layout, &family.filesystem),
            "e2fsck of what tom sees: {complaint}; all of it:\n{}",
            flat.complaints().join("\n")
        );
    }
    assert_victims_are_whole(&family.base_filesystem(), &flat);
}

/// Whether e2fsck speaks of space that is marked as used, without a user, in the reserved groups: blocks, or an
/// inode whose entry was in a directory that is not the child's.
fn is_leak_in(complaint: &str, layout: &Layout, filesystem: &Filesystem) -> bool {
    let numbers = |text: &str| -> Vec<u64> {
        text.split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect()
    };
    let is_reserved = |group: usize| filesystem.reserved().contains(&group);
    if let Some(blocks) = complaint.strip_prefix("Block bitmap differences:") {
        return !blocks.contains('+')
            && numbers(blocks).iter().all(|block| {
                layout
                    .groups
                    .iter()
                    .position(|g| g.blocks.contains(block))
                    .is_some_and(is_reserved)
            });
    }
    if let Some(inodes) = complaint.strip_prefix("Inode bitmap differences:") {
        return !inodes.contains('+')
            && numbers(inodes)
                .iter()
                .all(|&inode| is_reserved(layout.group_of_inode(inode)));
    }
    if let Some(inode) = complaint.strip_prefix("Unattached inode ") {
        return is_reserved(layout.group_of_inode(numbers(inode)[0]));
    }
    for count in [
        "Free blocks count wrong",
        "Free inodes count wrong",
        "Directories count wrong",
    ] {
        if let Some(rest) = complaint.strip_prefix(count) {
            return match rest.split_once("group #") {
                Some((_, rest)) => {
                    is_reserved(usize::try_from(numbers(rest)[0]).expect("few groups"))
                }
                None => true,
            };
        }
    }
    ["Fix? no", "Connect to /lost+found? no"].contains(&complaint)
        || complaint.contains("********** WARNING: Filesystem still has errors **********")
}

fn assert_victims_are_whole(base: &Ext4, flat: &Ext4) {
    for victim in ["overwritten", "truncated", "deleted", "renamed", "raw"] {
        let expected: String = format!("{victim}\n").chars().cycle().take(50_000).collect();
        for filesystem in [base, flat] {
            assert!(
                filesystem.debugfs(&format!("cat /victims/{victim}")) == expected,
                "{victim} changed in {}",
                filesystem.file.display()
            );
        }
    }
}

/// A line of the log that says all of this of `tom`.
fn assert_logged(log: &[String], parts: &[&str]) {
    assert!(
        log.iter()
            .any(|line| line.contains("vm tom: refused")
                && parts.iter().all(|part| line.contains(part))),
        "no refusal with {parts:?} is in the log:\n{}",
        log.join("\n")
    );
}

fn inode_of(filesystem: &Ext4, path: &str) -> u64 {
    let text = filesystem.debugfs(&format!("stat {path}"));
    let number = text
        .split_whitespace()
        .nth(1)
        .expect("debugfs prints the inode");
    number.parse().expect("an inode number")
}

fn first_block_of(filesystem: &Ext4, path: &str) -> u64 {
    let text = filesystem.debugfs(&format!("blocks {path}"));
    text.split_whitespace()
        .next()
        .and_then(|block| block.parse().ok())
        .expect("the file has blocks")
}

/// What root can do through the filesystem once the immutable flags are gone, and through a power cut and the
/// recovery of a journal that is full of it.
fn attack_through_the_filesystem(filesystem: Filesystem) {
    if !guests_available() {
        return;
    }
    let mut family = family_before_the_attack(filesystem);
    let untouched = digests(&family);
    let base = family.base_filesystem();
    let victims_group = base
        .layout()
        .group_of_inode(inode_of(&base, "/victims/overwritten"));

    family.serve();
    let mut tom = family.boot_mounted("tom");
    tom.ok("cd /mnt/victims && chattr -i . overwritten truncated deleted renamed && chown -h 1000 link");
    tom.fails(
        "dd if=/dev/zero of=/mnt/victims/overwritten bs=4k count=1 conv=notrunc,fsync",
        "Input/output error",
    );
    tom.ok(LATE_FILES);
    tom.run("cd /mnt/victims; echo new > new; truncate -s 0 truncated; mv renamed elsewhere; rm deleted; sync");
    // From here on its kernel takes foreign blocks and inodes for free: nothing new, or it harms itself.
    tom.start("while true; do dd if=/dev/zero of=/mnt/local/scratch bs=4k count=1 conv=notrunc,fsync; echo again; done");
    tom.wait_for("again");
    tom.kill();

    // The journal is full of foreign blocks. It is recovered all the same, without them.
    let mut tom = family.boot_mounted("tom");
    tom.ok(OWN_FILES_ARE_WHOLE);
    tom.ok(LATE_FILES_ARE_WHOLE);
    tom.shutdown();
    // Until now its kernel had what it recovered in its cache; from here on it reads what is.
    let mut tom = family.boot_mounted("tom");
    tom.ok(VICTIMS_ARE_WHOLE);
    tom.ok("echo alive > /mnt/local/alive; sync");
    tom.ok(&format!("umount /mnt && {}", family.mount()));
    tom.ok(OWN_FILES_ARE_WHOLE);
    tom.ok(LATE_FILES_ARE_WHOLE);
    tom.ok(VICTIMS_ARE_WHOLE);
    assert_eq!(tom.ok("cat /mnt/local/alive"), "alive");
    tom.shutdown();

    let log = family.stop();
    let group = format!("block group {victims_group},");
    assert_logged(&log, &["kind data", "the request failed"]);
    assert_logged(&log, &["kind inode,", &group, "dropped"]);
    assert_logged(&log, &["kind block bitmap", "dropped"]);
    assert_logged(&log, &["kind inode bitmap", &group, "dropped"]);
    assert_logged(&log, &["kind group descriptor", &group, "dropped"]);
    finish(&family, &untouched);
}

#[test]
fn scenario_7_root_attacks_through_the_filesystem() {
    attack_through_the_filesystem(Filesystem::DEFAULTS);
}

#[test]
fn scenario_7_root_attacks_through_the_filesystem_with_4k_blocks() {
    attack_through_the_filesystem(Filesystem::BLOCKS_4K);
}

/// Writes noise straight to the disk: `len` bytes at a multiple of it, in blocks of `block_size`, of which the
/// kernel first reads what is around.
fn raw_write(at: u64, len: u64, block_size: u64) -> String {
    assert_eq!(at % len, 0);
    format!(
        "exec 4</dev/vda; blockdev --setbsz {block_size} /dev/vda || exit 99
        dd if=/dev/urandom of=/dev/vda bs={len} count=1 seek={} conv=notrunc,fsync",
        at / len
    )
}

/// Foreign data is refused to the guest's face; foreign records in metadata blocks are dropped, since an honest
/// kernel may write those. All of it is logged.
fn attack_on_the_raw_disk(filesystem: Filesystem) {
    if !guests_available() {
        return;
    }
    let mut family = family_before_the_attack(filesystem);
    let untouched = digests(&family);
    let base = family.base_filesystem();
    let layout = base.layout();
    let size = layout.block_size;
    let victim = layout.groups.len() - 2;
    assert!(!filesystem.reserved().contains(&victim));
    let group = &layout.groups[victim];
    let in_group = format!("of block group {victim}, kind ");

    family.serve();
    let mut tom = family.boot("tom");
    let foreign_data = first_block_of(&base, "/victims/raw");
    let foreign_directory = first_block_of(&base, "/victims");
    for block in [foreign_data, foreign_directory] {
        tom.fails(&raw_write(block * size, size, size), "Input/output error");
    }
    // Nor does what is the child's, in one request with what is not.
    let at = layout.groups[filesystem.reserved.0].blocks.start() * size - 4096;
    tom.fails(
        &format!("dd if=/dev/urandom of=/dev/vda bs=8k count=1 seek={at} oflag=direct,seek_bytes conv=notrunc"),
        "Input/output error",
    );
    for block in [
        group.block_bitmap,
        group.inode_bitmap,
        *group.inode_table.start(),
    ] {
        tom.ok(&raw_write(block * size, size, size));
    }
    let descriptor =
        layout.first_descriptor_block() * size + victim as u64 * layout.descriptor_size;
    tom.ok(&raw_write(descriptor, layout.descriptor_size, size));
    let data = layout.data_blocks_of(victim);
    let (start, end) = (data[0].start() * size, (data[0].end() + 1) * size);
    tom.fails(
        &format!("blkdiscard -o {start} -l {} /dev/vda", end - start),
        "Input/output error",
    );
    tom.ok(&family.mount());
    tom.ok(OWN_FILES_ARE_WHOLE);
    tom.ok(VICTIMS_ARE_WHOLE);
    tom.ok("echo alive > /mnt/local/alive; sync");
    tom.shutdown();

    let log = family.stop();
    let range = |block: u64| {
        format!(
            "refused write of bytes {}..{}",
            block * size,
            (block + 1) * size
        )
    };
    assert_logged(
        &log,
        &[&range(foreign_data), "kind data", "the request failed"],
    );
    assert_logged(
        &log,
        &[&range(foreign_directory), "kind data", "the request failed"],
    );
    assert_logged(&log, &[&format!("{in_group}block bitmap"), "dropped"]);
    assert_logged(&log, &[&format!("{in_group}inode bitmap"), "dropped"]);
    let first_inode = victim as u64 * layout.inodes_per_group + 1;
    assert_logged(
        &log,
        &[&format!("{in_group}inode, inode {first_inode}:"), "dropped"],
    );
    assert_logged(&log, &[&format!("{in_group}group descriptor"), "dropped"]);
    assert_logged(
        &log,
        &[
            &format!("refused discard of bytes {start}.."),
            "the request failed",
        ],
    );
    finish(&family, &untouched);
}

#[test]
fn scenario_7_raw_writes_and_discards() {
    attack_on_the_raw_disk(Filesystem::DEFAULTS);
}

#[test]
fn scenario_7_raw_writes_and_discards_without_checksums() {
    attack_on_the_raw_disk(Filesystem::SEED);
}

/// Immutable symbolic links do not exist, so an honest `chown -hR` changes foreign ones as far as its kernel can
/// tell. That must not cost it its filesystem.
#[test]
fn scenario_7_honest_changes_of_foreign_symbolic_links_do_no_harm() {
    if !guests_available() {
        return;
    }
    let mut family = family_before_the_attack(Filesystem::DEFAULTS);
    let untouched = digests(&family);
    let base = family.base_filesystem();
    let link = inode_of(&base, "/victims/link");
    family.serve();
    let mut tom = family.boot_mounted("tom");
    tom.fails(
        "chown -hR 1000:1000 /mnt/victims",
        "Operation not permitted",
    );
    // A name in an own directory for an inode that is not: what immutability forbids for files.
    tom.fails("ln /mnt/victims/link /mnt/local/linked", "Too many links");
    tom.ok("cp -a /mnt/victims /mnt/local/copy; chown -hR 1000:1000 /mnt/local/copy; sync");
    still_writable(&mut tom, "first");
    tom.ok(&format!("umount /mnt && {}", family.mount()));
    still_writable(&mut tom, "second");
    tom.ok(VICTIMS_ARE_WHOLE);
    tom.ok(OWN_FILES_ARE_WHOLE);
    assert_eq!(tom.ok("cat /mnt/local/first"), "first");
    assert_eq!(tom.ok("find /mnt/local/copy -user 1000 | wc -l"), "7");
    tom.shutdown();
    let log = family.stop();
    assert_logged(&log, &["kind inode", &format!("inode {link}:"), "dropped"]);
    assert!(
        !log.iter().any(|line| line.contains("the request failed")),
        "a request failed:\n{}",
        log.join("\n")
    );
    assert_eq!(
        digests(&family),
        untouched,
        "the base or the sibling changed"
    );
    family.finish();
}

fn still_writable(guest: &mut Guest, name: &str) {
    guest.ok(&format!(
        "echo {name} > /mnt/local/{name}; sync; grep '/mnt ext4 rw' /proc/mounts"
    ));
}
