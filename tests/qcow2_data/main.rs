//! What a qcow2 image can hold besides plain clusters in its own file, written by us and judged by stock tools.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "../engine/mod.rs"]
mod engine;

mod bitmaps;
mod compressed;
mod data_file;
mod preallocation;
mod subclusters;
