//! Snapshots of a disk that is written meanwhile: each is the disk of one moment, and stays so.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::SystemTime;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::{Access, Image, Mapped};
use seethrough::qcow2::{OnlineQcow2, Qcow2};
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;

use crate::engine::{Allowed, check, for_each_seed, qemu_img, rng, run_interleaved};
use crate::guests::sectors;
use crate::storage::Tearing;

const SIZE: u64 = 256 << 10;
/// The sectors that guests write: every so many, so that tables and clusters are shared, and some are not touched.
const STRIDE: u64 = 3;
const SECTORS: u64 = SIZE / 512 / STRIDE;
const WRITERS: u64 = 3;
const WRITES: u64 = 40;
const SNAPSHOTS: u64 = 4;

const KINDS: &[&str] = &[
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=4",
    "cluster_size=2k,lazy_refcounts=on",
    "cluster_size=16k,extended_l2=on",
];

/// A write that has ended: which sector of its writer's, and when.
struct Written {
    sector: u64,
    began: u64,
    ended: u64,
}

/// What a snapshot showed when it was opened, and when it was taken.
struct Taken {
    name: String,
    content: Vec<u64>,
    began: u64,
    ended: u64,
    /// Of the storage: when it was known to be there, and when it began to be deleted.
    durable: Moment,
    deleted: Option<Moment>,
}

/// A disk, and the clock of all who use it.
struct Bed {
    storage: Arc<CrashStorage>,
    image: OnlineQcow2,
    clock: AtomicU64,
    written: Vec<Mutex<Vec<Written>>>,
    taken: Mutex<Vec<Taken>>,
}

/// The guest offset of a writer's sector.
fn offset(sector: u64) -> GuestOffset {
    GuestOffset(sector * STRIDE * 512)
}

fn owner(sector: u64) -> usize {
    usize::try_from(sector % WRITERS).unwrap()
}

