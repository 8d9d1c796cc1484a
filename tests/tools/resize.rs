//! `seethrough resize` against `qemu-img resize`.

use std::os::unix::fs::MetadataExt;

use crate::bed::Bed;

fn length(bed: &Bed, name: &str) -> u64 {
    std::fs::metadata(bed.path(name))
        .expect("it is there")
        .len()
}

fn allocated(bed: &Bed, name: &str) -> u64 {
    let metadata = std::fs::metadata(bed.path(name)).expect("it is there");
    metadata.blocks() * 512
}

fn virtual_size(bed: &Bed, name: &str) -> u64 {
    let text = bed.qemu_img(&["info", "--output=json", name]);
    let info: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    info["virtual-size"].as_u64().expect("a number")
}

#[test]
fn sizes_are_absolute_or_relative_and_shrinking_has_to_be_asked_for() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]);
    bed.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 10M".into()]);
    let full = allocated(&bed, "a.qcow2");
    assert_eq!(bed.ok(&["resize", "a.qcow2", "+5M"]), "Image resized.\n");
    assert_eq!(virtual_size(&bed, "a.qcow2"), 15 << 20);
    let error = bed.fails(&["resize", "a.qcow2", "-12M"], 1);
    assert!(error.contains("use --shrink"), "{error}");
    assert_eq!(
        bed.ok(&["resize", "-q", "--shrink", "-f", "qcow2", "a.qcow2", "-12M"]),
        ""
    );
    assert_eq!(virtual_size(&bed, "a.qcow2"), 3 << 20);
    assert!(allocated(&bed, "a.qcow2") < full / 2);
    bed.check("a.qcow2");
    bed.fails(&["resize", "--shrink", "a.qcow2", "0"], 1);
    bed.fails(&["resize", "--shrink", "a.qcow2", "-3M"], 1);
    bed.fails(&["resize", "a.qcow2", "3000001"], 1);
    bed.fails(&["resize", "a.qcow2", "large"], 2);
    // Options may follow the image, as with the stock tool.
    bed.ok(&["resize", "a.qcow2", "--shrink", "1M"]);
    assert_eq!(virtual_size(&bed, "a.qcow2"), 1 << 20);
}

#[test]
fn raw_images_are_resized_when_they_are_said_to_be_raw() {
    let bed = Bed::new();
    std::fs::write(bed.path("a.raw"), [7; 5000]).expect("writable");
    bed.fails(&["resize", "a.raw", "1M"], 2);
    bed.ok(&["resize", "-f", "raw", "a.raw", "+1k"]);
    assert_eq!(length(&bed, "a.raw"), 6024);
    bed.fails(&["resize", "-f", "raw", "a.raw", "-1k"], 1);
    bed.ok(&["resize", "-f", "raw", "--shrink", "a.raw", "3k"]);
    assert_eq!(
        std::fs::read(bed.path("a.raw")).expect("readable"),
        [7; 3072]
    );
}

#[test]
fn a_longer_backing_image_does_not_show_where_a_disk_has_grown() {
    let bed = Bed::new();
    for compat in ["0.10", "1.1"] {
        std::fs::write(bed.path("base.raw"), vec![9; 300_032]).expect("writable");
        let compat = format!("compat={compat},cluster_size=4k");
        let create = [
            "create", "-q", "-f", "qcow2", "-o", &compat, "-b", "base.raw",
        ];
        bed.qemu_img(&[&create[..], &["-F", "raw", "top.qcow2", "100000"]].concat());
        bed.ok(&["resize", "top.qcow2", "1M"]);
        bed.check("top.qcow2");
        let mut expected = vec![9; 100_352];
        expected.resize(1 << 20, 0);
        std::fs::write(bed.path("expected.raw"), expected).expect("writable");
        bed.assert_same(("qcow2", "top.qcow2"), ("raw", "expected.raw"));
    }
}

