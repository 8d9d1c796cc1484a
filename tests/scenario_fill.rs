//! Scenarios 1 and 2: filling a filesystem uses a VM's own block groups and no others, to the last block.

mod common;

use common::oracle::{self, Ext4, Layout};
use common::{Family, Filesystem, guests_available};

/// Copies of `/usr/share` until the filesystem is full, as in the figures; then files that take the rest, which
/// every Linux keeps back so that delayed allocation cannot fail: hence without that.
const FILL: &str = r#"
    set -e
    n=0
    while cp -r /usr/share "$PLACE/copy-$n" 2>/tmp/errors; do n=$((n + 1)); done
    [ -s /tmp/errors ]
    if grep -v 'No space left on device' /tmp/errors; then exit 2; fi
    sync
    mount -o remount,nodelalloc /mnt
    echo 0 > /sys/fs/ext4/vda/reserved_clusters
    # Small files at the end: the last free blocks may be too few for a large one's metadata.
    for n in 0 1 2 3; do
        if dd if=/dev/zero of="$PLACE/rest-$n" bs=1k 2>/tmp/errors; then exit 3; fi
        grep -q 'No space left on device' /tmp/errors
        sync
    done
"#;

/// Which files fit is up to the order in which directories list theirs, and what came too late is cut short.
const HOLDS_COPIES: &str = r#"
    cd /mnt/local/copy-0
    same=$(find . -type f | head -n 300 | while read -r file; do
        cmp -s "$file" "/usr/share/$file" && echo same
    done | wc -l)
    cd /
    [ "$same" -gt 50 ] || { echo "only $same of 300 files are whole"; exit 1; }
"#;

fn fill(place: &str) -> String {
    format!("PLACE={place}\n{FILL}")
}

fn descriptions(layout: &Layout, groups: &[usize]) -> Vec<String> {
    groups
        .iter()
        .map(|&group| layout.groups[group].text.clone())
        .collect()
}

fn bytes(filesystem: &Ext4, layout: &Layout, groups: &[usize]) -> Vec<u8> {
    filesystem.read_blocks(layout.block_size, &layout.blocks_of(groups))
}

/// Figure 1.
fn base_fills_all_groups_but_the_reserved_ones(filesystem: Filesystem) {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(filesystem);
    let reserved: Vec<usize> = filesystem.reserved().collect();
    let before = family.base_filesystem();
    let layout = before.layout();
    let untouched = (
        descriptions(&layout, &reserved),
        bytes(&before, &layout, &reserved),
    );

    family.serve();
    let mut base = family.boot_mounted("base");
    base.ok(&fill("/mnt"));
    base.shutdown();
    family.stop();

    let after = family.base_filesystem();
    let layout = after.layout();
    assert!(
        untouched
            == (
                descriptions(&layout, &reserved),
                bytes(&after, &layout, &reserved)
            ),
        "the reserved groups changed"
    );
    for group in filesystem.others(&layout) {
        assert_eq!(
            layout.groups[group].free_blocks, 0,
            "group {group} is not full"
        );
    }
    family.finish();
}

/// Figure 2.
fn child_fills_its_own_groups_alone(filesystem: Filesystem) {
    if !guests_available() {
        return;
    }
    let mut family = Family::base_and_tom(filesystem);
    let before = family.flattened("tom");
    let layout = before.layout();
    let others = filesystem.others(&layout);
    let untouched = (
        descriptions(&layout, &others),
        bytes(&before, &layout, &others),
    );
    let base_image = oracle::sha256(&family.image("base"));

    family.serve();
    let mut tom = family.boot_mounted("tom");
    tom.ok(&fill("/mnt/local"));
    tom.ok(HOLDS_COPIES);
    tom.shutdown();
    let log = family.stop();
    assert_eq!(
        refusals(&log),
        Vec::<&String>::new(),
        "an honest child was refused"
    );

    assert_eq!(
        oracle::sha256(&family.image("base")),
        base_image,
        "the base image changed"
    );
    let after = family.flattened("tom");
    let layout = after.layout();
    assert!(
        untouched
            == (
                descriptions(&layout, &others),
                bytes(&after, &layout, &others)
            ),
        "groups that are not the child's changed"
    );
    for group in filesystem.reserved() {
        assert_eq!(
            layout.groups[group].free_blocks, 0,
            "group {group} is not full"
        );
    }
    family.finish();
}

fn refusals(log: &[String]) -> Vec<&String> {
    log.iter().filter(|line| line.contains("refused")).collect()
}

#[test]
fn scenario_1_base_fills_its_groups_as_in_figure_1() {
    base_fills_all_groups_but_the_reserved_ones(Filesystem::SEED);
}

#[test]
fn scenario_1_base_fills_its_groups_with_default_features() {
    base_fills_all_groups_but_the_reserved_ones(Filesystem::BLOCKS_4K);
}

#[test]
fn scenario_2_child_fills_its_groups_as_in_figure_2() {
    child_fills_its_own_groups_alone(Filesystem::SEED);
}

#[test]
fn scenario_2_child_fills_its_groups_with_default_features() {
    child_fills_its_own_groups_alone(Filesystem::DEFAULTS);
}

/// The superblock keeps 5 % of the blocks for root: of a large base that would be more than all of a small
/// region, so a child is shown its share of them.
#[test]
fn scenario_2_ordinary_user_fills_a_small_region() {
    if !guests_available() {
        return;
    }
    let filesystem = Filesystem::BLOCKS_2K;
    let mut family = Family::base_and_tom(filesystem);
    family.serve();
    let mut tom = family.boot_mounted("tom");
    tom.ok("mount -o remount,nodelalloc /mnt; echo 0 > /sys/fs/ext4/vda/reserved_clusters; mkdir -m 777 /mnt/local/user");
    let free_kib = tom.number("df -k /mnt | tail -n 1 | awk '{ print $2 - $3 }'");
    tom.fails(
        "su user -c 'dd if=/dev/zero of=/mnt/local/user/rest bs=2k'",
        "No space left on device",
    );
    let used_kib = tom.number("du -k /mnt/local/user/rest | cut -f 1");
    assert!(
        used_kib >= free_kib * 94 / 100,
        "of {free_kib} KiB an ordinary user could fill {used_kib}"
    );
    tom.shutdown();
    family.finish();
}
