//! Persistent bitmaps: nobody trusts one after we have written, and their room is not lost.

use std::path::PathBuf;
use std::sync::Arc;

use seethrough::image::{Access, Image};
use seethrough::qcow2::Qcow2;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::engine::{Allowed, check, load, qemu_img, run};

/// An image with an automatic bitmap, one that is disabled, and some data.
struct File {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

impl File {
    fn create() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let name = path.display().to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", &name, "4M"]);
        qemu_img(&["bitmap", "--add", &name, "tracking"]);
        qemu_img(&["bitmap", "--add", "-g", "4k", &name, "frozen"]);
        let (code, text) = run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &name]);
        assert_eq!(code, 0, "{text}");
        qemu_img(&["bitmap", "--disable", &name, "frozen"]);
        Self {
            _directory: directory,
            path,
        }
    }

    fn save(&self, storage: &MemoryStorage) {
        std::fs::write(&self.path, storage.contents()).unwrap();
    }

    /// The names of the bitmaps that stock tools know, with the flags of each.
    fn bitmaps(&self) -> Vec<(String, Vec<String>)> {
        let name = self.path.display().to_string();
        let info = qemu_img(&["info", "--output=json", &name]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let list = info["format-specific"]["data"]["bitmaps"].as_array();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        list.into_iter()
            .flatten()
            .map(|bitmap| {
                let flags = bitmap["flags"].as_array().unwrap().iter().map(text);
                (text(&bitmap["name"]), flags.collect())
            })
            .collect()
    }
}

fn flags(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn open(storage: Arc<dyn Storage>) -> Qcow2 {
    block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap()
}

fn write(image: &Qcow2, at: u64) {
    block_on(image.write(GuestOffset(at), IoBuf::from_bytes(&[9; 512]))).unwrap();
}

#[test]
fn a_write_marks_the_bitmaps_that_should_have_recorded_it_and_leaves_a_clean_image() {
    let file = File::create();
    let storage = load(&file.path);
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>);
    block_on(image.read(GuestOffset(0), IoBuf::zeroed(512))).unwrap();
    block_on(image.flush()).unwrap();
    let before = file.bitmaps();
    file.save(&storage);
    assert_eq!(file.bitmaps(), before, "reading changes nothing");
    assert!(before.contains(&("tracking".into(), flags(&["auto"]))));

    write(&image, 2 << 20);
    block_on(image.flush()).unwrap();
    drop(image);
    file.save(&storage);
    let after = file.bitmaps();
    assert!(
        after.contains(&("tracking".into(), flags(&["in-use", "auto"]))),
        "{after:?}"
    );
    assert!(after.contains(&("frozen".into(), flags(&[]))), "{after:?}");
    check(&file.path, Allowed::Nothing).unwrap();

    // Stock tools do not use it, and can take it away.
    let name = file.path.display().to_string();
    let (code, text) = run("qemu-img", &["bitmap", "--clear", &name, "tracking"]);
    assert!(code != 0 && text.contains("inconsistent"), "{text}");
    qemu_img(&["bitmap", "--remove", &name, "tracking"]);
    check(&file.path, Allowed::Nothing).unwrap();
}

#[test]
fn no_bitmap_is_trusted_after_another_size_not_even_a_disabled_one() {
    let file = File::create();
    for size in [2 << 20, 8 << 20] {
        let bytes = std::fs::read(&file.path).unwrap();
        let storage = Arc::new(CrashStorage::new(bytes.clone(), Delays::none()));
        let image = open(Arc::clone(&storage) as Arc<dyn Storage>);
        drop(block_on(image.resize(size)).unwrap());
        for cut in storage.moments() {
            let left = storage.after_power_cut(cut, Lost::Some { seed: cut.0 });
            let has_old_size = left[24..32] == bytes[24..32];
            std::fs::write(&file.path, left).unwrap();
            let bitmaps = file.bitmaps();
            let is_trusted =
                |(_, flags): &(String, Vec<String>)| !flags.contains(&"in-use".to_owned());
            assert_eq!(bitmaps.len(), 2, "{cut:?}");
            assert!(
                has_old_size || !bitmaps.iter().any(is_trusted),
                "{cut:?}: {bitmaps:?}"
            );
        }
        std::fs::write(&file.path, bytes).unwrap();
    }
}

#[test]
fn a_power_cut_leaves_no_write_that_a_trusted_bitmap_has_not_recorded() {
    let file = File::create();
    let storage = Arc::new(CrashStorage::new(
        load(&file.path).contents(),
        Delays::none(),
    ));
    let untouched = storage.contents();
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>);
    // In place: the first thing that can reach the disk is the data.
    write(&image, 0);
    let trusted = file.bitmaps();
    for cut in 0..=storage.now().0 {
        for lost in [Lost::All, Lost::None, Lost::Some { seed: cut }] {
            let bytes = storage.after_power_cut(Moment(cut), lost);
            std::fs::write(&file.path, &bytes).unwrap();
            let found = read_sector(&bytes);
            if found != read_sector(&untouched) {
                assert_ne!(file.bitmaps(), trusted, "cut at {cut} with {lost:?}");
            }
        }
    }
}

fn read_sector(image: &[u8]) -> Vec<u8> {
    let storage = Arc::new(MemoryStorage::new(image.to_vec()));
    let image = block_on(Qcow2::open(storage, None, Access::ReadOnly)).unwrap();
    let buf = IoBuf::zeroed(512);
    block_on(image.read(GuestOffset(0), buf.clone())).unwrap();
    buf.to_vec()
}

#[test]
fn bitmaps_that_make_no_sense_are_given_up_before_the_first_write() {
    let file = File::create();
    let mut bytes = load(&file.path).contents();
    // The number of bitmaps in the header extension.
    let magic = 0x2385_2875u32.to_be_bytes();
    let at = bytes.windows(4).position(|window| window == magic).unwrap();
    bytes[at + 8..at + 12].copy_from_slice(&77u32.to_be_bytes());
    let storage = Arc::new(MemoryStorage::new(bytes));
    let image = open(Arc::clone(&storage) as Arc<dyn Storage>);
    write(&image, 0);
    block_on(image.flush()).unwrap();
    drop(image);
    assert_eq!(storage.contents()[88..96], [0; 8], "the autoclear bits");
    file.save(&storage);
    check(&file.path, Allowed::Leaks).unwrap();
}
