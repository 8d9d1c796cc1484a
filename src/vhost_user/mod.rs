//! The vhost-user back-end (QEMU's vhost-user protocol): sockets, front-ends and virtqueues.
//!
//! # Threads
//!
//! ```text
//! main            listens, takes signals, starts and ends sessions            (server)
//! <vm>            one per connected front-end: its messages, one by one       (session, front_end)
//! <vm>-q<n>       one per running vring: its requests, on its own reactor     (worker)
//! ```
//!
//! # Invariants
//!
//! 1. A vring runs exactly as long as its worker thread: stopping joins the thread, which first ends all requests
//!    that it has taken. Whatever answers after a stop knows that no guest memory of the vring is touched and
//!    no notification sent any more. There is no other way to change a running vring than to stop it.
//! 2. Only the session's thread starts and stops vrings, so stopping holds no lock that a worker could want.
//! 3. What a front-end sends can end its own session, nothing else.

mod call;
mod front_end;
mod memory;
mod pending;
mod polling;
mod server;
mod session;
mod socket;
mod split_ring;
mod stop;
mod vring;
mod worker;

pub use server::{Server, Vm};
pub use socket::{Audience, Endpoint, Listener};

/// The most entries of a vring.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The most vrings of a device.
pub const MAX_QUEUES: u16 = 64;

/// A name that fits the kernel's 15 bytes: the VM's, as much as there is room for, and `suffix`.
fn thread_name(vm: &str, suffix: &str) -> String {
    const MAX_LEN: usize = 15;
    let mut name = String::new();
    for c in vm.chars().filter(|c| *c != '\0') {
        if name.len() + c.len_utf8() + suffix.len() > MAX_LEN {
            break;
        }
        name.push(c);
    }
    name + suffix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_names_keep_their_suffix() {
        assert_eq!(thread_name("base", "-q3"), "base-q3");
        assert_eq!(thread_name("a-very-long-name", "-q12"), "a-very-long-q12");
        assert_eq!(thread_name("ööööööööö", "-q1"), "öööööö-q1");
        assert_eq!(thread_name("nul\0", ""), "nul");
    }
}
