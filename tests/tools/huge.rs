//! Disks of a pebibyte that hold next to nothing: whatever goes by the disk's size, not by what is allocated, never
//! comes to its end here, or to more memory than there is.

use std::process::Command;

use serde_json::Value;

use crate::bed::Bed;
use crate::engine::run;

/// What a verb may take for itself: the L1 table of such a disk has 4 MiB.
const MEMORY: &str = "--data=268435456";

const TIB: u64 = 1 << 40;

/// Runs `seethrough` with bounded memory; it has to succeed. Its standard output.
fn ok(bed: &Bed, arguments: &[&str]) -> String {
    let output = Command::new("prlimit")
        .args([MEMORY, env!("CARGO_BIN_EXE_seethrough")])
        .args(arguments)
        .current_dir(bed.directory.path())
        .output()
        .expect("prlimit runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn write(bed: &Bed, image: &str, pieces: &[(u8, u64)]) {
    for (pattern, at) in pieces {
        let command = format!("write -P {pattern} {at} 64k");
        let image = bed.path(image).display().to_string();
        let (code, text) = run("qemu-io", &["-f", "qcow2", "-c", &command, &image]);
        assert_eq!(code, 0, "{text}");
    }
}

fn data_at(bed: &Bed, image: &str) -> Vec<u64> {
    let map: Vec<Value> =
        serde_json::from_str(&ok(bed, &["map", "--output=json", image])).expect("JSON");
    let data = map.iter().filter(|extent| extent["zero"] == false);
    data.map(|extent| extent["start"].as_u64().expect("a number"))
        .collect()
}

#[test]
fn every_verb_takes_a_disk_of_a_pebibyte_for_what_it_holds() {
    let bed = Bed::new();
    let large = ["-o", "cluster_size=2M"];
    let create = [&["create", "-f", "qcow2"][..], &large].concat();
    ok(&bed, &[&create[..], &["base.qcow2", "1P"]].concat());
    let backing = ["-b", "base.qcow2", "-F", "qcow2", "top.qcow2"];
    ok(&bed, &[&create[..], &backing].concat());
    write(
        &bed,
        "base.qcow2",
        &[(1, 0), (2, 512 * TIB), (3, 1000 * TIB)],
    );
    write(&bed, "top.qcow2", &[(4, 700 * TIB)]);

    let all = [0, 512 * TIB, 700 * TIB, 1000 * TIB];
    ok(&bed, &["info", "--backing-chain", "top.qcow2"]);
    ok(
        &bed,
        &[&["measure", "-O", "qcow2"][..], &large, &["top.qcow2"]].concat(),
    );
    let convert = [&["convert", "-O", "qcow2"][..], &large].concat();
    ok(&bed, &[&convert[..], &["top.qcow2", "copy.qcow2"]].concat());
    assert_eq!(data_at(&bed, "copy.qcow2"), all);
    ok(&bed, &["compare", "top.qcow2", "copy.qcow2"]);
    for image in ["base.qcow2", "top.qcow2"] {
        ok(&bed, &["snapshot", "-c", "one", image]);
        ok(&bed, &["snapshot", "-d", "one", image]);
        ok(&bed, &["check", image]);
    }
    ok(&bed, &["commit", "top.qcow2"]);
    ok(&bed, &["compare", "base.qcow2", "copy.qcow2"]);
    ok(&bed, &["rebase", "-b", "", "top.qcow2"]);
    assert_eq!(data_at(&bed, "top.qcow2"), all);
    ok(&bed, &["resize", "--shrink", "copy.qcow2", "600T"]);
    ok(&bed, &["resize", "copy.qcow2", "900T"]);
    assert_eq!(data_at(&bed, "copy.qcow2"), all[..2]);
    ok(&bed, &["check", "copy.qcow2"]);
}
