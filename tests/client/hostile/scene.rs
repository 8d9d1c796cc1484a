//! What is attacked: a base and two children, and the daemon that serves them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use seethrough::image::{Access, Image, RawImage};
use seethrough::storage::MemoryStorage;
use seethrough::sys::block_on;
use seethrough::view::declaration::GroupList;
use seethrough::view::probe::{Probe, locate};
use tempfile::TempDir;

use super::guest::Guest;
use crate::common::Backend;

pub(super) const BASE: &str = "base";
/// The hostile child, in most tests.
pub(super) const TOM: &str = "tom";
/// The other one.
pub(super) const ANN: &str = "ann";

/// How the children own what they own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Regions {
    /// Both own the same groups, each in an overlay.
    Private,
    /// Each owns a group, in the base.
    Shared,
}

impl Regions {
    /// All groups that are the children's.
    pub(super) const ALL: &str = "4-5";

    /// The regions, and their groups.
    fn reserved(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Private => &[("local", Self::ALL)],
            Self::Shared => &[("photos", "4"), ("videos", "5")],
        }
    }

    fn region(self, child: &str) -> (&'static str, &'static str) {
        let all = self.reserved();
        if child == TOM {
            all[0]
        } else {
            all[all.len() - 1]
        }
    }

    /// The region that a child owns.
    fn name(self, child: &str) -> &'static str {
        self.region(child).0
    }

    /// The groups that a child owns.
    pub(super) fn groups(self, child: &str) -> GroupList {
        self.region(child).1.parse().expect("groups")
    }
}

/// Where the filesystem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    WholeDisk,
    /// In the first of two partitions.
    Partition,
}

/// Whether the daemon goes past the host's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direct {
    Yes,
    No,
}

/// What a scene is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) mke2fs: &'static [&'static str],
    pub(super) regions: Regions,
    pub(super) place: Place,
    pub(super) direct: Direct,
}

impl Setup {
    /// Private regions of a filesystem that has the disk for itself.
    pub(super) const USUAL: Self = Self {
        mke2fs: &["-b", "4096", "-g", "2048", "-J", "size=4"],
        regions: Regions::Private,
        place: Place::WholeDisk,
        direct: Direct::No,
    };
}

/// A base and two children, and the daemon that serves them.
pub(super) struct Scene {
    pub(super) setup: Setup,
    dir: TempDir,
    daemon: Option<Backend>,
}

fn run(program: &str, arguments: &[&str], dir: &Path, input: &str) {
    let path = format!(
        "/usr/sbin:/sbin:{}",
        std::env::var("PATH").unwrap_or_default()
    );
    let stdin = dir.join("input");
    fs::write(&stdin, input).expect("a file");
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .env("PATH", path)
        .stdin(fs::File::open(&stdin).expect("a file"))
        .output();
    let output = output.expect("the program starts");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Scene {
    pub(super) fn new(setup: Setup) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let at = dir.path();
        fs::create_dir_all(at.join("root/usr/bin")).expect("a directory");
        for n in 0..40u8 {
            let name = at.join(format!("root/usr/bin/program{n}"));
            fs::write(name, vec![n; 1000 * usize::from(n)]).expect("a file");
        }
        let mut options = vec!["-q", "-t", "ext4", "-d", "root"];
        let file = fs::File::create(at.join("base.raw")).expect("an image");
        if setup.place == Place::Partition {
            file.set_len(56 << 20).expect("an image");
            run("sfdisk", &["-q", "base.raw"], at, "2048,98304\n,4096\n");
            options.extend(["-E", "offset=1048576"]);
        }
        options.extend(setup.mke2fs);
        options.extend(["base.raw", "48M"]);
        run("mke2fs", &options, at, "");
        run(
            "qemu-img",
            &["convert", "-O", "qcow2", "base.raw", "base.qcow2"],
            at,
            "",
        );
        let mut prepare = vec!["prepare".to_owned(), "base.qcow2".to_owned()];
        for (name, groups) in setup.regions.reserved() {
            let reserve = format!("{name}=groups:{groups}");
            prepare.extend(["--reserve", &reserve, "--dir", &format!("/{name}")].map(String::from));
            if setup.regions == Regions::Shared {
                prepare.extend(["--shared", name].map(String::from));
            }
        }
        let prepare: Vec<&str> = prepare.iter().map(String::as_str).collect();
        let program = env!("CARGO_BIN_EXE_seethrough");
        run(program, &prepare, at, "");
        for child in [TOM, ANN] {
            let image = format!("{child}.qcow2");
            let region = setup.regions.name(child);
            run(
                program,
                &["create", "-b", "base.qcow2", "--region", region, &image],
                at,
                "",
            );
        }
        let mut scene = Self {
            setup,
            dir,
            daemon: None,
        };
        scene.serve();
        scene
    }

    fn serve(&mut self) {
        let names = [BASE, TOM, ANN];
        let path = |name: String| self.dir.path().join(name).display().to_string();
        let vms = names.iter().flat_map(|name| {
            let (image, socket) = (path(format!("{name}.qcow2")), path(format!("{name}.sock")));
            [
                "--vm".to_owned(),
                format!("name={name},image={image},socket={socket}"),
            ]
        });
        let cache = if self.setup.direct == Direct::Yes {
            "none"
        } else {
            "writeback"
        };
        let serve = ["serve", "--cache", cache].map(String::from);
        let arguments = serve.into_iter().chain(vms);
        let sockets: Vec<PathBuf> = names.iter().map(|name| self.socket(name)).collect();
        self.daemon = Some(Backend::seethrough(arguments, &sockets));
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }

    pub(super) fn guest(&self, name: &str) -> Guest {
        Guest::connect(&self.socket(name))
    }

    fn daemon(&self) -> &Backend {
        self.daemon.as_ref().expect("it is served")
    }

    /// Ends the daemon, which has to end well; what it logged.
    pub(super) fn stop(&mut self) -> Vec<String> {
        let log = self.daemon.take().expect("it is served").stop();
        assert!(
            !log.iter().any(|line| line.contains("panicked")),
            "{}",
            log.join("\n")
        );
        log
    }

    pub(super) fn file(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir.path().join(name)).expect("an image")
    }

    /// What an image holds, by a program that knows nothing of views.
    pub(super) fn contents(&self, name: &str) -> Vec<u8> {
        let image = format!("{name}.qcow2");
        run(
            "qemu-img",
            &["convert", "-U", "-O", "raw", &image, "contents.raw"],
            self.dir.path(),
            "",
        );
        self.file("contents.raw")
    }

    pub(super) fn check_images(&self) {
        for name in [BASE, TOM, ANN] {
            run(
                "qemu-img",
                &["check", "-q", &format!("{name}.qcow2")],
                self.dir.path(),
                "",
            );
        }
    }

    /// The daemon's resident memory, in bytes.
    pub(super) fn resident(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.daemon().id())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("a line");
        let kib: u64 = line
            .split_whitespace()
            .next()
            .expect("a number")
            .parse()
            .expect("a number");
        kib << 10
    }

    pub(super) fn probe(&self) -> Probe {
        let storage = Arc::new(MemoryStorage::new(self.contents(BASE)));
        let image: Arc<dyn Image> = Arc::new(RawImage::new(storage, Access::ReadOnly));
        let place = block_on(locate(&*image, None)).expect("a filesystem");
        block_on(Probe::read(&*image, place)).expect("a filesystem")
    }
}
