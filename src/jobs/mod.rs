//! Jobs on whole images, as the verbs of the command line do them: what lies where in a chain, copies,
//! comparisons, figures.
//!
//! A job takes open images and a [`crate::progress::Progress`]; it prints nothing and knows no arguments.

pub mod bench;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod copy;
pub mod extents;
pub mod figures;
mod lanes;
pub mod map;
pub mod measure;
pub mod rebase;
pub mod source;
