//! Writing what an overlay holds into an image that it lies on.
//!
//! # Invariants
//!
//! 1. The overlay forgets nothing before all of it is durable in the base: whenever the power is cut, the overlay
//!    reads the same as before.

use std::sync::Arc;

use super::convert::as_qcow2;
use super::copy::{Blank, Manner, Target, Zeros, copy};
use super::source::Chain;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::progress::Progress;
use crate::sys::block_on;

/// What becomes of the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It forgets what its backing image holds now.
    Empty,
    /// It stays as it is.
    Keep,
}

/// Writes into `base`, durably, what `overlay` and the layers above `base` hold. The base is a layer of the overlay's
/// chain, writable and at least as long; to empty the overlay it has to be the very next.
///
/// # Errors
/// What reading the overlay or writing the base fails with; the overlay reads the same still.
pub fn commit(
    overlay: &Arc<dyn Image>,
    base: &Arc<dyn Image>,
    afterwards: Afterwards,
    progress: &Progress,
) -> Result<()> {
    let is_next = overlay
        .backing()
        .is_some_and(|backing| Arc::ptr_eq(backing, base));
    if afterwards == Afterwards::Empty && !is_next {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: it cannot be emptied while images lie between it and {}",
                overlay.name(),
                base.name()
            ),
        ));
    }
    let source = Chain::above(Arc::clone(overlay), Arc::clone(base));
    let manner = Manner {
        zeros: Zeros::Known,
        blank: Blank::Unknown,
        ..Manner::new()
    };
    // Invariant 1: the copy ends with a flush of the base.
    copy(&source, &Target::Plain(&**base), manner, progress)?;
    match (afterwards, as_qcow2(&**overlay)) {
        (Afterwards::Empty, Some(qcow2)) => block_on(async {
            qcow2.forget_all().await?;
            overlay.flush().await
        }),
        _ => Ok(()),
    }
}
