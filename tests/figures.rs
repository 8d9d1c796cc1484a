//! The four figures of an image. Its commitment is a bound: images of every shape are filled in random order, by our
//! engine and by stock tools, and never come to more; and it is a tight one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic)]

mod engine;

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use engine::{Allowed, check, for_each_seed, load, qemu_img, rng, run};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::commitment::committed_length;
use seethrough::qcow2::header::Header;
use seethrough::storage::{MemoryStorage, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;
use serde_json::Value;

/// What happened to an image before its commitment is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Past {
    /// Nothing.
    Empty,
    /// Compressed clusters all over, and some plain ones.
    Compressed,
    /// Written in places, and discarded in others.
    Fragmented,
    /// A snapshot is there, and the disk has changed since.
    Snapshot,
    /// A snapshot was there, and its room is free again.
    SnapshotDeleted,
    /// Clusters at the end of the file belong to nobody.
    Leaked,
}

/// What is filled: options for `qemu-img create`, the disk's size, and its past.
struct Shape(&'static str, u64, Past);

const MIB: u64 = 1 << 20;

const SHAPES: &[Shape] = &[
    Shape("cluster_size=512", 3 * MIB, Past::Empty),
    // The refcount table grows at 2 MiB, twice.
    Shape("cluster_size=512,refcount_bits=64", 6 * MIB, Past::Empty),
    Shape(
        "cluster_size=512,refcount_bits=64",
        5 * MIB,
        Past::Fragmented,
    ),
    Shape(
        "cluster_size=512,refcount_bits=1",
        2 * MIB,
        Past::Fragmented,
    ),
    Shape(
        "cluster_size=1k,refcount_bits=32",
        3 * MIB + 512,
        Past::Empty,
    ),
    Shape("cluster_size=2k,refcount_bits=2", 3 * MIB, Past::Compressed),
    Shape(
        "cluster_size=4k,compat=0.10",
        4 * MIB + 1024,
        Past::Fragmented,
    ),
    Shape("cluster_size=4k,refcount_bits=8", 4 * MIB, Past::Compressed),
    Shape("cluster_size=8k,lazy_refcounts=on", 4 * MIB, Past::Empty),
    Shape(
        "cluster_size=16k,extended_l2=on",
        5 * MIB + 512,
        Past::Fragmented,
    ),
    Shape("cluster_size=32k,refcount_bits=4", 6 * MIB, Past::Leaked),
    Shape("", 10 * MIB + 3 * 512, Past::Empty),
    Shape("", 8 * MIB, Past::Compressed),
    Shape("compat=0.10", 8 * MIB, Past::Snapshot),
    Shape("", 8 * MIB, Past::SnapshotDeleted),
    Shape(
        "extended_l2=on,compression_type=zstd",
        8 * MIB,
        Past::Compressed,
    ),
    Shape("preallocation=metadata", 8 * MIB, Past::Empty),
    Shape("preallocation=falloc,cluster_size=4k", 4 * MIB, Past::Empty),
    Shape("cluster_size=256k", 12 * MIB, Past::Fragmented),
    Shape("cluster_size=1M", 9 * MIB + 512, Past::Empty),
    Shape("cluster_size=2M,extended_l2=on", 12 * MIB, Past::Fragmented),
    Shape("cluster_size=2M", 0, Past::Empty),
];

struct Made {
    directory: tempfile::TempDir,
    name: String,
}

impl Made {
    fn new(shape: &Shape, rng: &mut StdRng) -> Self {
        let made = Self {
            directory: tempfile::tempdir().expect("a temporary directory"),
            name: format!("{:?} of {} bytes, {:?}", shape.0, shape.1, shape.2),
        };
        let path = made.path();
        let path = path.to_str().expect("UTF-8");
        let options = if shape.0.is_empty() {
            "compat=1.1"
        } else {
            shape.0
        };
        let size = shape.1.to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, &size]);
        made.give_past(shape, path, rng);
        made
    }

    fn give_past(&self, shape: &Shape, path: &str, rng: &mut StdRng) {
        let size = shape.1;
        let mut pieces = |count: u64, verb: &str, align: u64| -> Vec<String> {
            let units = size / align;
            let piece = |_| {
                let len = rng.random_range(1..=(units / 12).max(1));
                let at = rng.random_range(0..=units - len);
                format!("{verb} {} {}", at * align, len * align)
            };
            (0..count).map(piece).collect()
        };
        let plain = |pieces: &mut dyn FnMut(u64, &str, u64) -> Vec<String>| {
            self.qemu_io(&pieces(8, "write -P 1", 512));
            self.qemu_io(&pieces(12, "discard", 65536.min(size / 4)));
            self.qemu_io(&pieces(4, "write -P 2", 512));
        };
        match shape.2 {
            Past::Empty => {}
            Past::Fragmented => plain(&mut pieces),
            Past::Compressed => {
                // One cluster each; they may not be there already.
                let cluster = self.header().cluster_size();
                let compressed = (0..size / cluster).filter(|number| number % 5 != 4);
                let commands = compressed.map(|number| {
                    let pattern = number % 250;
                    format!("write -c -P {pattern} {} {cluster}", number * cluster)
                });
                self.qemu_io(&commands.collect::<Vec<_>>());
                self.qemu_io(&pieces(3, "write -P 9", 512));
            }
            Past::Snapshot | Past::SnapshotDeleted => {
                plain(&mut pieces);
                qemu_img(&["snapshot", "-c", "one", path]);
                self.qemu_io(&pieces(5, "write -P 3", 512));
                if shape.2 == Past::SnapshotDeleted {
                    qemu_img(&["snapshot", "-d", "one", path]);
                }
            }
            Past::Leaked => {
                plain(&mut pieces);
                self.leak(7);
            }
        }
    }

    /// Gives the next `count` clusters behind the file's end a refcount.
    fn leak(&self, count: u64) {
        let header = self.header();
        assert_eq!(header.refcount_bits(), 4, "the image to be leaked in");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path())
            .expect("it opens");
        let mut word = [0; 8];
        file.read_exact_at(&mut word, header.refcount_table_offset.0)
            .expect("read");
        let block = u64::from_be_bytes(word);
        let end = file.metadata().expect("there").len() / header.cluster_size();
        for cluster in end..end + count {
            let at = block + cluster / 2;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            let refcount = if cluster % 2 == 0 { 1 } else { 0x10 };
            file.write_all_at(&[byte[0] | refcount], at)
                .expect("written");
        }
        file.set_len((end + count) * header.cluster_size())
            .expect("grown");
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("image.qcow2")
    }

    fn header(&self) -> Header {
        let bytes = std::fs::read(self.path()).expect("readable");
        Header::parse(&bytes).expect("sound")
    }

    fn committed(&self) -> u64 {
        let storage = load(&self.path());
        block_on(committed_length(storage.as_ref(), &self.header())).expect("a sound image")
    }

    fn qemu_io(&self, commands: &[String]) {
        for some in commands.chunks(500) {
            let mut arguments = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
            for command in some {
                arguments.extend(["-c".into(), command.clone()]);
            }
            arguments.push(self.path().display().to_string());
            let (code, text) = run("qemu-io", &arguments);
            assert_eq!(code, 0, "{}: {text}", self.name);
        }
    }

    /// Clusters of compressed data, or in place of which others are used: what the bound counts twice.
    fn replaced(&self, past: Past) -> u64 {
        match past {
            Past::Compressed => std::fs::metadata(self.path()).expect("there").len(),
            _ => 0,
        }
    }
}

