//! What `info` says.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::engine::{qemu_img, run};
use crate::made::MIB;

/// The figures that `seethrough info` prints for images in a directory.
fn info(directory: &Path, arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_seethrough"))
        .args(["info", "--output=json"])
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("seethrough runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn the_figures_of_new_images_are_those_of_their_formats() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let create = |format: &str, options: &str, name: &str| {
        let path = directory.path().join(name);
        let path = path.to_str().expect("UTF-8");
        qemu_img(&["create", "-q", "-f", format, "-o", options, path, "40M"]);
        info(directory.path(), &[name])["figures"].clone()
    };
    let disk = 40 * MIB;
    let sparse = create("raw", "preallocation=off", "sparse.raw");
    assert_eq!(sparse["capacity"], disk);
    assert_eq!(sparse["length"], disk);
    assert_eq!(sparse["commitment"], disk);
    assert!(sparse["allocation"].as_u64() < Some(MIB), "{sparse}");
    let full = create("raw", "preallocation=full", "full.raw");
    assert!(full["allocation"].as_u64() >= Some(disk), "{full}");
    // Header, refcount table, refcount block, L1 table, one L2 table.
    let whole = disk + 5 * 65536;
    for options in [
        "preallocation=off",
        "preallocation=metadata",
        "preallocation=full",
    ] {
        let figures = create("qcow2", options, "image.qcow2");
        assert_eq!(figures["capacity"], disk, "{options}");
        assert_eq!(figures["commitment"], whole, "{options}");
        let length = std::fs::metadata(directory.path().join("image.qcow2"))
            .expect("there")
            .len();
        assert_eq!(figures["length"], length, "{options}");
    }
}

#[test]
fn with_snapshots_there_is_no_bound_and_after_a_crash_none_is_known() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("image.qcow2");
    let name = path.to_str().expect("UTF-8");
    qemu_img(&["create", "-q", "-f", "qcow2", name, "4M"]);
    let (code, text) = run("qemu-io", &["-f", "qcow2", "-c", "write 0 1M", name]);
    assert_eq!(code, 0, "{text}");
    let plain = info(directory.path(), &["image.qcow2"])["figures"].clone();
    qemu_img(&["snapshot", "-c", "one", name]);
    let figures = info(directory.path(), &["image.qcow2"])["figures"].clone();
    assert_eq!(figures["commitment"], Value::Null);
    assert_eq!(figures["filesystem-shortfall"], Value::Null);
    // The snapshot's table and L1 table, a copy of the L2 table, and copies of 16 clusters.
    let more = 19 * 65536;
    let as_is = figures["commitment-without-new-snapshots"].as_u64();
    assert_eq!(
        as_is,
        plain["commitment"].as_u64().map(|bytes| bytes + more)
    );

    let file = OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("it opens");
    file.write_all_at(&[1], 79).expect("written");
    let figures = info(directory.path(), &["image.qcow2"])["figures"].clone();
    assert_eq!(figures["commitment"], Value::Null);
    let why = figures["commitment-unknown"].as_str().unwrap_or_default();
    assert!(
        why.contains("dirty bit") && why.contains("seethrough check -r all"),
        "{why}"
    );
}

#[test]
fn a_family_is_summed_with_each_file_once_and_held_against_its_filesystem() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let create = |name: &str, arguments: &[&str]| {
        let path = directory.path().join(name);
        let path = path.to_str().expect("UTF-8");
        qemu_img(&[&["create", "-q", "-f", "qcow2"], arguments, &[path, "1T"]].concat());
    };
    create("base.qcow2", &[]);
    create("tom.qcow2", &["-b", "base.qcow2", "-F", "qcow2"]);
    create("ann.qcow2", &["-b", "base.qcow2", "-F", "qcow2"]);
    let all = info(
        directory.path(),
        &["--backing-chain", "tom.qcow2", "ann.qcow2", "./base.qcow2"],
    );
    let images = all["images"].as_array().expect("a list");
    assert_eq!(images.len(), 3);
    let sum = |figure: &str| -> u64 {
        let each = images.iter().map(|image| image["figures"][figure].as_u64());
        each.map(|bytes| bytes.expect("a number")).sum()
    };
    let family = &all["family"];
    assert_eq!(family["files"], 3);
    for figure in ["capacity", "length", "allocation", "commitment"] {
        assert_eq!(family[figure], sum(figure), "{figure}");
    }
    let [filesystem] = family["filesystems"].as_array().expect("a list").as_slice() else {
        panic!("{family}");
    };
    let growth = sum("commitment") - sum("allocation");
    assert_eq!(filesystem["growth"], growth);
    let free = filesystem["free"].as_u64().expect("a number");
    assert_eq!(filesystem["shortfall"], growth.saturating_sub(free));
    // A chain alone is listed as stock tools list it, and its sums are with the topmost image.
    let chain = info(directory.path(), &["--backing-chain", "tom.qcow2"]);
    assert_eq!(chain[0]["family"]["files"], 2);
    assert_eq!(chain[1].get("family"), None);
}
