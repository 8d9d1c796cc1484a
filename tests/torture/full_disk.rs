//! Filesystems that fill up for real: in the midst of allocating writes, of metadata, of a flush.
//!
//! Whoever relied on what found no room learns of it, and by that name; nothing that a flush has acknowledged is
//! lost, and nothing else shows; and when there is room again, the image goes on as it is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::chain::format::Format;
use seethrough::chain::host::HostOptions;
use seethrough::chain::registry::{DiskRequest, Registry};
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image};
use seethrough::storage::CacheMode;
use seethrough::sys::block_on;

use crate::engine::workload::{Operation, part_of, perform, read_range};
use crate::engine::{Allowed, check, for_each_seed, qemu_img, rng};

const MIB: usize = 1 << 20;
/// The virtual disk: larger than any of the filesystems.
const SIZE: u64 = 24 << 20;

/// The kind of image that takes the most room.
const LARGEST: &str = "cluster_size=2M";

/// A small filesystem of its own.
struct Mount {
    directory: tempfile::TempDir,
    at: PathBuf,
}

#[derive(Clone, Copy, Debug)]
enum Filesystem {
    Tmpfs,
    Ext4,
}

impl Mount {
    /// Mounts a new filesystem of some MiB; `None` where that is not permitted, which a machine that runs the gate
    /// has to.
    fn new(filesystem: Filesystem, mib: usize) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("mnt");
        fs::create_dir(&at).unwrap();
        let outcome = match filesystem {
            Filesystem::Tmpfs => {
                let options = format!("size={mib}m");
                run("mount", &["-t", "tmpfs", "-o", &options, "none", text(&at)])
            }
            Filesystem::Ext4 => {
                let file = directory.path().join("disk");
                File::create(&file)
                    .unwrap()
                    .set_len((mib * MIB) as u64)
                    .unwrap();
                run("mkfs.ext4", &["-q", "-F", "-m", "0", text(&file)])
                    .and_then(|()| run("mount", &["-o", "loop", text(&file), text(&at)]))
            }
        };
        match outcome {
            Ok(()) => Some(Self { directory, at }),
            Err(reason) => {
                crate::skip::skip(
                    &format!("nothing can be mounted: {reason}"),
                    crate::skip::IN_CI,
                );
                None
            }
        }
    }

    /// Fills the filesystem up to some KiB.
    fn leave(&self, free_kib: u64) {
        let ballast = File::create(self.at.join("ballast")).unwrap();
        let block = vec![0xba; 4096];
        let mut at = 0;
        while self.free_kib() > free_kib && ballast.write_all_at(&block, at).is_ok() {
            at += 4096;
            if at % (256 << 10) == 0 {
                // What is not allocated yet is not counted yet.
                ballast.sync_all().unwrap();
            }
        }
        let _ = ballast.sync_all();
    }

    fn free_kib(&self) -> u64 {
        let stat = nix::sys::statvfs::statvfs(&self.at).unwrap();
        stat.blocks_available() * stat.fragment_size() / 1024
    }

    fn make_room(&self) {
        fs::remove_file(self.at.join("ballast")).unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a process that another test starts may have inherited a file of it for a moment.
        if let Err(reason) = run("umount", &["-l", text(&self.at)]) {
            eprintln!("{}: {reason}", self.directory.path().display());
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What is known of the disk.
struct Known {
    /// As it is if every success is believed.
    believed: Vec<u8>,
    /// For each sector, whether it is in doubt since an operation on it has failed.
    doubtful: Vec<bool>,
    /// What a sector may hold instead: the bytes that failed operations were to write, and what it held before.
    possible: Vec<Vec<Vec<u8>>>,
    failures: usize,
}

impl Known {
    fn new(flat: Vec<u8>) -> Self {
        let sectors = flat.len() / 512;
        Self {
            believed: flat,
            doubtful: vec![false; sectors],
            possible: vec![Vec::new(); sectors],
            failures: 0,
        }
    }

    /// Checks what was read.
    fn check(&self, start: u64, found: &[u8]) {
        let first = usize::try_from(start).unwrap() / 512;
        for (sector, found) in (first..).zip(found.chunks(512)) {
            let believed = &self.believed[sector * 512..][..512];
            let is_possible = found == believed
                || self.doubtful[sector]
                    && self.possible[sector].iter().any(|bytes| bytes == found);
            assert!(
                is_possible,
                "sector {sector} reads {:02x?}…, should be {:02x?}…",
                &found[..8],
                &believed[..8]
            );
        }
    }
}

struct Scene<'a> {
    mount: &'a Mount,
    image: Arc<dyn Image>,
    path: PathBuf,
    known: Known,
}

impl<'a> Scene<'a> {
    /// An image on the filesystem, perhaps over a base elsewhere.
    fn create(mount: &'a Mount, options: &str, cache: CacheMode, rng: &mut StdRng) -> Option<Self> {
        let path = mount.at.join("disk.qcow2");
        let base = mount.directory.path().join("base.raw");
        let mut flat = vec![0; usize::try_from(SIZE).unwrap()];
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        if rng.random_bool(0.5) {
            rng.fill(&mut flat[..2 * MIB]);
            fs::write(&base, &flat).unwrap();
            let backing = ["-b", text(&base), "-F", "raw"];
            qemu_img(&[&create[..], &backing, &[text(&path)]].concat());
        } else {
            qemu_img(&[&create[..], &[text(&path), &SIZE.to_string()]].concat());
        }
        Some(Self {
            mount,
            image: open(&path, cache)?,
            path,
            known: Known::new(flat),
        })
    }

    /// Performs a random operation; what fails fails for want of room.
    fn step(&mut self, rng: &mut StdRng) {
        let longest = [512, 4096, 65536, 400 << 10][rng.random_range(0..4)];
        let start = rng.random_range(0..SIZE / 512) * 512;
        let end = (start + rng.random_range(1..=longest / 512) * 512).min(SIZE);
        let operation = Operation::random(rng, end - start);
        let outcome = block_on(perform(self.image.as_ref(), start..end, &operation));
        if let Err(error) = &outcome {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
            self.known.failures += 1;
        }
        match (operation, outcome) {
            (Operation::Read, Ok(found)) => self.known.check(start, &found),
            (Operation::Read, Err(error)) => panic!("a read found no room: {error}"),
            (Operation::Write(bytes), outcome) => self.changed(start, &bytes, outcome.is_ok()),
            (Operation::Zero(_), outcome) => {
                self.changed(
                    start,
                    &vec![0; usize::try_from(end - start).unwrap()],
                    outcome.is_ok(),
                );
            }
            (Operation::Discard, outcome) => {
                self.changed(
                    start,
                    &vec![0; usize::try_from(end - start).unwrap()],
                    false,
                );
                if outcome.is_ok() {
                    self.settle(start, end);
                }
            }
            (Operation::Flush, _) => {}
        }
    }

    fn changed(&mut self, start: u64, bytes: &[u8], has_succeeded: bool) {
        let first = usize::try_from(start).unwrap() / 512;
        let known = &mut self.known;
        for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
            if has_succeeded {
                known.believed[sector * 512..][..512].copy_from_slice(bytes);
                known.doubtful[sector] = false;
                known.possible[sector].clear();
            } else {
                known.doubtful[sector] = true;
                known.possible[sector].push(bytes.to_vec());
            }
        }
    }

    /// Takes what is there for what is known.
    fn settle(&mut self, start: u64, end: u64) {
        let found = read_range(self.image.as_ref(), start..end).unwrap();
        self.known.check(start, &found);
        part_of(&mut self.known.believed, &(start..end)).copy_from_slice(&found);
        for sector in usize::try_from(start / 512).unwrap()..usize::try_from(end / 512).unwrap() {
            self.known.doubtful[sector] = false;
            self.known.possible[sector].clear();
        }
    }

    /// What would be left if the daemon ended now: sound, and with all that a flush has acknowledged.
    fn check_copy(&self, acknowledged: &Known) {
        let copy = self.mount.directory.path().join("copy.qcow2");
        fs::copy(&self.path, &copy).unwrap();
        check(&copy, Allowed::Leaks).unwrap();
        let raw = copy.with_extension("raw");
        let convert = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
        qemu_img(&[&convert[..], &[copy.as_os_str(), raw.as_os_str()]].concat());
        acknowledged.check(0, &fs::read(raw).unwrap());
    }
}

