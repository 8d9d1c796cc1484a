//! `create --grow`: block groups that a child alone has, against what resize2fs makes, and what is refused.

use serde_json::Value;

use super::{Bench, MIB, region};

/// How a filesystem is made, how large it is, which of its groups are a region, and how much a child has besides.
struct Case {
    mke2fs: &'static str,
    megabytes: u64,
    groups: &'static str,
    grow: &'static str,
}

const fn case(
    mke2fs: &'static str,
    megabytes: u64,
    groups: &'static str,
    grow: &'static str,
) -> Case {
    Case {
        mke2fs,
        megabytes,
        groups,
        grow,
    }
}

/// Each makes its descriptor table longer, or does not; the last group is whole or not, and the region's or not.
const CASES: &[Case] = &[
    case("-t ext4 -b 4096", 1024, "5", "1G"),
    case("-t ext4 -b 4096", 1020, "5-7", "20G"),
    case(
        "-t ext4 -b 4096 -O ^metadata_csum,uninit_bg",
        1020,
        "5",
        "20G",
    ),
    case("-t ext4 -b 2048 -g 16384", 250, "6", "6G"),
    case("-t ext4 -b 1024", 61, "5", "600M"),
    case(
        "-t ext4 -b 1024 -O ^64bit,^metadata_csum,^uninit_bg",
        61,
        "7",
        "2G",
    ),
    case("-t ext4 -b 1024 -O sparse_super2", 60, "7", "300M"),
    case("-t ext4 -b 1024 -O ^flex_bg", 61, "3", "600M"),
    case("-t ext4 -b 1024 -G 4", 61, "7", "600M"),
    case("-t ext3 -b 1024", 61, "5", "600M"),
];

/// What dumpe2fs says in its header of these names.
fn header(bench: &Bench, image: &str) -> Vec<String> {
    const NAMES: [&str; 6] = [
        "Inode count:",
        "Block count:",
        "Reserved block count:",
        "Reserved GDT blocks:",
        "Inodes per group:",
        "Filesystem features:",
    ];
    let text = bench.run(&format!("dumpe2fs -h {image}"));
    let of_interest = |line: &&str| NAMES.iter().any(|name| line.starts_with(name));
    text.lines()
        .filter(of_interest)
        .map(str::to_owned)
        .collect()
}

/// What the inode that keeps room for descriptors has, and where.
fn resize_inode(bench: &Bench, image: &str) -> Vec<String> {
    let text = bench.run_words(&["debugfs", "-R", "stat <7>", image]);
    let of_interest = |line: &&str| {
        ["Links:", "(", "TOTAL:"]
            .iter()
            .any(|start| line.starts_with(start))
    };
    text.lines()
        .filter(of_interest)
        .map(str::to_owned)
        .collect()
}

