//! The engine against stock tools, over images of every kind: `qemu-img` and `qemu-io` make and fill an image, the
//! engine reads what they read, writes to it, and they read what the engine wrote and find the image clean; then
//! they write, and the engine reads again. Every third image is one that we have made.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic)]

mod common;
mod engine;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::oracle::{self, Tolerated};
use engine::{for_each_seed, rng};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::chain::format::Format;
use seethrough::chain::host::HostOptions;
use seethrough::chain::registry::{DiskRequest, Registry};
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image};
use seethrough::storage::{CacheMode, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

/// Not a multiple of any cluster, and several L2 tables of small clusters.
const SIZE: u64 = (5 << 20) + 3 * 512;

/// Options of `qemu-img create`.
const KINDS: &[&str] = &[
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "compat=0.10,cluster_size=2M",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=1k,refcount_bits=32",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=16k,refcount_bits=4",
    "cluster_size=64k",
    "cluster_size=64k,refcount_bits=8,lazy_refcounts=on",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=2M",
    "cluster_size=2M,refcount_bits=64",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=32k,extended_l2=on,compression_type=zstd",
    "cluster_size=64k,extended_l2=on,refcount_bits=1",
    "cluster_size=128k,extended_l2=on",
    "cluster_size=2M,extended_l2=on",
    "compat=0.10,cluster_size=4k,preallocation=metadata",
    "cluster_size=2k,preallocation=falloc",
    "cluster_size=64k,preallocation=metadata,lazy_refcounts=on",
    "cluster_size=64k,preallocation=full",
    "cluster_size=64k,extended_l2=on,preallocation=metadata",
    "cluster_size=128k,extended_l2=on,preallocation=falloc",
    "cluster_size=512,data_file=data",
    "cluster_size=64k,data_file=data,lazy_refcounts=on",
    "cluster_size=32k,extended_l2=on,data_file=data",
    "cluster_size=64k,data_file=data,preallocation=metadata",
    "cluster_size=64k,data_file=data,preallocation=full",
    "cluster_size=4k,data_file=data,data_file_raw=on",
    "cluster_size=64k,extended_l2=on,data_file=data,data_file_raw=on",
    "cluster_size=64k,data_file=data,data_file_raw=on,preallocation=metadata",
];

/// Options with which every cluster has its place, and none is compressed.
const PLACED: &[&str] = &["data_file", "preallocation"];

/// What lies behind an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Nothing,
    Raw,
    ShorterRaw,
    Qcow2OnRaw,
    Compressed,
}

const BEHIND: &[Behind] = &[
    Behind::Nothing,
    Behind::Raw,
    Behind::ShorterRaw,
    Behind::Qcow2OnRaw,
    Behind::Compressed,
];

struct Case {
    name: String,
    /// With a data file's whole path.
    options: String,
    behind: Behind,
    /// Half the cases go past the page cache.
    cache: CacheMode,
    rng: StdRng,
    directory: tempfile::TempDir,
}

#[test]
fn images_without_a_backing_image_are_read_and_written_as_stock_tools_do() {
    all_kinds(Behind::Nothing);
}

#[test]
fn overlays_of_raw_images_are_read_and_written_as_stock_tools_do() {
    all_kinds(Behind::Raw);
}

#[test]
fn overlays_of_shorter_images_are_read_and_written_as_stock_tools_do() {
    all_kinds(Behind::ShorterRaw);
}

#[test]
fn chains_of_three_are_read_and_written_as_stock_tools_do() {
    all_kinds(Behind::Qcow2OnRaw);
}

#[test]
fn overlays_of_compressed_images_are_read_and_written_as_stock_tools_do() {
    all_kinds(Behind::Compressed);
}

fn all_kinds(behind: Behind) {
    let family = BEHIND.iter().position(|known| *known == behind);
    let family = family.expect("a known one") as u64;
    let kinds = (0..).zip(KINDS);
    for (index, options) in kinds.filter(|(_, options)| can_lie_on(options, behind)) {
        for_each_seed(1, &format!("{options} over {behind:?}"), |seed| {
            Case::new(seed << 16 | family << 8 | index, options, behind).run();
        });
    }
}

