//! What a guest's programs do in a directory of theirs, at random and in a model at the same time; and what they try
//! in directories that are not theirs.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, RngExt};
use rustix::fs::{
    CWD, FallocateFlags, RenameFlags, XattrFlags, fallocate, removexattr, renameat_with, setxattr,
};

use crate::model::{Contents, Kind, Node, PAGE, Tree};

const EPERM: i32 = 1;
const EACCES: i32 = 13;
const ENOSPC: i32 = 28;
const EMLINK: i32 = 31;
const EOPNOTSUPP: i32 = 95;
/// A file without a name, in a directory.
const O_TMPFILE: i32 = 0o20_200_000;

/// Names that a directory may have.
const NAMES: u32 = 24;
const MAX_DEPTH: usize = 4;
const MAX_SIZE: u64 = 192 << 10;
/// Where a file may have a byte far from all others.
const FAR: u64 = 900 << 20;
const CHUNK: usize = 64 << 10;

/// A directory, its model, and the chance.
pub(crate) struct Work<'a> {
    pub(crate) top: &'a Path,
    pub(crate) tree: &'a mut Tree,
    pub(crate) rng: &'a mut StdRng,
    /// Files that have no name any more, but are in use.
    pub(crate) held: &'a mut Vec<File>,
    /// What was done, for whoever reads of a failure.
    pub(crate) log: &'a mut Vec<String>,
}

/// Whether an operation was done: it may lack room, or the filesystem may not know of it.
fn done(what: &str, result: io::Result<()>) -> bool {
    match result {
        Ok(()) => true,
        Err(error) if matches!(error.raw_os_error(), Some(ENOSPC | EOPNOTSUPP)) => false,
        Err(error) => panic!("{what}: {error}"),
    }
}

