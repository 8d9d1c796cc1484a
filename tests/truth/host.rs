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
use seethrough::image::{Access, Image};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;
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
}

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

fn seethrough(directory: &Path, line: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_seethrough"))
        .args(line.split_whitespace())
        .current_dir(directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "seethrough {line}:\n{text}");
}

/// The host's directory of images.
pub(crate) struct Host {
    directory: PathBuf,
    recipe: Recipe,
    /// The children's names.
    children: Vec<String>,
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
    pub(crate) fn create_child(&mut self, regions: &[&str]) -> usize {
        let name = format!("child{}", self.children.len());
        let regions: String = regions
            .iter()
            .map(|region| format!("--region {region} "))
            .collect();
        let (base, format) = (self.base(), self.recipe.format.name());
        let line = format!("create -b {base} -F {format} {regions} {name}.qcow2");
        seethrough(&self.directory, &line);
        self.children.push(name);
        self.children.len()
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
        let disks = self.open(Access::ReadOnly);
        let look = |disk: &OpenImage| {
            let declared = Declared::of(disk).unwrap().unwrap();
            let room = block_on(declared.room()).unwrap();
            (room, block_on(declared.group_map()).unwrap())
        };
        disks.iter().map(look).collect()
    }

    fn open(&self, access: Access) -> Vec<OpenImage> {
        let mut requests = vec![self.request(&self.base(), self.recipe.format, access)];
        for child in &self.children {
            requests.push(self.request(&format!("{child}.qcow2"), Format::Qcow2, access));
        }
        let registry = Registry::new(HostOptions::default());
        block_on(registry.open_family(&requests)).unwrap()
    }

    /// Starts the daemon: what each VM is served, the base's first.
    pub(crate) fn serve(&self) -> Vec<Arc<dyn Image>> {
        let mut family = Views::default();
        let disks = self.open(Access::ReadWrite);
        let view = |disk: &OpenImage| {
            block_on(family.view_of("vm", disk, Policy::Live))
                .unwrap()
                .image()
        };
        disks.iter().map(view).collect()
    }

    /// Holds every image to the stock tools, none of which has anything to say; the daemon must not run. Returns the
    /// children's disks, merged with their base.
    pub(crate) fn assert_true(&self) -> Vec<PathBuf> {
        let disks = self.open(Access::ReadOnly);
        let base = self.directory.join("true.base");
        fs::write(
            &base,
            dump(
                |at, buf| block_on(disks[0].image.read(at, buf)).unwrap(),
                &disks[0],
            ),
        )
        .unwrap();
        assert_clean(&base);
        let mut merged = Vec::new();
        for (disk, name) in disks[1..].iter().zip(&self.children) {
            let disk_of_child = block_on(merged_of(disk)).unwrap();
            let path = self.directory.join(format!("true.{name}"));
            let bytes = dump(
                |at, buf| block_on(disk_of_child.read(at, buf)).unwrap(),
                disk,
            );
            fs::write(&path, bytes).unwrap();
            assert_clean(&path);
            merged.push(path);
        }
        drop(disks);
        let children = self.children.iter().map(|name| format!("{name}.qcow2"));
        let base = (self.recipe.format == Format::Qcow2).then(|| self.base());
        for name in children.chain(base) {
            check(&self.directory.join(&name), Allowed::Nothing)
                .unwrap_or_else(|text| panic!("{name}: {text}"));
        }
        merged
    }
}

/// Makes a base in `directory`, which is the template from then on.
fn make_base(directory: &Path, recipe: Recipe) -> Files {
    let raw = directory.join("base.raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(recipe.megabytes << 20).unwrap();
    let path = raw.to_str().unwrap();
    let options = ["-q", "-F", "-E", "lazy_itable_init=1,nodiscard"];
    succeed("mke2fs", &[&options[..], recipe.mke2fs, &[path]].concat());
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
    let reserve: String = REGIONS
        .iter()
        .zip(recipe.regions)
        .map(|(region, groups)| format!("--reserve {region}=groups:{groups} --dir /{region} "))
        .collect();
    seethrough(
        directory,
        &format!("prepare {reserve} -f {} {name}", recipe.format.name()),
    );
    let mut files = Vec::new();
    for name in [name.clone(), format!("{name}.seethrough")] {
        if let Ok(bytes) = fs::read(directory.join(&name)) {
            files.push((name, bytes));
        }
    }
    Arc::new(files)
}

/// A disk's bytes.
fn dump(read: impl Fn(GuestOffset, IoBuf), disk: &OpenImage) -> Vec<u8> {
    const CHUNK: u64 = 1 << 20;
    let size = disk.image.virtual_size();
    let mut bytes = Vec::new();
    for at in (0..size).step_by(1 << 20) {
        let buf = IoBuf::zeroed(usize::try_from(CHUNK.min(size - at)).unwrap());
        read(GuestOffset(at), buf.clone());
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
