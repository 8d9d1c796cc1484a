//! What a directory tree should be: names, files with their bytes, directories, symbolic links, hard links, modes and
//! extended attributes. And the same read from a mounted filesystem, to compare.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom as From};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{SeekFrom, getxattr, listxattr, seek};

pub(crate) const PAGE: u64 = 4096;
const NO_DATA_BEHIND: i32 = 6;

/// A file's bytes: pages that are not all zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    len: u64,
    pages: BTreeMap<u64, Arc<Vec<u8>>>,
}

impl Contents {
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) {
        self.put(at, bytes);
        self.len = self.len.max(at + bytes.len() as u64);
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let position = at + done as u64;
            let within = usize::try_from(position % PAGE).unwrap();
            let part = (bytes.len() - done).min(usize::try_from(PAGE).unwrap() - within);
            let page = self.pages.entry(position / PAGE).or_default();
            let page = Arc::make_mut(page);
            page.resize(usize::try_from(PAGE).unwrap(), 0);
            page[within..within + part].copy_from_slice(&bytes[done..done + part]);
            if page.iter().all(|byte| *byte == 0) {
                self.pages.remove(&(position / PAGE));
            }
            done += part;
        }
    }

    /// Zeros from `at` to `end`; the length stays.
    pub(crate) fn zero(&mut self, at: u64, end: u64) {
        let inner = at.div_ceil(PAGE)..end / PAGE;
        self.pages.retain(|page, _| !inner.contains(page));
        let pages: Vec<u64> = self
            .pages
            .range(at / PAGE..end.div_ceil(PAGE))
            .map(|(p, _)| *p)
            .collect();
        for page in pages {
            let (from, to) = (at.max(page * PAGE), end.min((page + 1) * PAGE));
            self.put(from, &vec![0; usize::try_from(to - from).unwrap()]);
        }
    }

    pub(crate) fn truncate(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len);
        }
        self.len = len;
    }

    /// The file's length is at least `end` from now on.
    pub(crate) fn extend(&mut self, end: u64) {
        self.len = self.len.max(end);
    }

    /// Takes out the whole pages from `at` to `end`.
    pub(crate) fn collapse(&mut self, at: u64, end: u64) {
        self.zero(at, end);
        let behind = self.pages.split_off(&(end / PAGE));
        let by = (end - at) / PAGE;
        self.pages
            .extend(behind.into_iter().map(|(page, bytes)| (page - by, bytes)));
        self.len -= end - at;
    }

    /// Puts whole pages of zeros in at `at`.
    pub(crate) fn insert(&mut self, at: u64, len: u64) {
        let behind = self.pages.split_off(&(at / PAGE));
        let by = len / PAGE;
        self.pages
            .extend(behind.into_iter().map(|(page, bytes)| (page + by, bytes)));
        self.len += len;
    }

    pub(crate) fn read(file: &mut File) -> io::Result<Self> {
        let mut contents = Self::default();
        let len = file.metadata()?.len();
        let mut at = 0;
        while at < len {
            let start = match seek(&*file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(error) if error.raw_os_error() == NO_DATA_BEHIND => break,
                Err(error) => return Err(error.into()),
            };
            let end = seek(&*file, SeekFrom::Hole(start))?;
            file.seek(From::Start(start))?;
            let mut bytes = Vec::new();
            file.by_ref().take(end - start).read_to_end(&mut bytes)?;
            contents.put(start, &bytes);
            at = end;
        }
        // Holes are asked for by reading, too: a file's last bytes.
        let mut last = [0; 16];
        let tail = len.saturating_sub(16);
        let read = file.read_at(&mut last, tail)?;
        contents.put(tail, &last[..read]);
        contents.len = len;
        Ok(contents)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File(Contents),
    Directory,
    Symlink(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) attributes: BTreeMap<String, Vec<u8>>,
}

impl Node {
    pub(crate) fn new(kind: Kind, mode: u32) -> Self {
        let attributes = BTreeMap::new();
        Self {
            kind,
            mode,
            attributes,
        }
    }
}

/// Tells the inodes of a tree from each other.
pub(crate) type Id = u64;