impl Bed {
    fn new(options: &str, seed: u64) -> Self {
        let storage = Arc::new(CrashStorage::new(
            new_image(options),
            Delays::up_to(3, seed),
        ));
        let tearing = Tearing::new(Arc::clone(&storage) as Arc<dyn Storage>, seed);
        let image = Qcow2::open(Arc::new(tearing), None, Access::ReadWrite);
        Self {
            storage,
            image: OnlineQcow2::new(block_on(image).unwrap()),
            clock: AtomicU64::new(1),
            written: (0..WRITERS).map(|_| Mutex::default()).collect(),
            taken: Mutex::default(),
        }
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// Writes its own sectors, one after the other, with the number of the write.
    async fn writer(&self, number: u64, mut rng: StdRng) {
        for write in 1..=WRITES {
            let sector = rng.random_range(0..SECTORS / WRITERS) * WRITERS + number;
            let buf = IoBuf::from_bytes(&sectors([write]));
            let began = self.now();
            match self.image.map_write(offset(sector), 512) {
                Mapped::Extent { storage, at, guard } => {
                    if rng.random_range(0..4) == 0 {
                        // Longer than it takes to take a snapshot.
                        turns(rng.random_range(0..4000)).await;
                    }
                    storage.writev(at, guard.held_by(buf)).await.unwrap();
                }
                _ => self.image.write(offset(sector), buf).await.unwrap(),
            }
            let written = Written {
                sector,
                began,
                ended: self.now(),
            };
            self.written[owner(sector)].lock().unwrap().push(written);
            if rng.random_range(0..8) == 0 {
                self.image.flush().await.unwrap();
            }
            pause(&mut rng).await;
        }
    }

    /// Takes snapshots, looks at them for a while, and deletes some.
    async fn snapshots(&self, mut rng: StdRng) {
        let mut open: Vec<(usize, Qcow2)> = Vec::new();
        for number in 0..SNAPSHOTS {
            for _ in 0..rng.random_range(0..60) {
                pause(&mut rng).await;
            }
            let name = format!("moment-{number}");
            let began = self.now();
            let taken = self
                .image
                .create_snapshot(OsStr::new(&name), SystemTime::UNIX_EPOCH);
            taken.await.unwrap();
            let ended = self.now();
            let durable = self.storage.now();
            let snapshot = self.image.open_snapshot(OsStr::new(&name)).await.unwrap();
            let content = read_all(&snapshot, &mut rng).await;
            self.taken.lock().unwrap().push(Taken {
                name,
                content,
                began,
                ended,
                durable,
                deleted: None,
            });
            open.push((usize::try_from(number).unwrap(), snapshot));
            for (number, snapshot) in &open {
                let found = read_all(snapshot, &mut rng).await;
                assert_eq!(
                    found,
                    self.taken.lock().unwrap()[*number].content,
                    "a snapshot moved"
                );
            }
            if rng.random_bool(0.5) {
                let (number, snapshot) = open.swap_remove(rng.random_range(0..open.len()));
                snapshot.all_ended().await;
                drop(snapshot);
                let deleted = self.storage.now();
                let name = {
                    let taken = &mut self.taken.lock().unwrap()[number];
                    taken.deleted = Some(deleted);
                    taken.name.clone()
                };
                self.image.delete_snapshot(OsStr::new(&name)).await.unwrap();
            }
        }
    }

    /// Every snapshot is the disk of one moment between its beginning and its end.
    fn judge_moments(&self) {
        let written: Vec<_> = self.written.iter().map(|one| one.lock().unwrap()).collect();
        for taken in self.taken.lock().unwrap().iter() {
            // The last write of each that is in it.
            let last = |writer: usize| {
                let own = (0u64..).zip(&taken.content);
                let own = own.filter(|(sector, _)| owner(*sector) == writer);
                usize::try_from(own.map(|(_, value)| *value).max().unwrap_or(0)).unwrap()
            };
            let lasts: Vec<usize> = (0..written.len()).map(last).collect();
            for (writes, last) in written.iter().zip(&lasts) {
                let mut expected = BTreeMap::new();
                for (number, write) in (1u64..).zip(&writes[..*last]) {
                    expected.insert(write.sector, number);
                    assert!(
                        write.began < taken.ended,
                        "{} has a later write",
                        taken.name
                    );
                }
                for (sector, value) in expected {
                    let found = taken.content[usize::try_from(sector).unwrap()];
                    assert_eq!(found, value, "sector {sector} of {}", taken.name);
                }
                if let Some(missing) = writes.get(*last) {
                    assert!(missing.ended > taken.began, "{} lacks a write", taken.name);
                    for (others, last) in written.iter().zip(&lasts) {
                        let Some(included) = last.checked_sub(1).map(|last| &others[last]) else {
                            continue;
                        };
                        assert!(
                            missing.ended > included.began,
                            "{} has a write and not one that had ended before it",
                            taken.name
                        );
                    }
                }
            }
        }
    }

    /// Stock tools find the image sound and read the same in every snapshot, after a power cut too.
    fn judge_image(&self, rng: &mut StdRng) {
        block_on(self.image.close()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, self.storage.contents()).unwrap();
        check(&path, Allowed::Nothing).unwrap();
        for taken in self.taken.lock().unwrap().iter() {
            if taken.deleted.is_none() {
                let raw = directory.path().join("raw");
                let arguments = ["convert", "-O", "raw", "-l", &taken.name].map(OsStr::new);
                qemu_img(&[&arguments[..], &[path.as_os_str(), raw.as_os_str()]].concat());
                let raw = std::fs::read(raw).unwrap();
                assert_eq!(values(&raw), taken.content, "{}", taken.name);
            }
        }
        for _ in 0..6 {
            let cut = Moment(rng.random_range(0..=self.storage.now().0));
            let lost = Lost::Some { seed: rng.random() };
            let bytes = self.storage.after_power_cut(cut, lost);
            std::fs::write(&path, &bytes).unwrap();
            check(&path, Allowed::Leaks).unwrap_or_else(|error| panic!("{cut:?}: {error}"));
            let storage = Arc::new(MemoryStorage::new(bytes));
            let image = block_on(Qcow2::open(storage, None, Access::ReadWrite)).unwrap();
            let image = OnlineQcow2::new(image);
            for taken in self.taken.lock().unwrap().iter() {
                let is_there = taken.durable <= cut && taken.deleted.is_none_or(|at| at >= cut);
                if is_there {
                    let name = OsStr::new(&taken.name);
                    let snapshot = block_on(image.open_snapshot(name)).unwrap();
                    let found = block_on(read_all(&snapshot, rng));
                    assert_eq!(found, taken.content, "{} after {cut:?}", taken.name);
                }
            }
        }
    }
}

/// Lets others go first, now and then.
async fn pause(rng: &mut StdRng) {
    turns(rng.random_range(0..4)).await;
}

/// Lets others go first, so many times.
async fn turns(mut turns: u32) {
    poll_fn(|context| {
        if turns == 0 {
            return Poll::Ready(());
        }
        turns -= 1;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The writers' sectors of a disk.
async fn read_all(image: &Qcow2, rng: &mut StdRng) -> Vec<u64> {
    let mut found = Vec::new();
    for sector in 0..SECTORS {
        let buf = IoBuf::zeroed(512);
        match image.map_read(offset(sector), 512) {
            Mapped::Extent { storage, at, guard } => {
                storage.readv(at, guard.held_by(buf.clone())).await.unwrap();
            }
            _ => image.read(offset(sector), buf.clone()).await.unwrap(),
        }
        found.push(value(&buf.to_vec()));
        if sector % 32 == 0 {
            pause(rng).await;
        }
    }
    found
}

fn values(disk: &[u8]) -> Vec<u64> {
    let sectors = (0..SECTORS).map(|sector| usize::try_from(offset(sector).0).unwrap());
    sectors.map(|at| value(&disk[at..at + 512])).collect()
}

fn value(sector: &[u8]) -> u64 {
    let (words, _) = sector.as_chunks::<8>();
    assert!(words.iter().all(|word| *word == words[0]), "a torn sector");
    u64::from_be_bytes(words[0])
}

/// The bytes of a new image with these options.
fn new_image(options: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let size = SIZE.to_string();
    let arguments = ["create", "-q", "-f", "qcow2", "-o", options].map(OsStr::new);
    qemu_img(&[&arguments[..], &[path.as_os_str(), OsStr::new(&size)]].concat());
    std::fs::read(path).unwrap()
}

#[test]
fn a_snapshot_of_a_disk_in_use_is_that_of_one_moment_and_stays() {
    for options in KINDS {
        for_each_seed(6, options, |seed| {
            let mut rng = rng(seed);
            let bed = Bed::new(options, seed);
            let mut tasks: Vec<Pin<Box<dyn Future<Output = ()> + '_>>> = Vec::new();
            for number in 0..WRITERS {
                let rng = crate::engine::rng(rng.random());
                tasks.push(Box::pin(bed.writer(number, rng)));
            }
            let own = crate::engine::rng(rng.random());
            tasks.push(Box::pin(bed.snapshots(own)));
            run_interleaved(&mut rng, tasks);
            bed.judge_moments();
            bed.judge_image(&mut rng);
        });
    }
}
