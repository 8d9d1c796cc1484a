//! A base image made by mke2fs, regions in it, and the disks of its VMs; and a kernel that uses such a disk as a
//! guest would, by a loop mount of a copy.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use seethrough::image::{Access, Image, RawImage};
use seethrough::jobs::copy::{Manner, Target, copy};
use seethrough::progress::Progress;
use seethrough::storage::MemoryStorage;
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;
use seethrough::view::View;
use seethrough::view::declaration::{BaseDeclaration, ChildDeclaration, Sharing};
use seethrough::view::merged::Merged;
use seethrough::view::new_child::NewChild;
use seethrough::view::open::{SharedBase, child_territory, open_base, open_child};
use seethrough::view::prepare::{Groups, Preparation, Request, Reserve};
use seethrough::view::probe::{Probe, locate};
use tempfile::TempDir;

use crate::overlay::TestOverlay;

/// How a base is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    pub(crate) mke2fs: &'static [&'static str],
    pub(crate) megabytes: u64,
    pub(crate) groups: &'static str,
    /// Where the filesystem starts on the disk, in bytes.
    pub(crate) start: u64,
}

/// A base whose regions are declared.
pub(crate) struct Bed {
    pub(crate) dir: TempDir,
    pub(crate) storage: Arc<MemoryStorage>,
    pub(crate) base: Arc<dyn Image>,
    pub(crate) declaration: BaseDeclaration,
    pub(crate) start: u64,
    shared: OnceLock<SharedBase>,
}

/// A child and its overlay.
pub(crate) struct Child {
    pub(crate) overlay: Arc<TestOverlay>,
    pub(crate) declaration: ChildDeclaration,
    pub(crate) view: View,
}

/// Runs a program that is expected to succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let (code, text) = try_run(program, arguments);
    assert_eq!(code, Some(0), "{program} {arguments:?}:\n{text}");
    text
}

pub(crate) fn try_run(program: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let path = format!(
        "/usr/sbin:/sbin:{}",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output.status.code(), text)
}

/// What is put into every base before it is prepared: files, a directory, a symbolic link, a device, and extended
/// attributes that do not fit an inode.
fn populate(image: &Path) {
    let script = image.with_extension("debugfs");
    let data = image.with_extension("data");
    fs::write(&data, b"what the base holds\n".repeat(500)).unwrap();
    let attribute = image.with_extension("attribute");
    fs::write(&attribute, [b'a'; 600]).unwrap();
    fs::write(
        &script,
        format!(
            "mkdir usr\nmkdir usr/share\nwrite {data} usr/share/file\nwrite {data} top\n\
             symlink link usr/share/file\nmknod null c 1 3\nea_set -f {attribute} top user.large\n",
            data = data.display(),
            attribute = attribute.display()
        ),
    )
    .unwrap();
    run(
        "debugfs",
        &[
            "-w",
            "-f",
            script.to_str().unwrap(),
            image.to_str().unwrap(),
        ],
    );
}

/// A base made by `recipe`, not prepared yet.
pub(crate) fn make_disk(recipe: &Recipe) -> (TempDir, Arc<MemoryStorage>, Arc<dyn Image>) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("fs.img");
    let file = File::create(&path).unwrap();
    file.set_len(recipe.megabytes << 20).unwrap();
    let mut arguments = vec!["-q", "-F"];
    arguments.extend(recipe.mke2fs);
    arguments.push(path.to_str().unwrap());
    run("mke2fs", &arguments);
    populate(&path);
    assert_clean(&path);
    let start = usize::try_from(recipe.start).unwrap();
    let mut bytes = vec![0; start];
    File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
    let storage = Arc::new(MemoryStorage::new(bytes));
    let base: Arc<dyn Image> = Arc::new(RawImage::new(storage.clone(), Access::ReadWrite));
    (dir, storage, base)
}

pub(crate) fn local(groups: &str) -> Request {
    region("local", groups, Sharing::Private)
}

/// A region whose directory is called as it is.
pub(crate) fn region(name: &str, groups: &str, sharing: Sharing) -> Request {
    Request {
        name: name.into(),
        sharing,
        reserve: Reserve::Groups {
            groups: Groups::Listed(groups.parse().unwrap()),
            directory: format!("/{name}"),
        },
    }
}

