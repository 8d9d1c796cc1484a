//! One writer at a time for each shared block.
//!
//! Writing a shared block is reading it, exchanging the VM's own records and writing it back. Two such
//! writes under way at once would lose one another's records, even of one and the same VM: descriptors of
//! different groups lie in one block.

use async_lock::{Mutex, MutexGuard};

use crate::units::FsBlock;

/// How many blocks can be written at once at most; a power of two.
const STRIPES: usize = 32;

/// Locks for all blocks of a filesystem. Blocks share stripes, so memory is constant; neighbours never share one.
///
/// A task holds at most one of these locks, and may hold it across I/O: only writers of the same stripe wait.
#[derive(Debug)]
pub(super) struct BlockLocks {
    stripes: [Mutex<()>; STRIPES],
}

impl BlockLocks {
    pub(super) fn new() -> Self {
        Self {
            stripes: [const { Mutex::new(()) }; STRIPES],
        }
    }

    /// Waits until nobody else writes `block`.
    pub(super) async fn lock(&self, block: FsBlock) -> MutexGuard<'_, ()> {
        let stripe = usize::try_from(block.0 % STRIPES as u64).unwrap_or_default();
        self.stripes[stripe].lock().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::block_on;

    #[test]
    fn a_block_has_one_writer_and_its_neighbour_another() {
        let locks = BlockLocks::new();
        let held = block_on(locks.lock(FsBlock(5)));
        assert!(locks.stripes[5].try_lock().is_none());
        drop(block_on(locks.lock(FsBlock(6))));
        drop(held);
        assert!(locks.stripes[5].try_lock().is_some());
    }
}
