//! `seethrough snapshot` and the list in `info`, against `qemu-img`.

use serde_json::Value;

use crate::bed::Bed;

/// An image with a snapshot of each of two states, the first by our tool and the second by the stock one.
fn two_snapshots(bed: &Bed) {
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
    bed.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 1M".into()]);
    assert_eq!(bed.ok(&["snapshot", "-c", "first", "a.qcow2"]), "");
    bed.qemu_io("qcow2", "a.qcow2", &["write -P 2 512k 1M".into()]);
    bed.qemu_img(&["snapshot", "-c", "a second one with a long name", "a.qcow2"]);
    bed.qemu_io("qcow2", "a.qcow2", &["write -P 3 1M 1M".into()]);
}

#[test]
fn snapshots_are_listed_as_the_stock_tool_lists_them() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "none.qcow2", "8M"]);
    assert_eq!(bed.ok(&["snapshot", "-l", "none.qcow2"]), "");
    two_snapshots(&bed);
    let list = bed.qemu_img(&["snapshot", "-l", "a.qcow2"]);
    assert_eq!(bed.ok(&["snapshot", "-l", "a.qcow2"]), list);
    assert_eq!(bed.ok(&["snapshot", "-U", "-f", "qcow2", "a.qcow2"]), list);
    assert!(bed.ok(&["info", "a.qcow2"]).contains(&list));

    let parse = |text: &str| -> Value { serde_json::from_str(text).expect("JSON") };
    let stock = parse(&bed.qemu_img(&["info", "--output=json", "a.qcow2"]));
    let ours = parse(&bed.ok(&["snapshot", "-l", "--output=json", "a.qcow2"]));
    assert_eq!(ours, stock["snapshots"]);
    let info = parse(&bed.ok(&["info", "--output=json", "a.qcow2"]));
    assert_eq!(info["snapshots"], stock["snapshots"]);
}

#[test]
fn snapshots_are_applied_and_deleted_by_name_and_id() {
    let bed = Bed::new();
    two_snapshots(&bed);
    for name in ["first", "2"] {
        let copy = ["convert", "-f", "qcow2", "-O", "raw", "-l"];
        bed.qemu_img(&[&copy[..], &[name, "a.qcow2", "expected.raw"]].concat());
        bed.ok(&["snapshot", "-q", "-a", name, "a.qcow2"]);
        bed.check("a.qcow2");
        bed.assert_same(("qcow2", "a.qcow2"), ("raw", "expected.raw"));
    }
    bed.ok(&["snapshot", "-d", "2", "a.qcow2"]);
    bed.check("a.qcow2");
    bed.ok(&["snapshot", "-d", "first", "a.qcow2"]);
    bed.check("a.qcow2");
    assert_eq!(bed.qemu_img(&["snapshot", "-l", "a.qcow2"]), "");
    bed.assert_same(("qcow2", "a.qcow2"), ("raw", "expected.raw"));
}

#[test]
fn what_cannot_be_is_refused_with_the_remedy() {
    let bed = Bed::new();
    two_snapshots(&bed);
    for action in ["-a", "-d"] {
        let error = bed.fails(&["snapshot", action, "third", "a.qcow2"], 1);
        assert!(error.contains("no snapshot 'third'"), "{error}");
        assert!(error.contains("seethrough snapshot -l"), "{error}");
    }
    bed.fails(&["snapshot", "-a", "first", "-d", "first", "a.qcow2"], 2);
    bed.qemu_img(&["create", "-q", "a.raw", "1M"]);
    let error = bed.fails(&["snapshot", "-f", "raw", "-c", "one", "a.raw"], 1);
    assert!(error.contains("only qcow2"), "{error}");
    bed.fails(&["snapshot", "-c", "one", "a.raw"], 1);

    let narrow = ["create", "-q", "-f", "qcow2", "-o", "refcount_bits=1"];
    bed.qemu_img(&[&narrow[..], &["narrow.qcow2", "1M"]].concat());
    bed.qemu_io("qcow2", "narrow.qcow2", &["write 0 64k".into()]);
    let before = std::fs::read(bed.path("narrow.qcow2")).expect("readable");
    let error = bed.fails(&["snapshot", "-c", "one", "narrow.qcow2"], 1);
    assert!(error.contains("refcounts of 1 bits"), "{error}");
    let after = std::fs::read(bed.path("narrow.qcow2")).expect("readable");
    assert!(after == before, "a refusal changes nothing");

    bed.qemu_img(&["bitmap", "--add", "a.qcow2", "backup"]);
    let error = bed.fails(&["snapshot", "-a", "first", "a.qcow2"], 1);
    assert!(error.contains("qemu-img bitmap --remove"), "{error}");
    // What they say of the disk is as true with one snapshot more or less.
    bed.ok(&["snapshot", "-c", "third", "a.qcow2"]);
    bed.ok(&["snapshot", "-d", "first", "a.qcow2"]);
    let info = bed.qemu_img(&["info", "a.qcow2"]);
    assert!(
        info.contains("name: backup") && !info.contains("in-use"),
        "{info}"
    );
    bed.check("a.qcow2");
}