/// A directory's contents, by paths relative to it; and which of them a power cut must not take away.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tree {
    names: BTreeMap<PathBuf, Id>,
    nodes: BTreeMap<Id, Node>,
    next: Id,
    durable: BTreeMap<PathBuf, (Id, Node)>,
}

impl Tree {
    pub(crate) fn id(&self, path: &Path) -> Option<Id> {
        self.names.get(path).copied()
    }

    pub(crate) fn node(&self, path: &Path) -> Option<&Node> {
        self.nodes.get(self.names.get(path)?)
    }

    /// The node to be changed; no name of it is durable any more.
    pub(crate) fn change(&mut self, path: &Path) -> &mut Node {
        let id = self.names[path];
        self.durable.retain(|_, (other, _)| *other != id);
        self.nodes.get_mut(&id).unwrap()
    }

    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.names.keys().map(PathBuf::as_path)
    }

    pub(crate) fn insert(&mut self, path: &Path, node: Node) {
        self.next += 1;
        self.touch(path);
        self.nodes.insert(self.next, node);
        self.names.insert(path.to_owned(), self.next);
    }

    pub(crate) fn link(&mut self, old: &Path, new: &Path) {
        let id = self.names[old];
        self.change(old);
        self.touch(new);
        self.names.insert(new.to_owned(), id);
    }

    /// A name is gone, and what lies below it.
    pub(crate) fn remove(&mut self, path: &Path) {
        if self.names.contains_key(path) {
            self.change(path);
        }
        self.touch(path);
        self.names.retain(|name, _| !name.starts_with(path));
        let named: std::collections::BTreeSet<Id> = self.names.values().copied().collect();
        self.nodes.retain(|id, _| named.contains(id));
    }

    /// Moves `old`, and what lies below it, to `new`, in place of what was there.
    pub(crate) fn rename(&mut self, old: &Path, new: &Path) {
        self.remove(new);
        let moved: Vec<(PathBuf, Id)> = self.below(old);
        self.change(old);
        self.touch(old);
        self.names.retain(|name, _| !name.starts_with(old));
        for (name, id) in moved {
            self.names.insert(rebased(&name, old, new), id);
        }
    }

    pub(crate) fn exchange(&mut self, one: &Path, other: &Path) {
        let (a, b) = (self.below(one), self.below(other));
        for path in [one, other] {
            self.change(path);
            self.touch(path);
            self.names.retain(|name, _| !name.starts_with(path));
        }
        for (name, id) in a {
            self.names.insert(rebased(&name, one, other), id);
        }
        for (name, id) in b {
            self.names.insert(rebased(&name, other, one), id);
        }
    }

    fn below(&self, path: &Path) -> Vec<(PathBuf, Id)> {
        let all = self.names.iter().filter(|(name, _)| name.starts_with(path));
        all.map(|(name, id)| (name.clone(), *id)).collect()
    }

    fn touch(&mut self, path: &Path) {
        self.durable.retain(|name, _| !name.starts_with(path));
    }

    /// Everything is as it is even after a power cut.
    pub(crate) fn sync(&mut self) {
        let all = self
            .names
            .iter()
            .map(|(name, id)| (name.clone(), (*id, self.nodes[id].clone())));
        self.durable = all.collect();
    }

    /// The file at `path` is as it is even after a power cut, and its name leads to it.
    pub(crate) fn fsync(&mut self, path: &Path) {
        let id = self.names[path];
        self.durable
            .insert(path.to_owned(), (id, self.nodes[&id].clone()));
    }

    /// What is in the directory `top`, but for the names of `except` in it.
    pub(crate) fn read(top: &Path, except: &[PathBuf]) -> io::Result<Self> {
        let mut tree = Self::default();
        tree.read_directory(top, Path::new(""), except)?;
        tree.next = tree.nodes.keys().max().copied().unwrap_or(0);
        tree.sync();
        Ok(tree)
    }

    fn read_directory(&mut self, top: &Path, path: &Path, except: &[PathBuf]) -> io::Result<()> {
        for entry in fs::read_dir(top.join(path))? {
            let path = path.join(entry?.file_name());
            if except.contains(&path) {
                continue;
            }
            let real = top.join(&path);
            let error = |error: io::Error| {
                io::Error::new(error.kind(), format!("{}: {error}", real.display()))
            };
            let metadata = fs::symlink_metadata(&real).map_err(error)?;
            self.names.insert(path.clone(), metadata.ino());
            let node = read_node(&real, &metadata).map_err(error)?;
            let is_directory = node.kind == Kind::Directory;
            self.nodes.insert(metadata.ino(), node);
            if is_directory {
                self.read_directory(top, &path, except)?;
            }
        }
        Ok(())
    }

    /// What `found` has that is not as here.
    pub(crate) fn difference(&self, found: &Self) -> Option<String> {
        let mut ids = BTreeMap::new();
        for (path, id) in &self.names {
            let Some(other) = found.id(path) else {
                return Some(format!("{} is not there", path.display()));
            };
            if let Some(text) = node_difference(&self.nodes[id], &found.nodes[&other]) {
                return Some(format!("{}: {text}", path.display()));
            }
            if *ids.entry(*id).or_insert(other) != other {
                return Some(format!(
                    "{} is no longer a link to the same file",
                    path.display()
                ));
            }
        }
        let more = found.paths().find(|path| !self.names.contains_key(*path));
        more.map(|path| format!("{} is there", path.display()))
    }

    /// What a power cut has taken away that it must not, given what was found afterwards.
    pub(crate) fn lost(&self, found: &Self) -> Option<String> {
        for (path, (_, node)) in &self.durable {
            let problem = match found.node(path) {
                None => Some("is gone".to_owned()),
                Some(other) => node_difference(node, other),
            };
            if let Some(text) = problem {
                return Some(format!("{}: {text}", path.display()));
            }
        }
        None
    }
}

