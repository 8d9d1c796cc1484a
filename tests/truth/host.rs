//! The host of a base and its children: their images, made by the program itself, and the daemon that serves them,
//! in this process.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::chain::format::Format;
use seethrough::chain::host::HostOptions;
use seethrough::chain::registry::{DiskRequest, OpenImage, Registry};
use seethrough::image::Access;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;
use seethrough::view::View;
use seethrough::view::declaration::Sharing;
use seethrough::view::declared::{Declared, Views, merged_of};
use seethrough::view::group_map::GroupMap;
use seethrough::view::refresh::Policy;
use seethrough::view::room::Room;

use crate::engine::{Allowed, check, run};

/// How a base is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    pub(crate) mke2fs: &'static [&'static str],
    pub(crate) megabytes: u64,
    /// The groups of region `one`, and of region `two`.
    pub(crate) regions: [&'static str; 2],
    pub(crate) format: Format,
    /// Whether a VM may lose its power: without a journal nothing is promised then.
    pub(crate) has_journal: bool,
    pub(crate) sharing: Sharing,
    pub(crate) place: Place,
}

/// Where the filesystem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    WholeDisk,
    /// In the first of two partitions.
    Partition,
}

impl Recipe {
    /// The filesystem's first byte, and the disk's length.
    fn start(&self) -> u64 {
        match self.place {
            Place::WholeDisk => 0,
            Place::Partition => 1 << 20,
        }
    }

    /// Bytes of the filesystem.
    fn len(&self) -> u64 {
        self.megabytes << 20
    }

    /// Bytes of the disk.
    pub(crate) fn disk_len(&self) -> u64 {
        match self.place {
            Place::WholeDisk => self.len(),
            Place::Partition => self.start() + self.len() + (2 << 20),
        }
    }

    /// Bytes of the longest disk that a VM may have.
    pub(crate) fn longest_disk_len(&self) -> u64 {
        self.disk_len() + if self.may_grow() { MAX_GROWN } else { 0 }
    }

    /// Whether children may have block groups behind the end of the base's filesystem.
    pub(crate) fn may_grow(&self) -> bool {
        self.place == Place::WholeDisk && self.sharing == Sharing::Private
    }

    /// How a loop device finds the filesystem on the base's disk.
    pub(crate) fn loop_options(&self) -> String {
        self.loop_options_of(self.len())
    }

    fn loop_options_of(&self, len: u64) -> String {
        format!("loop,offset={},sizelimit={len}", self.start())
    }
}

/// How much a child has besides its regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extra {
    /// Nothing.
    None,
    /// Some block groups behind the end of the base's filesystem.
    Grown,
}

/// What children that have it are given, and what it becomes at most in whole groups.
const GROWN: &str = "--grow 9M";
const MAX_GROWN: u64 = 16 << 20;

/// The regions' names, and their directories.
pub(crate) const REGIONS: [&str; 2] = ["one", "two"];

/// Files by name, as they were made once.
type Files = Arc<Vec<(String, Vec<u8>)>>;

static TEMPLATES: Mutex<Option<HashMap<&'static str, Files>>> = Mutex::new(None);

/// Runs a program that is expected to succeed.
pub(crate) fn succeed<S: AsRef<OsStr> + std::fmt::Debug>(program: &str, arguments: &[S]) -> String {
    let (code, text) = run(program, arguments);
    assert_eq!(code, 0, "{program} {arguments:?}:\n{text}");
    text
}

/// Runs the program; what it says if it fails.
fn seethrough(directory: &Path, line: &str) -> Result<(), String> {
    let output = Command::new(env!("CARGO_BIN_EXE_seethrough"))
        .args(line.split_whitespace())
        .current_dir(directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(());
    }
    Err(format!("seethrough {line}:\n{text}"))
}

/// A child's image.
pub(crate) struct Child {
    name: String,
    /// Bytes of its filesystem.
    len: u64,
    pub(crate) regions: Vec<&'static str>,
    /// When it sees what its base has written.
    pub(crate) policy: Policy,
    /// Whether the daemon serves it. Of those that own the same shared region one can be served at a time.
    pub(crate) is_served: bool,
}

/// The host's directory of images.
pub(crate) struct Host {
    directory: PathBuf,
    recipe: Recipe,
    children: Vec<Child>,
}

impl Host {
    /// A base made by `recipe`, with its regions declared, in `directory`.
    pub(crate) fn new(directory: &Path, recipe: Recipe) -> Self {
        let mut templates = TEMPLATES
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let templates = templates.get_or_insert_default();
        let files = templates
            .entry(recipe.name)
            .or_insert_with(|| make_base(directory, recipe));
        for (name, bytes) in files.iter() {
            fs::write(directory.join(name), bytes).unwrap();
        }
        Self {
            directory: directory.to_owned(),
            recipe,
            children: Vec::new(),
        }
    }

