//! Which foreign blocks hold extended attributes.
//!
//! A kernel that has read a block of attributes lets a new file with equal attributes share it, and counts the file in
//! the block: in the base's, if it read the base's. So foreign blocks of attributes are shown as shared to the full.
//! Nothing in a block's place says that it holds attributes; but a kernel finds it in an inode, which it has
//! read before, through this very view. The view takes note of it then.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::units::FsBlock;

/// The most blocks that are remembered. A filesystem whose files have more of them is unheard of; what is not
/// remembered is refused when it is written, and only not kept from being shared.
const MAX_BLOCKS: usize = 1 << 20;

/// The blocks that foreign inodes have named as holding their attributes.
#[derive(Debug, Default)]
pub(super) struct AttributeBlocks {
    /// Whether there is any: most filesystems have none, and then reads ask no further.
    any: AtomicBool,
    blocks: RwLock<BTreeSet<FsBlock>>,
}

impl AttributeBlocks {
    /// Remembers `block`.
    pub(super) fn note(&self, block: FsBlock) {
        let known = self.read(|blocks| blocks.contains(&block) || blocks.len() >= MAX_BLOCKS);
        if known {
            return;
        }
        let mut blocks = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        blocks.insert(block);
        self.any.store(true, Ordering::Release);
    }

    /// The first remembered block of `range`.
    pub(super) fn first_in(&self, range: Range<FsBlock>) -> Option<FsBlock> {
        if !self.any.load(Ordering::Acquire) || range.is_empty() {
            return None;
        }
        self.read(|blocks| blocks.range(range).next().copied())
    }

    fn read<T>(&self, look: impl FnOnce(&BTreeSet<FsBlock>) -> T) -> T {
        look(&self.blocks.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_remembered_block_of_a_range_is_found() {
        let blocks = AttributeBlocks::default();
        let first = |range: Range<u64>| blocks.first_in(FsBlock(range.start)..FsBlock(range.end));
        assert_eq!(first(0..u64::MAX), None);
        blocks.note(FsBlock(7));
        blocks.note(FsBlock(5));
        blocks.note(FsBlock(5));
        assert_eq!(first(0..10), Some(FsBlock(5)));
        assert_eq!(first(6..8), Some(FsBlock(7)));
        assert_eq!(first(6..7), None);
        assert_eq!(first(8..8), None);
    }
}
