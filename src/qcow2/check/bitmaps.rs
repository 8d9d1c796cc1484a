//! The clusters of persistent bitmaps, which have refcounts too (qcow2 specification, "Bitmaps extension").
//!
//! Without the autoclear bit the bitmaps are out of date: nobody looks at them, and their clusters are leaks.

use super::super::bitmap::{BitmapCluster, BitmapDirectory};
use super::checker::Checker;
use super::counts::{Counts, Use};
use crate::error::{ErrorKind, Result};

impl Checker<'_> {
    /// Counts the references of bitmaps: to their directory, tables and clusters.
    ///
    /// # Errors
    /// The storage's.
    pub(super) async fn walk_bitmaps(&mut self, counts: &mut Counts) -> Result<()> {
        let place = BitmapDirectory::place(&self.header);
        let Some(Some(place)) = self.sound(place)? else {
            return Ok(());
        };
        self.refer(counts, place, 1, Use::Other, "bitmap directory");
        let directory = BitmapDirectory::read(self.storage, &self.header).await;
        let Some(Some(directory)) = self.sound(directory)? else {
            return Ok(());
        };
        for bitmap in &directory.bitmaps {
            let range = (bitmap.table_at, bitmap.table_len());
            self.refer(counts, range, 1, Use::Other, "bitmap table");
            let table = bitmap.read_table(self.storage, &self.header).await;
            for entry in self.sound(table)?.unwrap_or_default() {
                if let Some(BitmapCluster::Stored(at)) = self.sound(entry)? {
                    let range = (at, self.header.cluster_size());
                    self.refer(counts, range, 1, Use::Other, "bitmap cluster");
                }
            }
        }
        Ok(())
    }

    /// What was read; nothing if it is broken, which is told.
    fn sound<T>(&mut self, read: Result<T>) -> Result<Option<T>> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.has_broken_bitmaps = true;
                self.walk_corruption(1, || format!("bitmaps: {error}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