fn open(path: &Path, cache: CacheMode) -> Option<Arc<dyn Image>> {
    let registry = Registry::new(HostOptions {
        cache,
        ..HostOptions::default()
    });
    let request = DiskRequest {
        path: path.to_owned(),
        format: Some(Format::Qcow2),
        access: Access::ReadWrite,
    };
    match block_on(registry.open(&request)) {
        // Some filesystems have no direct I/O.
        Err(error) if error.kind() == ErrorKind::Unsupported => None,
        opened => Some(opened.unwrap().image),
    }
}

fn fill_up_and_go_on(
    filesystem: Filesystem,
    options: &str,
    cache: CacheMode,
    seed: u64,
) -> Option<()> {
    let mib = if options == LARGEST { 48 } else { 12 };
    let mount = Mount::new(filesystem, mib)?;
    let mut rng = rng(seed);
    let mut scene = Scene::create(&mount, options, cache, &mut rng)?;
    for _ in 0..10 {
        scene.step(&mut rng);
    }
    block_on(scene.image.flush()).unwrap();
    scene.mount.leave(rng.random_range(0..300));
    let mut left = 400;
    while scene.known.failures < 25 && left > 0 {
        scene.step(&mut rng);
        left -= 1;
    }
    assert!(scene.known.failures > 0, "the filesystem has not filled up");
    // Everything that was acknowledged so far reads so, whatever the flush says.
    scene.settle(0, SIZE);
    let flushed = block_on(scene.image.flush());
    if let Err(error) = &flushed {
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    } else {
        scene.check_copy(&scene.known);
    }
    scene.mount.make_room();
    block_on(scene.image.flush()).unwrap();
    scene.check_copy(&scene.known);
    let failures = scene.known.failures;
    for _ in 0..10 {
        scene.step(&mut rng);
    }
    assert_eq!(scene.known.failures, failures, "there is room again");
    scene.settle(0, SIZE);
    block_on(scene.image.flush()).unwrap();
    let Scene {
        image, path, known, ..
    } = scene;
    drop(image);
    check(&path, Allowed::Nothing).unwrap();
    let again = open(&path, cache).unwrap();
    known.check(0, &read_range(again.as_ref(), 0..SIZE).unwrap());
    drop(again);
    Some(())
}