/// Whether the format allows such an image on such a backing image.
fn can_lie_on(options: &str, behind: Behind) -> bool {
    if behind == Behind::Nothing {
        return true;
    }
    let has_place = PLACED.iter().any(|one| options.contains(one));
    // The compressed backing image has the same options.
    if behind == Behind::Compressed && has_place {
        return false;
    }
    let is_hidden = options.contains("preallocation") && !options.contains("extended_l2");
    !is_hidden && !options.contains("data_file_raw")
}

/// A raw image has no format to get wrong, but its last sector may be cut short.
#[test]
fn raw_images_are_read_and_written_byte_for_byte() {
    let mut case = Case::new(1000, "", Behind::Nothing);
    let image = case.path("disk.raw");
    std::fs::write(&image, vec![0x11; 300_000]).expect("writable");
    let mut model = vec![0x11; 300_000];
    model.resize(300_032, 0);
    let disk = case.open(&image, Format::Raw, Access::ReadWrite);
    assert!(read_all(&disk, &mut case.rng) == model);
    case.write_randomly(&disk, &mut model);
    drop(disk);
    let mut file = std::fs::read(&image).expect("readable");
    file.resize(model.len(), 0);
    assert!(file == model);
}

impl Case {
    fn new(seed: u64, options: &str, behind: Behind) -> Self {
        let cache = if seed.is_multiple_of(2) {
            CacheMode::Writeback
        } else {
            CacheMode::None
        };
        let directory = tempfile::tempdir().expect("a temporary directory");
        let data_file = format!("data_file={}/data", text(directory.path()));
        Self {
            name: format!("seed {seed}: {options} over {behind:?}, {cache:?}"),
            cache,
            options: options.replace("data_file=data", &data_file),
            behind,
            rng: rng(seed),
            directory,
        }
    }

    fn run(mut self) {
        // Shown with a failure alone.
        eprintln!("{}", self.name);
        let backing = self.make_backing();
        let image = self.make(backing.as_deref());
        self.compress(&image);
        self.fill(&image, "qcow2", SIZE);
        let before: Vec<Vec<u8>> = self.files_behind().iter().map(|file| bytes(file)).collect();

        let mut model = self.stock_reads(&image);
        let disk = self.open(&image, Format::Qcow2, Access::ReadWrite);
        assert_eq!(disk.virtual_size(), SIZE, "{}", self.name);
        let found = read_all(&disk, &mut self.rng);
        self.same(&found, &model, "first read");
        self.write_randomly(&disk, &mut model);
        let found = read_all(&disk, &mut self.rng);
        self.same(&found, &model, "read after writing");
        drop(disk);

        oracle::qemu_img_check(&image, Tolerated::Nothing);
        self.same(&self.stock_reads(&image), &model, "what stock tools read");
        self.check_raw_data_file(&model);
        self.fill(&image, "qcow2", SIZE);
        let model = self.stock_reads(&image);
        self.check_raw_data_file(&model);
        let disk = self.open(&image, Format::Qcow2, Access::ReadOnly);
        let found = read_all(&disk, &mut self.rng);
        self.same(&found, &model, "read after stock tools wrote");
        drop(disk);

        oracle::qemu_img_check(&image, Tolerated::Nothing);
        let after: Vec<Vec<u8>> = self.files_behind().iter().map(|file| bytes(file)).collect();
        assert!(before == after, "{}: a backing file has changed", self.name);
    }

