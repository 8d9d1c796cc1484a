//! `seethrough rebase`: an overlay reads the same before and after, on whatever backing image.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::{Access, Image, RawImage};
use seethrough::jobs::rebase::absorb_difference;
use seethrough::progress::Progress;
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::backing_update::set_backing;
use seethrough::qcow2::create::BackingReference;
use seethrough::qcow2::header::Header;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::bed::{Bed, Layer};
use crate::engine::{for_each_seed, rng};

fn backing_of(bed: &Bed, name: &str) -> serde_json::Value {
    let info = bed.qemu_img(&["info", "--output=json", "-f", "qcow2", name]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    serde_json::json!([info["backing-filename"], info["backing-filename-format"]])
}

#[test]
fn overlays_read_the_same_on_every_backing_image() {
    for_each_seed(10, "rebase", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let depth = rng.random_range(2..=4);
        let chain = bed.chain_of(rng, "l", depth);
        let others = rng.random_range(1..=2);
        let other = bed.chain_of(rng, "other", others);
        let top = chain.last().expect("a chain has a layer");
        bed.qemu_img(&[
            "convert", "-f", top.format, "-O", "raw", &top.name, "expected",
        ]);
        let mut bases: Vec<&Layer> = chain[..depth - 1].iter().chain(&other).collect();
        for _ in 0..3 {
            let base = bases.remove(rng.random_range(0..bases.len()));
            bed.ok(&["rebase", "-b", &base.name, "-F", base.format, &top.name]);
            assert_eq!(
                backing_of(&bed, &top.name),
                serde_json::json!([base.name, base.format])
            );
            bed.check(&top.name);
            bed.assert_same(("qcow2", &top.name), ("raw", "expected"));
            if bases.is_empty() {
                break;
            }
        }
        bed.ok(&["rebase", "-b", "", &top.name]);
        assert_eq!(backing_of(&bed, &top.name), serde_json::json!([null, null]));
        bed.check(&top.name);
        bed.assert_same(("qcow2", &top.name), ("raw", "expected"));
    });
}

#[test]
fn only_what_differs_is_taken_in() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "deep", "64M"]);
    bed.qemu_io("qcow2", "deep", &["write -P 1 0 32M".into()]);
    bed.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "deep", "-F", "qcow2", "mid",
    ]);
    bed.qemu_io(
        "qcow2",
        "mid",
        &["write -P 2 1M 64k".into(), "write -P 1 2M 64k".into()],
    );
    bed.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top",
    ]);
    bed.ok(&["rebase", "-b", "deep", "top"]);
    let map: Vec<serde_json::Value> =
        serde_json::from_str(&bed.ok(&["map", "--output=json", "top"])).expect("JSON");
    let own: Vec<_> = map
        .iter()
        .filter(|entry| entry["depth"] == 0 && entry["present"] == true)
        .collect();
    assert_eq!(own.len(), 1, "{own:?}");
    assert_eq!(own[0]["start"], 1 << 20);
    assert_eq!(own[0]["length"], 64 << 10);
    // As does the stock tool for a disk that was copied and changed: what is left is the difference.
    bed.qemu_img(&["convert", "-O", "qcow2", "mid", "modified"]);
    bed.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "modified", "-F", "qcow2", "diff",
    ]);
    bed.ok(&["rebase", "-b", "deep", "-F", "qcow2", "diff"]);
    bed.assert_same(("qcow2", "diff"), ("qcow2", "mid"));
    let metadata = std::fs::metadata(bed.path("diff")).expect("it is there");
    assert!(metadata.blocks() * 512 < 1 << 20);
}

#[test]
fn the_name_alone_changes_unchecked_and_then_the_backing_image_need_not_be_there() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "base", "1M"]);
    bed.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top",
    ]);
    std::fs::rename(bed.path("base"), bed.path("moved")).expect("renamed");
    bed.fails(&["rebase", "-b", "moved", "-F", "raw", "top"], 1);
    bed.ok(&["rebase", "-u", "-b", "moved", "-F", "raw", "top"]);
    assert_eq!(backing_of(&bed, "top"), serde_json::json!(["moved", "raw"]));
    bed.ok(&["rebase", "-u", "-b", "nowhere", "-F", "qcow2", "top"]);
    bed.ok(&["rebase", "-u", "-b", "", "top"]);
    assert_eq!(backing_of(&bed, "top"), serde_json::json!([null, null]));
    bed.check("top");
}

