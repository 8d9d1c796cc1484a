//! `seethrough commit`: what the overlay read before, both it and its backing image read afterwards.

use std::sync::Arc;

use rand::RngExt;
use seethrough::image::{Access, Image, RawImage};
use seethrough::jobs::commit::{Afterwards, commit};
use seethrough::progress::Progress;
use seethrough::qcow2::Qcow2;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::bed::{Bed, Layer};
use crate::engine::{for_each_seed, rng};

/// Asserts that a disk begins with the bytes of a raw image.
fn assert_begins_as(bed: &Bed, disk: &Layer, expected: &str) {
    bed.qemu_img(&["convert", "-f", disk.format, "-O", "raw", &disk.name, "got"]);
    let [expected, mut got] =
        [expected, "got"].map(|name| std::fs::read(bed.path(name)).expect("readable"));
    got.truncate(expected.len());
    assert!(got == expected, "{disk:?}");
}

fn size(bed: &Bed, format: &str, name: &str) -> serde_json::Value {
    let info = bed.qemu_img(&["info", "--output=json", "-f", format, name]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    info["virtual-size"].clone()
}

#[test]
fn bases_come_to_hold_what_the_overlay_read_as_the_stock_tool_has_it() {
    for_each_seed(10, "commit", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let depth = rng.random_range(2..=4);
        let chain = bed.chain_of(rng, "l", depth);
        let top = &chain[depth - 1];
        let base = &chain[depth - 2];
        bed.qemu_img(&[
            "convert", "-f", top.format, "-O", "raw", &top.name, "expected",
        ]);
        // The stock tool does the same beside.
        for layer in &chain {
            let stock = bed.path("stock").join(&layer.name);
            std::fs::create_dir_all(bed.path("stock")).expect("a directory");
            std::fs::copy(bed.path(&layer.name), stock).expect("copied");
        }
        let stock_top = format!("stock/{}", top.name);
        // It cannot make every image longer.
        let (code, ..) = bed.stock("qemu-img", &["commit", "-q", "-f", "qcow2", &stock_top]);
        let stock_can = code == 0;
        let keep = rng.random_bool(0.3);
        let arguments: &[&str] = if keep { &["commit", "-d"] } else { &["commit"] };
        let printed = bed.ok(&[arguments, &[&top.name]].concat());
        assert_eq!(printed, "Image committed.\n");
        bed.assert_same(("qcow2", &top.name), ("raw", "expected"));
        bed.check(&top.name);
        assert_begins_as(&bed, base, "expected");
        if stock_can {
            let stock = format!("stock/{}", base.name);
            bed.assert_same((base.format, &base.name), (base.format, &stock));
            assert_eq!(
                size(&bed, base.format, &base.name),
                size(&bed, base.format, &stock)
            );
        }
        if base.format == "qcow2" {
            bed.check(&base.name);
        }
        if !keep {
            let map = bed.ok(&["map", "--output=json", &top.name]);
            let map: Vec<serde_json::Value> = serde_json::from_str(&map).expect("JSON");
            let held = |entry: &&serde_json::Value| entry["depth"] == 0 && entry["present"] == true;
            assert_eq!(map.iter().find(held), None);
        }
    });
}

#[test]
fn a_base_further_down_takes_all_that_lies_above_it() {
    for_each_seed(6, "commit -b", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let chain = bed.chain_of(rng, "l", 4);
        let (base, top) = (&chain[rng.random_range(0..2)], &chain[3]);
        bed.qemu_img(&[
            "convert", "-f", top.format, "-O", "raw", &top.name, "expected",
        ]);
        bed.ok(&["commit", "-q", "-b", &base.name, &top.name]);
        bed.assert_same(("qcow2", &top.name), ("raw", "expected"));
        bed.check(&top.name);
        // The overlay over the base alone is the same disk.
        bed.ok(&[
            "rebase",
            "-u",
            "-b",
            &base.name,
            "-F",
            base.format,
            &top.name,
        ]);
        bed.assert_same(("qcow2", &top.name), ("raw", "expected"));
        assert_begins_as(&bed, base, "expected");
    });
}

#[test]
fn what_others_see_through_to_is_refused() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "alone", "1M"]);
    bed.fails(&["commit", "-f", "raw", "alone"], 1);
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "base", "1M"]);
    bed.fails(&["commit", "base"], 1);
    bed.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top",
    ]);
    bed.fails(&["commit", "-b", "alone", "top"], 2);
    bed.qemu_img(&["snapshot", "-c", "one", "top"]);
    let error = bed.fails(&["commit", "top"], 1);
    assert!(error.contains("snapshots"), "{error}");
}

