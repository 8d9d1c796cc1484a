//! `seethrough create` and `seethrough info` against `qemu-img create` and `qemu-img info`: the same options mean
//! the same images, and the same images are described in the same words.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::oracle::{self, Tolerated};
use serde_json::Value;

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `seethrough` in the directory.
    fn seethrough(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_seethrough"))
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("seethrough runs")
    }

    /// Runs `seethrough`, which has to succeed; its standard output.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.seethrough(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs `seethrough`, which has to fail with this exit code; its standard error.
    fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.seethrough(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("seethrough: "), "{stderr}");
        stderr
    }

    /// Runs `qemu-img` in the directory, which has to succeed; its standard output.
    fn qemu_img(&self, arguments: &[&str]) -> String {
        let output = Command::new("qemu-img")
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .expect("qemu-img runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "qemu-img {arguments:?}: {stderr}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// What both programs print about an image, for people and for programs, is the same, but for our figures.
    fn described_alike(&self, image: &str) {
        for more in [&[][..], &["--backing-chain"]] {
            let human = [&["info"], more, &[image]].concat();
            let ours = without_figures(&self.ok(&human));
            assert_eq!(ours, self.qemu_img(&human), "{image}");
            let json = [&["info", "--output=json"], more, &[image]].concat();
            let mut ours = parse(&self.ok(&json));
            let images = match &mut ours {
                Value::Array(images) => images.as_mut_slice(),
                image => std::slice::from_mut(image),
            };
            for image in images {
                let image = image.as_object_mut().expect("an object");
                assert!(image.remove("figures").is_some());
                image.remove("family");
            }
            assert_eq!(ours, parse(&self.qemu_img(&json)), "{image}");
        }
    }
}

/// What `info` prints for people, without the blocks of figures.
fn without_figures(text: &str) -> String {
    let mut in_figures = false;
    let mut kept = String::new();
    for line in text.lines() {
        let begins = line.starts_with("Figures") || line.starts_with("All ");
        in_figures = begins || in_figures && line.starts_with("    ");
        if !in_figures {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    // A blank line stands between images, and in front of the sums.
    match kept.strip_suffix("\n\n") {
        Some(images) => format!("{images}\n"),
        None => kept,
    }
}

fn parse(json: &str) -> Value {
    serde_json::from_str(json).expect("JSON")
}

/// What does not depend on how an image's file came to be.
fn properties(json: &str) -> Value {
    let mut value = parse(json);
    let object = value.as_object_mut().expect("an object");
    object.remove("actual-size");
    object.remove("filename");
    value
}

const OPTIONS: &[&str] = &[
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=2M,refcount_bits=1",
    "cluster_size=4k,refcount_bits=2,lazy_refcounts=on",
    "refcount_bits=4,compression_type=zstd",
    "refcount_bits=8",
    "refcount_bits=32,extended_l2=on",
    "cluster_size=128k,extended_l2=on",
    "cluster_size=16k,extended_l2=on,compat=v3",
];

#[test]
fn every_option_makes_the_image_that_qemu_img_makes() {
    let directory = Directory::new();
    for options in OPTIONS {
        for size in ["0", "513", "20G"] {
            let arguments = |name| ["create", "-q", "-f", "qcow2", "-o", options, name, size];
            directory.ok(&arguments("ours.qcow2"));
            directory.qemu_img(&arguments("theirs.qcow2"));
            oracle::qemu_img_check(&directory.path("ours.qcow2"), Tolerated::Nothing);
            let info = |name| directory.qemu_img(&["info", "--output=json", name]);
            assert_eq!(
                properties(&info("ours.qcow2")),
                properties(&info("theirs.qcow2")),
                "{options} {size}"
            );
        }
        directory.described_alike("ours.qcow2");
        directory.described_alike("theirs.qcow2");
    }
}

#[test]
fn stock_tools_write_to_our_images() {
    let directory = Directory::new();
    for options in OPTIONS {
        directory.ok(&[
            "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", "10M",
        ]);
        let image = directory.path("a.qcow2");
        let io = |command: &str| {
            oracle::ok(
                "qemu-io",
                ["-f", "qcow2", "-c", command, &image.display().to_string()],
            )
        };
        io("write -P 0x5a 512 3M");
        let read = io("read -P 0x5a 512 3M");
        assert!(!read.contains("failed"), "{options}: {read}");
        oracle::qemu_img_check(&image, Tolerated::Nothing);
    }
}

#[test]
fn overlays_take_size_and_format_from_what_they_lie_over() {
    let directory = Directory::new();
    directory.ok(&["create", "-q", "base.raw", "100M"]);
    directory.ok(&["create", "-q", "-b", "base.raw", "-F", "raw", "a.qcow2"]);
    directory.ok(&[
        "create",
        "-q",
        "-b",
        "a.qcow2",
        "b.qcow2",
        "-o",
        "extended_l2=on",
    ]);
    directory.ok(&["create", "-q", "-b", "a.qcow2", "larger.qcow2", "200M"]);
    let size =
        |name| parse(&directory.ok(&["info", "--output=json", name]))["virtual-size"].clone();
    assert_eq!(size("b.qcow2"), 100 << 20);
    assert_eq!(size("larger.qcow2"), 200 << 20);
    directory.described_alike("b.qcow2");
    directory.described_alike("base.raw");
}

#[test]
fn creations_that_make_no_sense_are_usage_errors_and_leave_nothing() {
    let directory = Directory::new();
    directory.ok(&["create", "-q", "base.raw", "1M"]);
    for (arguments, words) in [
        (&["new"][..], "needs a size"),
        (&["-b", "base.raw", "new"], "raw is never guessed"),
        (
            &["-f", "raw", "-b", "base.raw", "-F", "raw", "new"],
            "no backing image",
        ),
        (
            &["-f", "raw", "-o", "cluster_size=4k", "new", "1M"],
            "cluster_size",
        ),
        (&["-f", "vmdk", "new", "1M"], "vmdk"),
        (&["-o", "cluster_size=3000", "new", "1M"], "power of two"),
        (
            &["-o", "compat=0.10,lazy_refcounts=on", "new", "1M"],
            "compat=1.1",
        ),
        (&["-o", "colour=red", "new", "1M"], "colour"),
        (&["new", "10X"], "10X"),
    ] {
        let error = directory.fails(&[&["create"], arguments].concat(), 2);
        assert!(error.contains(words), "{arguments:?}: {error}");
        assert!(!directory.path("new").exists(), "{arguments:?}");
    }
    let error = directory.fails(&["create", "-b", "missing.qcow2", "new"], 1);
    assert!(error.contains("missing.qcow2"), "{error}");
}

#[test]
fn an_image_is_never_made_its_own_backing_image() {
    let directory = Directory::new();
    directory.ok(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    directory.ok(&["create", "-q", "-b", "a.qcow2", "b.qcow2"]);
    let before = std::fs::read(directory.path("a.qcow2")).expect("readable");
    std::fs::hard_link(directory.path("a.qcow2"), directory.path("link.qcow2")).expect("linked");
    for backing in ["a.qcow2", "./a.qcow2", "b.qcow2", "link.qcow2"] {
        directory.fails(&["create", "-b", backing, "a.qcow2"], 2);
    }
    let after = std::fs::read(directory.path("a.qcow2")).expect("readable");
    assert!(before == after, "a refused creation changed the image");
}

#[test]
fn backing_images_are_named_in_the_json_form_as_stock_tools_name_them() {
    let directory = Directory::new();
    directory.ok(&["create", "-q", "-f", "qcow2", "base.qcow2", "3M"]);
    for name in [
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}"#,
        r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"base.qcow2"}"#,
    ] {
        directory.ok(&["create", "-q", "-b", name, "ours.qcow2"]);
        directory.qemu_img(&["compare", "-f", "qcow2", "ours.qcow2", "base.qcow2"]);
        directory.qemu_img(&[
            "create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", "o.qcow2",
        ]);
        directory.ok(&["info", "--backing-chain", "o.qcow2"]);
    }
    let error = directory.fails(
        &[
            "create",
            "-b",
            r#"json:{"driver":"raw","offset":512,"file.filename":"base.qcow2"}"#,
            "new",
        ],
        1,
    );
    assert!(error.contains("offset"), "{error}");
}

#[test]
fn chains_that_cannot_be_followed_are_refused_with_a_remedy() {
    let directory = Directory::new();
    directory.ok(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    directory.ok(&[
        "create", "-q", "-u", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "1M",
    ]);
    directory.ok(&[
        "create", "-q", "-u", "-b", "b.qcow2", "-F", "qcow2", "a.qcow2", "1M",
    ]);
    let error = directory.fails(&["info", "--backing-chain", "a.qcow2"], 1);
    assert!(error.contains("contains itself"), "{error}");
}

#[test]
fn images_that_cannot_be_served_are_described_all_the_same() {
    let directory = Directory::new();
    let external = "data_file=data.raw,data_file_raw=on";
    directory.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        external,
        "external.qcow2",
        "1M",
    ]);
    directory.described_alike("external.qcow2");
    directory.qemu_img(&["create", "-q", "-f", "qcow2", "marked.qcow2", "1M"]);
    // Dirty and corrupt: the two lowest incompatible features.
    let image = directory.path("marked.qcow2");
    let mut bytes = std::fs::read(&image).expect("readable");
    bytes[79] |= 0b11;
    std::fs::write(&image, bytes).expect("writable");
    directory.described_alike("marked.qcow2");
}

#[test]
fn the_declaration_of_regions_is_shown_whatever_the_format() {
    let directory = Directory::new();
    let raw = directory.path("base.raw");
    directory.ok(&["create", "-q", "base.raw", "16M"]);
    let parts = [
        "-n",
        "1:2048:+4M",
        "-n",
        "2:0:+4M",
        raw.to_str().expect("UTF-8"),
    ];
    oracle::ok("sgdisk", parts);
    directory.qemu_img(&["convert", "-O", "qcow2", "base.raw", "base.qcow2"]);
    for (name, format) in [("base.raw", "raw"), ("base.qcow2", "qcow2")] {
        let before = parse(&directory.ok(&["info", "--output=json", name]));
        assert!(before.get("seethrough").is_none(), "{before}");
        directory.ok(&[
            "prepare",
            "-f",
            format,
            "--reserve",
            "data=partition:2",
            name,
        ]);
        let after = parse(&directory.ok(&["info", "--output=json", name]));
        let declared = after["seethrough"].to_string();
        assert!(declared.contains("\"data\""), "{name}: {declared}");
        let human = directory.ok(&["info", name]);
        assert!(
            human.contains(&format!("seethrough: {declared}")),
            "{human}"
        );
    }
    oracle::qemu_img_check(&directory.path("base.qcow2"), Tolerated::Nothing);
}

#[test]
fn persistent_bitmaps_are_listed_as_stock_tools_list_them() {
    let directory = Directory::new();
    directory.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]);
    directory.qemu_img(&["bitmap", "--add", "a.qcow2", "records"]);
    directory.qemu_img(&[
        "bitmap",
        "--add",
        "-g",
        "512",
        "--disable",
        "a.qcow2",
        "of earlier",
    ]);
    directory.described_alike("a.qcow2");
}

