//! Partition tables: which bytes of a disk are which partition. Pure functions over bytes.
//!
//! [`Scan`] reads an MBR with its logical partitions, or a GPT. It reads nothing itself: it names the bytes that it
//! needs next, and its caller hands them in. All of them are untrusted; a walk is bounded, and no partition that
//! it returns leaves the disk or overlaps another. Sectors are those of virtio, 512 bytes.

mod gpt;
mod mbr;
mod scan;

pub use scan::{Partition, PartitionKind, Scan};
