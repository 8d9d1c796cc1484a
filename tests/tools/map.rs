//! `seethrough map` against `qemu-img map`.

use serde_json::Value;

use crate::bed::Bed;
use crate::engine::{for_each_seed, rng};

/// The map as JSON, without the fields that the stock tool of this version does not print.
fn parsed(text: &str) -> Vec<Value> {
    let map: Vec<Value> = serde_json::from_str(text).expect("JSON");
    let without = |mut entry: Value| {
        if let Some(fields) = entry.as_object_mut() {
            fields.remove("compressed");
        }
        entry
    };
    map.into_iter().map(without).collect()
}

#[test]
fn maps_of_random_chains_are_those_of_the_stock_tool() {
    for_each_seed(12, "map", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let chain = bed.chain(rng, "l");
        for layer in &chain {
            let image = ["-f", layer.format, &layer.name];
            let json = [&["map", "--output=json"][..], &image].concat();
            let (ours, stock) = (bed.ok(&json), bed.qemu_img(&json));
            assert_eq!(parsed(&ours), parsed(&stock), "{chain:?}");

            let part = [
                "map",
                "--output=json",
                "--start-offset=300",
                "--max-length=100k",
            ];
            if layer.size > 300 {
                let part = [&part[..], &image].concat();
                let (ours, stock) = (bed.ok(&part), bed.qemu_img(&part));
                assert_eq!(parsed(&ours), parsed(&stock), "{chain:?}");
            }

            let human = [&["map"][..], &image].concat();
            let (code, stock, _) = bed.stock("qemu-img", &human);
            let ours = bed.seethrough(&human);
            assert_eq!(ours.status.code(), Some(code), "{chain:?}");
            let ours = String::from_utf8(ours.stdout).expect("UTF-8");
            assert_eq!(ours, stock, "{chain:?}");
        }
    });
}

#[test]
fn room_that_the_host_has_not_given_is_known_to_be_zeros() {
    let bed = Bed::new();
    for (name, options) in [
        ("metadata.qcow2", "preallocation=metadata"),
        ("extended.qcow2", "preallocation=metadata,extended_l2=on"),
        ("falloc.qcow2", "preallocation=falloc"),
    ] {
        bed.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "8M"]);
        let writes = ["write -P 7 1M 100k", "write -z 3M 1M"].map(str::to_owned);
        bed.qemu_io("qcow2", name, &writes);
        let json = ["map", "--output=json", name];
        let (ours, stock) = (bed.ok(&json), bed.qemu_img(&json));
        assert_eq!(parsed(&ours), parsed(&stock), "{options}");
    }
}

#[test]
fn a_range_without_bytes_has_an_empty_map() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let beyond = ["map", "--output=json", "--start-offset=1M", "a.qcow2"];
    assert_eq!(bed.ok(&beyond), "[]\n");
}

#[test]
fn compressed_data_is_said_to_be() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "192k"]);
    let writes = ["write -c -P 7 0 128k", "write -P 8 64k 64k"].map(str::to_owned);
    bed.qemu_io("qcow2", "a.qcow2", &writes);
    let map: Vec<Value> =
        serde_json::from_str(&bed.ok(&["map", "--output=json", "a.qcow2"])).expect("JSON");
    let compressed: Vec<_> = map.iter().map(|entry| &entry["compressed"]).collect();
    assert_eq!(compressed, [true, false, false]);
    let error = bed.fails(&["map", "a.qcow2"], 1);
    assert!(error.contains("--output json"), "{error}");
}
