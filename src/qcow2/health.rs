//! Whether an image may be written: the corrupt bit, failed metadata writes, and what has to happen before the
//! first write (qcow2 specification, "Header", feature bits).
//!
//! # Invariants
//!
//! 1. Once writing has been forbidden it stays so until the image is reopened; reads go on.
//! 2. Autoclear bits are durably cleared before anything else is written, but for those whose promise is kept: that
//!    for bitmaps is by marking them as in use (`qcow2::bitmap`).
//! 3. With lazy refcounts the dirty bit is durably set before anything else is written, and cleared when the image is
//!    closed and its refcounts are durable, too. Whoever finds it set makes the refcounts anew before they are used.
//! 4. Metadata found broken sets the corrupt bit, so that no one else writes either before a repair.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bitmap::{BitmapDirectory, Change};
use super::engine::Qcow2;
use super::features::{AutoclearFeatures, IncompatibleFeatures};
use super::header::{Header, Version};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Access;

/// Why writing is forbidden, and whether it has begun.
#[derive(Debug)]
pub(super) struct Health {
    broken: AtomicBool,
    reason: OnceLock<String>,
    /// The corrupt bit is still to be set.
    unrecorded: AtomicBool,
    /// The first write may go ahead: nothing is left to be cleared.
    begun: AtomicBool,
}

impl Health {
    /// The state of an image with this header.
    pub(super) fn new(header: &Header, access: Access) -> Self {
        let mut promises = header.autoclear_features;
        if header.has_raw_data_file() {
            promises = promises.without(AutoclearFeatures::RAW_EXTERNAL_DATA);
        }
        let clean = promises == AutoclearFeatures::default() && !header.has_lazy_refcounts();
        Self {
            broken: AtomicBool::new(false),
            reason: OnceLock::new(),
            unrecorded: AtomicBool::new(false),
            begun: AtomicBool::new(access == Access::ReadWrite && clean),
        }
    }

    /// Whether the fast path may write: nothing is broken, and nothing is left to be done before.
    pub(super) fn allows_writes(&self) -> bool {
        self.begun.load(Ordering::Acquire) && !self.broken.load(Ordering::Acquire)
    }

    /// Says that the next write has to begin with [`Qcow2::begin_writing`] again.
    pub(super) fn end_writing(&self) {
        self.begun.store(false, Ordering::Release);
    }

    /// Forbids all further writes.
    pub(super) fn poison(&self, reason: &dyn std::fmt::Display) {
        // The first reason is the one to act on.
        if self.reason.set(reason.to_string()).is_ok() {
            self.broken.store(true, Ordering::Release);
        }
    }

    /// Forbids all further writes since the metadata is broken; the corrupt bit is set by whoever can do I/O next.
    pub(super) fn find_corrupt(&self, reason: &dyn std::fmt::Display) {
        self.unrecorded.store(true, Ordering::Release);
        self.poison(reason);
    }
}

/// A change of several writes under way. Dropped before its end it leaves the disk in a state that nobody knows, and
/// writes that may still be under way: all further ones are forbidden.
#[must_use]
pub(super) struct PoisonIfDropped<'a> {
    health: &'a Health,
    what: &'static str,
}

impl Health {
    /// Sees to it that dropping the calling task from here on forbids all further writes.
    pub(super) fn poison_if_dropped(&self, what: &'static str) -> PoisonIfDropped<'_> {
        PoisonIfDropped { health: self, what }
    }
}

impl PoisonIfDropped<'_> {
    /// The change has come to its end, well or not.
    pub(super) fn settle(self) {
        std::mem::forget(self);
    }
}

impl Drop for PoisonIfDropped<'_> {
    fn drop(&mut self) {
        self.health
            .poison(&format_args!("{} was cut short", self.what));
    }
}