/// Where the groups hold copies.
fn copies(bench: &Bench, image: &str) -> Vec<String> {
    let text = bench.run(&format!("dumpe2fs {image}"));
    let heads = text.lines().map(str::trim);
    heads
        .filter(|line| line.contains(" superblock at "))
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_grown_child_is_the_disk_that_resize2fs_would_make() {
    for case in CASES {
        let bench = Bench::new();
        bench.make_file("base.raw", case.megabytes * MIB);
        bench.run(&format!("mke2fs -q -F {} base.raw", case.mke2fs));
        bench.run(&format!(
            "seethrough prepare -f raw base.raw --reserve local=groups:{} --dir /local",
            case.groups
        ));
        bench.run(&format!(
            "seethrough create -q -b base.raw -F raw --region local --grow {} tom.qcow2",
            case.grow
        ));
        bench.run("qemu-img check -q tom.qcow2");
        bench.run("seethrough flatten -O raw tom.qcow2 flat.raw");
        bench.assert_clean("flat.raw");
        // A copy has to be as good as what it is of.
        bench.assert_clean("base.raw");
        let blocks = header(&bench, "flat.raw")
            .iter()
            .find_map(|line| Some(line.strip_prefix("Block count:")?.trim().to_owned()))
            .unwrap();
        bench.run("e2fsck -fp base.raw");
        let length = std::fs::metadata(bench.path("flat.raw")).unwrap().len();
        bench.make_longer("base.raw", length);
        bench.run(&format!("resize2fs base.raw {blocks}"));
        assert_eq!(
            header(&bench, "flat.raw"),
            header(&bench, "base.raw"),
            "{}",
            case.mke2fs
        );
        // resize2fs moves the last copy to the new last group.
        if case.mke2fs.contains("sparse_super2") {
            continue;
        }
        for of in [resize_inode, copies] {
            assert_eq!(
                of(&bench, "flat.raw"),
                of(&bench, "base.raw"),
                "{}",
                case.mke2fs
            );
        }
    }
}

#[test]
fn groups_of_a_childs_own_are_told_of_everywhere() {
    let bench = Bench::new();
    bench.make_base();
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /local");
    let said = bench.run("seethrough create -b base.qcow2 --region local --grow 30M tom.qcow2");
    assert!(
        said.contains("size=100663296") && said.contains("grow="),
        "{said}"
    );
    // 30 MiB are whole groups of 8 MiB.
    let grown = region(&bench, "tom.qcow2", "(grown)");
    assert_eq!(grown["groups"], "8-11");
    assert_eq!(grown["directory"], "/local");
    assert_eq!(grown["size"], 32 * MIB);
    let df: Value =
        serde_json::from_str(&bench.run("seethrough df --output json tom.qcow2")).unwrap();
    let regions = df[0]["regions"].as_array().unwrap();
    assert_eq!(regions[1]["name"], "(grown)");
    assert_eq!(regions[1]["free"], grown["free"]);
    let map = bench.run("seethrough map --groups --output json tom.qcow2");
    let map: Value = serde_json::from_str(&map).unwrap();
    let groups = map["groups"].as_array().unwrap();
    assert_eq!(groups.len(), 12);
    assert!(
        groups[8..].iter().all(|group| group["region"] == "(grown)"),
        "{map}"
    );
    for output in ["human", "svg"] {
        let text = bench.run(&format!(
            "seethrough map --groups --output {output} tom.qcow2"
        ));
        assert!(text.contains("(grown)"), "{text}");
    }
    let info = bench.run("seethrough info tom.qcow2");
    assert!(
        info.contains("\"grown\":{\"from\":16384,\"groups\":4"),
        "{info}"
    );
    let base = bench.run("seethrough map --groups base.qcow2");
    assert!(!base.contains("(grown)"), "{base}");
}

#[test]
fn a_child_cannot_grow_where_its_groups_would_lead_nowhere_or_have_no_room() {
    let bench = Bench::new();
    bench.make_base();
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /local");
    bench.run(
        "seethrough prepare base.qcow2 --reserve common=groups:5 --dir /common --shared common",
    );
    for (options, expected) in [
        ("--grow 1G", "--region"),
        ("--region local --grow 0", "leave --grow out"),
        ("--region local --grow lots", "no size"),
        ("--region common --grow 1G", "is shared"),
        ("--region local --grow 64P", "take less"),
        ("--region local -o size=1G", "--grow"),
    ] {
        let line = format!("seethrough create -b base.qcow2 {options} tom.qcow2");
        let said = bench.refused(&line);
        assert!(said.contains(expected), "{line}:\n{said}");
        assert!(!bench.path("tom.qcow2").exists(), "{line}");
    }

    bench.make_file("small.raw", 64 * MIB);
    bench.run("mke2fs -q -F -t ext4 -b 1024 -E resize=140000 small.raw");
    bench.run("seethrough prepare -f raw small.raw --reserve local --size 6M --dir /local");
    let grow = |size: &str| {
        format!("seethrough create -q -b small.raw -F raw --region local --grow {size} tom.qcow2")
    };
    let said = bench.refused(&grow("2G"));
    assert!(said.contains("^resize_inode"), "{said}");
    let room = said
        .split("which are ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .unwrap();
    bench.run(&grow(room));

    bench.make_file("disk.raw", 100 * MIB);
    bench.run("sgdisk -o -n 1:2048:+64M -n 2:0:+16M disk.raw");
    bench.run("mkfs.ext4 -q -F -b 1024 -E offset=1048576 disk.raw 64M");
    bench.run(
        "seethrough prepare -f raw disk.raw --reserve local=groups:3 --dir /local --reserve data=partition:2",
    );
    for (name, expected) in [
        ("local", "partition table"),
        ("data", "region of block groups"),
    ] {
        let line = format!("create -b disk.raw -F raw --region {name} --grow 1G ann.qcow2");
        let said = bench.refused(&format!("seethrough {line}"));
        assert!(said.contains(expected), "{line}:\n{said}");
    }
}

#[test]
fn a_base_that_was_changed_under_a_grown_child_is_refused_until_it_is_as_before() {
    let bench = Bench::new();
    bench.make_file("base.raw", 61 * MIB);
    bench.run("mke2fs -q -F -t ext4 -b 1024 -g 1024 base.raw");
    bench.run("seethrough prepare -f raw base.raw --reserve local=groups:50-55 --dir /local");
    bench.run("seethrough create -q -b base.raw -F raw --region local --grow 100M tom.qcow2");
    let verbs = [
        "regions tom.qcow2",
        "df tom.qcow2",
        "map --groups tom.qcow2",
        "flatten -O raw tom.qcow2 flat.raw",
    ];
    let all_say = |expected: &str| {
        for verb in verbs {
            let said = bench.refused(&format!("seethrough {verb}"));
            assert!(said.contains(expected), "{verb}:\n{said}");
        }
    };
    bench.make_longer("base.raw", 90 * MIB);
    for verb in &verbs[..3] {
        bench.run(&format!("seethrough {verb}"));
    }
    bench.run("e2fsck -fp base.raw");
    bench.run("resize2fs base.raw");
    all_say("with resize2fs, or create the child anew");
    bench.run("e2fsck -fp base.raw");
    bench.run("resize2fs base.raw 61M");
    bench.run("e2fsck -fp base.raw");
    for verb in verbs {
        bench.run(&format!("seethrough {verb}"));
    }
    bench.assert_clean("flat.raw");
    std::fs::remove_file(bench.path("flat.raw")).unwrap();

    bench.run("tune2fs -O ^resize_inode base.raw");
    bench.try_run("e2fsck -fy base.raw");
    all_say("undo what tune2fs has changed");

    bench.run("qemu-img resize -q --shrink tom.qcow2 80M");
    let said = bench.refused("seethrough df tom.qcow2");
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_shortened_overlay_is_told_from_a_damaged_one() {
    let bench = Bench::new();
    bench.make_base();
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /local");
    bench.run("seethrough create -q -b base.qcow2 --region local --grow 30M tom.qcow2");
    bench.run("qemu-img resize -q --shrink tom.qcow2 80M");
    for verb in ["df tom.qcow2", "flatten tom.qcow2 flat.qcow2"] {
        let said = bench.refused(&format!("seethrough {verb}"));
        assert!(said.contains("seethrough resize"), "{verb}:\n{said}");
    }
}

#[test]
fn a_grown_child_takes_over_the_last_group_of_its_base_as_long_as_it_is_there() {
    let bench = Bench::new();
    bench.make_file("base.raw", 61 * MIB);
    bench.run("mke2fs -q -F -t ext4 -b 1024 base.raw");
    bench.run("seethrough prepare -f raw base.raw --reserve local=groups:5 --dir /local");
    bench.run("seethrough create -q -b base.raw -F raw --region local --grow 100M tom.qcow2");
    bench.run("seethrough prepare -f raw base.raw --enlarge local=groups:7");
    bench.run("seethrough prepare --adopt tom.qcow2");
    bench.run("seethrough flatten -O raw tom.qcow2 flat.raw");
    bench.assert_clean("flat.raw");
}
