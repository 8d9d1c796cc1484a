//! A filesystem of one row: a base, a child of it as a qcow2 overlay, and a kernel that uses their disks by loop mounts
//! of what it is served.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use seethrough::chain::host::HostOptions;
use seethrough::chain::registry::{DiskRequest, Registry};
use seethrough::ext4::layout::Kind;
use seethrough::image::{Access, Image};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::{FsBlock, GuestOffset};
use seethrough::view::View;
use seethrough::view::declaration::{BaseDeclaration, Declaration, Extent};
use seethrough::view::declared::declaration_of;
use seethrough::view::open::{SharedBase, open_base, open_child};
use seethrough::view::probe::{Probe, locate};
use tempfile::TempDir;

use crate::rows::{ROWS, Row, Then};

const CHUNK: usize = 1 << 20;

/// A row's images.
pub(crate) struct Bed {
    pub(crate) dir: TempDir,
    pub(crate) row: &'static Row,
}

/// The views of a base and its child, open for writing.
pub(crate) struct Family {
    pub(crate) base: Arc<dyn Image>,
    pub(crate) base_view: View,
    pub(crate) child_view: View,
    /// The child's groups.
    owned: Vec<u32>,
}

impl Bed {
    /// Makes the filesystem, as mke2fs and others would have it.
    pub(crate) fn new(row: &'static Row) -> Self {
        let bed = Self {
            dir: TempDir::new().unwrap(),
            row,
        };
        bed.make_filesystem();
        bed
    }

