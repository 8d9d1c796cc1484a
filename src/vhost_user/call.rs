//! Telling a driver that descriptors have been used.

use std::fs::File;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::sys::Signal;

/// A vring's call eventfd. The front-end may replace it at any moment; the worker always uses the present one.
///
/// Without one, the driver polls its ring. A front-end that fills the counter, and makes writing to it wait, keeps
/// nobody: see [`Signal`].
#[derive(Debug, Default)]
pub(super) struct Call(Mutex<Option<Signal>>);

impl Call {
    /// Uses `eventfd` from now on.
    ///
    /// # Errors
    /// If it is no eventfd, or cannot be signalled; the driver is told by none then.
    pub(super) fn replace(&self, eventfd: Option<&File>) -> Result<()> {
        self.clear();
        let signal = eventfd
            .map(Signal::new)
            .transpose()
            .map_err(|error| Error::io("the call descriptor cannot be signalled", error))?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = signal;
        Ok(())
    }

    /// Tells the driver nothing from now on.
    pub(super) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Notifies the driver.
    pub(super) fn notify(&self) {
        let mut signal = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(signal) = signal.as_mut()
            && let Err(error) = signal.send()
        {
            log::debug!("the call descriptor cannot be signalled: {error}");
        }
    }
}