fn rebased(name: &Path, old: &Path, new: &Path) -> PathBuf {
    let rest = name.strip_prefix(old).unwrap();
    // Joining an empty path would add a slash.
    if rest.as_os_str().is_empty() {
        new.to_owned()
    } else {
        new.join(rest)
    }
}

fn read_node(real: &Path, metadata: &fs::Metadata) -> io::Result<Node> {
    let kind = metadata.file_type();
    let mut node = Node::new(Kind::Directory, metadata.permissions().mode() & 0o7777);
    if kind.is_symlink() {
        node.kind = Kind::Symlink(fs::read_link(real)?);
        return Ok(node);
    }
    if kind.is_file() {
        node.kind = Kind::File(Contents::read(&mut File::open(real)?)?);
    }
    let mut names = vec![0; 8192];
    let len = listxattr(real, &mut names)?;
    for name in names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 8192];
        let len = getxattr(real, name, &mut value)?;
        value.truncate(len);
        node.attributes
            .insert(String::from_utf8_lossy(name).into_owned(), value);
    }
    Ok(node)
}

fn node_difference(expected: &Node, found: &Node) -> Option<String> {
    if expected.mode != found.mode {
        return Some(format!(
            "mode {:o} instead of {:o}",
            found.mode, expected.mode
        ));
    }
    if expected.attributes != found.attributes {
        return Some("other extended attributes".to_owned());
    }
    match (&expected.kind, &found.kind) {
        (Kind::File(expected), Kind::File(found)) => contents_difference(expected, found),
        (expected, found) if expected == found => None,
        _ => Some("another kind of file, or another link".to_owned()),
    }
}

fn contents_difference(expected: &Contents, found: &Contents) -> Option<String> {
    if expected.len != found.len {
        return Some(format!("{} bytes instead of {}", found.len, expected.len));
    }
    let pages = expected.pages.keys().chain(found.pages.keys());
    let page = pages
        .into_iter()
        .find(|page| expected.pages.get(page) != found.pages.get(page))?;
    let zeros = vec![0; usize::try_from(PAGE).unwrap()];
    let bytes = |contents: &Contents| {
        contents
            .pages
            .get(page)
            .map_or(zeros.clone(), |page| page.to_vec())
    };
    let (expected, found) = (bytes(expected), bytes(found));
    let at = expected.iter().zip(&found).position(|(a, b)| a != b)?;
    Some(format!(
        "byte {} is {:#04x} instead of {:#04x}",
        page * PAGE + at as u64,
        found[at],
        expected[at]
    ))
}
