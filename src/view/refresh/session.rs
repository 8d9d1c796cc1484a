//! What becomes of a child's view of its base when front-ends come and go, and when an operator moves it.

use std::sync::Arc;

use super::refresher::{Mounted, Moved, Refresher};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::view::View;
use crate::view::compose::read_bytes;

impl View {
    /// This view, showing the base as `refresher` says.
    pub(in crate::view) fn refreshed_by(mut self, refresher: Arc<Refresher>) -> Self {
        self.truth = Arc::clone(refresher.window()) as _;
        self.refresher = Some(refresher);
        self
    }

    /// What [`crate::image::Image::begin_session`] does.
    pub(in crate::view) async fn begin_session_of_guest(&self) -> Result<()> {
        self.start_session();
        match &self.refresher {
            Some(refresher) => refresher.begin(self.mounted().await?).await,
            None => Ok(()),
        }
    }

    /// What [`crate::image::Image::close`] does.
    pub(in crate::view) async fn end_session(&self) -> Result<()> {
        if let Some(refresher) = &self.refresher {
            // That nothing is mounted is durable before what was mounted is given up.
            self.flush().await?;
            refresher.end().await?;
        }
        self.close_stores().await
    }

    /// Moves the view of a child to its base as it is now. Must not be dropped before its end.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`] if it is no child, or sees its base live; [`ErrorKind::Refused`] if its filesystem
    /// is mounted; and as [`Refresher::refresh`].
    pub async fn refresh(&self) -> Result<Moved> {
        let Some(refresher) = &self.refresher else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "vm {}: there is nothing to refresh: it is served with refresh=live, or is no child",
                    self.refusals.vm()
                ),
            ));
        };
        refresher.refresh_by_command(self.mounted().await?).await
    }

    /// Whether the filesystem of a child's VM is mounted, as far as its own superblock says.
    async fn mounted(&self) -> Result<Mounted> {
        let Some(filesystem) = self.territory.filesystem() else {
            return Ok(Mounted::Perhaps);
        };
        let at = filesystem.superblock_block_offset();
        let block = read_bytes(&*self.own, at, filesystem.block_size()).await?;
        Ok(Mounted::as_told_by(&block))
    }
}
