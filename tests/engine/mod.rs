//! What the engine's tests share: images made and judged by stock tools, storage that lets others go first, and a
//! scheduler that runs futures in an order given by a seed.

// Each test binary includes this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]
// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

pub mod workload;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::image::{Access, Image, RawImage};
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::features::IncompatibleFeatures;
use seethrough::qcow2::header::Header;
use seethrough::storage::{IoFuture, MemoryStorage, Storage, ZeroMode};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::HostOffset;

/// How often every random test runs: `SEETHROUGH_TEST_ROUNDS` times as often as usual.
pub fn rounds(usual: u64) -> u64 {
    let factor = std::env::var("SEETHROUGH_TEST_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok());
    usual * factor.unwrap_or(1)
}

/// Runs a random test for its usual seeds, and says on failure how to replay the one that failed;
/// `SEETHROUGH_TEST_SEED` runs a single one.
pub fn for_each_seed(usual: u64, what: &str, test: impl Fn(u64)) {
    let single = std::env::var("SEETHROUGH_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seeds = single.map_or(0..rounds(usual), |seed: u64| seed..seed + 1);
    for seed in seeds {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(seed)));
        if let Err(cause) = outcome {
            eprintln!("{what}: replay with SEETHROUGH_TEST_SEED={seed}");
            std::panic::resume_unwind(cause);
        }
    }
}

/// Runs a stock tool and returns its exit code and what it printed.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> (i32, String) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("the stock tool is installed");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    let _ = write!(text, "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), text)
}

/// Runs `qemu-img` and expects success.
pub fn qemu_img<S: AsRef<OsStr> + std::fmt::Debug>(arguments: &[S]) -> String {
    let (code, text) = run("qemu-img", arguments);
    assert_eq!(code, 0, "qemu-img {arguments:?}: {text}");
    text
}

/// What `qemu-img check` may find.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    Nothing,
    Leaks,
}

/// Whether an image's last writer has not closed it, and has left its refcounts for whoever opens it next.
pub fn is_dirty(image: &[u8]) -> bool {
    Header::parse(image).is_ok_and(|header| {
        header
            .incompatible_features
            .contains(IncompatibleFeatures::DIRTY)
    })
}

/// Has `qemu-img check` look at an image, after a repair if it has not been closed.
pub fn check(path: &Path, allowed: Allowed) -> Result<(), String> {
    if is_dirty(&std::fs::read(path).map_err(|error| error.to_string())?) {
        let path = path.display().to_string();
        let (code, text) = run(
            "qemu-img",
            &["check", "-q", "-f", "qcow2", "-r", "all", &path],
        );
        if code != 0 {
            return Err(format!("qemu-img check -r all: exit code {code}: {text}"));
        }
    }
    let (code, text) = run(
        "qemu-img",
        &[
            OsStr::new("check"),
            OsStr::new("-f"),
            OsStr::new("qcow2"),
            path.as_os_str(),
        ],
    );
    match code {
        0 => Ok(()),
        3 if allowed == Allowed::Leaks => Ok(()),
        _ => Err(format!("qemu-img check: exit code {code}: {text}")),
    }
}

/// A file's contents as storage in memory.
pub fn load(path: &Path) -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::new(
        std::fs::read(path).expect("the image exists"),
    ))
}

/// Opens a chain of images in memory, the base (raw) first; `cache` bounds their metadata caches, in bytes.
pub fn open_chain(layers: &[Arc<dyn Storage>], raw_base: bool, cache: Option<u64>) -> Arc<Qcow2> {
    let open = |storage: &Arc<dyn Storage>, backing, access| {
        let opened =
            block_on(Qcow2::open(Arc::clone(storage), backing, access)).expect("the image opens");
        if let Some(bytes) = cache {
            opened.set_metadata_cache(bytes);
        }
        Arc::new(opened)
    };
    let (top, below) = layers.split_last().expect("a chain has a layer");
    let mut backing: Option<Arc<dyn Image>> = None;
    for (depth, storage) in below.iter().enumerate() {
        backing = Some(if depth == 0 && raw_base {
            Arc::new(RawImage::new(Arc::clone(storage), Access::ReadOnly))
        } else {
            open(storage, backing, Access::ReadOnly)
        });
    }
    open(top, backing, Access::ReadWrite)
}