impl Work<'_> {
    /// Does something.
    pub(crate) fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..20 => self.create(),
            20..32 => self.write(),
            32..38 => self.truncate(),
            38..46 => self.allocate(),
            46..55 => self.rename(),
            55..60 => self.link(),
            60..64 => self.make_symlink(),
            64..73 => self.unlink(),
            73..80 => self.make_directory(),
            80..83 => self.remove_directory(),
            83..86 => self.change_mode(),
            86..91 => self.set_attribute(),
            91..93 => self.drop_name_in_use(),
            93..97 => self.sync_file(),
            97 => self.many_files(),
            98 => self.fill_up(),
            _ => self.remove_everything_below(),
        }
    }

    fn note(&mut self, what: &str, path: &Path) -> String {
        let line = format!("{what} {}", self.top.join(path).display());
        self.log.push(line.clone());
        line
    }

    fn real(&self, path: &Path) -> PathBuf {
        self.top.join(path)
    }

    fn any(&mut self, wanted: impl Fn(&Node) -> bool) -> Option<PathBuf> {
        let tree = &*self.tree;
        let fitting = tree
            .paths()
            .filter(|path| tree.node(path).is_some_and(&wanted));
        fitting.choose(self.rng).map(Path::to_owned)
    }

    fn any_file(&mut self) -> Option<PathBuf> {
        self.any(|node| matches!(node.kind, Kind::File(_)))
    }

    /// A directory, the top among them.
    fn any_directory(&mut self) -> PathBuf {
        let tree = &*self.tree;
        let directories = tree.paths().filter(|path| {
            path.components().count() < MAX_DEPTH
                && tree
                    .node(path)
                    .is_some_and(|node| node.kind == Kind::Directory)
        });
        let top = Path::new("");
        directories
            .chain([top])
            .choose(self.rng)
            .unwrap_or(top)
            .to_owned()
    }

    fn any_name(&mut self) -> PathBuf {
        let directory = self.any_directory();
        directory.join(format!("n{}", self.rng.random_range(0..NAMES)))
    }

    fn new_name(&mut self) -> Option<PathBuf> {
        let name = self.any_name();
        self.tree.id(&name).is_none().then_some(name)
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = match self.rng.random_range(0..10) {
            0 => 0,
            1..5 => self.rng.random_range(1..200),
            5..9 => self.rng.random_range(200..20_000),
            _ => self.rng.random_range(20_000..MAX_SIZE),
        };
        let mut bytes = vec![self.rng.random(); usize::try_from(len).unwrap()];
        let head = bytes.len().min(64);
        self.rng.fill_bytes(&mut bytes[..head]);
        bytes
    }

    fn create(&mut self) {
        let Some(name) = self.new_name() else { return };
        let bytes = self.bytes();
        self.create_with(&name, &bytes);
    }

    fn create_with(&mut self, name: &Path, bytes: &[u8]) -> bool {
        let what = self.note("create", name);
        let mode = *[0o644, 0o600, 0o755].iter().choose(self.rng).unwrap();
        let mut options = OpenOptions::new();
        let opened = options
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(self.real(name));
        let file = match opened {
            Ok(file) => file,
            Err(error) => return done(&what, Err(error)),
        };
        let node = Node::new(Kind::File(Contents::default()), mode);
        self.tree.insert(name, node);
        self.write_to(&file, name, 0, bytes)
    }

    /// Writes as much as there is room for.
    fn write_to(&mut self, file: &File, name: &Path, at: u64, bytes: &[u8]) -> bool {
        let Kind::File(contents) = &mut self.tree.change(name).kind else {
            panic!("{} is no file", name.display());
        };
        let mut written = 0;
        while written < bytes.len() {
            let position = at + written as u64;
            match file.write_at(&bytes[written..], position) {
                Ok(len) => {
                    contents.write(position, &bytes[written..written + len]);
                    written += len;
                }
                Err(error) => return done("write", Err(error)),
            }
        }
        true
    }

    fn write(&mut self) {
        let Some(name) = self.any_file() else { return };
        let len = self.len_of(&name);
        let at = match self.rng.random_range(0..8) {
            0 => self.rng.random_range(0..FAR),
            1..4 => len,
            _ => self.rng.random_range(0..len.min(MAX_SIZE) + 5000),
        };
        let bytes = self.bytes();
        self.note(&format!("write {} bytes at {at} to", bytes.len()), &name);
        let file = OpenOptions::new()
            .write(true)
            .open(self.real(&name))
            .unwrap();
        self.write_to(&file, &name, at, &bytes);
    }

    fn len_of(&self, name: &Path) -> u64 {
        match self.tree.node(name).map(|node| &node.kind) {
            Some(Kind::File(contents)) => contents.len(),
            _ => 0,
        }
    }

    fn truncate(&mut self) {
        let Some(name) = self.any_file() else { return };
        let len = match self.rng.random_range(0..4) {
            0 => 0,
            1 => self.rng.random_range(0..MAX_SIZE),
            _ => self.rng.random_range(0..=self.len_of(&name)),
        };
        let what = self.note(&format!("truncate to {len}"), &name);
        let file = OpenOptions::new()
            .write(true)
            .open(self.real(&name))
            .unwrap();
        if done(&what, file.set_len(len)) {
            self.contents(&name).truncate(len);
        }
    }

    fn contents(&mut self, name: &Path) -> &mut Contents {
        match &mut self.tree.change(name).kind {
            Kind::File(contents) => contents,
            _ => panic!("{} is no file", name.display()),
        }
    }

    fn allocate(&mut self) {
        let Some(name) = self.any_file() else { return };
        let len = self.len_of(&name);
        let at = self.rng.random_range(0..len.min(MAX_SIZE) + 5000);
        let end = at + self.rng.random_range(1..40_000);
        let (first, last) = (at.next_multiple_of(PAGE), end.next_multiple_of(PAGE));
        let whole = FallocateFlags::KEEP_SIZE;
        let (flags, at, end) = match self.rng.random_range(0..6) {
            0 => (FallocateFlags::empty(), at, end),
            1 => (whole, at, end),
            2 => (FallocateFlags::PUNCH_HOLE | whole, at, end),
            3 => (FallocateFlags::ZERO_RANGE, at, end),
            4 if last < len && first < last => (FallocateFlags::COLLAPSE_RANGE, first, last),
            5 if first < len && first < last => (FallocateFlags::INSERT_RANGE, first, last),
            _ => return,
        };
        let what = self.note(&format!("allocate {flags:?} {at}..{end}"), &name);
        let path = self.real(&name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let result = fallocate(&file, flags, at, end - at).map_err(io::Error::from);
        let succeeded = done(&what, result);
        if !succeeded {
            // Without room it may have been done in part: in any case to this file alone.
            self.adopt(&name);
            return;
        }
        let contents = self.contents(&name);
        match flags {
            FallocateFlags::COLLAPSE_RANGE => contents.collapse(at, end),
            FallocateFlags::INSERT_RANGE => contents.insert(at, end - at),
            _ => {
                if flags.intersects(FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE) {
                    contents.zero(at, end);
                }
                if !flags.contains(whole) {
                    contents.extend(end);
                }
            }
        }
    }

    /// Takes a file as it is.
    fn adopt(&mut self, name: &Path) {
        let mut file = File::open(self.real(name)).unwrap();
        // What is not written out yet some filesystems report as a hole.
        file.sync_all().unwrap();
        let found = Contents::read(&mut file).unwrap();
        *self.contents(name) = found;
    }

    fn rename(&mut self) {
        let Some(old) = self.any(|_| true) else {
            return;
        };
        let new = self.any_name();
        if new.starts_with(&old) || old.starts_with(&new) {
            return;
        }
        let is_directory = |path: &Path| {
            self.tree
                .node(path)
                .is_some_and(|node| node.kind == Kind::Directory)
        };
        let exists = self.tree.id(&new).is_some();
        let exchange = exists && self.rng.random_range(0..3) == 0;
        if exists && !exchange {
            let replaced = is_directory(&new);
            if replaced != is_directory(&old) || (replaced && !self.is_empty(&new)) {
                return;
            }
            // Two names of one file: nothing would happen.
            if self.tree.id(&new) == self.tree.id(&old) {
                return;
            }
        }
        let what = self.note(
            &format!("rename (exchange: {exchange}) {} to", old.display()),
            &new,
        );
        let flags = if exchange {
            RenameFlags::EXCHANGE
        } else {
            RenameFlags::empty()
        };
        let result = renameat_with(CWD, self.real(&old), CWD, self.real(&new), flags);
        if !done(&what, result.map_err(io::Error::from)) {
            return;
        }
        if exchange {
            self.tree.exchange(&old, &new);
        } else {
            self.tree.rename(&old, &new);
        }
    }

    fn is_empty(&self, directory: &Path) -> bool {
        !self
            .tree
            .paths()
            .any(|path| path != directory && path.starts_with(directory))
    }

    fn link(&mut self) {
        let (Some(old), Some(new)) = (
            self.any(|node| node.kind != Kind::Directory),
            self.new_name(),
        ) else {
            return;
        };
        let what = self.note(&format!("link {} to", old.display()), &new);
        if done(&what, fs::hard_link(self.real(&old), self.real(&new))) {
            self.tree.link(&old, &new);
        }
    }

    fn make_symlink(&mut self) {
        let Some(new) = self.new_name() else { return };
        // Short ones are kept in the inode.
        let len = *[10, 59, 60, 300].iter().choose(self.rng).unwrap();
        let target = PathBuf::from("t".repeat(len));
        let what = self.note("symlink", &new);
        if done(&what, symlink(&target, self.real(&new))) {
            self.tree
                .insert(&new, Node::new(Kind::Symlink(target), 0o777));
        }
    }

    fn unlink(&mut self) {
        let Some(name) = self.any(|node| node.kind != Kind::Directory) else {
            return;
        };
        let what = self.note("unlink", &name);
        if done(&what, fs::remove_file(self.real(&name))) {
            self.tree.remove(&name);
        }
    }

    /// Takes the name away from a file that stays open.
    fn drop_name_in_use(&mut self) {
        let Some(name) = self.any_file() else { return };
        self.held.push(File::open(self.real(&name)).unwrap());
        self.note("hold and unlink", &name);
        fs::remove_file(self.real(&name)).unwrap();
        self.tree.remove(&name);
        if self.held.len() > 3 {
            self.held.remove(0);
        }
    }

    fn make_directory(&mut self) {
        let Some(name) = self.new_name() else { return };
        let what = self.note("mkdir", &name);
        if done(&what, fs::create_dir(self.real(&name))) {
            self.tree.insert(&name, Node::new(Kind::Directory, 0o755));
        }
    }

    fn remove_directory(&mut self) {
        let Some(name) = self.any(|node| node.kind == Kind::Directory) else {
            return;
        };
        if self.is_empty(&name) {
            self.note("rmdir", &name);
            fs::remove_dir(self.real(&name)).unwrap();
            self.tree.remove(&name);
        }
    }

    fn change_mode(&mut self) {
        let Some(name) = self.any(|node| !matches!(node.kind, Kind::Symlink(_))) else {
            return;
        };
        let mode = *[0o700, 0o644, 0o1777, 0o4755]
            .iter()
            .choose(self.rng)
            .unwrap();
        self.note(&format!("chmod {mode:o}"), &name);
        fs::set_permissions(self.real(&name), Permissions::from_mode(mode)).unwrap();
        self.tree.change(&name).mode = mode;
    }

    fn set_attribute(&mut self) {
        let Some(name) = self.any(|node| !matches!(node.kind, Kind::Symlink(_))) else {
            return;
        };
        let attribute = format!("user.a{}", self.rng.random_range(0..3));
        let real = self.real(&name);
        let is_set = self
            .tree
            .node(&name)
            .is_some_and(|node| node.attributes.contains_key(&attribute));
        if is_set && self.rng.random() {
            let what = self.note("removexattr", &name);
            if done(
                &what,
                removexattr(&real, attribute.as_str()).map_err(io::Error::from),
            ) {
                self.tree.change(&name).attributes.remove(&attribute);
            }
            return;
        }
        // Some find room in the inode, some need a block.
        let len = *[8, 40, 300, 700].iter().choose(self.rng).unwrap();
        let value = vec![self.rng.random(); len];
        let what = self.note(&format!("setxattr {attribute} {len}"), &name);
        let result = setxattr(&real, attribute.as_str(), &value, XattrFlags::empty());
        if done(&what, result.map_err(io::Error::from)) {
            self.tree.change(&name).attributes.insert(attribute, value);
        }
    }

    fn sync_file(&mut self) {
        let Some(name) = self.any_file() else { return };
        self.note("fsync", &name);
        File::open(self.real(&name)).unwrap().sync_all().unwrap();
        self.tree.fsync(&name);
    }

    /// A directory with more names than a block has room for.
    fn many_files(&mut self) {
        let Some(directory) = self.new_name() else {
            return;
        };
        let what = self.note("many files", &directory);
        if !done(&what, fs::create_dir(self.real(&directory))) {
            return;
        }
        self.tree
            .insert(&directory, Node::new(Kind::Directory, 0o755));
        let count = self.rng.random_range(50..250);
        for number in 0..count {
            let name = directory.join(format!("{}{number}", "a-rather-long-name-".repeat(3)));
            if !self.create_with(&name, b"x") {
                break;
            }
        }
    }

    fn fill_up(&mut self) {
        let Some(name) = self.new_name() else { return };
        let chunk = vec![0x5a; CHUNK];
        if !self.create_with(&name, &chunk) {
            return;
        }
        self.note("fill up", &name);
        let file = OpenOptions::new()
            .write(true)
            .open(self.real(&name))
            .unwrap();
        let mut at = CHUNK as u64;
        // What is allocated only when it is written out might not find room.
        while self.write_to(&file, &name, at, &chunk) {
            at += CHUNK as u64;
        }
        file.sync_all().unwrap();
        self.tree.fsync(&name);
        drop(file);
        if self.rng.random_range(0..4) != 0 {
            fs::remove_file(self.real(&name)).unwrap();
            self.tree.remove(&name);
        }
    }

    fn remove_everything_below(&mut self) {
        let Some(name) = self.any(|node| node.kind == Kind::Directory) else {
            return;
        };
        self.note("rm -r", &name);
        fs::remove_dir_all(self.real(&name)).unwrap();
        self.tree.remove(&name);
    }
}