/// The disk in pieces that cover it, in random order, some of them more than once.
fn pieces(size: u64, rng: &mut StdRng) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size {
        let end = size.min(at + rng.random_range(1..=64) * 512 * rng.random_range(1..=8));
        pieces.push(at..end);
        if rng.random_bool(0.2) {
            pieces.push(at..end);
        }
        at = end;
    }
    pieces.shuffle(rng);
    pieces
}

#[test]
fn no_order_of_writes_takes_our_engine_beyond_the_commitment_and_it_is_reached() {
    for_each_seed(1, "filling", |seed| {
        for shape in SHAPES {
            let mut rng = rng(seed);
            let made = Made::new(shape, &mut rng);
            let committed = made.committed();
            let storage = load(&made.path());
            fill(&storage, shape.1, &made.name, committed, &mut rng);
            let slack = committed - storage.len();
            let bound = made.replaced(shape.2)
                + superseded_tables(&made.header())
                + made.header().cluster_size()
                - 1;
            assert!(slack <= bound, "{}: {slack} bytes too much", made.name);
            std::fs::write(made.path(), storage.contents()).expect("writable");
            let allowed = if shape.2 == Past::Leaked {
                Allowed::Leaks
            } else {
                Allowed::Nothing
            };
            check(&made.path(), allowed).expect("sound");
            // An image that is full has come to what it was said to come to, and says the same.
            if shape.2 != Past::Compressed {
                assert!(made.committed() <= committed, "{}", made.name);
            }
        }
    });
}

