//! `seethrough convert`: what it makes has the contents of its source, as the stock tools see both.

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use rand::RngExt;
use rand::seq::IndexedRandom;

use crate::bed::{Bed, Layer};
use crate::engine::{for_each_seed, rng};

/// Formats and options of outputs; those that can be compressed come first.
const OUTPUTS: &[(&str, &str)] = &[
    ("qcow2", "cluster_size=64k"),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=4k,compression_type=zstd"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "cluster_size=32k,extended_l2=on"),
    ("qcow2", "cluster_size=64k,compat=0.10"),
    ("raw", ""),
];

fn top(chain: &[Layer]) -> &Layer {
    chain.last().expect("a chain has a layer")
}

#[test]
fn copies_of_random_chains_have_their_contents() {
    for_each_seed(10, "convert", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let chain = bed.chain(rng, "l");
        let source = top(&chain);
        for turn in 0..4 {
            let (format, options) = *OUTPUTS.choose(rng).expect("not empty");
            let lanes = rng.random_range(1..=16).to_string();
            let mut arguments = vec!["convert", "-f", source.format, "-O", format, "-m", &lanes];
            if !options.is_empty() {
                arguments.extend(["-o", options]);
            }
            match rng.random_range(0..3) {
                0 if format == "qcow2" => arguments.push("-c"),
                1 => arguments.push("-W"),
                _ => {}
            }
            match rng.random_range(0..4) {
                0 => arguments.extend(["-S", "0"]),
                1 => arguments.extend(["-S", "64k"]),
                _ => {}
            }
            let name = format!("out{turn}");
            arguments.extend([source.name.as_str(), &name]);
            println!("{arguments:?}");
            assert_eq!(bed.ok(&arguments), "");
            bed.assert_same((source.format, &source.name), (format, &name));
            let size = format!("\"virtual-size\": {}", source.size);
            let info = bed.qemu_img(&["info", "--output=json", "-f", format, &name]);
            assert!(info.contains(&size), "{info}");
            if format == "qcow2" {
                bed.check(&name);
            }
        }
    });
}

#[test]
fn copies_over_a_base_hold_what_the_source_holds_above_it() {
    for_each_seed(8, "convert -B", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let chain = bed.chain_of(rng, "l", 3);
        let source = top(&chain);
        // The direct backing image, a copy of it under another name, and the image behind it.
        let backing = &chain[1];
        bed.qemu_img(&[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            &backing.name,
            "copy.qcow2",
        ]);
        for (base, format) in [
            (backing.name.as_str(), "qcow2"),
            ("copy.qcow2", "qcow2"),
            (chain[0].name.as_str(), chain[0].format),
        ] {
            let mut arguments = vec!["convert", "-O", "qcow2", "-B", base, "-F", format];
            if rng.random_bool(0.3) {
                arguments.push("-c");
            }
            let out = format!("over-{base}");
            arguments.extend([source.name.as_str(), &out]);
            bed.ok(&arguments);
            bed.check(&out);
            bed.assert_same(("qcow2", &source.name), ("qcow2", &out));
            let info = bed.qemu_img(&["info", "--output=json", &out]);
            assert!(
                info.contains(&format!("\"backing-filename\": \"{base}\"")),
                "{info}"
            );
        }
    });
}

#[test]
fn what_the_source_does_not_hold_is_not_copied_over_a_base() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "1G"]);
    bed.qemu_io("qcow2", "base.qcow2", &["write -P 1 0 1M".into()]);
    bed.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ]);
    bed.qemu_io(
        "qcow2",
        "top.qcow2",
        &["write -P 2 512M 64k".into(), "write -z 0 64k".into()],
    );
    bed.ok(&[
        "convert",
        "-O",
        "qcow2",
        "-B",
        "base.qcow2",
        "top.qcow2",
        "out.qcow2",
    ]);
    let map = |name: &str| bed.ok(&["map", "--output=json", name]);
    let depths = |name: &str| -> Vec<serde_json::Value> {
        let map: Vec<serde_json::Value> = serde_json::from_str(&map(name)).expect("JSON");
        map.into_iter()
            .map(|entry| {
                serde_json::json!([
                    entry["start"],
                    entry["length"],
                    entry["depth"],
                    entry["zero"]
                ])
            })
            .collect()
    };
    assert_eq!(depths("top.qcow2"), depths("out.qcow2"));
}