/// The disk of a stopped QEMU holds no lock; one that is in use does.
#[test]
fn an_image_in_use_is_neither_replaced_nor_described_without_force() {
    let directory = Directory::new();
    directory.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let user = InUse::by_qemu_io(&directory.path("a.qcow2"));
    let error = directory.fails(&["create", "-q", "-f", "qcow2", "a.qcow2", "2M"], 1);
    assert!(error.contains("a.qcow2"), "{error}");
    directory.fails(&["info", "a.qcow2"], 1);
    directory.ok(&["info", "-U", "a.qcow2"]);
    directory.ok(&["create", "-q", "-b", "a.qcow2", "b.qcow2"]);
    drop(user);
    directory.ok(&["create", "-q", "-f", "qcow2", "a.qcow2", "2M"]);
}

/// An image that another program has open for writing.
struct InUse {
    process: std::process::Child,
}

impl InUse {
    fn by_qemu_io(image: &Path) -> Self {
        use std::io::{BufRead, BufReader, Write};
        let mut process = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(image)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("qemu-io runs");
        // Its answer to a command says that the image is open.
        let stdin = process.stdin.as_mut().expect("piped");
        stdin.write_all(b"length\n").expect("qemu-io listens");
        let stdout = process.stdout.as_mut().expect("piped");
        let mut answer = String::new();
        BufReader::new(stdout)
            .read_line(&mut answer)
            .expect("qemu-io answers");
        Self { process }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        self.process.wait().expect("qemu-io ends");
    }
}

