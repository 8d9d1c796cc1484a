//! The on-disk structures of ext4, their checksums and their layout: pure functions over bytes.
//!
//! One on-disk structure per file. Nothing here does I/O: whoever holds a disk reads the blocks that a function
//! asks for and hands their bytes in. Offsets and names are those of the kernel's
//! `Documentation/filesystems/ext4`. All input is untrusted: every number from a disk is checked before it
//! is used, and every walk is bounded.

pub mod bitmap;
pub mod checksum;
pub mod directory;
pub mod dirhash;
pub mod extent;
pub mod features;
pub mod geometry;
pub mod group;
pub mod group_descriptor;
pub mod growth;
pub mod htree;
pub mod inode;
pub mod jbd2;
pub mod jbd2_log;
pub mod layout;
pub mod layout_builder;
pub mod mmp;
pub mod new_directory;
pub mod orphan_file;
pub mod records;
pub mod resize_inode;
pub mod superblock;
pub mod volatile;
pub mod xattr_block;

mod fields;
mod locations;