#[test]
fn holes_stay_holes_and_zeros_in_data_become_holes() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "a.raw", "1G"]);
    let writes = ["write -P 1 0 64k", "write -P 0 1M 8M", "write -P 2 100M 4k"];
    bed.qemu_io("raw", "a.raw", &writes.map(str::to_owned));
    let on_host = |name: &str| {
        let metadata = std::fs::metadata(bed.path(name)).expect("it is there");
        metadata.blocks() * 512
    };
    bed.ok(&["convert", "-f", "raw", "-O", "raw", "a.raw", "b.raw"]);
    assert_eq!(std::fs::metadata(bed.path("b.raw")).unwrap().len(), 1 << 30);
    assert!(on_host("b.raw") <= 80 << 10, "{}", on_host("b.raw"));
    bed.ok(&["convert", "-f", "raw", "-O", "qcow2", "a.raw", "b.qcow2"]);
    assert!(on_host("b.qcow2") <= 1 << 20, "{}", on_host("b.qcow2"));
    // All of it is written if that is asked for.
    bed.qemu_img(&["create", "-q", "-f", "raw", "small.raw", "4M"]);
    bed.ok(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        "-S",
        "0",
        "small.raw",
        "full.raw",
    ]);
    assert!(on_host("full.raw") >= 4 << 20);
}

#[test]
fn an_image_that_is_there_takes_the_disk_and_keeps_what_lies_behind_it() {
    let bed = Bed::new();
    for (format, options) in OUTPUTS {
        bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1000k"]);
        let writes = [
            "write -P 1 100k 100k",
            "write -P 0 300k 100k",
            "write -z 900k 10k",
        ];
        bed.qemu_io("qcow2", "a.qcow2", &writes.map(str::to_owned));
        let mut create = vec!["create", "-q", "-f", format];
        if !options.is_empty() {
            create.extend(["-o", options]);
        }
        create.extend(["out", "2M"]);
        bed.qemu_img(&create);
        bed.qemu_io(format, "out", &["write -P 7 0 2M".into()]);
        bed.ok(&["convert", "-n", "-O", format, "a.qcow2", "out"]);
        bed.qemu_img(&["create", "-q", "-f", "raw", "expected", "2M"]);
        let expected = [
            "write -P 7 0 2M",
            "write -P 0 0 1000k",
            "write -P 1 100k 100k",
        ];
        bed.qemu_io("raw", "expected", &expected.map(str::to_owned));
        bed.assert_same((format, "out"), ("raw", "expected"));
        if *format == "qcow2" {
            bed.check("out");
            bed.ok(&["convert", "-n", "-c", "-O", format, "a.qcow2", "out"]);
            bed.assert_same((format, "out"), ("raw", "expected"));
            bed.check("out");
        }
        bed.qemu_img(&["create", "-q", "-f", "raw", "small", "999k"]);
        let error = bed.fails(&["convert", "-n", "-O", "raw", "a.qcow2", "small"], 2);
        assert!(error.contains("seethrough resize"), "{error}");
    }
}

#[test]
fn sources_are_joined_one_behind_the_other() {
    for_each_seed(4, "concatenation", |seed| {
        let rng = &mut rng(seed);
        let bed = Bed::new();
        let mut names = Vec::new();
        for prefix in ["a", "b", "c"] {
            let layer = Layer {
                name: prefix.to_owned(),
                format: "qcow2",
                options: "cluster_size=4k",
                size: rng.random_range(0..300) * 512,
            };
            bed.create(&layer, None);
            if layer.size > 0 {
                bed.fill(rng, &layer);
            }
            names.push(prefix);
        }
        bed.ok(&[&["convert", "-O", "qcow2", "-c"][..], &names, &["ours"]].concat());
        bed.qemu_img(&[&["convert", "-O", "raw"][..], &names, &["stock"]].concat());
        bed.assert_same(("qcow2", "ours"), ("raw", "stock"));
        bed.check("ours");
    });
}