fn all_kinds(filesystem: Filesystem, cache: CacheMode) {
    for options in [
        "cluster_size=64k",
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=64k,extended_l2=on",
        LARGEST,
    ] {
        for_each_seed(
            2,
            &format!("{options} on {filesystem:?}, {cache:?}"),
            |seed| {
                fill_up_and_go_on(filesystem, options, cache, seed);
            },
        );
    }
}

#[test]
fn a_full_tmpfs_fails_requests_and_nothing_else() {
    all_kinds(Filesystem::Tmpfs, CacheMode::Writeback);
}

#[test]
fn a_full_ext4_fails_requests_and_nothing_else() {
    all_kinds(Filesystem::Ext4, CacheMode::Writeback);
}

#[test]
fn a_full_ext4_fails_direct_requests_and_nothing_else() {
    all_kinds(Filesystem::Ext4, CacheMode::None);
}

/// The tables' clusters are holes in the file until the first flush, which is where they find no room.
#[test]
fn a_flush_that_finds_no_room_for_metadata_can_be_repeated_when_there_is() {
    for (filesystem, cache) in [
        (Filesystem::Tmpfs, CacheMode::Writeback),
        (Filesystem::Ext4, CacheMode::Writeback),
        (Filesystem::Ext4, CacheMode::None),
    ] {
        let Some(mount) = Mount::new(filesystem, 12) else {
            return;
        };
        let path = mount.at.join("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "1G"]);
        let Some(image) = open(&path, cache) else {
            continue;
        };
        let write = |at| perform_write(image.as_ref(), at);
        // Two tables, each of which covers 512 MiB.
        for at in [0, 512 << 20] {
            write(at).unwrap();
        }
        mount.leave(0);
        for _ in 0..3 {
            let error = block_on(image.flush()).unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::NoSpace,
                "{filesystem:?}, {cache:?}: {error}"
            );
            // What has its room goes on.
            write(512 << 20).unwrap();
        }
        mount.make_room();
        block_on(image.flush()).unwrap();
        drop(image);
        check(&path, Allowed::Nothing).unwrap();
        let image = open(&path, cache).unwrap();
        for at in [0, 512 << 20] {
            assert_eq!(
                read_range(image.as_ref(), at..at + 65536).unwrap(),
                [0x5a; 65536]
            );
        }
    }
}

fn perform_write(image: &dyn Image, at: u64) -> seethrough::error::Result<Vec<u8>> {
    let whole = Operation::Write(vec![0x5a; 65536]);
    block_on(perform(image, at..at + 65536, &whole))
}