#[test]
fn a_dump_follows_offsets_to_where_stock_tools_map_them_and_back() {
    let directory = Directory::new();
    let image = directory.path("top.qcow2").display().to_string();
    for options in ["cluster_size=4k", "extended_l2=on", "compat=0.10"] {
        directory.qemu_img(&["create", "-q", "-f", "qcow2", "base.qcow2", "4M"]);
        let base = directory.path("base.qcow2").display().to_string();
        oracle::ok("qemu-io", ["-f", "qcow2", "-c", "write -P 1 1M 2M", &base]);
        let over = ["-b", "base.qcow2", "-F", "qcow2"];
        directory.qemu_img(
            &[
                &["create", "-q", "-f", "qcow2", "-o", options],
                &over[..],
                &["top.qcow2"],
            ]
            .concat(),
        );
        let commands = [
            "write -c -P 2 0 64k",
            "write -P 3 1536k 256k",
            "write -P 4 1600k 8k",
        ];
        for command in commands {
            oracle::ok("qemu-io", ["-f", "qcow2", "-c", command, &image]);
        }
        directory.qemu_img(&["snapshot", "-c", "one", "top.qcow2"]);
        oracle::ok(
            "qemu-io",
            ["-f", "qcow2", "-c", "write -P 5 1536k 64k", &image],
        );
        let map = parse(&directory.qemu_img(&["map", "--output=json", "top.qcow2"]));
        for run in map.as_array().expect("a list") {
            let start = run["start"].as_u64().expect("a number") + 512;
            let way = [
                "dump",
                "--output=json",
                "--guest-offset",
                &start.to_string(),
                "top.qcow2",
            ];
            let found = parse(&directory.ok(&way));
            let way = found["way"].as_array().expect("a list");
            let last = way.last().expect("an image");
            let holds = last["holds"].as_str().expect("a word");
            match (run["data"].as_bool(), run["offset"].as_u64()) {
                (Some(true), Some(offset)) => {
                    assert_eq!(
                        way.len() as u64,
                        run["depth"].as_u64().expect("a number") + 1
                    );
                    assert_eq!(holds, "data");
                    assert_eq!(last["host-offset"], offset + 512, "{options} {start}");
                    assert_eq!(last["l2-table-refcount"], 1);
                    if way.len() == 1 {
                        led_back(&directory, "top.qcow2", offset, start - 512);
                    }
                }
                (Some(true), None) => assert_eq!(holds, "compressed data"),
                _ => assert_eq!(holds, "nothing"),
            }
        }
    }
}

