//! The harness for tests with real guests: boots Linux under stock QEMU, runs shell commands in it, runs
//! the daemon, and asks stock tools for their verdict on the images.
//!
//! Nothing here sleeps. Whoever waits, waits for an event (output, a socket that appears, a process that
//! ends) and fails loudly at a deadline, with the logs of all concerned.
//!
//! - [`Guest`]: a virtual machine and its shell;
//! - [`Backend`]: the daemon, or any other vhost-user back-end;
//! - [`Family`]: a base image, its children, their daemon, and the checks that follow every scenario;
//! - [`oracle`]: what stock tools say;
//! - [`narration`]: shows what runs, for the demo;
//! - [`guests_available`]: whether this machine can run guests at all.

// Each test binary includes this module and uses a part of it.
#![allow(dead_code, unreachable_pub, unused_imports)]
// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic)]

mod backend;
mod family;
mod guest;
pub mod narration;
pub mod oracle;
mod requirements;
mod skip;

pub use backend::Backend;
pub use family::{Family, FamilyConfig, Filesystem, Placement};
pub use guest::{Disk, Guest, GuestConfig, Output};
pub use requirements::{VmImages, guests_available, vm_images};