#[test]
fn neither_a_child_nor_a_base_with_regions_is_committed_to_or_rebased() {
    let bed = Bed::new();
    for arguments in [
        &["create", "-q", "-f", "raw", "base.raw", "64M"][..],
        &["create", "-q", "-f", "qcow2", "other.qcow2", "64M"],
    ] {
        bed.qemu_img(arguments);
    }
    let made = std::process::Command::new("mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-g", "2048", "-J", "size=4"])
        .arg(bed.path("base.raw"))
        .status()
        .expect("mkfs.ext4 runs");
    assert!(made.success());
    bed.ok(&[
        "prepare",
        "-f",
        "raw",
        "base.raw",
        "--reserve",
        "tom=groups:6-7",
        "--dir",
        "/tom",
    ]);
    bed.ok(&[
        "create",
        "-q",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "--region",
        "tom",
        "tom.qcow2",
    ]);
    bed.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "plain.qcow2",
    ]);
    bed.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "tom.qcow2",
        "-F",
        "qcow2",
        "over.qcow2",
    ]);
    let before = std::fs::read(bed.path("base.raw")).expect("readable");
    let error = bed.fails(&["commit", "tom.qcow2"], 1);
    assert!(error.contains("child"), "{error}");
    for overlay in ["plain.qcow2", "over.qcow2"] {
        let error = bed.fails(&["commit", overlay], 1);
        assert!(error.contains("regions"), "{error}");
    }
    let error = bed.fails(&["rebase", "-b", "other.qcow2", "tom.qcow2"], 1);
    assert!(error.contains("child"), "{error}");
    assert!(std::fs::read(bed.path("base.raw")).expect("readable") == before);
    // A base that was moved is followed.
    bed.ok(&["rebase", "-u", "-b", "base.raw", "-F", "raw", "tom.qcow2"]);
    let info = bed.ok(&["info", "tom.qcow2"]);
    assert!(info.contains("tom"), "{info}");
}

fn contents(image: &dyn Image) -> Vec<u8> {
    let len = usize::try_from(image.virtual_size()).expect("small");
    let buf = IoBuf::zeroed(len);
    block_on(image.read(GuestOffset(0), buf.clone())).expect("readable");
    buf.to_vec()
}

/// Opens an overlay over a base, raw or qcow2.
fn open(
    base: &Arc<dyn Storage>,
    raw: bool,
    overlay: &Arc<dyn Storage>,
    access: Access,
) -> (Arc<dyn Image>, Arc<dyn Image>) {
    let base: Arc<dyn Image> = if raw {
        Arc::new(RawImage::new(Arc::clone(base), access))
    } else {
        let base = Qcow2::open(Arc::clone(base), None, access);
        Arc::new(block_on(base).expect("the base opens"))
    };
    let overlay = Qcow2::open(Arc::clone(overlay), Some(Arc::clone(&base)), access);
    (
        base,
        Arc::new(block_on(overlay).expect("the overlay opens")),
    )
}

#[test]
fn after_a_power_cut_the_overlay_reads_the_same() {
    for_each_seed(40, "commit, power cut", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let raw = rng.random_bool(0.5);
        let layer = |name: &str, format, options| Layer {
            name: name.to_owned(),
            format,
            options,
            size: 512 << 10,
        };
        let base = if raw {
            layer("base", "raw", "")
        } else {
            layer("base", "qcow2", "cluster_size=4k")
        };
        let options =
            ["cluster_size=4k", "cluster_size=16k,extended_l2=on"][rng.random_range(0..2)];
        let top = layer("top", "qcow2", options);
        bed.create(&base, None);
        bed.fill(rng, &base);
        bed.create(&top, Some(&base));
        bed.fill(rng, &top);
        let bytes = |name: &str| std::fs::read(bed.path(name)).expect("readable");
        let base_disk = Arc::new(CrashStorage::new(bytes("base"), Delays::none()));
        let top_disk = Arc::new(base_disk.beside(bytes("top"), Delays::none()));
        let storages: [Arc<dyn Storage>; 2] = [base_disk.clone(), top_disk.clone()];
        let (base, overlay) = open(&storages[0], raw, &storages[1], Access::ReadWrite);
        let expected = contents(&*overlay);
        commit(&overlay, &base, Afterwards::Empty, &Progress::default()).expect("committed");
        assert!(contents(&*base) == expected);
        assert!(contents(&*overlay) == expected);
        for _ in 0..20 {
            let cut = Moment(rng.random_range(0..=base_disk.now().0));
            let lost = Lost::Some { seed: rng.random() };
            let left = [&base_disk, &top_disk].map(|disk| disk.after_power_cut(cut, lost));
            let [base, top] =
                left.map(|left| Arc::new(MemoryStorage::new(left)) as Arc<dyn Storage>);
            let (_, overlay) = open(&base, raw, &top, Access::ReadOnly);
            assert!(
                contents(&*overlay) == expected,
                "cut at {cut:?} of {:?}",
                base_disk.now()
            );
        }
    });
}