    /// A filesystem that no view can be made of.
    pub(crate) fn refused(arguments: &[&str]) -> Self {
        let bed = Self {
            dir: TempDir::new().unwrap(),
            row: &ROWS[0],
        };
        let file = File::create(bed.path("fs.raw")).unwrap();
        file.set_len(32 << 20).unwrap();
        let mut words = vec!["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024"];
        words.extend(arguments);
        words.push("fs.raw");
        let (succeeded, text) = bed.try_run(&words);
        assert!(succeeded, "{words:?}:\n{text}");
        bed
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command line in the bed's directory.
    pub(crate) fn try_run(&self, words: &[&str]) -> (bool, String) {
        let program = match words[0] {
            "seethrough" => env!("CARGO_BIN_EXE_seethrough"),
            other => other,
        };
        let path = format!("/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap());
        let output = Command::new(program)
            .args(&words[1..])
            .current_dir(self.dir.path())
            .env("PATH", path)
            .output()
            .unwrap_or_else(|error| panic!("{words:?}: {error}"));
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    pub(crate) fn run(&self, line: &str) -> String {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (succeeded, text) = self.try_run(&words);
        assert!(succeeded, "{}: {line}:\n{text}", self.row.name);
        text
    }

    fn make_filesystem(&self) {
        let row = self.row;
        let file = File::create(self.path("fs.raw")).unwrap();
        file.set_len(row.megabytes << 20).unwrap();
        let mut words = vec!["mke2fs", "-q", "-F"];
        words.extend(row.mke2fs);
        words.push("fs.raw");
        words.extend(row.length);
        let (succeeded, text) = self.try_run(&words);
        assert!(succeeded, "{}: {words:?}:\n{text}", row.name);
        self.populate();
        match row.then {
            Then::Nothing => {}
            Then::Grown(megabytes) => {
                file.set_len(megabytes << 20).unwrap();
                self.run("e2fsck -fp fs.raw");
                self.run("resize2fs fs.raw");
            }
            Then::HalfMetaBg => {
                self.try_run(&[
                    "debugfs",
                    "-w",
                    "-R",
                    "set_super_value first_meta_bg 1",
                    "fs.raw",
                ]);
                self.try_run(&["e2fsck", "-fy", "fs.raw"]);
                assert!(
                    self.run("dumpe2fs -h fs.raw")
                        .contains("First meta block group:   1")
                );
            }
            Then::Used => {
                let mount = Mount::of(&self.path("fs.raw"), &self.path("used"));
                fs::write(mount.at.join("written-by-a-kernel"), [1; 5000]).unwrap();
                drop(mount);
            }
        }
        self.assert_clean("fs.raw");
    }

    /// Files of each kind that a row may hold in a way of its own.
    fn populate(&self) {
        let attribute = self.path("attribute");
        // Larger than a block it has an inode of its own, where there is such a thing.
        let len = if self.row.mke2fs.contains(&"ea_inode") {
            3000
        } else {
            700
        };
        fs::write(&attribute, vec![b'a'; len]).unwrap();
        fs::write(self.path("data"), b"what the base holds\n".repeat(500)).unwrap();
        fs::write(self.path("small"), b"a few bytes").unwrap();
        let script = "mkdir usr\nmkdir usr/share\nmkdir usr/empty\nwrite data usr/share/file\nwrite data top\n\
                      write small usr/small\nsymlink link usr/share/file\nmknod null c 1 3\n\
                      ea_set -f attribute top user.large\n";
        fs::write(self.path("script"), script).unwrap();
        self.run("debugfs -w -f script fs.raw");
        if self.row.mke2fs.contains(&"ea_inode") {
            // debugfs forgets such an inode's blocks in the count of its file.
            self.try_run(&["e2fsck", "-fy", "fs.raw"]);
        }
    }

    pub(crate) fn assert_clean(&self, raw: &str) {
        let (succeeded, text) = self.try_run(&["e2fsck", "-fn", raw]);
        assert!(
            succeeded && !text.contains("Fix?") && !text.contains("WARNING"),
            "{}: {raw}:\n{text}",
            self.row.name
        );
    }

    /// Declares the region and makes the child.
    pub(crate) fn prepare(&self) {
        self.run("qemu-img convert -f raw -O qcow2 fs.raw base.qcow2");
        self.run(&format!(
            "seethrough prepare base.qcow2 --reserve local --size {} --dir /local",
            self.row.region
        ));
        self.run("seethrough create -b base.qcow2 --region local tom.qcow2");
    }

    /// As [`Bed::prepare`], for a child that has so much room behind the base's end.
    pub(crate) fn prepare_grown(&self, grow: &str) {
        self.prepare();
        fs::remove_file(self.path("tom.qcow2")).unwrap();
        self.run(&format!(
            "seethrough create -q -b base.qcow2 --region local --grow {grow} tom.qcow2"
        ));
    }

    /// Opens both for writing, as the daemon would.
    pub(crate) fn open(&self) -> Family {
        let registry = Registry::new(HostOptions::default());
        let requests = ["base.qcow2", "tom.qcow2"].map(|name| DiskRequest {
            path: self.path(name),
            format: None,
            access: Access::ReadWrite,
        });
        let disks = block_on(registry.open_family(&requests)).unwrap();
        let declaration = declared_base(declaration_of(&disks[0].source).unwrap());
        let Some(Declaration::Child(child)) = declaration_of(&disks[1].source).unwrap() else {
            panic!("a child says that it is one");
        };
        let base = Arc::clone(&disks[0].image);
        let shared = block_on(SharedBase::open(Arc::clone(&base), declaration)).unwrap();
        let base_view = block_on(open_base("base", &shared)).unwrap();
        let overlay = Arc::clone(&disks[1].image);
        let child_view = block_on(open_child("tom", overlay, &child, &shared)).unwrap();
        let lists = child.regions.iter().map(|region| match &region.extent {
            Extent::Groups { list, .. } => list.iter().map(|group| group.0).collect(),
            Extent::Partition { .. } => Vec::new(),
        });
        let owned = lists.flat_map(|list: Vec<u32>| list).collect();
        Family {
            base,
            base_view,
            child_view,
            owned,
        }
    }

    /// What stock tools say of everything that was written.
    pub(crate) fn assert_sound(&self) {
        for image in ["base.qcow2", "tom.qcow2"] {
            self.run(&format!("qemu-img check -q {image}"));
        }
        self.run("qemu-img convert -O raw base.qcow2 base.raw");
        self.assert_clean("base.raw");
        let _ = fs::remove_file(self.path("flat.raw"));
        self.run("seethrough flatten -O raw tom.qcow2 flat.raw");
        self.assert_clean("flat.raw");
    }
}

fn declared_base(declaration: Option<Declaration>) -> BaseDeclaration {
    match declaration {
        Some(Declaration::Base(declaration)) => declaration,
        other => panic!("no base: {other:?}"),
    }
}

impl Family {
    /// One block of each kind that is foreign to the child, and its offset.
    pub(crate) fn foreign_blocks(&self) -> Vec<(Kind, GuestOffset)> {
        let place = block_on(locate(&*self.base, None)).unwrap();
        let probe = block_on(Probe::read(&*self.base, place)).unwrap();
        let superblock = probe.superblock();
        let mut found: Vec<(Kind, GuestOffset)> = Vec::new();
        let mut block = 0;
        while let Some((kind, len)) = probe.layout().classify(FsBlock(block)) {
            let is_foreign = match kind {
                Kind::Data { group }
                | Kind::BlockBitmap { group }
                | Kind::InodeBitmap { group }
                | Kind::InodeTable { group, .. } => !self.owned.contains(&group.0),
                Kind::Backup { .. } | Kind::ReservedDescriptors => true,
                _ => false,
            };
            let same =
                |other: &Kind| std::mem::discriminant(other) == std::mem::discriminant(&kind);
            if is_foreign && !found.iter().any(|(other, _)| same(other)) {
                // Of what is kept for descriptors, a child with more groups than the base has the first blocks in use.
                let one = match kind {
                    Kind::ReservedDescriptors => block + len - 1,
                    _ => block,
                };
                let at = place.start.0 + one * u64::from(superblock.block_size);
                found.push((kind, GuestOffset(at)));
            }
            block += len;
        }
        found
    }
}

/// The bytes of a disk.
pub(crate) fn dump(image: &dyn Image) -> Vec<u8> {
    let size = usize::try_from(image.virtual_size()).unwrap();
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let buf = IoBuf::zeroed(CHUNK.min(size - bytes.len()));
        block_on(image.read(GuestOffset(bytes.len() as u64), buf.clone())).unwrap();
        bytes.extend(buf.to_vec());
    }
    bytes
}

/// A loop mount, which ends when it is dropped.
struct Mount {
    disk: PathBuf,
    at: PathBuf,
}

impl Mount {
    fn of(disk: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        let output = Command::new("mount")
            .args(["-t", "ext4", "-o", "loop"])
            .args([disk, at])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mount {}:\n{text}", disk.display());
        Self {
            disk: disk.to_path_buf(),
            at: at.to_path_buf(),
        }
    }
}

impl Drop for Mount {
    /// A program that another test is just starting has this process's files open until it runs, so the kernel may call
    /// the mount busy for a moment: as often as that, it is asked again. And the filesystem ends with its last user, who
    /// may be somebody that looks at all mounts: everything is in the file once no loop device has it.
    fn drop(&mut self) {
        const TRIES: usize = 10_000;
        let unmounted = (0..TRIES).any(|_| {
            let output = Command::new("umount").arg(&self.at).output().unwrap();
            output.status.success() || !String::from_utf8_lossy(&output.stderr).contains("busy")
        });
        let detached = (0..TRIES).any(|_| {
            let output = Command::new("losetup")
                .env("PATH", "/usr/sbin:/sbin")
                .arg("-j")
                .arg(&self.disk)
                .output();
            output.is_ok_and(|output| output.status.success() && output.stdout.is_empty())
        });
        if !(unmounted && detached) {
            eprintln!("{} is still busy", self.at.display());
        }
    }
}

/// A guest's kernel with one disk mounted: it works on a copy of what the view serves, and what it has changed is
/// written to the view when it unmounts.
pub(crate) struct Kernel<'a> {
    view: &'a View,
    before: Vec<u8>,
    copy: PathBuf,
    mount: Mount,
}

impl<'a> Kernel<'a> {
    pub(crate) fn mount(bed: &Bed, view: &'a View, name: &str) -> Self {
        // A guest reads an inode before it reads its attributes; a copy of the disk is in another order.
        dump(view);
        let before = dump(view);
        let copy = bed.path(&format!("{name}.disk"));
        let mut file = File::create(&copy).unwrap();
        file.set_len(before.len() as u64).unwrap();
        for (index, chunk) in before.chunks(64 << 10).enumerate() {
            if chunk.iter().any(|byte| *byte != 0) {
                file.seek(SeekFrom::Start((index as u64) << 16)).unwrap();
                file.write_all(chunk).unwrap();
            }
        }
        let mount = Mount::of(&copy, &bed.path(&format!("{name}.mnt")));
        Self {
            view,
            before,
            copy,
            mount,
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.mount.at
    }

    /// Unmounts, and writes what has changed, a block at a time; returns the disk as the kernel left it.
    pub(crate) fn unmount(self) -> Vec<u8> {
        let s_log_block_size = self.before[1024 + 0x18];
        let unit_len = 1024 << s_log_block_size;
        drop(self.mount);
        let mut after = Vec::with_capacity(self.before.len());
        let mut copy = OpenOptions::new().read(true).open(&self.copy).unwrap();
        copy.read_to_end(&mut after).unwrap();
        let chunks = self.before.chunks(CHUNK).zip(after.chunks(CHUNK));
        for (index, (old, new)) in chunks.enumerate().filter(|(_, (old, new))| old != new) {
            let units = old.chunks(unit_len).zip(new.chunks(unit_len));
            let changed = units.enumerate().filter(|(_, (old, new))| old != new);
            for (unit, (_, bytes)) in changed {
                let at = GuestOffset((index * CHUNK + unit * unit_len) as u64);
                block_on(self.view.write(at, IoBuf::from_bytes(bytes))).unwrap();
            }
        }
        block_on(self.view.flush()).unwrap();
        fs::remove_file(&self.copy).unwrap();
        after
    }
}
