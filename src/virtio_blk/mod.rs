//! The virtio block device (virtio 1.3, section 5.2): what a descriptor chain asks for, what the device
//! answers, and its configuration space. Nothing here knows how rings reach the daemon.
//!
//! # Invariants
//!
//! 1. Guest memory changes under our feet: a header or a segment is copied once, and the copy is judged.
//! 2. Whatever a chain holds, parsing ends with a request or a [`Rejection`]; neither loses the chain, and both
//!    know its status byte if it has one.
//! 3. Before a request reaches the image, its range is known to lie within the disk and its size within the limits
//!    that the configuration space tells.

mod chain;
mod config;
mod device;
mod execute;
mod request;
mod status;
#[cfg(test)]
mod testing;

pub use chain::ChainReader;
pub use config::{CONFIG_SIZE, Config, WRITEBACK_OFFSET, WriteCache};
pub use device::{Device, ID_LEN};
pub use execute::execute;
pub use request::{Operation, Rejection, Request, Segment};
pub use status::{Status, status_of};
