//! The engine against its peers: the same random sequence of operations is performed by our engine and by another
//! on equal images; then the images change hands, and both go on with the other's. Contents, read by both and by
//! `qemu-img`, have to be what a model of the disk says, `qemu-img check` has to find nothing, and internal snapshots
//! have to stay as they were.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod disk;
#[path = "../engine/mod.rs"]
mod engine;
mod players;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::oracle::{self, Tolerated};
use disk::{Disk, Possible};
use engine::{for_each_seed, rng};
use players::{Habits, Imago, Ours, Player, QemuIo};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::storage::CacheMode;

/// Operations of each half of a sequence.
const STEPS: usize = 30;

/// Options of `qemu-img create`.
const KINDS: &[&str] = &[
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "compat=0.10,cluster_size=4k,preallocation=metadata",
    "compat=0.10,cluster_size=2M",
    "cluster_size=512",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=1k,refcount_bits=32",
    "cluster_size=2k,preallocation=falloc",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=16k,refcount_bits=4",
    "cluster_size=64k",
    "cluster_size=64k,preallocation=metadata",
    "cluster_size=64k,preallocation=full",
    "cluster_size=64k,refcount_bits=8",
    "cluster_size=64k,compression_type=zstd",
    "cluster_size=512k,refcount_bits=32",
    "cluster_size=2M",
    "cluster_size=2M,preallocation=falloc",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=32k,extended_l2=on,compression_type=zstd",
    "cluster_size=64k,extended_l2=on,refcount_bits=1",
    "cluster_size=64k,extended_l2=on,preallocation=metadata",
    "cluster_size=128k,extended_l2=on",
    "cluster_size=2M,extended_l2=on",
];

/// What lies behind an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Nothing,
    Raw,
    ShorterRaw,
    LongerRaw,
    Qcow2,
    ShorterQcow2,
}

/// An image under test, its disk, and the snapshot in it.
struct Case {
    directory: tempfile::TempDir,
    options: &'static str,
    habits: Habits,
    image: PathBuf,
    disk: Disk,
    snapshot: Option<Vec<u8>>,
}

#[test]
fn sequences_end_as_with_qemu_io_and_images_can_change_hands() {
    for options in KINDS {
        for_each_seed(2, options, |seed| {
            compare_with(&QemuIo, options, seed);
        });
    }
}

#[test]
fn sequences_end_as_with_imago_and_images_can_change_hands() {
    // imago knows no subclusters and no zstd.
    let foreign = ["extended_l2", "zstd"];
    for options in KINDS
        .iter()
        .filter(|options| foreign.iter().all(|one| !options.contains(one)))
    {
        for_each_seed(2, options, |seed| {
            compare_with(&Imago, options, seed);
        });
    }
}

fn compare_with(peer: &dyn Player, options: &'static str, seed: u64) {
    let kind = KINDS.iter().position(|known| *known == options).unwrap();
    let mut rng = rng(seed << 8 | kind as u64);
    let cache = if seed % 4 == 3 {
        CacheMode::None
    } else {
        CacheMode::Writeback
    };
    let ours = Ours(cache);
    let case = Case::create(options, &mut rng, peer.name() == "qemu-io");
    let mut halves = [case.copy("ours.qcow2"), case.copy("peers.qcow2")];
    for round in 0..2 {
        let steps = case.disk.random_steps(&mut rng, STEPS);
        let players: [&dyn Player; 2] = if round == 0 {
            [&ours, peer]
        } else {
            [peer, &ours]
        };
        for ((image, disk), player) in halves.iter_mut().zip(players) {
            player
                .play(image, disk, case.habits, &steps)
                .and_then(|()| case.judge(image, disk, &[&ours, peer, &QemuIo]))
                .unwrap_or_else(|error| {
                    panic!("{options}, round {round}, {} plays: {error}", player.name())
                });
        }
    }
}

impl Case {
    fn create(options: &'static str, rng: &mut StdRng, full: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cluster_size = cluster_size(options);
        let size =
            (cluster_size * 40).clamp(600 << 10, 9 << 20) + [0, 3 * 512][rng.random_range(0..2)];
        let behind = if options.contains("preallocation") {
            Behind::Nothing
        } else {
            use Behind::{LongerRaw, Nothing, Qcow2, Raw, ShorterQcow2, ShorterRaw};
            [
                Nothing,
                Nothing,
                Raw,
                ShorterRaw,
                LongerRaw,
                Qcow2,
                ShorterQcow2,
            ][rng.random_range(0..7)]
        };
        let image = directory.path().join("image.qcow2");
        let mut case = Self {
            habits: Habits {
                has_zero_flag: !options.contains("compat=0.10"),
                has_backing: behind != Behind::Nothing,
            },
            disk: Disk::over(Vec::new(), size, cluster_size),
            directory,
            options,
            image,
            snapshot: None,
        };
        eprintln!("{options}, {size} bytes over {behind:?}");
        case.make_image(behind, size, rng);
        case.compress(rng);
        case.fill(rng);
        if full && !options.contains("refcount_bits=1") && rng.random_bool(0.4) {
            case.take_snapshot();
            case.fill(rng);
        }
        let image = case.image.clone();
        case.judge(&image, &mut case.disk.clone(), &[&QemuIo])
            .unwrap();
        let found = QemuIo.read_all(&image).unwrap();
        case.disk.settle(0, &found).unwrap();
        case
    }

