//! `preallocation`: what a new image has ready is what stock tools make ready, and the disk reads as zeros, or as its
//! backing image.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::preallocate::Preallocation;
use seethrough::storage::{Fault, FaultStorage, MemoryStorage, Operation, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{GuestOffset, HostOffset};

use crate::engine::workload::read_range;
use crate::engine::{Allowed, check, load, qemu_img, run};

const KINDS: &[&str] = &[
    "cluster_size=512,refcount_bits=1",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=64k",
    "compat=0.10",
    "cluster_size=2M",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=128k,extended_l2=on,lazy_refcounts=on",
];
const MODES: [&str; 3] = ["metadata", "falloc", "full"];
const SIZE: u64 = (3 << 20) + 512;

fn seethrough(arguments: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_seethrough"))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

fn create(format: &str, options: &str, more: &[&str], path: &Path) {
    let size = SIZE.to_string();
    let create = ["create", "-q", "-f", format, "-o", options];
    let rest = [path.to_str().unwrap(), size.as_str()];
    let (code, text) = seethrough(&[&create, more, &rest].concat());
    assert_eq!(code, 0, "{options}: {text}");
}

/// Bytes that the host has given to a file.
fn room(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Start, length, and whether it is allocated and holds data, wherever that lies.
fn map(path: &Path) -> Vec<(u64, u64, bool, bool)> {
    let text = qemu_img(&[
        "map",
        "--output=json",
        "-f",
        "qcow2",
        path.to_str().unwrap(),
    ]);
    let entries: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let mut map: Vec<(u64, u64, bool, bool)> = Vec::new();
    for entry in &entries {
        let number = |key: &str| entry[key].as_u64().unwrap();
        let flags = (entry["present"] == true, entry["data"] == true);
        match map.last_mut() {
            Some(last) if (last.2, last.3) == flags => last.1 += number("length"),
            _ => map.push((number("start"), number("length"), flags.0, flags.1)),
        }
    }
    map
}

/// The places that entries give, whatever lies there.
fn assert_all_placed(path: &Path, what: &str) {
    let (code, text) = run(
        "qemu-img",
        &["check", "--output=json", path.to_str().unwrap()],
    );
    assert_eq!(code, 0, "{what}: {text}");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        report["allocated-clusters"], report["total-clusters"],
        "{what}"
    );
}

#[test]
fn every_cluster_of_every_kind_of_image_has_its_place_and_reads_as_zeros() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, stock) = (
        directory.path().join("ours"),
        directory.path().join("stock"),
    );
    for kind in KINDS {
        for mode in MODES {
            let options = format!("{kind},preallocation={mode}");
            create("qcow2", &options, &[], &ours);
            let size = SIZE.to_string();
            let path = stock.to_str().unwrap();
            qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, &size]);
            check(&ours, Allowed::Nothing).unwrap();
            assert_all_placed(&ours, &options);
            let is_sparse = mode == "metadata";
            let len = |path: &Path| std::fs::metadata(path).unwrap().len();
            for image in [&ours, &stock] {
                let (room, len) = (room(image), len(image));
                let as_asked = if is_sparse {
                    room + SIZE / 2 <= len
                } else {
                    room >= SIZE
                };
                assert!(as_asked, "{options}: {room} of {len}");
            }
            assert!(len(&ours).abs_diff(len(&stock)) <= 4 << 20, "{options}");
            if !is_sparse {
                assert_eq!(map(&ours), map(&stock), "{options}");
            }
            let image = Qcow2::open(load(&ours), None, Access::ReadOnly);
            let found = read_range(&block_on(image).unwrap(), 0..SIZE).unwrap();
            assert!(found.iter().all(|byte| *byte == 0), "{options}");
        }
    }
}

#[test]
fn preallocated_clusters_are_written_in_place() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    create("qcow2", "preallocation=metadata", &[], &path);
    let storage = load(&path);
    let before = storage.len();
    let image = block_on(Qcow2::open(
        Arc::clone(&storage) as _,
        None,
        Access::ReadWrite,
    ))
    .unwrap();
    let data = IoBuf::from_bytes(&vec![5; usize::try_from(SIZE).unwrap()]);
    block_on(image.write(GuestOffset(0), data)).unwrap();
    block_on(image.flush()).unwrap();
    assert_eq!(storage.len(), before);
}

#[test]
fn a_backing_image_shows_through_places_that_are_not_written_to() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.raw");
    let bytes = vec![0x42; usize::try_from(SIZE).unwrap()];
    std::fs::write(&base, &bytes).unwrap();
    let path = directory.path().join("disk");
    let over = ["-b", "base.raw", "-F", "raw"];
    for mode in MODES {
        let options = format!("extended_l2=on,preallocation={mode}");
        create("qcow2", &options, &over, &path);
        check(&path, Allowed::Nothing).unwrap();
        assert_all_placed(&path, &options);
        let (base, path) = (base.to_str().unwrap(), path.to_str().unwrap());
        qemu_img(&["compare", "-f", "raw", "-F", "qcow2", base, path]);

        // Standard entries would hide it: refused, as by stock tools.
        let standard = format!("preallocation={mode}");
        let new = directory.path().join("new");
        let new = new.to_str().unwrap();
        let create = ["create", "-f", "qcow2", "-o", &standard];
        let arguments = [&create[..], &over, &[new]].concat();
        let (code, text) = seethrough(&arguments);
        assert!(code != 0 && text.contains("extended_l2=on"), "{text}");
        assert_ne!(run("qemu-img", &arguments).0, 0);
        assert!(!Path::new(new).exists());
    }
}

