//! The tools for whole images against the stock ones: the same images, the same answers.

#[path = "../engine/mod.rs"]
mod engine;

mod bed;
mod bench;
mod commit;
mod compare;
mod convert;
mod huge;
mod map;
mod rebase;
mod resize;
#[path = "../common/skip.rs"]
mod skip;
mod snapshot;