/// A storage whose operations let others go first, now and then, before and after.
pub struct Yielding {
    inner: Arc<dyn Storage>,
    state: AtomicU64,
}

impl Yielding {
    pub fn new(inner: Arc<dyn Storage>, seed: u64) -> Self {
        Self {
            inner,
            state: AtomicU64::new(seed | 1),
        }
    }

    /// Waits 0 to 3 turns.
    fn pause(&self) -> impl Future<Output = ()> + use<> {
        let mut state = self.state.load(Ordering::Relaxed);
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.state.store(state, Ordering::Relaxed);
        let mut turns = state >> 40 & 3;
        std::future::poll_fn(move |context| {
            if turns == 0 {
                return Poll::Ready(());
            }
            turns -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }

    fn around<'a>(
        &'a self,
        operation: impl FnOnce(&'a dyn Storage) -> IoFuture<'a> + 'a,
    ) -> IoFuture<'a> {
        IoFuture::boxed(async move {
            self.pause().await;
            let result = operation(self.inner.as_ref()).await;
            self.pause().await;
            result
        })
    }
}

impl Storage for Yielding {
    fn readv(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.around(move |inner| inner.readv(at, buf))
    }

    fn writev(&self, at: HostOffset, buf: IoBuf) -> IoFuture<'_> {
        self.around(move |inner| inner.writev(at, buf))
    }

    fn flush(&self) -> IoFuture<'_> {
        self.around(|inner| inner.flush())
    }

    fn discard(&self, at: HostOffset, len: u64) -> IoFuture<'_> {
        // What is discarded reads as anything: make it something that shows.
        self.around(move |inner| {
            let len = inner.len().min(at.0 + len).saturating_sub(at.0);
            inner.writev(
                at,
                IoBuf::from_bytes(&vec![0xdb; usize::try_from(len).expect("small")]),
            )
        })
    }

    fn write_zeroes(&self, at: HostOffset, len: u64, mode: ZeroMode) -> IoFuture<'_> {
        self.around(move |inner| inner.write_zeroes(at, len, mode))
    }

    fn set_len(&self, len: u64) -> IoFuture<'_> {
        self.around(move |inner| inner.set_len(len))
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn alignment(&self) -> u32 {
        self.inner.alignment()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

/// Runs futures on this thread to their end, polling a random one each time.
pub fn run_interleaved<'a, T>(
    rng: &mut StdRng,
    futures: Vec<Pin<Box<dyn Future<Output = T> + 'a>>>,
) -> Vec<T> {
    let mut context = Context::from_waker(Waker::noop());
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    let mut running: Vec<_> = futures.into_iter().enumerate().collect();
    let mut polls = 0u64;
    while !running.is_empty() {
        let pick = rng.random_range(0..running.len());
        if let Poll::Ready(result) = running[pick].1.as_mut().poll(&mut context) {
            let (number, _) = running.swap_remove(pick);
            results[number] = Some(result);
        }
        polls += 1;
        assert!(polls < 10_000_000, "futures wait for one another");
    }
    results
        .into_iter()
        .map(|result| result.expect("it has run"))
        .collect()
}

/// A source of randomness for a seed.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// A way to make the top image of a chain.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Options for `qemu-img create -o`.
    pub options: &'static str,
    /// The size of the disk in bytes.
    pub size: u64,
    /// qcow2 layers below the top; a raw base is at the bottom of all chains but those without backing.
    pub backing: Backing,
}

/// What an image's unallocated clusters read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    None,
    Raw,
    Qcow2OnRaw,
    /// A raw file shorter than the disk.
    ShortRaw,
    /// A raw file longer than the disk.
    LongRaw,
}

/// A chain of images in a directory, and the bytes that its disk holds.
pub struct Chain {
    pub directory: tempfile::TempDir,
    pub layers: Vec<Arc<MemoryStorage>>,
    pub raw_base: bool,
    pub flat: Vec<u8>,
}