    /// Makes the image over what lies behind it, which holds random sectors.
    fn make_image(&mut self, behind: Behind, size: u64, rng: &mut StdRng) {
        let path = |name: &str| self.directory.path().join(name);
        let base_size = match behind {
            Behind::Nothing => 0,
            Behind::ShorterRaw | Behind::ShorterQcow2 => size / 3 / 512 * 512,
            Behind::LongerRaw => size + (256 << 10),
            Behind::Raw | Behind::Qcow2 => size,
        };
        let mut base = Disk::over(Vec::new(), base_size, 65536);
        for _ in 0..if base_size > 0 { 12 } else { 0 } {
            let step = base.random_step(rng);
            base.part(&step.range).fill(Possible::only(rng.random()));
        }
        let sectors: Vec<u8> = base
            .sectors
            .iter()
            .map(|sector| sector.certain().unwrap())
            .collect();
        let bytes: Vec<u8> = sectors.iter().flat_map(|byte| [*byte; 512]).collect();
        std::fs::write(path("base.raw"), bytes).unwrap();
        let backing: &[&str] = match behind {
            Behind::Nothing => &[],
            Behind::Raw | Behind::ShorterRaw | Behind::LongerRaw => {
                &["-b", "base.raw", "-F", "raw"]
            }
            Behind::Qcow2 | Behind::ShorterQcow2 => {
                let (raw, middle) = (path("base.raw"), path("middle.qcow2"));
                let convert = [
                    "convert",
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                    "-o",
                    "cluster_size=4k",
                ];
                oracle::ok(
                    "qemu-img",
                    convert.into_iter().chain([text(&raw), text(&middle)]),
                );
                &["-b", "middle.qcow2", "-F", "qcow2"]
            }
        };
        let create = ["create", "-q", "-f", "qcow2", "-o", self.options];
        let rest = [text(&self.image), &size.to_string()];
        oracle::ok("qemu-img", create.iter().chain(backing).chain(&rest));
        let shown = sectors.into_iter().take(self.disk.sectors.len()).collect();
        self.disk = Disk::over(shown, size, cluster_size(self.options));
    }

    /// Compresses some clusters of a new image; stock tools compress none that are allocated.
    fn compress(&mut self, rng: &mut StdRng) {
        let size = cluster_size(self.options);
        let whole_clusters = self.disk.size() / size;
        if self.options.contains("preallocation") || whole_clusters == 0 {
            return;
        }
        let mut clusters = BTreeSet::new();
        for _ in 0..rng.random_range(0..4) {
            let first = rng.random_range(0..whole_clusters);
            clusters.extend(first..(first + 4).min(whole_clusters));
        }
        let mut arguments: Vec<String> =
            ["-f", "qcow2", "-t", "unsafe"].map(str::to_owned).to_vec();
        for cluster in clusters {
            let range = cluster * size..(cluster + 1) * size;
            let byte = rng.random();
            arguments.extend([
                "-c".to_owned(),
                format!("write -c -P {byte} {} {size}", range.start),
            ]);
            self.disk.part(&range).fill(Possible::only(byte));
        }
        arguments.push(text(&self.image).to_owned());
        oracle::ok("qemu-io", arguments);
    }

    fn fill(&mut self, rng: &mut StdRng) {
        let steps = self.disk.random_steps(rng, 12);
        QemuIo
            .play(&self.image, &mut self.disk, self.habits, &steps)
            .unwrap();
    }

    /// Takes a snapshot with stock tools, unless they will not: qemu-img 7.2 was seen to refuse one image in a thousand
    /// (EINVAL), and to take the same one when asked again.
    fn take_snapshot(&mut self) {
        let (before, _) = self.copy("before.qcow2");
        let taken = oracle::run(
            "qemu-img",
            ["snapshot", "-q", "-c", "one", text(&self.image)],
        );
        if taken.status.success() {
            self.snapshot = Some(self.read_snapshot(&self.image));
        } else {
            eprintln!("no snapshot: {}", String::from_utf8_lossy(&taken.stderr));
            std::fs::rename(before, &self.image).unwrap();
        }
    }

    fn copy(&self, name: &str) -> (PathBuf, Disk) {
        let to = self.directory.path().join(name);
        std::fs::copy(&self.image, &to).unwrap();
        (to, self.disk.clone())
    }

    fn read_snapshot(&self, image: &Path) -> Vec<u8> {
        let raw = image.with_extension("snapshot");
        let convert = [
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "-l",
            "snapshot.name=one",
        ];
        oracle::ok(
            "qemu-img",
            convert.into_iter().chain([text(image), text(&raw)]),
        );
        std::fs::read(raw).unwrap()
    }

    /// The image is sound, and all read what the disk holds.
    fn judge(&self, image: &Path, disk: &mut Disk, readers: &[&dyn Player]) -> Result<(), String> {
        oracle::qemu_img_check(image, Tolerated::Nothing);
        for reader in readers {
            let found = reader.read_all(image)?;
            disk.settle(0, &found)
                .map_err(|error| format!("{} reads: {error}", reader.name()))?;
        }
        if self
            .snapshot
            .as_ref()
            .is_some_and(|before| *before != self.read_snapshot(image))
        {
            return Err("the snapshot has changed".to_owned());
        }
        Ok(())
    }
}

fn cluster_size(options: &str) -> u64 {
    let option = options
        .split(',')
        .find_map(|option| option.strip_prefix("cluster_size="));
    option.map_or(65536, |size| {
        seethrough::cli::options::parse_size(size).unwrap()
    })
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
