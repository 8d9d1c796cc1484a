//! Zeroing and discarding, down to single subclusters: what reads as zeros afterwards is what stock tools make so.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::RngExt;
use seethrough::image::{Access, Image, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{MemoryStorage, ZeroMode};
use seethrough::sys::block_on;
use seethrough::units::GuestOffset;

use crate::engine::workload::{check_same, part_of, read_range};
use crate::engine::{Allowed, check, for_each_seed, load, qemu_img, rng, run};

const SIZE: u64 = 2 << 20;

struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// An image with some data, over a base of ones where `backed`.
    fn create(&self, options: &str, backed: bool) {
        let ones = vec![1; usize::try_from(SIZE).unwrap()];
        std::fs::write(self.path("base.raw"), ones).unwrap();
        let path = self.path("disk").display().to_string();
        let size = SIZE.to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        let backing: &[&str] = if backed {
            &["-b", "base.raw", "-F", "raw"]
        } else {
            &[]
        };
        qemu_img(&[&create[..], backing, &[&path, &size]].concat());
        qemu_io(&self.path("disk"), &["write -P 2 200k 400k".to_owned()]);
    }

    fn open(&self) -> (Arc<MemoryStorage>, Qcow2) {
        let storage = load(&self.path("disk"));
        let base = Arc::new(RawImage::new(
            load(&self.path("base.raw")),
            Access::ReadOnly,
        ));
        let image = Qcow2::open(Arc::clone(&storage) as _, Some(base), Access::ReadWrite);
        (storage, block_on(image).unwrap())
    }

    fn raw_copy(&self, snapshot: Option<&str>) -> Vec<u8> {
        let (from, to) = (self.path("disk"), self.path("copy.raw"));
        let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
        let name = snapshot.map(|name| format!("snapshot.name={name}"));
        let of: Vec<&str> = name.iter().flat_map(|name| ["-l", name]).collect();
        let convert = ["convert", "-f", "qcow2", "-O", "raw"];
        qemu_img(&[&convert[..], &of, &[from, to]].concat());
        std::fs::read(to).unwrap()
    }
}

fn qemu_io(image: &Path, commands: &[String]) {
    let mut arguments: Vec<&str> = vec!["-d", "unmap", "-f", "qcow2"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(image.to_str().unwrap());
    let (code, text) = run("qemu-io", &arguments);
    assert_eq!(code, 0, "{text}");
}

fn some_range(rng: &mut impl RngExt) -> Range<u64> {
    let unit = [512, 1024, 2048, 4096, 65536][rng.random_range(0..5)];
    let start = rng.random_range(0..SIZE / unit) * unit;
    let most = if rng.random_bool(0.5) { 4 } else { 40 };
    let len = rng.random_range(1..=most) * unit;
    start..(start + len).min(SIZE)
}

fn whole_subclusters(range: &Range<u64>, size: u64) -> Range<u64> {
    let start = range.start.next_multiple_of(size);
    start..(range.end / size * size).max(start)
}

/// What is discarded reads as zeros over a backing image, whether there was an L2 table or not, and nothing else
/// changes: sector for sector as after the same discards by `qemu-io`, which leaves alone what is less than a cluster
/// even where there are subclusters.
#[test]
fn discards_hide_the_backing_image_where_stock_tools_hide_it() {
    for options in [
        "cluster_size=512",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=128k,extended_l2=on",
        "compat=0.10,cluster_size=4k",
    ] {
        for_each_seed(2, options, |seed| {
            let mut rng = rng(seed);
            let files = Files::new();
            files.create(options, true);
            let (storage, image) = files.open();
            let ranges: Vec<_> = (0..6).map(|_| some_range(&mut rng)).collect();
            let mut commands = Vec::new();
            for range in &ranges {
                let len = range.end - range.start;
                block_on(image.discard(GuestOffset(range.start), len)).unwrap();
                commands.push(format!("discard {} {len}", range.start));
            }
            let ours = read_range(&image, 0..SIZE).unwrap();
            block_on(image.flush()).unwrap();
            qemu_io(&files.path("disk"), &commands);
            let stock = files.raw_copy(None);
            let mut expected = stock.clone();
            if options.contains("extended_l2") {
                for range in &ranges {
                    let whole = whole_subclusters(range, image.cluster_size() / 32);
                    part_of(&mut expected, &whole).fill(0);
                }
            }
            check_same(
                &ours,
                &expected,
                0,
                &format!("{options} after {commands:?}"),
            );
            std::fs::write(files.path("disk"), storage.contents()).unwrap();
            check(&files.path("disk"), Allowed::Nothing).unwrap();
        });
    }
}

/// Subclusters of a cluster that a snapshot shares are cleared in the active table alone.
#[test]
fn single_subclusters_of_shared_clusters_are_zeroed_and_discarded() {
    for options in [
        "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,extended_l2=on",
    ] {
        for backed in [false, true] {
            let files = Files::new();
            files.create(options, backed);
            let name = files.path("disk").display().to_string();
            qemu_img(&["snapshot", "-c", "before", &name]);
            let before = files.raw_copy(Some("before"));
            let mut expected = before.clone();
            let storage = load(&files.path("disk"));
            let base = Arc::new(RawImage::new(
                load(&files.path("base.raw")),
                Access::ReadOnly,
            ));
            let backing = backed.then_some(base as Arc<dyn Image>);
            let image = Qcow2::open(Arc::clone(&storage) as _, backing, Access::ReadWrite);
            let image = block_on(image).unwrap();
            for (number, start) in [204_800u64, 262_144, 300_032, 401_408]
                .into_iter()
                .enumerate()
            {
                let at = GuestOffset(start);
                match number {
                    0 => block_on(image.write_zeroes(at, 4096, ZeroMode::MayUnmap)),
                    1 => block_on(image.write_zeroes(at, 4096, ZeroMode::KeepAllocated)),
                    2 => block_on(image.write_zeroes(at, 1024, ZeroMode::MayUnmap)),
                    _ => block_on(image.discard(at, 4096)),
                }
                .unwrap();
                let len = if number == 2 { 1024 } else { 4096 };
                let start = usize::try_from(start).unwrap();
                expected[start..start + len].fill(0);
            }
            let found = read_range(&image, 0..SIZE).unwrap();
            check_same(&found, &expected, 0, options);
            block_on(image.flush()).unwrap();
            drop(image);
            std::fs::write(files.path("disk"), storage.contents()).unwrap();
            check(&files.path("disk"), Allowed::Nothing).unwrap();
            check_same(&files.raw_copy(None), &expected, 0, "the disk");
            check_same(&files.raw_copy(Some("before")), &before, 0, "the snapshot");
        }
    }
}