/// Refcount tables that the fill leaves behind, whose room may be used again, or not.
fn superseded_tables(header: &Header) -> u64 {
    if header.cluster_size() == 512 {
        16 * 512
    } else {
        0
    }
}

fn fill(storage: &Arc<MemoryStorage>, size: u64, name: &str, committed: u64, rng: &mut StdRng) {
    let disk = Qcow2::open(
        Arc::clone(storage) as Arc<dyn Storage>,
        None,
        Access::ReadWrite,
    );
    let disk = block_on(disk).expect("a sound image");
    for piece in pieces(size, rng) {
        let len = usize::try_from(piece.end - piece.start).expect("small");
        block_on(disk.write(GuestOffset(piece.start), IoBuf::from_bytes(&vec![7; len])))
            .expect("written");
        if rng.random_bool(0.05) {
            block_on(disk.flush()).expect("flushed");
        }
        assert!(
            storage.len() <= committed,
            "{name}: {} of {committed} bytes",
            storage.len()
        );
    }
    block_on(disk.close()).expect("closed");
    assert!(
        storage.len() <= committed,
        "{name}: {} of {committed} bytes",
        storage.len()
    );
}

/// Stock tools leave gaps in the file where a request needs contiguous clusters, and in front of a larger refcount
/// table: what the host allocates stays within the bound, the file's length need not.
#[test]
fn no_order_of_writes_takes_stock_tools_beyond_the_commitment() {
    for_each_seed(1, "filling by qemu-io", |seed| {
        for shape in SHAPES {
            let mut rng = rng(seed);
            let made = Made::new(shape, &mut rng);
            let committed = made.committed();
            let mut commands = Vec::new();
            for piece in pieces(shape.1, &mut rng) {
                let mut command = String::new();
                let _ = write!(
                    command,
                    "write -P 7 {} {}",
                    piece.start,
                    piece.end - piece.start
                );
                commands.push(command);
            }
            made.qemu_io(&commands);
            let metadata = std::fs::metadata(made.path()).expect("there");
            let allocated = metadata.blocks() * 512;
            // Blocks of the host; those in which it notes the file's extents, if there are many; and gaps between
            // the free clusters that there were, too small for a request of a stock tool.
            let gaps = if shape.2 == Past::Fragmented {
                committed / 16
            } else {
                0
            };
            let bound = committed.next_multiple_of(4096) + 8 * 4096 + gaps;
            assert!(
                allocated <= bound,
                "{}: {allocated} bytes allocated, committed to {committed}",
                made.name
            );
        }
    });
}

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
