//! The qcow2 format, versions 2 and 3: an in-process copy-on-write engine.
//!
//! ```text
//! Image ─ image ─┬─ read ─┬─ mapping ── l1, table_cache (L2)     what is where
//!                ├─ write ┼─ cow                                 what a write needs
//!                ├─ packing ───── compressed                     compressed clusters, and where they go
//!                ├─ data_file                                   where data lies that is not in the image itself
//!                ├─ zero ─┴─ room ───── allocator, table_cache (refcount blocks)
//!                └─ flush ── quarantine ─ grace                  what is durable when, what is free when
//! ```
//!
//! `check` works on a file that nobody has open. `snapshot` and `resize` change an image as a whole, each by one new
//! `revision` of its metadata; `online` does so while VMs use the image.
//!
//! The crash order is in the `flush` module, the lock order in `engine`.

mod address_hash;
mod allocation;
mod allocator;
pub mod backing_update;
pub mod bitmap;
pub mod cache_budget;
pub mod check;
mod cluster_ranges;
pub mod commitment;
pub mod compressed;
mod cow;
pub mod create;
pub mod data_file;
mod decompressed;
pub mod dump;
mod engine;
mod entry;
pub mod features;
mod flush;
mod geometry;
pub mod header;
pub mod header_extension;
mod header_parse;
mod header_switch;
pub mod header_update;
mod health;
mod image;
pub(crate) mod join;
mod l1;
mod l2_table;
mod mapping;
mod online;
mod packing;
pub mod preallocate;
mod quarantine;
mod read;
mod refcount;
mod resize;
mod revision;
mod revision_refcounts;
mod room;
mod snapshot;
mod snapshot_metadata;
pub mod snapshot_table;
mod supported;
mod table_cache;
mod write;
mod zero;
mod zeros;

pub use engine::Qcow2;
pub use online::OnlineQcow2;