/// Tries to change the file, link or directory `victim`, which is somebody else's, as all around it is: everything
/// fails. `own` is a directory of the one who tries.
pub(crate) fn trespass(victim: &Path, own: &Path, rng: &mut StdRng) {
    let metadata = fs::symlink_metadata(victim).unwrap();
    let parent = victim.parent().unwrap();
    let result = match rng.random_range(0..6) {
        0 if !metadata.is_dir() => fs::remove_file(victim),
        1 if !metadata.is_dir() => fs::hard_link(victim, own.join("trespasser")),
        2 => fs::rename(victim, parent.join("trespasser")),
        3 if metadata.is_file() => OpenOptions::new().write(true).open(victim).map(drop),
        4 if metadata.is_file() => OpenOptions::new().append(true).open(victim).map(drop),
        5 if !metadata.is_symlink() => change_inode(victim, rng),
        _ if metadata.is_dir() => return trespass_in(victim, own, rng),
        _ => return,
    };
    assert_refused(victim, result);
}

/// Tries to change the directory `victim`, which is somebody else's, though its name may not be.
pub(crate) fn trespass_in(victim: &Path, own: &Path, rng: &mut StdRng) {
    let inside = victim.join("trespasser");
    let result = match rng.random_range(0..7) {
        0 => File::create(&inside).map(drop),
        1 => fs::create_dir(&inside),
        2 => symlink("target", &inside),
        3 => fs::remove_dir(victim),
        4 => fs::rename(victim, own.join("trespasser")),
        5 => OpenOptions::new()
            .write(true)
            .custom_flags(O_TMPFILE)
            .open(victim)
            .map(drop),
        _ => change_inode(victim, rng),
    };
    assert_refused(victim, result);
}

fn change_inode(victim: &Path, rng: &mut StdRng) -> io::Result<()> {
    if rng.random() {
        return fs::set_permissions(victim, Permissions::from_mode(0o777));
    }
    setxattr(victim, "user.a0", b"mine", XattrFlags::empty()).map_err(io::Error::from)
}

fn assert_refused(victim: &Path, result: io::Result<()>) {
    let error = result.expect_err("what is somebody else's could be changed");
    assert!(
        matches!(error.raw_os_error(), Some(EPERM | EACCES | EMLINK)),
        "{}: {error}",
        victim.display()
    );
}
