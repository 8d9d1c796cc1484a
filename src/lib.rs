//! seethrough: a vhost-user-blk daemon that serves guests from an in-process qcow2 engine, through a
//! per-VM view that enforces who may write which part of a disk.
//!
//! # The way of a request
//!
//! ```text
//! guest vring ─ vhost_user ─ virtio_blk ─ view ─ image (raw | qcow2 | chain) ─ storage ─ io_uring ─ file
//!               lifecycle,   parse chain  who may  guest offset →              one host
//!               workers      to Request,  write,   host offset,                file, or
//!                            status back  compose  copy-on-write               memory, or faults
//! ```
//!
//! Down on the way in, up on the way out, one step per layer. Data does not move: the guest's own pages
//! are the I/O vectors that io_uring reads into and writes from.
//!
//! Two ways lead down. The *fast path* asks [`image::Image::map_read`] or
//! [`image::Image::map_write`], which answer from memory alone; where the answer is one extent of one
//! host file, the worker submits the I/O itself. Everything else (metadata misses, allocation,
//! copy-on-write, compressed clusters, composed blocks) is a future on the worker's own executor, so
//! that a miss never blocks another request.
//!
//! Imports point down this list only: `cli` → `control` → `vhost_user` → `virtio_blk` → `view` → `jobs` → `chain` →
//! {`qcow2`, `ext4`, `partition`} → `image` → `storage` → `sys`. [`units`], [`error`], [`metrics`], [`log_limit`] and
//! [`progress`] are leaves.
//! Modules of one layer do not know each other.

pub mod chain;
pub mod cli;
pub mod control;
pub mod error;
pub mod ext4;
pub mod image;
pub mod jobs;
pub mod log_limit;
pub mod metrics;
pub mod partition;
pub mod progress;
pub mod qcow2;
pub mod storage;
pub mod sys;
pub mod units;
pub mod vhost_user;
pub mod view;
pub mod virtio_blk;
