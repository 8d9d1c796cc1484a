//! The base as of its last committed transaction.
//!
//! A base that is mounted writes its metadata to its journal first, and to its place some time later. Children are
//! to see what the base has committed, so they are shown the blocks in the log for as long as those have not come to
//! their place. The daemon sees every write to the journal, so it knows at every moment what the log holds; after a
//! restart it scans the log, as a kernel does that recovers.
//!
//! ```text
//!   the base's write to its journal ─ follow ─ index: which block lies where in the log
//!   a child's read of the base ───── committed ─┬─ in the index: from the log
//!                                               └─ else: from its place
//! ```
//!
//! # Invariants
//!
//! 1. What the index says is what a recovery of the log would write: every transaction up to the last committed one,
//!    revoked blocks left out, from where the journal's superblock says that the log begins.
//! 2. The base's guest learns that a write to its journal is done only after the index knows of it. So a commit
//!    block that the guest knows to be written is one that children see, and a part of the log that the guest
//!    believes to be free is one that no child will begin to read.
//! 3. A block read from the log is given to a child only if the index still names that place afterwards: the base
//!    may have come round the log and overwritten it.
//! 4. A block that the index names is written in its place only after every read of it has ended that began before the
//!    index named it: whoever reads a block in its place holds a token from before it looks into the index.
//! 5. Only blocks that the base alone owns are followed. What the log says of superblock, descriptors and of other
//!    VMs' groups is the base's view of them, and not true.
//!
//! Lock order: the follower's, held across reads of the journal; inside it the index's, never across I/O.

mod committed;
mod follow;
mod index;
mod log;
mod readers;

pub use committed::Committed;
