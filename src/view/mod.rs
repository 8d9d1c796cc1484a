//! What one VM sees of a shared disk, and what it may write.
//!
//! A base VM and its children hold one ext4 filesystem, and all of them write. Every block group has one
//! owner; whatever lies in a group, or serves it, is written by its owner alone. A VM's [`View`] stands
//! between its device and its images and shows it a filesystem in which only its own groups can be
//! written: the others look full, and their inodes immutable, so that an unmodified kernel leaves them alone.
//! Behind that, whatever a VM writes to what is not its own is refused.
//!
//! ```text
//!   request ─ route ─┬─ through ──────────────── the VM's own store (its unwritten ranges fall to the base)
//!                    ├─ in place ─────────────── own groups of a shared region: the base's store
//!                    ├─ composed ─ compose ───── own records from the own store, foreign ones from the base
//!                    │             scatter ───── own records to the own store, foreign ones dropped
//!                    └─ foreign ─┬ journal ───── read: from the base, as it has committed
//!                                └ refusals ──── written: refused
//! ```
//!
//! # Invariants
//!
//! 1. What is where comes from the base alone, read once when the view is opened; nothing that a child
//!    wrote is ever trusted to say it.
//! 2. Nothing foreign is ever written, whatever the request: a request that touches foreign data is refused
//!    before any of it is applied; foreign records in shared blocks never leave the scatterer.
//! 3. Foreign records are read from the base, never from what the VM's own store holds in their place.
//! 4. What the base stores is true: its own e2fsck finds nothing amiss. Only its view shows groups as full.
//! 5. A block that serves several owners is classified by the group that it *serves*, not by the group it lies in.
//!
//! Lock order, each held across the I/O of one shared block: the block in a child's overlay → the same block in the
//! base, if it holds descriptors of the child's there → the base's superblock. Nothing else is locked under them but
//! the lists of the layers below.

mod attribute_blocks;
mod changes;
mod choose;
mod compose;
pub mod declaration;
pub mod declared;
mod disk;
pub mod file_search;
mod group_list;
pub mod group_map;
mod groups;
pub mod grown;
pub mod journal;
pub mod lease;
mod ledger;
pub mod merged;
mod merged_growth;
pub mod new_child;
mod new_directory;
mod new_groups;
pub mod open;
pub mod ownership;
pub mod prepare;
pub mod probe;
pub mod refresh;
pub mod refusal;
mod refusal_book;
pub mod region_change;
pub mod regions;
pub mod room;
mod route;
mod scatter;
mod session;
pub mod statfs;
pub mod territory;

pub use disk::View;