#[test]
fn images_in_use_are_neither_read_nor_replaced() {
    let bed = Bed::new();
    for name in ["a.qcow2", "b.qcow2"] {
        bed.qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]);
    }
    let mut user = Command::new("qemu-io")
        .args(["-f", "qcow2", "a.qcow2"])
        .current_dir(bed.directory.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("qemu-io runs");
    // It prompts once it has opened the image.
    let mut prompt = [0; 8];
    let stdout = user.stdout.as_mut().expect("a pipe");
    std::io::Read::read_exact(stdout, &mut prompt).expect("a prompt");
    let error = bed.fails(&["convert", "-O", "raw", "a.qcow2", "out"], 1);
    assert!(error.contains("a.qcow2"), "{error}");
    assert!(!bed.path("out").exists());
    let error = bed.fails(&["convert", "-O", "qcow2", "b.qcow2", "a.qcow2"], 1);
    assert!(error.contains("a.qcow2"), "{error}");
    bed.ok(&["convert", "-U", "-O", "raw", "a.qcow2", "out"]);
    drop(user.stdin.take());
    user.wait().expect("qemu-io ends");
    let error = bed.fails(&["convert", "-O", "qcow2", "a.qcow2", "a.qcow2"], 1);
    assert!(error.contains("a.qcow2"), "{error}");
    bed.check("a.qcow2");
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    for (arguments, code, hint) in [
        (&["-c", "-O", "raw"][..], 1, "convert to qcow2"),
        (&["-c", "-W", "-O", "qcow2"], 2, "-W"),
        (&["-S", "100", "-O", "qcow2"], 2, "512"),
        (&["-O", "raw", "-o", "cluster_size=4k"], 2, "cluster_size"),
        (&["-O", "qcow2", "-o", "size=512k"], 2, "less than"),
        (&["-O", "qcow2", "-B", "out"], 1, "out"),
        (&["-O", "qcow2", "-t", "writethrough"], 2, "not supported"),
        (&["-m", "17"], 2, "17"),
    ] {
        let arguments = [&["convert"][..], arguments, &["a.qcow2", "out"]].concat();
        let error = bed.fails(&arguments, code);
        assert!(error.contains(hint), "{arguments:?}: {error}");
        assert!(!bed.path("out").exists());
    }
}

