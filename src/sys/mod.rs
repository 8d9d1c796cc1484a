//! The only unsafe code: memory that the kernel or a guest shares with us, and the kernel interfaces
//! that no safe crate covers.

#![allow(unsafe_code)]

mod executor;
mod io_buf;

pub use executor::block_on;
pub use io_buf::IoBuf;