/// Whether the refcounts of an image that is to be written can be relied on.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if its last writer has left them out of date.
pub(super) fn require_refcounts(header: &Header) -> Result<()> {
    if !header
        .incompatible_features
        .contains(IncompatibleFeatures::DIRTY)
    {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        "the refcounts are out of date (the dirty bit is set) and the image cannot be written: repair it with \
         `seethrough check -r all IMAGE`, or open it read-only",
    ))
}

impl Qcow2 {
    /// # Errors
    /// [`ErrorKind::Poisoned`] if an earlier failure forbids writing.
    pub(super) fn check_not_poisoned(&self) -> Result<()> {
        if !self.health.broken.load(Ordering::Acquire) {
            return Ok(());
        }
        let reason = self
            .health
            .reason
            .get()
            .map_or("an earlier failure", String::as_str);
        Err(Error::new(
            ErrorKind::Poisoned,
            format!(
                "{} takes no writes until it is reopened: {reason}",
                self.storage.name()
            ),
        ))
    }

    /// What every operation that changes anything begins with.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`], [`ErrorKind::Poisoned`], or the storage's.
    pub(super) async fn begin_writing(&self) -> Result<()> {
        if self.access == Access::ReadOnly {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{} is open read-only", self.storage.name()),
            ));
        }
        self.check_not_poisoned()?;
        if self.health.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        // Invariants 2 and 3. Two that get here at once do it twice, which does no harm.
        let kept = self.disown_bitmaps(Change::Contents).await?;
        let kept = kept.with(self.kept_by_data_file());
        self.update_header(|header| {
            header.autoclear_features = AutoclearFeatures(header.autoclear_features.0 & kept.0);
            if self.is_lazy {
                let dirty = IncompatibleFeatures::DIRTY;
                header.incompatible_features = header.incompatible_features.with(dirty);
            }
        })
        .await?;
        self.storage.flush().await?;
        self.health.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Marks the bitmaps that a change makes untrue, and returns the autoclear bit that may stay for that: none if the
    /// bitmaps make no sense. Not durable before a flush.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn disown_bitmaps(&self, change: Change) -> Result<AutoclearFeatures> {
        let header = self.header.lock().await.clone();
        match BitmapDirectory::read(self.storage.as_ref(), &header).await {
            Ok(Some(directory)) => {
                directory.mark_in_use(self.storage.as_ref(), change).await?;
                Ok(AutoclearFeatures::BITMAPS)
            }
            Ok(None) => Ok(AutoclearFeatures::default()),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                log::warn!(
                    "{}: the persistent bitmaps are given up: {error}",
                    self.storage.name()
                );
                Ok(AutoclearFeatures::default())
            }
            Err(error) => Err(error),
        }
    }

    /// Passes a result on; an error that says the image's metadata is broken also has the consequences
    /// (invariant 4).
    pub(super) async fn judge<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.kind() == ErrorKind::Corrupt
        {
            self.health.find_corrupt(error);
        }
        self.record_corruption().await;
        result
    }

    /// Sets the corrupt bit if that is still to be done. What the disk holds is in doubt anyway: a failure here
    /// changes nothing for the caller.
    pub(super) async fn record_corruption(&self) {
        if !self.health.unrecorded.swap(false, Ordering::AcqRel) {
            return;
        }
        let reason = self.health.reason.get().map_or("", String::as_str);
        log::error!(
            "{}: {reason}; the image takes no more writes: repair it with `seethrough check -r all IMAGE`",
            self.storage.name()
        );
        if self.access == Access::ReadOnly {
            return;
        }
        let marked = self
            .update_header(|header| {
                if header.version == Version::V3 {
                    let corrupt = IncompatibleFeatures::CORRUPT;
                    header.incompatible_features = header.incompatible_features.with(corrupt);
                }
            })
            .await;
        let durable = match marked {
            Ok(()) => self.storage.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = durable {
            log::error!(
                "{}: cannot set the corrupt bit: {error}",
                self.storage.name()
            );
        }
    }
}