#[test]
fn a_conversion_that_fails_leaves_nothing_and_what_was_there_before() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "a.raw", "8M"]);
    bed.qemu_io("raw", "a.raw", &["write -P 1 0 8M".into()]);
    let Some(full) = Tmpfs::mount(&bed, "4m") else {
        return;
    };
    let source = bed.path("a.raw").display().to_string();
    for format in ["raw", "qcow2"] {
        let out = full.path("out");
        let arguments = ["convert", "-f", "raw", "-O", format, &source, &out];
        let error = bed.fails(&arguments, 1);
        assert!(error.contains("No space left"), "{error}");
        assert_eq!(full.names(), Vec::<String>::new());
        std::fs::write(&out, "precious").expect("room for a few bytes");
        bed.fails(&arguments, 1);
        assert_eq!(std::fs::read(&out).unwrap(), b"precious");
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn a_snapshot_is_copied_by_id_and_name_as_the_stock_tool_does() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "8M"]);
    bed.qemu_io("qcow2", "base.qcow2", &["write -P 9 4M 1M".into()]);
    let overlay = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
    ];
    bed.qemu_img(&[&overlay[..], &["a.qcow2"]].concat());
    bed.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 1M".into()]);
    bed.ok(&["snapshot", "-c", "2", "a.qcow2"]);
    bed.qemu_io("qcow2", "a.qcow2", &["write -P 2 512k 4M".into()]);
    bed.qemu_img(&["snapshot", "-c", "second", "a.qcow2"]);
    bed.ok(&["resize", "a.qcow2", "12M"]);
    bed.qemu_io("qcow2", "a.qcow2", &["write -P 3 1M 11M".into()]);
    for (wanted, size) in [
        ("2", 8 << 20),
        ("second", 8 << 20),
        ("snapshot.name=2", 8 << 20),
        ("snapshot.id=2,snapshot.name=second", 8 << 20),
    ] {
        let copy = [
            "convert", "-f", "qcow2", "-O", "raw", "-l", wanted, "a.qcow2",
        ];
        bed.qemu_img(&[&copy[..], &["expected.raw"]].concat());
        assert_eq!(bed.ok(&[&copy[..], &["found.raw"]].concat()), "");
        bed.assert_same(("raw", "found.raw"), ("raw", "expected.raw"));
        let found = std::fs::metadata(bed.path("found.raw")).expect("a copy");
        assert_eq!(found.len(), size, "{wanted}");
    }
    bed.qemu_img(&["create", "-q", "a.raw", "1M"]);
    for (arguments, code, hint) in [
        (&["-l", "third", "a.qcow2"][..], 1, "no snapshot 'third'"),
        (
            &["-l", "snapshot.id=1,snapshot.name=second", "a.qcow2"],
            1,
            "no snapshot",
        ),
        (&["-l", "snapshot.no=1", "a.qcow2"], 2, "snapshot.id=ID"),
        (&["-l", "2", "a.qcow2", "a.qcow2"], 2, "one source"),
        (&["-l", "2", "-f", "raw", "a.raw"], 2, "only qcow2"),
        (&["-l", "2", "-B", "base.qcow2", "a.qcow2"], 2, "-B"),
        (&["--bitmaps", "a.qcow2"], 2, "--bitmaps"),
    ] {
        let arguments = [&["convert"][..], arguments, &["none.raw"]].concat();
        let error = bed.fails(&arguments, code);
        assert!(error.contains(hint), "{arguments:?}: {error}");
    }
    assert!(!bed.path("none.raw").exists());
}

#[test]
fn a_conversion_that_fails_leaves_no_new_data_file() {
    let bed = Bed::new();
    bed.qemu_img(&["create", "-q", "-f", "raw", "a.raw", "8M"]);
    bed.qemu_io("raw", "a.raw", &["write -P 1 0 8M".into()]);
    let Some(full) = Tmpfs::mount(&bed, "4m") else {
        return;
    };
    let source = bed.path("a.raw").display().to_string();
    let (out, data) = (full.path("out"), full.path("data"));
    let option = format!("data_file={data}");
    let to = [
        "convert", "-f", "raw", "-O", "qcow2", "-o", &option, &source,
    ];
    let error = bed.fails(&[&to[..], &[&out]].concat(), 1);
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(full.names(), Vec::<String>::new());
    // One that was there before stays, though not what it held.
    std::fs::write(&data, "old").expect("room for a few bytes");
    bed.fails(&[&to[..], &[&out]].concat(), 1);
    assert_eq!(full.names(), ["data"]);
    std::fs::remove_file(&data).unwrap();
    for old in [None, Some("precious")] {
        if let Some(old) = old {
            std::fs::write(&data, old).unwrap();
        }
        let error = bed.fails(&[&to[..], &[&data]].concat(), 2);
        assert!(error.contains("its own data file"), "{error}");
        let left = std::fs::read(&data).ok();
        assert_eq!(left.as_deref(), old.map(str::as_bytes));
    }
}

/// A small filesystem.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    /// `None`, and the reason printed, where this is not permitted.
    fn mount(bed: &Bed, size: &str) -> Option<Self> {
        let path = bed.path("full");
        std::fs::create_dir(&path).expect("a directory");
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&path)
            .output()
            .expect("mount runs");
        if output.status.success() {
            return Some(Self(path));
        }
        let reason = String::from_utf8_lossy(&output.stderr);
        crate::skip::skip(
            &format!("no filesystem can be mounted: {reason}"),
            crate::skip::IN_CI,
        );
        None
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("it is there");
        entries
            .map(|entry| {
                entry
                    .expect("it is there")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
