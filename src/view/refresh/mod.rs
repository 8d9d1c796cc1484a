//! When a child sees what its base has written: at once, when it mounts, or when it is told to.
//!
//! A child with a policy other than [`Policy::Live`] does not read the base as it is now, but a *pin*: an internal
//! snapshot of the base, taken while its VM runs, and read as a recovery of the base's journal would leave it. The
//! view moves by being given a newer pin.
//!
//! ```text
//!   base.qcow2 ── the base's VM writes ──────────────────────────▶
//!        │ seethrough-pin-…-1        │ seethrough-pin-…-2
//!        ▼                           ▼
//!   Committed ──▶ Window: what a child's view reads as the base (exchanged while the child has nothing mounted)
//! ```
//!
//! # Invariants
//!
//! 1. From the write that marks a child's filesystem as mounted to the one that marks it as clean again, what its view
//!    reads of the base stays the same, byte for byte: over a reset of the device, a restart of the daemon and a crash
//!    of either VM.
//! 2. A pin is durable, and the child's overlay durably says that it reads it, before any of it is read. So whoever
//!    opens the child next goes on with it, or finds that there is none and nothing is mounted.
//! 3. A pin belongs to one child, whose identifier is in its name. It is deleted after the last read of it has ended
//!    and the overlay no longer names it; what a power cut leaves of that is found when the child is served next.
//! 4. A pin whose filesystem is laid out otherwise than the one that ownership was worked out from is not shown.
//!
//! Lock order: the refresher's `current`, then the window's exchange. A child's superblock is written with its block
//! locked, and reads the window under that.

mod open;
mod pace;
mod pin;
mod pin_name;
mod policy;
mod refresher;
mod session;
mod window;

pub use open::base_to_pin;
pub(super) use open::follow;
pub(super) use pin_name::PinName;
pub use policy::Policy;
pub(super) use refresher::Mounted;
pub use refresher::{Moved, Refresher};
