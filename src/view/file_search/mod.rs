//! Whose a block or an inode is: the file, and its path.
//!
//! ext4 keeps no way back from a block to its file, nor from a file to its name, so both are searched for: the block in
//! the maps of inodes, the name in directories; in both cases those of the nearest groups first, for that is where ext4
//! puts what belongs together. It is done when somebody asks, on that caller's thread, never when a write is refused.
//!
//! # Invariants
//!
//! 1. A search reads [`MAX_BYTES`] at most for the owners and as much for their names, and keeps at most [`MAX_OWNERS`]
//!    files; what it gave up it says.
//! 2. What is damaged is passed over: a search ends with what it can find.

mod names;
mod owners;
mod reader;

use std::ops::Range;

use super::disk::View;
use crate::error::{Error, Result};
use crate::units::{GuestOffset, InodeNumber};
use names::Names;
use reader::Reader;

/// The most bytes that one half of a search reads.
pub const MAX_BYTES: u64 = 128 << 20;
/// The most files that a search keeps.
pub const MAX_OWNERS: usize = 256;

/// What to search for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Whoever owns any of these bytes of the disk.
    Bytes(Range<GuestOffset>),
    /// The name of an inode.
    Inode(InodeNumber),
}

/// What was searched for is this to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Its data, or the entries of a directory.
    Data,
    /// A block of the map to its data.
    Map,
    /// Its extended attributes.
    Attributes,
    /// Its inode.
    Inode,
}

/// A file that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The inode.
    pub inode: InodeNumber,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// What was searched for is this to it.
    pub part: Part,
    /// Its path from the filesystem's root, or one of them; `None` if it has no name, or none was found.
    pub path: Option<String>,
}

/// What a search came to.
#[derive(Debug, Default)]
pub struct Findings {
    /// The owners of each [`Wanted`], in their order.
    pub owners: Vec<Vec<Found>>,
    /// Whether there may be more to find: the search was given up at its limit.
    pub given_up: bool,
}

/// Why a search ends before it has seen everything.
enum Stop {
    /// Invariant 1.
    Limit,
    /// The disk cannot be read.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Whether a step has seen everything.
fn is_complete(step: Result<(), Stop>) -> Result<bool> {
    match step {
        Ok(()) => Ok(true),
        Err(Stop::Limit) => Ok(false),
        Err(Stop::Failed(error)) => Err(error),
    }
}

impl View {
    /// Searches the base's filesystem for the owners of `wanted`, and for their names.
    ///
    /// # Errors
    /// What reading the base returns.
    pub async fn find_files(&self, wanted: &[Wanted]) -> Result<Findings> {
        let mut owners = vec![Vec::new(); wanted.len()];
        let Some(filesystem) = self.territory.filesystem() else {
            return Ok(Findings {
                owners,
                given_up: false,
            });
        };
        let mut reader = Reader::new(&*self.truth, filesystem.probe());
        let seen = owners::search(&mut reader, wanted, &mut owners).await;
        let all_owners = is_complete(seen)?;
        reader.refill();
        let mut names = Names::new(reader);
        let seen = names.search(owners.iter_mut().flatten()).await;
        let all_names = is_complete(seen)?;
        Ok(Findings {
            owners,
            given_up: !(all_owners && all_names),
        })
    }
}