    /// Makes a child that owns `regions`; the daemon may run.
    pub(crate) fn create_child(
        &mut self,
        regions: &[&'static str],
        policy: Policy,
        room: Extra,
    ) -> usize {
        let name = format!("child{}", self.children.len());
        let mut options: String = regions
            .iter()
            .map(|region| format!("--region {region} "))
            .collect();
        if room == Extra::Grown {
            options += GROWN;
        }
        let (base, format) = (self.base(), self.recipe.format.name());
        let line = format!("create -b {base} -F {format} {options} {name}.qcow2");
        seethrough(&self.directory, &line).unwrap();
        let len = match room {
            Extra::None => self.recipe.len(),
            Extra::Grown => {
                let image = fs::read(self.directory.join(format!("{name}.qcow2"))).unwrap();
                u64::from_be_bytes(image[24..32].try_into().unwrap())
            }
        };
        self.children.push(Child {
            name,
            len,
            regions: regions.to_vec(),
            policy,
            is_served: true,
        });
        self.children.len()
    }

    /// The child of VM `vm`, which is not the base's.
    pub(crate) fn child(&mut self, vm: usize) -> &mut Child {
        &mut self.children[vm - 1]
    }

    /// How a loop device finds the filesystem on the disk of VM `vm`, which is not the base's.
    pub(crate) fn loop_options(&self, vm: usize) -> String {
        self.recipe.loop_options_of(self.children[vm - 1].len)
    }

    /// Whether the daemon serves VM `vm`.
    pub(crate) fn serves(&self, vm: usize) -> bool {
        vm == 0 || self.children[vm - 1].is_served
    }

    /// Gives a region one more group, if one is to be had; the daemon must not run. Whether it was.
    pub(crate) fn enlarge(&self, region: &str) -> bool {
        let (base, format) = (self.base(), self.recipe.format.name());
        let line = format!("prepare --enlarge {region} --size 1M -f {format} {base}");
        match seethrough(&self.directory, &line) {
            Ok(()) => true,
            Err(text) => {
                assert!(text.contains("in block groups that hold nothing"), "{text}");
                false
            }
        }
    }

    /// Lets the child of VM `vm` take over what its regions have got; the daemon must not run.
    pub(crate) fn adopt(&self, vm: usize) {
        let name = &self.children[vm - 1].name;
        seethrough(&self.directory, &format!("prepare --adopt {name}.qcow2")).unwrap();
    }

    fn base(&self) -> String {
        format!("base.{}", self.recipe.format.name())
    }

    fn request(&self, name: &str, format: Format, access: Access) -> DiskRequest {
        DiskRequest {
            path: self.directory.join(name),
            format: Some(format),
            access,
        }
    }

    /// How full every image is, and who has what in it, as the tools tell; the base's first.
    pub(crate) fn rooms(&self) -> Vec<(Room, GroupMap)> {
        let disks = self.open(Access::ReadOnly, &Vec::from_iter(&self.children));
        let look = |disk: &OpenImage| {
            let declared = Declared::of(disk).unwrap().unwrap();
            let room = block_on(declared.room()).unwrap();
            (room, block_on(declared.group_map()).unwrap())
        };
        disks.iter().map(look).collect()
    }

    fn open(&self, access: Access, children: &[&Child]) -> Vec<OpenImage> {
        let mut requests = vec![self.request(&self.base(), self.recipe.format, access)];
        for child in children {
            let image = format!("{}.qcow2", child.name);
            requests.push(self.request(&image, Format::Qcow2, access));
        }
        let registry = Registry::new(HostOptions::default());
        let pinned = |child: &&Child| child.policy != Policy::Live;
        if access == Access::ReadWrite && children.iter().any(pinned) {
            registry.expect_snapshots(&requests[0].path).unwrap();
        }
        block_on(registry.open_family(&requests)).unwrap()
    }

    /// Starts the daemon: what each VM is served that is, the base's first.
    pub(crate) fn serve(&self) -> Vec<Option<Arc<View>>> {
        let mut family = Views::default();
        let served: Vec<&Child> = self.children.iter().filter(|one| one.is_served).collect();
        let policies = served.iter().map(|child| child.policy);
        let policies = [Policy::Live].into_iter().chain(policies);
        let opened = self.open(Access::ReadWrite, &served);
        let mut views = opened.iter().zip(policies).map(|(disk, policy)| {
            let served = block_on(family.view_of("vm", disk, policy)).unwrap();
            served.view().map(Arc::clone)
        });
        (0..=self.children.len())
            .map(|vm| {
                if self.serves(vm) {
                    views.next().flatten()
                } else {
                    None
                }
            })
            .collect()
    }

    /// Holds every image to the stock tools, none of which has anything to say; the daemon must not run. Returns the
    /// filesystems of the base alone, and of the children merged with it.
    pub(crate) fn assert_true(&self) -> Vec<PathBuf> {
        let disks = self.open(Access::ReadOnly, &Vec::from_iter(&self.children));
        let mut filesystems = vec![self.directory.join("true.base")];
        let base = &disks[0].image;
        let bytes = dump(self.recipe.len(), &self.recipe, |at, buf| {
            block_on(base.read(at, buf)).unwrap();
        });
        fs::write(&filesystems[0], bytes).unwrap();
        for (disk, child) in disks[1..].iter().zip(&self.children) {
            let disk_of_child = block_on(merged_of(disk)).unwrap();
            let path = self.directory.join(format!("true.{}", child.name));
            let bytes = dump(child.len, &self.recipe, |at, buf| {
                block_on(disk_of_child.read(at, buf)).unwrap();
            });
            fs::write(&path, bytes).unwrap();
            filesystems.push(path);
        }
        filesystems.iter().for_each(|path| assert_clean(path));
        drop(disks);
        let children = self
            .children
            .iter()
            .map(|child| format!("{}.qcow2", child.name));
        let base = (self.recipe.format == Format::Qcow2).then(|| self.base());
        for name in children.chain(base) {
            check(&self.directory.join(&name), Allowed::Nothing)
                .unwrap_or_else(|text| panic!("{name}: {text}"));
        }
        filesystems
    }
}

/// Makes a base in `directory`, which is the template from then on.
fn make_base(directory: &Path, recipe: Recipe) -> Files {
    let raw = directory.join("base.raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(recipe.disk_len()).unwrap();
    let path = raw.to_str().unwrap();
    if recipe.place == Place::Partition {
        let (start, len) = (recipe.start() >> 9, recipe.len() >> 9);
        let script = directory.join("script");
        fs::write(&script, format!("{start},{len}\n,2048\n")).unwrap();
        let mut sfdisk = Command::new("/sbin/sfdisk");
        sfdisk
            .args(["-q", path])
            .stdin(fs::File::open(&script).unwrap());
        assert!(sfdisk.status().unwrap().success());
    }
    let extended = format!("lazy_itable_init=1,nodiscard,offset={}", recipe.start());
    let (options, size) = (
        ["-q", "-F", "-E", &extended],
        format!("{}M", recipe.megabytes),
    );
    succeed(
        "mke2fs",
        &[&options[..], recipe.mke2fs, &[path, &size]].concat(),
    );
    let mut name = "base.raw".to_owned();
    if recipe.format == Format::Qcow2 {
        name = "base.qcow2".to_owned();
        let qcow2 = directory.join(&name);
        succeed(
            "qemu-img",
            &["convert", "-O", "qcow2", path, qcow2.to_str().unwrap()],
        );
        fs::remove_file(&raw).unwrap();
    }
    let mut reserve: String = REGIONS
        .iter()
        .zip(recipe.regions)
        .map(|(region, groups)| format!("--reserve {region}=groups:{groups} --dir /{region} "))
        .collect();
    if recipe.sharing == Sharing::Shared {
        reserve.extend(REGIONS.map(|region| format!("--shared {region} ")));
    }
    let line = format!("prepare {reserve} -f {} {name}", recipe.format.name());
    seethrough(directory, &line).unwrap();
    let mut files = Vec::new();
    for name in [name.clone(), format!("{name}.seethrough")] {
        if let Ok(bytes) = fs::read(directory.join(&name)) {
            files.push((name, bytes));
        }
    }
    Arc::new(files)
}

/// The bytes of the filesystem on a disk, which has `len` of them.
fn dump(len: u64, recipe: &Recipe, read: impl Fn(GuestOffset, IoBuf)) -> Vec<u8> {
    const CHUNK: u64 = 1 << 20;
    let mut bytes = Vec::new();
    for at in (0..len).step_by(1 << 20) {
        let buf = IoBuf::zeroed(usize::try_from(CHUNK.min(len - at)).unwrap());
        read(GuestOffset(recipe.start() + at), buf.clone());
        bytes.extend(buf.to_vec());
    }
    bytes
}

/// `e2fsck -fn` has nothing to say.
fn assert_clean(path: &Path) {
    let (code, text) = run("e2fsck", &["-fn", path.to_str().unwrap()]);
    assert_eq!(code, 0, "{}: {text}", path.display());
    assert!(
        !text.contains("WARNING") && !text.contains("Fix?"),
        "{text}"
    );
}

/// One or two of the regions.
pub(crate) fn some_regions(rng: &mut StdRng) -> Vec<&'static str> {
    match rng.random_range(0..4) {
        0 => REGIONS.to_vec(),
        _ => vec![REGIONS[rng.random_range(0..REGIONS.len())]],
    }
}

/// When a child sees what its base has written; only a qcow2 base can show anything but the present.
pub(crate) fn some_policy(rng: &mut StdRng, recipe: &Recipe) -> Policy {
    match rng.random_range(0..4) {
        0 if recipe.format == Format::Qcow2 => Policy::OnMount,
        1 if recipe.format == Format::Qcow2 => Policy::Manual,
        _ => Policy::Live,
    }
}