#[test]
fn what_would_break_an_image_is_refused() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "base", "1M"]);
    bed.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid",
    ]);
    bed.qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top",
    ]);
    let before = std::fs::read(bed.path("mid")).expect("readable");
    bed.fails(&["rebase", "-b", "top", "mid"], 2);
    bed.fails(&["rebase", "-b", "mid", "mid"], 2);
    bed.fails(&["rebase", "-b", "missing", "mid"], 1);
    std::fs::write(bed.path("raw"), [7; 1024]).expect("writable");
    bed.fails(&["rebase", "-b", "raw", "mid"], 2);
    bed.fails(&["rebase", "-f", "raw", "-b", "base", "raw"], 1);
    assert!(std::fs::read(bed.path("mid")).expect("readable") == before);
    bed.qemu_img(&["snapshot", "-c", "one", "mid"]);
    let error = bed.fails(&["rebase", "-b", "", "mid"], 1);
    assert!(error.contains("snapshots"), "{error}");
}

#[test]
fn a_name_that_a_power_cut_could_lose_is_refused_before_anything_is_written() {
    let bed = Bed::new();
    for (name, byte) in [("old", 1), ("new", 2)] {
        std::fs::write(bed.path(name), [byte; 64 << 10]).expect("writable");
    }
    // Either fits a cluster of 1 KiB, but not both of them.
    let [old, new] = [
        format!("{}old", "./".repeat(230)),
        format!("{}/new", ".//".repeat(150)),
    ];
    let options = "cluster_size=1k";
    bed.ok(&[
        "create", "-q", "-f", "qcow2", "-o", options, "-b", &old, "-F", "raw", "top",
    ]);
    let before = std::fs::read(bed.path("top")).expect("readable");
    let error = bed.fails(&["rebase", "-b", &new, "-F", "raw", "top"], 2);
    assert!(error.contains("shorter name"), "{error}");
    assert!(std::fs::read(bed.path("top")).expect("readable") == before);
    bed.ok(&["rebase", "-b", "new", "-F", "raw", "top"]);
    bed.check("top");
    bed.assert_same(("qcow2", "top"), ("raw", "old"));
}

/// A raw image in memory with random bytes in places.
fn random_base(rng: &mut StdRng, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for _ in 0..6 {
        let len = rng.random_range(1..size / 4);
        let at = rng.random_range(0..size - len);
        bytes[at..at + len].fill(rng.random_range(0..4));
    }
    bytes
}

fn raw(bytes: &[u8]) -> Arc<dyn Image> {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    Arc::new(RawImage::new(storage, Access::ReadOnly))
}

fn contents(image: &dyn Image) -> Vec<u8> {
    let len = usize::try_from(image.virtual_size()).expect("small");
    let buf = IoBuf::zeroed(len);
    block_on(image.read(GuestOffset(0), buf.clone())).expect("readable");
    buf.to_vec()
}

#[test]
fn after_a_power_cut_the_overlay_reads_the_same_on_the_backing_image_that_it_names() {
    const SIZE: usize = 512 << 10;
    for_each_seed(40, "rebase, power cut", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let options =
            ["cluster_size=4k", "cluster_size=16k,extended_l2=on"][rng.random_range(0..2)];
        let [old, new] = [random_base(rng, SIZE), random_base(rng, SIZE)];
        std::fs::write(bed.path("old"), &old).expect("writable");
        let create = [
            "create", "-q", "-f", "qcow2", "-o", options, "-b", "old", "-F", "raw", "top",
        ];
        bed.qemu_img(&create);
        let layer = Layer {
            name: "top".into(),
            format: "qcow2",
            options,
            size: SIZE as u64,
        };
        bed.fill(rng, &layer);
        let bytes = std::fs::read(bed.path("top")).expect("readable");
        let disk = Arc::new(CrashStorage::new(bytes, Delays::none()));
        let open = |storage: Arc<dyn Storage>, backing: Option<Arc<dyn Image>>, access| {
            block_on(Qcow2::open(storage, backing, access)).expect("the overlay opens")
        };
        let overlay: Arc<dyn Image> =
            Arc::new(open(disk.clone(), Some(raw(&old)), Access::ReadWrite));
        let expected = contents(&*overlay);
        let drops = rng.random_bool(0.2);
        let new_image = (!drops).then(|| raw(&new));
        absorb_difference(&overlay, new_image.as_ref(), &Progress::default()).expect("absorbed");
        drop(overlay);
        let reference = (!drops).then(|| BackingReference {
            file: "new".into(),
            format: "qcow2".to_owned(),
        });
        block_on(set_backing(&*disk, reference.as_ref())).expect("named");
        for _ in 0..20 {
            let cut = Moment(rng.random_range(0..=disk.now().0));
            let lost = Lost::Some { seed: rng.random() };
            let left = disk.after_power_cut(cut, lost);
            let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new(left));
            let header = block_on(Header::read(storage.as_ref())).expect("a header");
            let backing = match header
                .backing_file
                .as_deref()
                .and_then(|name| name.to_str())
            {
                Some("old") => Some(raw(&old)),
                Some("new") => Some(raw(&new)),
                None if drops => None,
                other => panic!("{other:?}"),
            };
            let overlay = open(storage, backing, Access::ReadOnly);
            assert!(
                contents(&overlay) == expected,
                "on {:?}",
                header.backing_file
            );
        }
    });
}