impl Chain {
    /// Makes the images with `qemu-img`; the base has random bytes in places.
    pub fn create(shape: &Shape, rng: &mut StdRng) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let size = usize::try_from(shape.size).expect("small");
        let base_len = match shape.backing {
            Backing::None => 0,
            Backing::ShortRaw => size / 2 / 512 * 512,
            Backing::LongRaw => size + (64 << 10),
            Backing::Raw | Backing::Qcow2OnRaw => size,
        };
        let mut base = vec![0u8; base_len];
        for _ in 0..8.min(base_len) {
            let len = rng.random_range(0..base_len / 4);
            let start = rng.random_range(0..base_len - len);
            rng.fill(&mut base[start..start + len]);
        }
        let mut flat = base.clone();
        flat.resize(size, 0);
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("base.raw"), &base).expect("writable");
        let size = shape.size.to_string();
        let create = |name: &str, options: &str, backing: Option<(&str, &str)>| {
            let mut arguments = vec![
                "create".to_owned(),
                "-q".into(),
                "-f".into(),
                "qcow2".into(),
            ];
            if !options.is_empty() {
                arguments.extend(["-o".into(), options.into()]);
            }
            if let Some((file, format)) = backing {
                arguments.extend(["-b".into(), file.into(), "-F".into(), format.into()]);
            }
            arguments.extend([path(name).display().to_string(), size.clone()]);
            qemu_img(&arguments);
        };
        let mut names: Vec<PathBuf> = Vec::new();
        match shape.backing {
            Backing::None => create("top.qcow2", shape.options, None),
            Backing::Qcow2OnRaw => {
                create("mid.qcow2", "", Some(("base.raw", "raw")));
                create("top.qcow2", shape.options, Some(("mid.qcow2", "qcow2")));
                names.extend([path("base.raw"), path("mid.qcow2")]);
            }
            _ => {
                create("top.qcow2", shape.options, Some(("base.raw", "raw")));
                names.push(path("base.raw"));
            }
        }
        names.push(path("top.qcow2"));
        let layers: Vec<_> = names.iter().map(|name| load(name)).collect();
        Self {
            layers,
            raw_base: shape.backing != Backing::None,
            directory,
            flat,
        }
    }

    /// Opens the chain; every layer's operations let others go first. For odd seeds, metadata caches are tiny.
    pub fn open_yielding(&self, seed: u64) -> Arc<Qcow2> {
        let layers: Vec<Arc<dyn Storage>> = self
            .layers
            .iter()
            .map(|layer| {
                Arc::new(Yielding::new(Arc::clone(layer) as Arc<dyn Storage>, seed))
                    as Arc<dyn Storage>
            })
            .collect();
        open_chain(&layers, self.raw_base, (seed % 2 == 1).then_some(0))
    }

    /// The layers below the top, opened.
    pub fn open_backing(&self) -> Option<Arc<dyn Image>> {
        let below: Vec<Arc<dyn Storage>> = self.layers[..self.layers.len() - 1]
            .iter()
            .map(|layer| Arc::clone(layer) as Arc<dyn Storage>)
            .collect();
        (!below.is_empty()).then(|| {
            let mut image: Arc<dyn Image> =
                Arc::new(RawImage::new(Arc::clone(&below[0]), Access::ReadOnly));
            for storage in &below[1..] {
                image = Arc::new(
                    block_on(Qcow2::open(
                        Arc::clone(storage),
                        Some(image),
                        Access::ReadOnly,
                    ))
                    .expect("it opens"),
                );
            }
            image
        })
    }

    /// The top image's storage.
    pub fn top(&self) -> &Arc<MemoryStorage> {
        self.layers.last().expect("a chain has a layer")
    }

    /// Writes `bytes` as the top image, and returns its path.
    pub fn save_top(&self, bytes: &[u8]) -> PathBuf {
        let path = self.directory.path().join("top.qcow2");
        std::fs::write(&path, bytes).expect("writable");
        path
    }

    /// Has the stock tools judge the top image: sound, and holding the bytes of `flat`.
    pub fn judge(&self, allowed: Allowed) -> Result<(), String> {
        let top = self.save_top(&self.top().contents());
        check(&top, allowed)?;
        let flat = self.directory.path().join("flat.raw");
        std::fs::write(&flat, &self.flat).expect("writable");
        let arguments = ["compare", "-f", "qcow2", "-F", "raw"].map(OsStr::new);
        let (code, text) = run(
            "qemu-img",
            &[&arguments[..], &[top.as_os_str(), flat.as_os_str()]].concat(),
        );
        if code == 0 {
            Ok(())
        } else {
            Err(format!("qemu-img compare: {text}"))
        }
    }
}
