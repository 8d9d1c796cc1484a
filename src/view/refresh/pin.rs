//! Pins of a base: taken, opened and deleted while the base's VM runs.

use std::sync::Arc;
use std::time::SystemTime;

use super::pin_name::PinName;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::image::Image;
use crate::qcow2::{OnlineQcow2, Qcow2};
use crate::view::declaration::BaseDeclaration;
use crate::view::journal::Committed;
use crate::view::open::base_filesystem;
use crate::view::territory::Filesystem;

/// A moment of a base, as its VM had committed it by then.
pub(super) struct Pin {
    disk: Arc<Qcow2>,
    /// What children read.
    pub(super) committed: Committed,
}

/// A base whose moments can be pinned.
pub(super) struct Pinnable {
    image: Arc<OnlineQcow2>,
    declaration: BaseDeclaration,
    /// The filesystem when the child was opened: what ownership was worked out from.
    filesystem: Option<Filesystem>,
}

impl Pinnable {
    /// The base in `image`, which says of itself what `declaration` holds.
    ///
    /// # Errors
    /// As [`base_filesystem`].
    pub(super) async fn new(image: Arc<OnlineQcow2>, declaration: BaseDeclaration) -> Result<Self> {
        Ok(Self {
            filesystem: base_filesystem(&*image, &declaration).await?,
            image,
            declaration,
        })
    }

    /// The base as it is stored now.
    pub(super) fn image(&self) -> &OnlineQcow2 {
        &self.image
    }

    /// Pins the present moment.
    ///
    /// # Errors
    /// As [`OnlineQcow2::create_snapshot`] and [`Pinnable::open`]; there is no such pin then.
    pub(super) async fn take(&self, name: &PinName) -> Result<Pin> {
        let snapshot = name.snapshot();
        // A power cut before the overlay named it may have left one.
        for left in self.image.snapshots().await? {
            if left.name == snapshot {
                self.image.delete_snapshot(&snapshot).await?;
            }
        }
        self.image
            .create_snapshot(&snapshot, SystemTime::now())
            .await
            .context(|| format!("taking a snapshot of {}", self.image.name()))?;
        let opened = self.open(name).await;
        if opened.is_err() {
            self.delete(name).await;
        }
        opened
    }

    /// Opens a pin that was taken before.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfBounds`] if there is none, [`ErrorKind::Refused`] if its filesystem has another layout
    /// (invariant 4 of [`super`]); and what reading the base returns.
    pub(super) async fn open(&self, name: &PinName) -> Result<Pin> {
        let disk = Arc::new(self.image.open_snapshot(&name.snapshot()).await?);
        let filesystem = base_filesystem(&*disk, &self.declaration).await?;
        let is_same = match (&self.filesystem, &filesystem) {
            (Some(known), Some(found)) => known.has_layout_of(found),
            (None, None) => true,
            _ => false,
        };
        if !is_same {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "the filesystem of {} has been given another layout since it was opened: restart the daemon \
                     to see it as it is now",
                    self.image.name()
                ),
            ));
        }
        let shared: Arc<dyn Image> = Arc::clone(&disk) as _;
        Ok(Pin {
            committed: Committed::open(shared, filesystem).await?,
            disk,
        })
    }

    /// Whether the base is as it was when `pin` was taken.
    ///
    /// # Errors
    /// As [`OnlineQcow2::is_unchanged_since`].
    pub(super) async fn is_unchanged_since(&self, pin: &Pin) -> Result<bool> {
        self.image.is_unchanged_since(&pin.disk).await
    }

    /// Deletes a pin that nobody reads. One that cannot be deleted now is found again when the child is served next.
    pub(super) async fn delete(&self, name: &PinName) {
        if let Err(error) = self.image.delete_snapshot(&name.snapshot()).await {
            log::warn!(
                "{}: snapshot {name}, which nobody needs any more, stays for now: {error}",
                self.image.name()
            );
        }
    }

    /// Deletes all pins of the child of `kept` but this one: what a power cut has left, or nobody could delete.
    ///
    /// # Errors
    /// As [`OnlineQcow2::snapshots`].
    pub(super) async fn delete_others(&self, kept: &PinName) -> Result<()> {
        for snapshot in self.image.snapshots().await? {
            match PinName::of_snapshot(&snapshot.name) {
                Some(found) if found.is_of_the_child_of(kept) && found != *kept => {
                    self.delete(&found).await;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Pin {
    /// Waits until the last read of the pin has ended.
    pub(super) async fn end(self) {
        drop(self.committed);
        self.disk.all_ended().await;
    }
}
