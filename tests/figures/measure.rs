//! What `measure` says.

use std::path::Path;
use std::process::Command;

use rand::RngExt;
use seethrough::qcow2::commitment::committed_length;
use seethrough::qcow2::header::Header;
use seethrough::sys::block_on;
use serde_json::Value;

use crate::engine::{for_each_seed, load, qemu_img, rng, run};
use crate::made::{Made, SHAPES};

/// Runs both programs with the arguments of `measure`; ours tells the commitment besides.
fn measured_alike(directory: &Path, arguments: &[&str]) -> u64 {
    let measure = |program: &str, output: &str| {
        let output = Command::new(program)
            .args(["measure", "--output", output])
            .args(arguments)
            .current_dir(directory)
            .output()
            .expect("it runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{program} measure {arguments:?}: {stderr}"
        );
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let ours = env!("CARGO_BIN_EXE_seethrough");
    let mut figures: Value = serde_json::from_str(&measure(ours, "json")).expect("JSON");
    let commitment = figures
        .as_object_mut()
        .expect("an object")
        .remove("commitment");
    let commitment = commitment
        .and_then(|bytes| bytes.as_u64())
        .expect("a number");
    let stock: Value = serde_json::from_str(&measure("qemu-img", "json")).expect("JSON");
    assert_eq!(figures, stock, "{arguments:?}");
    let human = format!("{}commitment: {commitment}\n", measure("qemu-img", "human"));
    assert_eq!(measure(ours, "human"), human, "{arguments:?}");
    commitment
}

const MEASURED_OPTIONS: &[&str] = &[
    "compat=0.10",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=4k",
    "extended_l2=on",
    "cluster_size=2M,refcount_bits=1",
    "preallocation=metadata",
    "preallocation=full",
];

#[test]
fn new_images_are_measured_as_stock_tools_measure_them_and_come_to_that() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for size in ["0", "1", "10485761", "1T"] {
        measured_alike(directory.path(), &["--size", size]);
        for options in MEASURED_OPTIONS {
            if options.contains("512") && size == "1T" {
                continue;
            }
            let arguments = ["--size", size, "-O", "qcow2", "-o", options];
            let commitment = measured_alike(directory.path(), &arguments);
            // As it is told of the image once it is there.
            let image = directory.path().join("new.qcow2");
            let options = options.replace("preallocation=full", "compat=1.1");
            let options = options.replace("preallocation=metadata", "compat=1.1");
            let path = image.to_str().expect("UTF-8");
            let create = ["create", "-q", "-f", "qcow2", "-o", &options, path, size];
            let (code, text) = run(env!("CARGO_BIN_EXE_seethrough"), &create);
            assert_eq!(code, 0, "{text}");
            let header = Header::parse(&std::fs::read(&image).expect("readable")).expect("sound");
            let storage = load(&image);
            let told =
                block_on(committed_length(storage.as_ref(), &header)).expect("a sound image");
            assert_eq!(told, commitment, "{options} {size}");
        }
    }
}

#[test]
fn copies_are_measured_as_stock_tools_measure_them() {
    for_each_seed(1, "measuring copies", |seed| {
        let mut rng = rng(seed);
        for shape in SHAPES.iter().filter(|shape| shape.1 > 0) {
            let made = Made::new(shape, &mut rng);
            let directory = made.directory.path();
            let options = MEASURED_OPTIONS[rng.random_range(0..MEASURED_OPTIONS.len())];
            measured_alike(directory, &["-O", "qcow2", "-o", options, "image.qcow2"]);
            measured_alike(directory, &["-O", "raw", "-f", "qcow2", "image.qcow2"]);
            let overlay = directory.join("overlay.qcow2");
            let overlay = overlay.to_str().expect("UTF-8");
            qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "image.qcow2",
                "-F",
                "qcow2",
                overlay,
            ]);
            let command = [
                "-f",
                "qcow2",
                "-c",
                "write -P 5 300k 200k",
                "-c",
                "write -z 1M 100k",
                overlay,
            ];
            let (code, text) = run("qemu-io", &command);
            assert_eq!(code, 0, "{text}");
            for bitmap in ["one", "another"] {
                qemu_img(&["bitmap", "--add", "-g", "512", overlay, bitmap]);
            }
            measured_alike(
                directory,
                &["-O", "qcow2", "-o", "cluster_size=4k", "overlay.qcow2"],
            );
            measured_alike(directory, &["-O", "qcow2", "overlay.qcow2"]);
        }
    });
}
