//! The engine where it hurts: many requests at once, disks that fill up, other people's bytes in fresh clusters.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]
#![allow(unreachable_pub)]

mod concurrency;
mod dropped;
#[path = "../engine/mod.rs"]
mod engine;
mod full_disk;
mod guests;
mod history;
#[path = "../common/skip.rs"]
mod skip;
mod snapshots;
mod stale;
mod storage;
mod threads;
