//! Images of every shape, with a past.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::qcow2::commitment::committed_length;
use seethrough::qcow2::header::Header;
use seethrough::sys::block_on;

use crate::engine::{load, qemu_img, run};

/// What happened to an image before its commitment is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
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
pub struct Shape(pub &'static str, pub u64, pub Past);

pub const MIB: u64 = 1 << 20;

pub const SHAPES: &[Shape] = &[
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

pub struct Made {
    pub directory: tempfile::TempDir,
    pub name: String,
}

impl Made {
    pub fn new(shape: &Shape, rng: &mut StdRng) -> Self {
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

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("image.qcow2")
    }

    pub fn header(&self) -> Header {
        let bytes = std::fs::read(self.path()).expect("readable");
        Header::parse(&bytes).expect("sound")
    }

    pub fn committed(&self) -> u64 {
        let storage = load(&self.path());
        block_on(committed_length(storage.as_ref(), &self.header())).expect("a sound image")
    }

    pub fn qemu_io(&self, commands: &[String]) {
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
    pub fn replaced(&self, past: Past) -> u64 {
        match past {
            Past::Compressed => std::fs::metadata(self.path()).expect("there").len(),
            _ => 0,
        }
    }
}
