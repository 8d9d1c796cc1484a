//! `prepare`, `create --region` and `flatten`, as a user runs them: on raw and qcow2 bases, with the filesystem on the
//! whole disk or in a partition, and with partitions as regions.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "view_cli/grown.rs"]
mod grown;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command line in the bench's directory: whether it succeeded, and what it said.
    fn try_run(&self, line: &str) -> (bool, String) {
        self.try_words(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// As [`Bench::try_run`], of words that may hold spaces.
    fn try_words(&self, words: &[&str]) -> (bool, String) {
        let program = match words[0] {
            "seethrough" => env!("CARGO_BIN_EXE_seethrough"),
            other => other,
        };
        let path = format!("/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap());
        let output = Command::new(program)
            .args(&words[1..])
            .current_dir(self.dir.path())
            .env("PATH", path)
            .output()
            .unwrap_or_else(|error| panic!("{words:?}: {error}"));
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    fn run(&self, line: &str) -> String {
        let (succeeded, text) = self.try_run(line);
        assert!(succeeded, "{line}:\n{text}");
        text
    }

    fn run_words(&self, words: &[&str]) -> String {
        let (succeeded, text) = self.try_words(words);
        assert!(succeeded, "{words:?}:\n{text}");
        text
    }

    fn refused(&self, line: &str) -> String {
        let (succeeded, text) = self.try_run(line);
        assert!(!succeeded, "{line} succeeded:\n{text}");
        text
    }

    fn make_file(&self, name: &str, len: u64) {
        File::create(self.path(name)).unwrap().set_len(len).unwrap();
    }

    fn make_longer(&self, name: &str, len: u64) {
        let file = File::options().write(true).open(self.path(name));
        file.unwrap().set_len(len).unwrap();
    }

    /// A qcow2 base with groups of 8 MiB.
    fn make_base(&self) {
        self.make_file("base.raw", 64 * MIB);
        self.run("mkfs.ext4 -q -F -b 4096 -g 2048 -J size=4 base.raw");
        self.run("qemu-img convert -O qcow2 base.raw base.qcow2");
    }

    fn assert_clean(&self, raw: &str) {
        self.run(&format!("e2fsck -fn {raw}"));
    }
}

#[test]
fn a_qcow2_base_a_child_and_its_flattened_disk_pass_the_stock_tools() {
    let bench = Bench::new();
    bench.make_base();
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /local");
    bench.run("seethrough create -b base.qcow2 --region local tom.qcow2");
    for image in ["base.qcow2", "tom.qcow2"] {
        bench.run(&format!("qemu-img check {image}"));
    }
    bench.run("seethrough flatten tom.qcow2 flat.qcow2");
    bench.run("seethrough flatten -O raw tom.qcow2 flat.raw");
    bench.run("qemu-img check flat.qcow2");
    bench.run("qemu-img compare -f qcow2 -F raw flat.qcow2 flat.raw");
    bench.assert_clean("flat.raw");
    bench.run("qemu-img convert -O raw base.qcow2 now.raw");
    bench.assert_clean("now.raw");
    let listing = bench.run("debugfs -R ls flat.raw");
    assert!(listing.contains("local"), "{listing}");
    assert!(
        bench
            .refused("seethrough flatten tom.qcow2 flat.raw")
            .contains("exists already")
    );
    assert!(
        bench
            .refused("seethrough flatten base.qcow2 x.raw")
            .contains("no child")
    );
}

#[test]
fn what_makes_no_sense_is_refused_with_a_remedy_and_changes_nothing() {
    let bench = Bench::new();
    bench.make_base();
    let before = fs::read(bench.path("base.qcow2")).unwrap();
    for (line, expected) in [
        (
            "create -b base.qcow2 --region local tom.qcow2",
            "seethrough prepare",
        ),
        (
            "prepare base.qcow2 --reserve local=groups:6",
            "--dir /local",
        ),
        (
            "prepare base.qcow2 --reserve local=groups:6 --dir /a --dir /b",
            "--dir /b",
        ),
        (
            "prepare base.qcow2 --reserve local=blocks:6 --dir /a",
            "NAME=groups:8-15",
        ),
        (
            "prepare base.qcow2 --reserve a/b=groups:6 --dir /a",
            "letters, digits",
        ),
        (
            "prepare base.qcow2 --reserve local=partition:2",
            "no partition 2",
        ),
        (
            "prepare base.qcow2 --reserve local=groups:1-5 --dir /a",
            "free are block groups",
        ),
        (
            "prepare base.qcow2 --reserve a=groups:6 --dir /a --reserve b=groups:6-7 --dir /b",
            "belongs to region \"a\"",
        ),
    ] {
        let said = bench.refused(&format!("seethrough {line}"));
        assert!(said.contains(expected), "{line}:\n{said}");
    }
    assert!(fs::read(bench.path("base.qcow2")).unwrap() == before);
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /local");
    for (options, expected) in [
        ("--region other", "it declares: local"),
        ("--region local -o cluster_size=256k", "at once"),
        (
            "--region local -o extended_l2=off,cluster_size=64k",
            "at once",
        ),
        ("--region local -o compat=0.10", "compat=1.1"),
        ("--region local -f raw", "leave -f out"),
    ] {
        let line = format!("seethrough create -b base.qcow2 {options} tom.qcow2");
        let said = bench.refused(&line);
        assert!(said.contains(expected), "{line}:\n{said}");
        assert!(!bench.path("tom.qcow2").exists(), "{line}");
    }
    bench.run("seethrough create -b base.qcow2 --region local -o cluster_size=64k tom.qcow2");
}

#[test]
fn a_filesystem_in_a_partition_and_a_whole_partition_become_regions() {
    for table in ["gpt", "mbr"] {
        let bench = Bench::new();
        bench.make_file("disk.raw", 100 * MIB);
        bench.run("sgdisk -o -n 1:2048:+64M -n 2:0:+16M disk.raw");
        if table == "mbr" {
            bench.run("sgdisk --gpttombr=1:2 disk.raw");
        }
        bench.run("mkfs.ext4 -q -F -b 1024 -E offset=1048576 disk.raw 64M");
        bench.run(
            "seethrough prepare -f raw disk.raw --reserve local=groups:3,6 --dir /local \
             --reserve scratch=partition:2",
        );
        let said = bench.refused("seethrough prepare -f raw disk.raw --reserve x=partition:1");
        assert!(said.contains("holds the filesystem"), "{said}");
        let base = fs::read(bench.path("disk.raw")).unwrap();
        bench.run("seethrough create -b disk.raw -F raw --region local --region scratch tom.qcow2");
        bench.run("seethrough create -b disk.raw -F raw --region scratch ann.qcow2");
        for child in ["tom", "ann"] {
            bench.run(&format!("qemu-img check {child}.qcow2"));
            bench.run(&format!(
                "seethrough flatten -O raw {child}.qcow2 {child}.raw"
            ));
            let flat = fs::read(bench.path(&format!("{child}.raw"))).unwrap();
            let end = usize::try_from(65 * MIB).unwrap();
            fs::write(bench.path("fs.raw"), &flat[1 << 20..end]).unwrap();
            bench.assert_clean("fs.raw");
            assert!(flat[..1 << 20] == base[..1 << 20], "the partition table");
            assert!(flat[end..] == base[end..], "the other partition");
        }
        assert!(fs::read(bench.path("disk.raw")).unwrap() == base, "{table}");
    }
}

/// What `seethrough regions` says of an image's region, as JSON.
fn region(bench: &Bench, image: &str, name: &str) -> serde_json::Value {
    let text = bench.run(&format!("seethrough regions --output json {image}"));
    let images: serde_json::Value = serde_json::from_str(&text).unwrap();
    let regions = images[0]["regions"].as_array().unwrap().clone();
    regions
        .into_iter()
        .find(|region| region["name"] == name)
        .unwrap()
}

#[test]
fn a_region_of_a_size_takes_the_last_free_groups_that_lie_side_by_side() {
    let bench = Bench::new();
    bench.make_base();
    bench.run("seethrough prepare base.qcow2 --reserve taken=groups:5 --dir /taken");
    let text = bench.run("seethrough prepare base.qcow2 --reserve local --size 10M --dir /local");
    assert!(text.contains("block groups 6-7"), "{text}");
    let local = region(&bench, "base.qcow2", "local");
    assert_eq!(local["groups"], "6-7");
    assert_eq!(local["size"], 16 * MIB);
    assert!(local["free"].as_u64().unwrap() >= 10 * MIB);
    let text = bench.refused("seethrough prepare base.qcow2 --reserve more --size 1G --dir /more");
    assert!(text.contains("make the filesystem larger"), "{text}");
    let text = bench.refused("seethrough prepare base.qcow2 --reserve more --dir /more");
    assert!(text.contains("--size 2G"), "{text}");
    // Not side by side, but there. (The journal lies in group 4.)
    bench.run("seethrough prepare base.qcow2 --reserve middle=groups:2 --dir /middle");
    let text = bench.run("seethrough prepare base.qcow2 --reserve rest --size 12M --dir /rest");
    assert!(text.contains("block groups 1,3"), "{text}");
    bench.run("qemu-img convert -O raw base.qcow2 now.raw");
    bench.assert_clean("now.raw");
}

#[test]
fn an_enlarged_region_is_a_childs_once_it_takes_it_over() {
    let bench = Bench::new();
    bench.make_base();
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6 --dir /local");
    bench.run("seethrough create -b base.qcow2 --region local tom.qcow2");
    let before = region(&bench, "tom.qcow2", "local");
    let text = bench.run("seethrough prepare base.qcow2 --enlarge local=groups:7");
    assert!(text.contains("block groups 6-7"), "{text}");
    // It can still be used as it is.
    bench.run("seethrough flatten -O raw tom.qcow2 before.raw");
    bench.assert_clean("before.raw");
    assert_eq!(region(&bench, "tom.qcow2", "local"), before);
    let text = bench.run("seethrough prepare --adopt tom.qcow2");
    assert!(text.contains("block groups 7 are the child's"), "{text}");
    let after = region(&bench, "tom.qcow2", "local");
    assert_eq!(after["groups"], "6-7");
    assert!(after["free"].as_u64() > before["free"].as_u64());
    bench.run("seethrough flatten -O raw tom.qcow2 after.raw");
    bench.assert_clean("after.raw");
    for image in ["base.qcow2", "tom.qcow2"] {
        bench.run(&format!("qemu-img check {image}"));
    }
    let text = bench.run("seethrough prepare --adopt tom.qcow2");
    assert!(text.contains("added nothing"), "{text}");
    let text = bench.run("seethrough regions base.qcow2 tom.qcow2");
    assert!(text.contains("of tom.qcow2"), "{text}");
    let text = bench.refused("seethrough prepare --adopt base.qcow2");
    assert!(text.contains("no child"), "{text}");
}

#[test]
fn a_released_region_is_the_bases_again_and_its_children_are_refused() {
    let bench = Bench::new();
    bench.make_base();
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /local");
    bench.run("seethrough create -b base.qcow2 --region local tom.qcow2");
    bench.run("seethrough prepare base.qcow2 --release local");
    let text = bench.refused("seethrough flatten tom.qcow2 flat.qcow2");
    assert!(text.contains("declares no region \"local\""), "{text}");
    let text = bench.refused("seethrough prepare base.qcow2 --release local");
    assert!(text.contains("no region \"local\""), "{text}");
    // The directory is there still, an ordinary one.
    bench.run("qemu-img convert -O raw base.qcow2 now.raw");
    bench.assert_clean("now.raw");
    assert!(bench.run("debugfs -R ls now.raw").contains("local"));
    let text =
        bench.refused("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /other");
    assert!(
        text.contains("hold data of the base"),
        "the directory: {text}"
    );
}

#[test]
fn a_shared_region_is_declared_listed_owned_and_given_back() {
    let bench = Bench::new();
    bench.make_base();
    let prepare = "seethrough prepare base.qcow2 --reserve photos=groups:6 --dir /photos";
    let error = bench.refused(&format!("{prepare} --shared videos"));
    assert!(
        error.contains("--shared videos belongs to no --reserve"),
        "{error}"
    );
    let said = bench.run(&format!("{prepare} --shared photos"));
    assert_eq!(
        said,
        "region photos: block groups 6, directory /photos, shared\n"
    );
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:7 --dir /local");
    for child in ["tom", "ann"] {
        bench.run(&format!(
            "seethrough create -q -b base.qcow2 --region photos {child}.qcow2"
        ));
    }
    let both = "seethrough create -b base.qcow2 --region photos --region local both.qcow2";
    assert!(bench.refused(both).contains("create a child for each"));
    let listed = bench.run("seethrough regions base.qcow2 tom.qcow2 ann.qcow2");
    assert!(
        listed.contains("photos: groups 6, /photos, shared; 8 MiB"),
        "{listed}"
    );
    assert!(listed.contains("of tom.qcow2, ann.qcow2"), "{listed}");
    let json = bench.run("seethrough regions --output json base.qcow2");
    assert!(json.contains(r#""sharing": "shared""#) && json.contains(r#""sharing": "private""#));
    let error = bench.refused("seethrough prepare base.qcow2 --evict photos");
    assert!(error.contains("nobody holds"), "{error}");
    bench.run("seethrough snapshot -c now tom.qcow2");
    assert!(
        bench
            .refused("seethrough snapshot -a now tom.qcow2")
            .contains("create the child anew")
    );
    bench.run("seethrough flatten -O raw tom.qcow2 flat.raw");
    bench.assert_clean("flat.raw");
    bench.run("seethrough prepare base.qcow2 --enlarge photos=groups:5");
    assert!(
        bench
            .run("seethrough prepare --adopt tom.qcow2")
            .contains("block groups 5")
    );
    bench.run("seethrough prepare base.qcow2 --release photos");
    for image in ["base.qcow2", "tom.qcow2"] {
        bench.run(&format!("qemu-img check {image}"));
    }
    let error = bench.refused("seethrough flatten ann.qcow2 x.raw");
    assert!(error.contains("no region \"photos\""), "{error}");
}

#[test]
fn df_and_the_map_of_groups_agree_with_the_stock_tools() {
    let bench = Bench::new();
    bench.make_base();
    let plain = bench.refused("seethrough df base.qcow2");
    assert!(plain.contains("seethrough prepare"), "{plain}");
    let plain = bench.refused("seethrough map --groups base.qcow2");
    assert!(plain.contains("seethrough prepare"), "{plain}");
    let ranges = bench.refused("seethrough map --output svg base.qcow2");
    assert!(ranges.contains("add --groups"), "{ranges}");
    bench.run("seethrough prepare base.qcow2 --reserve local=groups:6-7 --dir /local");
    bench.run("seethrough create -b base.qcow2 --region local tom.qcow2");
    bench.run("seethrough flatten -O raw tom.qcow2 flat.raw");

    let json = |line: &str| -> Value { serde_json::from_str(&bench.run(line)).unwrap() };
    let map = json("seethrough map --groups --output json tom.qcow2");
    let free = |group: &Value| (group["free-blocks"].as_u64(), group["free-inodes"].as_u64());
    let shown: Vec<_> = map["groups"].as_array().unwrap().iter().map(free).collect();
    let numbers = |line: &str| {
        let (blocks, rest) = line.trim().split_once(" free blocks, ")?;
        let inodes = rest.split_once(" free inodes")?.0;
        Some((blocks.parse().ok(), inodes.parse().ok()))
    };
    let stock: Vec<_> = bench
        .run("dumpe2fs flat.raw")
        .lines()
        .filter_map(numbers)
        .collect();
    assert_eq!(shown, stock);
    let own: Vec<usize> = (0..8)
        .filter(|group| map["groups"][group]["own"] == true)
        .collect();
    assert_eq!(own, [6, 7]);

    let text = bench.run("seethrough map --groups tom.qcow2");
    assert!(text.contains("  A  region local, own: 2 groups"), "{text}");
    let picture = bench.run("seethrough map --groups --output svg base.qcow2");
    assert!(picture.starts_with("<svg ") && picture.contains("region local"));

    let df = json("seethrough df --output json base.qcow2 tom.qcow2");
    let regions = json("seethrough regions --output json tom.qcow2");
    let room = &regions[0]["regions"][0];
    for vm in [&df[0], &df[1]] {
        assert_eq!(vm["regions"][0]["free"], room["free"]);
    }
    // A child that may take less than it has: blocks are kept back.
    assert_eq!(df[1]["free-inodes"], room["free-inodes"]);
    assert!(df[1]["available"].as_u64() < room["free"].as_u64());
    let host = fs::metadata(bench.path("tom.qcow2")).unwrap().blocks() * 512;
    assert_eq!(df[1]["allocation"], host);
    let text = bench.run("seethrough df base.qcow2 tom.qcow2");
    assert_eq!(text.lines().count(), 5, "{text}");
}