#[test]
fn raw_images_have_room_or_zeros_and_no_metadata() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    for mode in ["off", "falloc", "full"] {
        create("raw", &format!("preallocation={mode}"), &[], &path);
        assert_eq!(room(&path) >= SIZE, mode != "off", "{mode}");
        assert!(std::fs::read(&path).unwrap() == vec![0; usize::try_from(SIZE).unwrap()]);
    }
    let name = path.to_str().unwrap();
    let arguments = [
        "create",
        "-f",
        "raw",
        "-o",
        "preallocation=metadata",
        name,
        "1M",
    ];
    let (code, text) = seethrough(&arguments);
    assert!(code != 0 && text.contains("falloc"), "{text}");
}

#[test]
fn data_files_are_made_with_their_images() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let data = path("data");
    std::fs::write(&data, vec![0xee; 100_000]).unwrap();
    for (options, placed) in [
        ("data_file_raw=off", false),
        ("data_file_raw=on", true),
        ("data_file_raw=on,extended_l2=on", true),
        ("preallocation=metadata", true),
        ("preallocation=full,cluster_size=4k", true),
    ] {
        let options = format!("data_file={},{options}", data.display());
        let image = path("disk.qcow2");
        create("qcow2", &options, &[], &image);
        assert!(std::fs::read(&data).unwrap() == vec![0; usize::try_from(SIZE).unwrap()]);
        assert_eq!(room(&data) >= SIZE, options.contains("full"), "{options}");
        check(&image, Allowed::Nothing).unwrap();
        let whole = [(0, SIZE, placed, placed)];
        assert_eq!(map(&image), whole, "{options}");
        // What others write to a raw data file is read, by us and by stock tools.
        if options.contains("raw=on") {
            std::fs::write(&data, vec![0x77; usize::try_from(SIZE).unwrap()]).unwrap();
            let (image, data) = (image.to_str().unwrap(), data.to_str().unwrap());
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", image, data]);
        }
    }
}

/// An image without preallocation, of 64 KiB clusters.
fn plain(directory: &Path) -> (PathBuf, Arc<MemoryStorage>) {
    let path = directory.join("disk");
    create("qcow2", "cluster_size=64k", &[], &path);
    let storage = load(&path);
    (path, storage)
}

#[test]
fn what_a_reused_cluster_held_never_shows() {
    let directory = tempfile::tempdir().unwrap();
    let (path, storage) = plain(directory.path());
    let end = HostOffset(storage.len());
    block_on(storage.writev(end, IoBuf::from_bytes(&vec![0xd5; 8 << 20]))).unwrap();
    let image = block_on(Qcow2::open(
        Arc::clone(&storage) as _,
        None,
        Access::ReadWrite,
    ))
    .unwrap();
    block_on(image.write(GuestOffset(65536), IoBuf::from_bytes(&[1; 65536]))).unwrap();
    block_on(image.preallocate(GuestOffset(0), SIZE, Preallocation::Metadata)).unwrap();
    let found = read_range(&image, 0..SIZE).unwrap();
    for (number, cluster) in found.chunks(65536).enumerate() {
        let expected = u8::from(number == 1);
        assert!(
            cluster.iter().all(|byte| *byte == expected),
            "cluster {number}"
        );
    }
    block_on(image.flush()).unwrap();
    std::fs::write(&path, storage.contents()).unwrap();
    check(&path, Allowed::Nothing).unwrap();
}

#[test]
fn a_host_without_room_ends_preallocation_and_leaves_a_sound_image() {
    let directory = tempfile::tempdir().unwrap();
    let (path, storage) = plain(directory.path());
    let failing = Arc::new(FaultStorage::new(Arc::clone(&storage) as Arc<dyn Storage>));
    let image = Qcow2::open(Arc::clone(&failing) as _, None, Access::ReadWrite);
    let image = block_on(image).unwrap();
    for (operation, mode) in [
        (Operation::SetLen, Preallocation::Metadata),
        (Operation::WriteZeroes, Preallocation::Falloc),
        (Operation::Write, Preallocation::Full),
    ] {
        failing.inject(Fault::nth(0, ErrorKind::NoSpace).only(operation));
        let error = block_on(image.preallocate(GuestOffset(0), SIZE, mode)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        block_on(image.flush()).unwrap();
        std::fs::write(&path, storage.contents()).unwrap();
        check(&path, Allowed::Nothing).unwrap();
    }
    block_on(image.preallocate(GuestOffset(0), SIZE, Preallocation::Full)).unwrap();
    block_on(image.flush()).unwrap();
    std::fs::write(&path, storage.contents()).unwrap();
    assert_all_placed(&path, "at last");
}

#[test]
fn standard_entries_over_a_backing_image_stay_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let (_, storage) = plain(directory.path());
    let base = Arc::new(MemoryStorage::new(vec![3; 1 << 20]));
    let base = Arc::new(RawImage::new(base, Access::ReadOnly));
    let image = Qcow2::open(storage, Some(base), Access::ReadWrite);
    let image = block_on(image).unwrap();
    let refused = image.preallocate(GuestOffset(0), SIZE, Preallocation::Metadata);
    let error = block_on(refused).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
}