    /// A raw data file is the disk, whatever the image says. (Stock tools write whole clusters, behind its end too.)
    fn check_raw_data_file(&self, model: &[u8]) {
        if self.options.contains("data_file_raw") {
            let mut found = bytes(&self.path("data"));
            found.truncate(model.len());
            self.same(&found, model, "the raw data file");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn files_behind(&self) -> Vec<PathBuf> {
        ["base.raw", "middle.qcow2"]
            .iter()
            .map(|name| self.path(name))
            .filter(|file| file.exists())
            .collect()
    }

    /// Makes what lies behind; the name and format that the overlay is to say.
    fn make_backing(&mut self) -> Option<String> {
        let base = self.path("base.raw");
        let base_size = match self.behind {
            Behind::Nothing => return None,
            Behind::ShorterRaw => SIZE / 3 / 512 * 512,
            _ => SIZE,
        };
        oracle::ok(
            "qemu-img",
            [
                "create",
                "-q",
                "-f",
                "raw",
                text(&base),
                &base_size.to_string(),
            ],
        );
        self.fill(&base, "raw", base_size);
        let middle = self.path("middle.qcow2");
        match self.behind {
            Behind::Nothing | Behind::Raw | Behind::ShorterRaw => {
                return Some("base.raw,raw".to_owned());
            }
            Behind::Qcow2OnRaw => {
                let backing = ["-b", "base.raw", "-F", "raw"];
                self.qemu_img_create(&backing, "cluster_size=4k", &middle);
                self.fill(&middle, "qcow2", SIZE);
            }
            Behind::Compressed => {
                let options = if self.options.contains("compat=0.10") {
                    self.options.clone()
                } else {
                    format!("{},compression_type=zstd", self.options)
                };
                let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
                let files = [text(&base), text(&middle)];
                oracle::ok("qemu-img", convert.into_iter().chain(files));
            }
        }
        Some("middle.qcow2,qcow2".to_owned())
    }

    fn qemu_img_create(&self, backing: &[&str], options: &str, image: &Path) {
        let size = SIZE.to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        let rest = [text(image), &size];
        oracle::ok("qemu-img", create.iter().chain(backing).chain(&rest));
    }

    /// Makes the image itself, with stock tools or our own.
    fn make(&mut self, backing: Option<&str>) -> PathBuf {
        let image = self.path("image.qcow2");
        let backing = backing.map(|backing| backing.split_once(',').expect("name,format"));
        let backing = match &backing {
            Some((name, format)) => vec!["-b", name, "-F", format],
            None => Vec::new(),
        };
        if self.rng.random_range(0..3) > 0 {
            self.qemu_img_create(&backing, &self.options, &image);
            return image;
        }
        let size = SIZE.to_string();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_seethrough"))
            .args(["create", "-q", "-f", "qcow2", "-o", &self.options])
            .args(&backing)
            .args([text(&image), &size])
            .output()
            .expect("seethrough runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {stderr}", self.name);
        image
    }

    /// Writes, zeroes and discards with `qemu-io`.
    fn fill(&mut self, image: &Path, format: &str, size: u64) {
        let mut commands = Vec::new();
        for _ in 0..self.rng.random_range(8..20) {
            let at = self.rng.random_range(0..size / 512) * 512;
            let most = (size - at).min(1 << self.rng.random_range(9..20));
            let len = self.rng.random_range(1..=most / 512) * 512;
            let pattern: u8 = self.rng.random();
            commands.push(match self.rng.random_range(0..8) {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -z -u {at} {len}"),
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {pattern} {at} {len}"),
            });
        }
        qemu_io(image, format, commands);
    }

    /// Compresses some clusters of a new image; stock tools compress none that are allocated.
    fn compress(&mut self, image: &Path) {
        if ["data_file", "preallocation"]
            .iter()
            .any(|one| self.options.contains(one))
        {
            return;
        }
        let cluster = self.cluster_size();
        let mut clusters = BTreeSet::new();
        for _ in 0..self.rng.random_range(0..6) {
            let first = self.rng.random_range(0..SIZE / cluster);
            clusters.extend(first..(first + 4).min(SIZE / cluster));
        }
        let commands = clusters.into_iter().map(|index| {
            let pattern: u8 = self.rng.random();
            format!("write -c -P {pattern} {} {cluster}", index * cluster)
        });
        qemu_io(image, "qcow2", commands.collect());
    }

    fn cluster_size(&self) -> u64 {
        let option = self
            .options
            .split(',')
            .find_map(|option| option.strip_prefix("cluster_size="));
        match option {
            Some(size) => seethrough::cli::options::parse_size(size).expect("a size"),
            None => 65536,
        }
    }

    /// The disk as stock tools read it.
    fn stock_reads(&self, image: &Path) -> Vec<u8> {
        let raw = self.path("stock.raw");
        oracle::to_raw(image, &raw);
        bytes(&raw)
    }

    /// Writes through the engine, and to the model of the disk.
    fn write_randomly(&mut self, disk: &Arc<dyn Image>, model: &mut [u8]) {
        let sectors = model.len() / 512;
        for step in 0..60 {
            let at = self.rng.random_range(0..sectors) * 512;
            let most = (model.len() - at).min(1 << self.rng.random_range(9..21));
            let len = self
                .rng
                .random_range(0..most / 512)
                .max(1)
                .min((model.len() - at) / 512)
                * 512;
            let range = at..at + len;
            let offset = GuestOffset(at as u64);
            let result = match self.rng.random_range(0..10) {
                0 | 1 => {
                    model[range].fill(0);
                    let mode = if step % 2 == 0 {
                        ZeroMode::MayUnmap
                    } else {
                        ZeroMode::KeepAllocated
                    };
                    block_on(disk.write_zeroes(offset, len as u64, mode))
                }
                2 => {
                    let result = block_on(disk.discard(offset, len as u64));
                    self.settle_discard(disk, range, model);
                    result
                }
                3 => block_on(disk.flush()),
                _ => {
                    let mut data = vec![0; len];
                    self.rng.fill(&mut data[..]);
                    model[range].copy_from_slice(&data);
                    block_on(disk.write(offset, IoBuf::from_bytes(&data)))
                }
            };
            result.unwrap_or_else(|error| panic!("{}: step {step}: {error}", self.name));
        }
        block_on(disk.close()).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// A discarded sector reads as zeros or as before, and stays so: the model learns which.
    fn settle_discard(
        &self,
        disk: &Arc<dyn Image>,
        range: std::ops::Range<usize>,
        model: &mut [u8],
    ) {
        let buf = IoBuf::zeroed(range.len());
        block_on(disk.read(GuestOffset(range.start as u64), buf.clone()))
            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let found = buf.to_vec();
        for (found, model) in found.chunks(512).zip(model[range].chunks_mut(512)) {
            let is_zero = found.iter().all(|byte| *byte == 0);
            assert!(
                is_zero || found == model,
                "{}: a discarded sector reads as neither zeros nor what it was",
                self.name
            );
            model.copy_from_slice(found);
        }
    }

    fn open(&self, image: &Path, format: Format, access: Access) -> Arc<dyn Image> {
        let request = DiskRequest {
            path: image.to_owned(),
            format: Some(format),
            access,
        };
        let open = |cache| {
            let registry = Registry::new(HostOptions {
                cache,
                ..HostOptions::default()
            });
            block_on(registry.open(&request))
        };
        let opened = match open(self.cache) {
            // Some filesystems have no direct I/O.
            Err(error) if error.kind() == ErrorKind::Unsupported => open(CacheMode::Writeback),
            outcome => outcome,
        };
        opened
            .unwrap_or_else(|error| panic!("{}: {error}", self.name))
            .image
    }

    fn same(&self, found: &[u8], expected: &[u8], what: &str) {
        assert_eq!(found.len(), expected.len(), "{}: {what}: length", self.name);
        let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
        if let Some(at) = wrong {
            let mut message = format!("{}: {what}: byte {at:#x} is", self.name);
            let _ = write!(message, " {:#x}, not {:#x}", found[at], expected[at]);
            panic!("{message}");
        }
    }
}

fn qemu_io(image: &Path, format: &str, commands: Vec<String>) {
    let mut arguments = ["-d", "unmap", "-f", format].map(str::to_owned).to_vec();
    for command in commands {
        arguments.extend(["-c".to_owned(), command]);
    }
    arguments.push(text(image).to_owned());
    oracle::ok("qemu-io", arguments);
}

/// The whole disk, in pieces of random length.
fn read_all(disk: &Arc<dyn Image>, rng: &mut StdRng) -> Vec<u8> {
    let size = usize::try_from(disk.virtual_size()).expect("a small disk");
    let mut all = Vec::with_capacity(size);
    while all.len() < size {
        let len = rng.random_range(1..600) * 512;
        let buf = IoBuf::zeroed(len.min(size - all.len()));
        block_on(disk.read(GuestOffset(all.len() as u64), buf.clone()))
            .unwrap_or_else(|error| panic!("reading {}: {error}", all.len()));
        all.extend(buf.to_vec());
    }
    all
}

fn bytes(file: &Path) -> Vec<u8> {
    std::fs::read(file).expect("readable")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}
