//! The paths of inodes: a name found in a directory, and the way up from there by `..`.

use std::collections::HashMap;

use super::reader::{File, Reader};
use super::{Found, Stop};
use crate::ext4::directory;
use crate::ext4::inode::ROOT;
use crate::units::{BlockGroup, FsBlock, InodeNumber};

/// The deepest path that is followed.
const MAX_DEPTH: usize = 128;

/// A name in a directory.
struct Name {
    parent: InodeNumber,
    name: String,
}

/// A search for names.
pub(super) struct Names<'a> {
    reader: Reader<'a>,
    /// The names found so far, by inode.
    known: HashMap<InodeNumber, Name>,
}

impl<'a> Names<'a> {
    pub(super) fn new(reader: Reader<'a>) -> Self {
        Self {
            reader,
            known: HashMap::new(),
        }
    }

    /// Gives `files` their paths.
    ///
    /// # Errors
    /// [`Stop::Limit`] if some may have one that was not found.
    pub(super) async fn search(
        &mut self,
        files: impl Iterator<Item = &mut Found>,
    ) -> Result<(), Stop> {
        let files: Vec<&mut Found> = files.collect();
        // Directories know the way up; the others need a pass over all directories.
        let others = files.iter().filter(|file| !file.is_directory);
        let mut unnamed: Vec<InodeNumber> = others.map(|file| file.inode).collect();
        unnamed.sort_unstable();
        unnamed.dedup();
        let searched = self.search_directories(&mut unnamed).await;
        for file in files {
            file.path = self.path_of(file.inode).await?;
        }
        searched
    }

    /// Looks for the names of `unnamed` in all directories, those of the nearest groups first.
    async fn search_directories(&mut self, unnamed: &mut Vec<InodeNumber>) -> Result<(), Stop> {
        let near = unnamed
            .iter()
            .filter_map(|number| self.reader.group_of_inode(*number));
        let near: Vec<BlockGroup> = near.collect();
        for group in self.reader.nearest_first(near) {
            if unnamed.is_empty() {
                break;
            }
            for file in self.reader.files_of(group).await? {
                if file.is_directory() {
                    self.search_directory(&file, unnamed).await?;
                }
            }
        }
        Ok(())
    }

    /// Notes the names that one directory has for any of `unnamed`, which is sorted; those are taken out of it.
    async fn search_directory(
        &mut self,
        parent: &File,
        unnamed: &mut Vec<InodeNumber>,
    ) -> Result<(), Stop> {
        let extents = self.reader.map_of(parent).await?.data;
        let blocks = extents.iter().flat_map(|extent| {
            let start = extent.start.0;
            (start..start.saturating_add(u64::from(extent.len))).map(FsBlock)
        });
        for block in blocks {
            if unnamed.is_empty() {
                break;
            }
            let bytes = self.reader.block(block).await?;
            // What follows a damaged entry cannot be read.
            for entry in directory::entries(&bytes).map_while(Result::ok) {
                let Some(inode) = entry.inode.filter(|_| !matches!(entry.name, b"." | b".."))
                else {
                    continue;
                };
                if let Ok(at) = unnamed.binary_search(&inode) {
                    unnamed.remove(at);
                    let name = Name {
                        parent: parent.number,
                        name: String::from_utf8_lossy(entry.name).into_owned(),
                    };
                    self.known.insert(inode, name);
                }
            }
        }
        Ok(())
    }

    /// The path of a directory, or of a file whose name is known.
    async fn path_of(&mut self, number: InodeNumber) -> Result<Option<String>, Stop> {
        let mut names = Vec::new();
        let mut at = number;
        while at != ROOT {
            if !self.known.contains_key(&at) {
                self.name_directory(at).await?;
            }
            let Some(Name { parent, name }) = self.known.get(&at) else {
                return Ok(None);
            };
            if names.len() == MAX_DEPTH {
                return Ok(None);
            }
            names.push(name.as_str().to_owned());
            at = *parent;
        }
        names.reverse();
        Ok(Some(format!("/{}", names.join("/"))))
    }

    /// Looks for a directory's name where its `..` says that it is.
    async fn name_directory(&mut self, number: InodeNumber) -> Result<(), Stop> {
        let Some(own) = self.directory(number).await? else {
            return Ok(());
        };
        let extents = self.reader.map_of(&own).await?.data;
        let Some(first) = extents.first() else {
            return Ok(());
        };
        let bytes = self.reader.block(first.start).await?;
        let above = directory::entries(&bytes)
            .map_while(Result::ok)
            .find(|entry| entry.name == b"..")
            .and_then(|entry| entry.inode);
        let Some(above) = above else {
            return Ok(());
        };
        match self.directory(above).await? {
            Some(parent) => self.search_directory(&parent, &mut vec![number]).await,
            None => Ok(()),
        }
    }

    async fn directory(&mut self, number: InodeNumber) -> Result<Option<File>, Stop> {
        let file = self.reader.file(number).await?;
        Ok(file.filter(File::is_directory))
    }
}
