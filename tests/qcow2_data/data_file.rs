//! Images that keep the guest's data in another file: random operations, power cuts of both files, and what stock
//! tools find afterwards.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::error::ErrorKind;
use seethrough::image::{Access, Image, Mapped, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::engine::workload::{
    Operation, Uncertain, check_same, part_of, perform_batch, random_batch, read_range,
};
use crate::engine::{Allowed, Yielding, check, for_each_seed, load, qemu_img, rng, run};

/// Options, whether the data file is raw, and whether there is a backing image.
const KINDS: &[(&str, bool, bool)] = &[
    ("cluster_size=4k", false, false),
    ("cluster_size=512", false, true),
    ("cluster_size=64k,refcount_bits=1", false, true),
    ("cluster_size=64k,preallocation=metadata", false, false),
    ("cluster_size=16k,extended_l2=on", false, true),
    (
        "cluster_size=128k,extended_l2=on,preallocation=metadata",
        false,
        true,
    ),
    ("cluster_size=2k", true, false),
    ("cluster_size=64k,lazy_refcounts=on", true, false),
    ("cluster_size=32k,extended_l2=on", true, false),
];

/// In the middle of a cluster.
const SIZE: u64 = (1 << 20) + 3 * 512;

struct Files {
    directory: tempfile::TempDir,
    raw: bool,
    base: Option<Arc<MemoryStorage>>,
    flat: Vec<u8>,
    data_len: usize,
}

impl Files {
    fn create((options, raw, backed): (&str, bool, bool), rng: &mut StdRng) -> Self {
        let mut files = Self {
            directory: tempfile::tempdir().unwrap(),
            raw,
            base: None,
            flat: vec![0; usize::try_from(SIZE).unwrap()],
            data_len: 0,
        };
        let path = |path: PathBuf| path.display().to_string();
        let mut arguments: Vec<String> = ["create", "-q", "-f", "qcow2"].map(str::to_owned).into();
        if backed {
            rng.fill(&mut files.flat[..]);
            std::fs::write(files.path("base.raw"), &files.flat).unwrap();
            files.base = Some(load(&files.path("base.raw")));
            arguments.extend(["-b", "base.raw", "-F", "raw"].map(str::to_owned));
        }
        let switch = if raw { "on" } else { "off" };
        let data = path(files.path("data"));
        arguments.extend([
            "-o".to_owned(),
            format!("{options},data_file={data},data_file_raw={switch}"),
            path(files.path("top.qcow2")),
            SIZE.to_string(),
        ]);
        qemu_img(&arguments);
        files.data_len = load(&files.path("data")).contents().len();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self, top: Arc<dyn Storage>, data: Arc<dyn Storage>) -> Arc<Qcow2> {
        let backing = self
            .base
            .clone()
            .map(|base| -> Arc<dyn Image> { Arc::new(RawImage::new(base, Access::ReadOnly)) });
        let opened = Qcow2::open_with_data(top, Some(data), backing, Access::ReadWrite);
        Arc::new(block_on(opened).expect("the image opens"))
    }

    /// Has the stock tools look at the files.
    fn judge(&self, top: &[u8], data: &[u8], allowed: Allowed) -> Result<(), String> {
        std::fs::write(self.path("top.qcow2"), top).unwrap();
        std::fs::write(self.path("data"), data).unwrap();
        check(&self.path("top.qcow2"), allowed)
    }

    /// As [`Files::judge`]; they also have to find the bytes of `flat`, in a raw data file without the image, too.
    fn judge_all(&self, top: &[u8], data: &[u8]) {
        self.judge(top, data, Allowed::Nothing).unwrap();
        std::fs::write(self.path("flat.raw"), &self.flat).unwrap();
        let compare = |format: &str, name: &str| {
            let name = self.path(name).display().to_string();
            let flat = self.path("flat.raw").display().to_string();
            let (code, text) = run(
                "qemu-img",
                &["compare", "-f", format, "-F", "raw", &name, &flat],
            );
            assert_eq!(code, 0, "{text}");
        };
        compare("qcow2", "top.qcow2");
        // Stock tools fill the last cluster when they preallocate; nobody adds to that.
        assert_eq!(data.len(), self.data_len);
        if self.raw {
            check_same(data, &self.flat, 0, "the raw data file");
            let info = qemu_img(&["info", &self.path("top.qcow2").display().to_string()]);
            assert!(info.contains("data file raw: true"), "{info}");
        }
    }
}

fn settle(image: &Qcow2, flat: &mut [u8], range: &Range<u64>, operation: &Operation) {
    let part = part_of(flat, range);
    match operation {
        Operation::Write(bytes) => part.copy_from_slice(bytes),
        Operation::Zero(_) => part.fill(0),
        Operation::Discard => {
            let now = read_range(image, range.clone()).unwrap();
            for (byte, now) in part.iter_mut().zip(now) {
                assert!(now == 0 || now == *byte, "a discard made something up");
                *byte = now;
            }
        }
        Operation::Read | Operation::Flush => {}
    }
}

#[test]
fn random_operations_leave_the_bytes_of_a_flat_disk_in_the_data_file() {
    for kind in KINDS {
        for_each_seed(2, &format!("{kind:?}"), |seed| {
            let mut rng = rng(seed);
            let mut files = Files::create(*kind, &mut rng);
            let (top, data) = (load(&files.path("top.qcow2")), load(&files.path("data")));
            if !files.raw && seed % 2 == 1 {
                // What is not allocated must never show.
                let noise = IoBuf::from_bytes(&vec![0xd5; files.flat.len()]);
                let is_fresh = !kind.0.contains("preallocation");
                if is_fresh {
                    block_on(data.writev(seethrough::units::HostOffset(0), noise)).unwrap();
                }
            }
            let yielding = |storage: &Arc<MemoryStorage>, seed| -> Arc<dyn Storage> {
                Arc::new(Yielding::new(Arc::clone(storage) as Arc<dyn Storage>, seed))
            };
            let mut image = files.open(yielding(&top, seed), yielding(&data, seed + 9));
            for step in 0..60 {
                if step % 20 == 19 {
                    block_on(image.flush()).unwrap();
                    drop(image);
                    image = files.open(yielding(&top, seed + 1), yielding(&data, seed + 7));
                }
                let batch = random_batch(&mut rng, SIZE, &[1, 512, 512, 4096, 65536]);
                let results = perform_batch(image.as_ref(), &batch, &mut rng);
                for ((range, operation), result) in batch.iter().zip(results) {
                    let found = result.unwrap();
                    if let Operation::Read = operation {
                        check_same(&found, part_of(&mut files.flat, range), range.start, "read");
                    }
                    settle(&image, &mut files.flat, range, operation);
                }
            }
            block_on(image.flush()).unwrap();
            drop(image);
            files.judge_all(&top.contents(), &data.contents());
        });
    }
}

#[test]
fn a_power_cut_of_both_files_loses_nothing_that_was_flushed() {
    for kind in KINDS {
        for_each_seed(1, &format!("{kind:?}"), |seed| power_cuts(*kind, seed));
    }
}

fn power_cuts(kind: (&str, bool, bool), seed: u64) {
    let mut rng = rng(seed);
    let mut files = Files::create(kind, &mut rng);
    let contents = |name| load(&files.path(name)).contents();
    let top = Arc::new(CrashStorage::new(
        contents("top.qcow2"),
        Delays::up_to(3, seed),
    ));
    let data = Arc::new(top.beside(contents("data"), Delays::up_to(3, seed + 1)));
    let image = files.open(Arc::clone(&top) as _, Arc::clone(&data) as _);
    let fresh = |flat: &[u8]| Uncertain {
        durable: flat.to_vec(),
        later: Vec::new(),
    };
    // When each flush returned, what was durable then, and when each later operation began.
    let mut epochs = vec![(top.now(), fresh(&files.flat), Vec::new())];
    for _ in 0..20 {
        if rng.random_range(0..4) == 0 {
            block_on(image.flush()).unwrap();
            epochs.push((top.now(), fresh(&files.flat), Vec::new()));
        }
        let batch = random_batch(&mut rng, SIZE, &[512, 512, 4096, 65536]);
        let (_, content, begun) = epochs.last_mut().unwrap();
        for (range, operation) in &batch {
            content.add(range, operation);
            begun.resize(content.later.len(), top.now());
        }
        let results = perform_batch(image.as_ref(), &batch, &mut rng);
        for ((range, operation), result) in batch.iter().zip(results) {
            result.unwrap();
            settle(&image, &mut files.flat, range, operation);
        }
    }
    for _ in 0..8 {
        let cut = Moment(rng.random_range(0..=top.now().0));
        let mut lost = || match rng.random_range(0..5) {
            0 => Lost::All,
            1 => Lost::None,
            _ => Lost::Some { seed: rng.random() },
        };
        let (lost_top, lost_data) = (lost(), lost());
        let bytes = top.after_power_cut(cut, lost_top);
        let data_bytes = data.after_power_cut(cut, lost_data);
        let what = format!("cut at {cut:?}, {lost_top:?} and {lost_data:?}");
        let sound = files.judge(&bytes, &data_bytes, Allowed::Leaks);
        sound.unwrap_or_else(|error| panic!("{what}: {error}"));
        let (_, content, begun) = epochs.iter().rev().find(|epoch| epoch.0 <= cut).unwrap();
        let expected = Uncertain {
            durable: content.durable.clone(),
            later: content.later[..begun.iter().take_while(|begun| **begun < cut).count()].to_vec(),
        };
        let survivor = files.open(
            Arc::new(MemoryStorage::new(bytes)),
            Arc::new(MemoryStorage::new(data_bytes.clone())),
        );
        let found = read_range(survivor.as_ref(), 0..SIZE).unwrap();
        expected
            .check(&found)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        if files.raw {
            let raw = &data_bytes[..found.len()];
            expected
                .check(raw)
                .unwrap_or_else(|error| panic!("raw, {what}: {error}"));
        }
    }
}

fn opened(kind: (&str, bool, bool)) -> (Files, Arc<MemoryStorage>, Arc<MemoryStorage>, Arc<Qcow2>) {
    let files = Files::create(kind, &mut rng(1));
    let (top, data) = (load(&files.path("top.qcow2")), load(&files.path("data")));
    let image = files.open(Arc::clone(&top) as _, Arc::clone(&data) as _);
    (files, top, data, image)
}

#[test]
fn the_first_cluster_is_allocated_at_offset_0_of_the_data_file() {
    let (_files, _, data, image) = opened(("cluster_size=64k", false, false));
    let at = GuestOffset(0);
    block_on(image.write(at, IoBuf::from_bytes(&[7; 65536]))).unwrap();
    assert!(data.contents()[..65536] == [7; 65536]);
    let Mapped::Extent { at: host, .. } = image.map_write(at, 65536) else {
        panic!("it is allocated");
    };
    assert_eq!(host.0, 0);
    block_on(image.discard(at, 65536)).unwrap();
    assert!(read_range(image.as_ref(), 0..65536).unwrap() == [0; 65536]);
    assert!(
        data.contents()[..65536] == [0; 65536],
        "its room is given back"
    );
}

#[test]
fn an_entry_that_points_elsewhere_in_the_data_file_is_corrupt() {
    let (_files, top, _, image) = opened(("cluster_size=64k", false, false));
    block_on(image.write(GuestOffset(65536), IoBuf::from_bytes(&[7; 65536]))).unwrap();
    block_on(image.flush()).unwrap();
    drop(image);
    let bytes = top.contents();
    let entry = ((1u64 << 63) | 65536).to_be_bytes();
    let at = bytes
        .windows(8)
        .rposition(|window| window == entry)
        .unwrap();
    let elsewhere = IoBuf::from_bytes(&((1u64 << 63) | (2 * 65536)).to_be_bytes());
    block_on(top.writev(seethrough::units::HostOffset(at as u64), elsewhere)).unwrap();
    let (files, data) = (
        Files::create(("cluster_size=64k", false, false), &mut rng(1)),
        vec![0; 1 << 20],
    );
    let image = files.open(top, Arc::new(MemoryStorage::new(data)));
    let error = block_on(image.read(GuestOffset(65536), IoBuf::zeroed(512))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("its own place"), "{error}");
}

#[test]
fn images_and_data_files_that_do_not_belong_together_are_refused() {
    let (_files, top, data, image) = opened(("cluster_size=64k", false, false));
    drop(image);
    let alone = Qcow2::open(top, None, Access::ReadOnly);
    assert_eq!(
        block_on(alone).err().unwrap().kind(),
        ErrorKind::InvalidConfig
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("plain.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    let both = Qcow2::open_with_data(load(&path), Some(data), None, Access::ReadOnly);
    assert_eq!(
        block_on(both).err().unwrap().kind(),
        ErrorKind::InvalidConfig
    );
}

#[test]
fn compressed_data_is_refused() {
    let (_files, _, _, image) = opened(("cluster_size=64k", false, false));
    let error = block_on(image.write_compressed(GuestOffset(0), IoBuf::zeroed(99))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn a_raw_data_file_changes_with_every_zero_and_every_discard() {
    let (mut files, top, data, image) = opened(("cluster_size=64k", true, false));
    let size = usize::try_from(SIZE).unwrap();
    block_on(image.write(GuestOffset(0), IoBuf::from_bytes(&vec![9; size]))).unwrap();
    files.flat.fill(9);
    for (at, len) in [(512, 1024), (65536, 131_072), (700_000 / 512 * 512, 4096)] {
        block_on(image.write_zeroes(GuestOffset(at), len, ZeroMode::KeepAllocated)).unwrap();
        part_of(&mut files.flat, &(at..at + len)).fill(0);
    }
    block_on(image.discard(GuestOffset(327_680), 65536)).unwrap();
    part_of(&mut files.flat, &(327_680..393_216)).fill(0);
    block_on(image.flush()).unwrap();
    drop(image);
    files.judge_all(&top.contents(), &data.contents());
}