/// The cluster at a host offset is told to be the guest's, of the disk or of a snapshot.
fn led_back(directory: &Directory, image: &str, host: u64, guest: u64) {
    let found = parse(&directory.ok(&[
        "dump",
        "--output=json",
        "--host-offset",
        &host.to_string(),
        image,
    ]));
    let uses = found["uses"].as_array().expect("a list");
    let is_it = |one: &&Value| one["kind"] == "data" && one["guest-offset"] == guest;
    assert!(uses.iter().any(|one| is_it(&one)), "{found}");
    assert_eq!(
        found["refcount"].as_u64(),
        Some(uses.len() as u64),
        "{found}"
    );
}

#[test]
fn every_cluster_of_a_sound_image_is_told_by_as_many_uses_as_its_refcount() {
    let directory = Directory::new();
    directory.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=64k",
        "a.qcow2",
        "1M",
    ]);
    let image = directory.path("a.qcow2").display().to_string();
    oracle::ok(
        "qemu-io",
        [
            "-f",
            "qcow2",
            "-c",
            "write 0 128k",
            "-c",
            "write -c -P 7 512k 64k",
            &image,
        ],
    );
    directory.qemu_img(&["snapshot", "-c", "one", "a.qcow2"]);
    directory.qemu_img(&["bitmap", "--add", "a.qcow2", "records"]);
    let clusters = std::fs::metadata(&image)
        .expect("there")
        .len()
        .div_ceil(65536);
    for cluster in 0..clusters {
        let offset = (cluster * 65536 + 7).to_string();
        let found =
            parse(&directory.ok(&["dump", "--output=json", "--host-offset", &offset, "a.qcow2"]));
        let uses = found["uses"].as_array().expect("a list");
        assert_eq!(
            found["refcount"].as_u64(),
            Some(uses.len() as u64),
            "{found}"
        );
    }
}

#[test]
fn a_dump_shows_what_is_broken_and_names_it() {
    let directory = Directory::new();
    directory.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1G"]);
    let image = directory.path("a.qcow2");
    oracle::ok(
        "qemu-io",
        [
            "-f",
            "qcow2",
            "-c",
            "write 0 128k",
            &image.display().to_string(),
        ],
    );
    let sound = std::fs::read(&image).expect("readable");
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().expect("8 bytes"));
    let l1 = usize::try_from(word(40)).expect("small");
    let l2 = usize::try_from(word(l1) & 0x00ff_ffff_ffff_fe00).expect("small");
    let text = directory.ok(&["dump", "--tables", "a.qcow2"]);
    assert!(text.contains("l1_table_offset: 0x30000"), "{text}");
    assert!(text.contains("kind data, offset 0x50000"), "{text}");

    let mut broken = sound.clone();
    broken[l2 + 6] |= 2;
    broken[l2 + 15] |= 2;
    std::fs::write(&image, &broken).expect("writable");
    let text = directory.ok(&["dump", "--l2", "0", "a.qcow2"]);
    assert!(
        text.contains("broken points to an offset that is not aligned"),
        "{text}"
    );
    assert!(text.contains("broken has reserved bits set"), "{text}");
    let text = directory.ok(&["dump", "--guest-offset", "0", "a.qcow2"]);
    assert!(
        text.contains("holds: unknown, for an entry is broken"),
        "{text}"
    );

    let mut broken = sound.clone();
    broken[20..24].copy_from_slice(&40u32.to_be_bytes());
    std::fs::write(&image, &broken).expect("writable");
    let text = directory.ok(&["dump", "a.qcow2"]);
    assert!(
        text.contains("cluster_bits: 40") && text.contains("broken: cluster_bits is 40"),
        "{text}"
    );
    directory.fails(&["dump", "--tables", "a.qcow2"], 1);
}
