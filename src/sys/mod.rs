//! The only unsafe code: memory that the kernel or a guest shares with us, and the kernel interfaces
//! that no safe crate covers.

#![allow(unsafe_code)]

mod executor;
mod file_facts;
mod host_file;
mod io_buf;
mod local_time;
mod lost_memory;
mod offload;
mod op;
mod process;
mod prompt_io;
mod reactor;
mod ring;
mod ring_op;
mod signal;

pub use async_task::Task;
pub use file_facts::{
    FileId, bytes_on_host, direct_io_alignment, identify, is_in_memory, logical_block_size,
    next_data, next_hole,
};
pub use host_file::{HostFile, truncate_blocking};
pub use io_buf::IoBuf;
pub use local_time::LocalTime;
pub use lost_memory::WatchedMemory;
pub use offload::{keep_this_thread_responsive, offload};
pub use process::{exclude_from_core_dumps, share_freed_memory, take_inherited_fd};
pub use prompt_io::Promptness;
pub use reactor::{Direction, Reactor, block_on};
pub use ring_op::RingOp;
pub use signal::Signal;