#[test]
fn a_version_2_image_with_snapshots_keeps_its_size() {
    let bed = Bed::new();
    let create = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10"];
    bed.qemu_img(&[&create[..], &["a.qcow2", "1M"]].concat());
    bed.ok(&["snapshot", "-c", "one", "a.qcow2"]);
    for size in ["2M", "512k"] {
        let error = bed.fails(&["resize", "--shrink", "a.qcow2", size], 1);
        assert!(error.contains("snapshot -d"), "{error}");
    }
    bed.ok(&["snapshot", "-d", "one", "a.qcow2"]);
    bed.ok(&["resize", "a.qcow2", "2M"]);
}

#[test]
fn bitmaps_of_the_old_size_are_trusted_by_nobody() {
    let bed = Bed::new();
    for size in ["4M", "16M"] {
        bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "8M"]);
        bed.qemu_img(&["bitmap", "--add", "a.qcow2", "backup"]);
        bed.ok(&["resize", "--shrink", "a.qcow2", size]);
        let info = bed.qemu_img(&["info", "a.qcow2"]);
        assert!(info.contains("in-use"), "{info}");
        bed.check("a.qcow2");
        bed.qemu_img(&["bitmap", "--remove", "a.qcow2", "backup"]);
        bed.check("a.qcow2");
    }
}

#[test]
fn an_external_data_file_goes_along() {
    let bed = Bed::new();
    for raw in ["off", "on"] {
        let options = format!("cluster_size=4k,data_file=data.raw,data_file_raw={raw}");
        let create = ["create", "-q", "-f", "qcow2", "-o", &options];
        bed.qemu_img(&[&create[..], &["a.qcow2", "1000000"]].concat());
        bed.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 300000".into()]);
        bed.qemu_io("qcow2", "a.qcow2", &["write -P 2 900k 50k".into()]);
        let mut expected = vec![0; 1_000_448];
        expected[..300_000].fill(1);
        expected[900 << 10..950 << 10].fill(2);
        // Bytes that nobody has written through the image do not show.
        let mut data = std::fs::read(bed.path("data.raw")).expect("readable");
        data.resize(1_100_000, 9);
        std::fs::write(bed.path("data.raw"), data).expect("writable");
        for size in [2_000_384, 924_160, 1_048_576] {
            bed.ok(&["resize", "--shrink", "a.qcow2", &size.to_string()]);
            expected.resize(size, 0);
            assert_eq!(length(&bed, "data.raw"), size as u64);
            bed.qemu_img(&["check", "-q", "a.qcow2"]);
            std::fs::write(bed.path("expected.raw"), &expected).expect("writable");
            bed.assert_same(("qcow2", "a.qcow2"), ("raw", "expected.raw"));
            if raw == "on" {
                bed.assert_same(("raw", "data.raw"), ("raw", "expected.raw"));
            }
        }
        let error = bed.fails(&["snapshot", "-c", "one", "a.qcow2"], 1);
        assert!(error.contains("external data file"), "{error}");
    }
}

#[test]
fn what_is_new_of_a_longer_disk_is_preallocated() {
    let bed = Bed::new();
    for mode in ["metadata", "falloc", "full"] {
        let preallocation = format!("--preallocation={mode}");
        bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
        bed.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 1M".into()]);
        bed.ok(&["resize", &preallocation, "a.qcow2", "3M"]);
        bed.check("a.qcow2");
        let map = bed.qemu_img(&["map", "--output=json", "a.qcow2"]);
        assert!(!map.contains("\"present\": false"), "{mode}: {map}");
        let mut expected = vec![1; 1 << 20];
        expected.resize(3 << 20, 0);
        std::fs::write(bed.path("expected.raw"), expected).expect("writable");
        bed.assert_same(("qcow2", "a.qcow2"), ("raw", "expected.raw"));
        bed.fails(&["resize", "--shrink", &preallocation, "a.qcow2", "2M"], 1);

        std::fs::write(bed.path("a.raw"), [1; 5000]).expect("writable");
        if mode == "metadata" {
            bed.fails(&["resize", "-f", "raw", &preallocation, "a.raw", "3M"], 2);
            continue;
        }
        bed.ok(&["resize", "-f", "raw", &preallocation, "a.raw", "3M"]);
        assert!(allocated(&bed, "a.raw") >= 3 << 20, "{mode}");
        assert_eq!(length(&bed, "a.raw"), 3 << 20);
    }
    bed.fails(&["resize", "--preallocation=some", "a.raw", "9M"], 2);
}
