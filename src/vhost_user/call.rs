//! Telling a driver that descriptors have been used.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::sync::{Mutex, PoisonError};

/// A vring's call eventfd. The front-end may replace it at any moment; the worker always uses the present one.
///
/// Without one, the driver polls its ring.
#[derive(Debug, Default)]
pub(super) struct Call(Mutex<Option<File>>);

impl Call {
    /// Uses `eventfd` from now on.
    pub(super) fn replace(&self, eventfd: Option<File>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = eventfd;
    }

    /// Notifies the driver.
    pub(super) fn notify(&self) {
        let eventfd = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut eventfd) = eventfd.as_ref()
            && let Err(error) = eventfd.write(&1u64.to_ne_bytes())
            // A counter about to overflow has notified already.
            && error.kind() != ErrorKind::WouldBlock
        {
            log::debug!("the call descriptor cannot be written: {error}");
        }
    }
}
