//! The four figures of an image. Its commitment is a bound: images of every shape are filled in random order, by our
//! engine and by stock tools, and never come to more; and it is a tight one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used, unreachable_pub)]

#[path = "../engine/mod.rs"]
mod engine;

mod filling;
mod info;
mod made;
mod measure;
mod rewriting;