pub(crate) const ID: &str = "00112233445566778899aabbccddeeff";

impl Bed {
    /// A base with one region, `local`.
    pub(crate) fn new(recipe: &Recipe) -> Self {
        Self::with_regions(recipe, &[local(recipe.groups)])
    }

    /// A base with regions.
    pub(crate) fn with_regions(recipe: &Recipe, regions: &[Request]) -> Self {
        let (dir, storage, base) = make_disk(recipe);
        let preparation = block_on(Preparation::plan(
            &*base,
            None,
            ID.into(),
            regions,
            (recipe.start != 0).then_some(1),
        ))
        .unwrap();
        block_on(preparation.apply(&*base)).unwrap();
        let bed = Self {
            dir,
            storage,
            base,
            declaration: preparation.declaration().clone(),
            start: recipe.start,
            shared: OnceLock::new(),
        };
        bed.assert_base_clean();
        bed
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The filesystem's bytes on the stored base.
    pub(crate) fn stored(&self) -> Vec<u8> {
        self.storage.contents()[usize::try_from(self.start).unwrap()..].to_vec()
    }

    pub(crate) fn assert_base_clean(&self) {
        let path = self.path("base.check");
        fs::write(&path, self.stored()).unwrap();
        assert_clean(&path);
    }

    /// What is where in the filesystem.
    pub(crate) fn probe(&self) -> Probe {
        let place = block_on(locate(&*self.base, None)).unwrap();
        block_on(Probe::read(&*self.base, place)).unwrap()
    }

    pub(crate) fn base_view(&self) -> View {
        block_on(open_base("base", self.shared())).unwrap()
    }

    /// The bed after the base was made to declare something else.
    pub(crate) fn declaring(self, declaration: BaseDeclaration) -> Self {
        Self {
            declaration,
            shared: OnceLock::new(),
            ..self
        }
    }

    /// What all views of this base share.
    pub(crate) fn shared(&self) -> &SharedBase {
        self.shared.get_or_init(|| self.share(self.base.clone()))
    }

    /// A base that is stored in `disk` instead.
    pub(crate) fn share(&self, disk: Arc<dyn Image>) -> SharedBase {
        block_on(SharedBase::open(disk, self.declaration.clone())).unwrap()
    }

    pub(crate) fn child(&self, name: &str) -> Child {
        let (overlay, declaration) = self.new_child(&["local"]);
        let view = self.open_child(name, &overlay, &declaration);
        Child {
            overlay,
            declaration,
            view,
        }
    }

    /// A fresh overlay that owns these regions.
    pub(crate) fn new_child(&self, regions: &[&str]) -> (Arc<TestOverlay>, ChildDeclaration) {
        let names: Vec<String> = regions.iter().map(|name| (*name).to_owned()).collect();
        let new = block_on(NewChild::plan(&*self.base, &self.declaration, &names)).unwrap();
        let overlay = Arc::new(TestOverlay::new(self.base.clone(), new.subcluster_size));
        block_on(new.write_to(&*overlay)).unwrap();
        (overlay, new.declaration)
    }

    pub(crate) fn open_child(
        &self,
        name: &str,
        overlay: &Arc<TestOverlay>,
        declaration: &ChildDeclaration,
    ) -> View {
        block_on(open_child(
            name,
            overlay.clone(),
            declaration,
            self.shared(),
        ))
        .unwrap()
    }

    /// The child's disk as a standalone image, which e2fsck must find clean.
    pub(crate) fn assert_flattened_clean(&self, child: &Child) -> PathBuf {
        let territory = block_on(child_territory(
            &*self.base,
            &self.declaration,
            &child.declaration,
        ))
        .unwrap();
        let merged = block_on(Merged::open(
            child.overlay.clone(),
            self.base.clone(),
            territory,
        ))
        .unwrap();
        let len = usize::try_from(merged.virtual_size()).unwrap();
        let storage = Arc::new(MemoryStorage::new(vec![0; len]));
        let out = RawImage::new(storage.clone(), Access::ReadWrite);
        copy(
            &merged,
            &Target::Plain(&out),
            Manner::new(),
            &Progress::default(),
        )
        .unwrap();
        let path = self.path("flattened");
        let start = usize::try_from(self.start).unwrap();
        fs::write(&path, &storage.contents()[start..]).unwrap();
        assert_clean(&path);
        path
    }
}

/// `e2fsck -fn` has nothing to say.
pub(crate) fn assert_clean(path: &Path) {
    let (code, text) = try_run("e2fsck", &["-fn", path.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{text}");
    assert!(
        !text.contains("WARNING") && !text.contains("Fix?"),
        "{text}"
    );
}

/// The bytes of a disk, read in requests that are no multiple of anything.
pub(crate) fn dump(image: &dyn Image) -> Vec<u8> {
    const REQUEST: u64 = (256 << 10) + 512;
    let size = image.virtual_size();
    let mut bytes = Vec::new();
    let mut at = 0;
    while at < size {
        let len = REQUEST.min(size - at);
        let buf = IoBuf::zeroed(usize::try_from(len).unwrap());
        block_on(image.read(GuestOffset(at), buf.clone())).unwrap();
        bytes.extend(buf.to_vec());
        at += len;
    }
    bytes
}

/// A guest's kernel for one disk: what it reads is a copy of the disk, and what it has changed is written to the
/// disk when it unmounts.
pub(crate) struct Kernel<'a> {
    image: &'a dyn Image,
    start: u64,
    before: Vec<u8>,
    copy: PathBuf,
    pub(crate) mount: PathBuf,
}

/// Whether this machine can mount; a machine that runs the gate has to.
pub(crate) fn can_mount() -> bool {
    let root = run("id", &["-u"]).trim() == "0";
    let loops = Path::new("/dev/loop-control").exists();
    if !(root && loops) {
        crate::skip::skip("no loop mounts here", crate::skip::IN_CI);
    }
    root && loops
}

impl<'a> Kernel<'a> {
    pub(crate) fn mount(bed: &Bed, image: &'a dyn Image, name: &str, options: &str) -> Self {
        Self::mount_in(bed.dir.path(), bed.start, image, name, options)
    }

    /// As [`Kernel::mount`], with its files in `dir` and the filesystem at `start`.
    pub(crate) fn mount_in(
        dir: &Path,
        start: u64,
        image: &'a dyn Image,
        name: &str,
        options: &str,
    ) -> Self {
        let before = dump(image);
        let copy = dir.join(format!("{name}.disk"));
        fs::write(&copy, &before).unwrap();
        let mount = dir.join(format!("{name}.mnt"));
        fs::create_dir_all(&mount).unwrap();
        let options = format!("loop,offset={start},{options}");
        run(
            "mount",
            &[
                "-t",
                "ext4",
                "-o",
                &options,
                copy.to_str().unwrap(),
                mount.to_str().unwrap(),
            ],
        );
        Self {
            image,
            start,
            before,
            copy,
            mount,
        }
    }

    /// Unmounts, and writes to the disk what has changed, a block at a time.
    pub(crate) fn unmount(mut self) -> Vec<u8> {
        unmount(self.mount.to_str().unwrap(), &self.copy);
        let changed = self.changes();
        self.write(&changed);
        self.before
    }

    /// Unmounts, and returns what has changed, which is not written to the disk.
    pub(crate) fn unmount_unwritten(mut self) -> Vec<Changed> {
        unmount(self.mount.to_str().unwrap(), &self.copy);
        self.changes()
    }

    /// The same kernel while nobody serves its disk.
    pub(crate) fn disconnected(self) -> Disconnected {
        Disconnected {
            start: self.start,
            before: self.before,
            copy: self.copy,
            mount: self.mount,
        }
    }

    /// The disk as the kernel saw it when it looked last.
    pub(crate) fn seen(&self) -> &[u8] {
        &self.before
    }

    /// Has the kernel commit, and writes to the disk what has changed so far, in the order that `sort` gives it.
    pub(crate) fn commit(&mut self, sort: impl FnOnce(&mut [Changed])) -> Vec<u8> {
        self.commit_unwritten();
        self.deliver(sort)
    }

    /// Writes to the disk what the kernel has written so far, in the order that `sort` gives it.
    pub(crate) fn deliver(&mut self, sort: impl FnOnce(&mut [Changed])) -> Vec<u8> {
        let mut changed = self.changes();
        sort(&mut changed);
        self.write(&changed);
        self.before.clone()
    }

    /// Has the kernel commit; what it has changed is written to the disk later.
    pub(crate) fn commit_unwritten(&self) {
        // A sync of the whole filesystem would bring everything to its place, too.
        let file = File::create(self.mount.join("marker")).unwrap();
        file.sync_all().unwrap();
    }

    /// Has the kernel commit what lies below a directory of the mount; nothing is brought to its place.
    pub(crate) fn commit_in(&self, directory: &Path) {
        let file = File::create(directory.join("marker")).unwrap();
        file.sync_all().unwrap();
    }

    /// Writes to the disk what has changed so far.
    pub(crate) fn write_so_far(&mut self) {
        let changed = self.changes();
        self.write(&changed);
    }

    /// The blocks that have changed since this was asked last.
    fn changes(&mut self) -> Vec<Changed> {
        let after = self.settled();
        let block = block_size(&after, self.start);
        let pairs = self.before.chunks(block).zip(after.chunks(block));
        let changed = pairs
            .enumerate()
            .filter(|(_, (old, new))| old != new)
            .map(|(index, (_, new))| Changed {
                at: (index * block) as u64,
                bytes: new.to_vec(),
            })
            .collect();
        self.before = after;
        changed
    }

    /// The disk as it is at one moment: a kernel that has it mounted may be writing still.
    fn settled(&self) -> Vec<u8> {
        let mut disk = fs::read(&self.copy).unwrap();
        loop {
            let again = fs::read(&self.copy).unwrap();
            if again == disk {
                return disk;
            }
            disk = again;
        }
    }

    fn write(&self, changed: &[Changed]) {
        for Changed { at, bytes } in changed {
            block_on(self.image.write(GuestOffset(*at), IoBuf::from_bytes(bytes))).unwrap();
        }
        block_on(self.image.flush()).unwrap();
    }
}

/// A kernel whose disk is not served.
pub(crate) struct Disconnected {
    start: u64,
    before: Vec<u8>,
    copy: PathBuf,
    mount: PathBuf,
}

impl Disconnected {
    /// The kernel, once its disk is served as `image`.
    pub(crate) fn reconnected(self, image: &dyn Image) -> Kernel<'_> {
        Kernel {
            image,
            start: self.start,
            before: self.before,
            copy: self.copy,
            mount: self.mount,
        }
    }
}

/// A block that a kernel has changed.
pub(crate) struct Changed {
    /// Its offset on the disk.
    pub(crate) at: u64,
    /// What it holds now.
    pub(crate) bytes: Vec<u8>,
}

/// Unmounts. A program that another test is just starting has this process's files open until it runs, those below the
/// mount among them, so the kernel may call the mount busy for a moment: as often as that, it is asked again. For the
/// same reason the filesystem may be in use for a moment longer than it is mounted: its loop device goes last.
fn unmount(mount: &str, disk: &Path) {
    const TRIES: usize = 1000;
    let is_unmounted = || match try_run("umount", &[mount]) {
        (Some(0), _) => true,
        (_, text) => {
            assert!(text.contains("busy"), "umount {mount}:\n{text}");
            false
        }
    };
    let is_idle = || run("losetup", &["-j", disk.to_str().unwrap()]).is_empty();
    assert!((0..TRIES).any(|_| is_unmounted()), "{mount} is busy");
    assert!(
        (0..TRIES).any(|_| is_idle()),
        "{} is in use",
        disk.display()
    );
}

/// The filesystem's block size.
pub(crate) fn block_size(disk: &[u8], start: u64) -> usize {
    let at = usize::try_from(start).unwrap() + 1024 + 0x18;
    1024 << u32::from_le_bytes(disk[at..at + 4].try_into().unwrap())
}
