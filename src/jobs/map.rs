//! The map of a disk: what holds each of its ranges, as `qemu-img map` tells it.

use std::sync::Arc;

use super::extents::{Extent, Extents};
use crate::error::Result;
use crate::image::Image;
use crate::units::GuestOffset;

/// A line of the map: extents that lie one after the other, on the disk and in the host file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The first byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// The layer that decides: 0 is the topmost.
    pub depth: usize,
    /// Whether the chain decides, and not what might be put below it.
    pub present: bool,
    /// Whether it is known to read as zeros.
    pub zero: bool,
    /// Whether room for data is in use.
    pub data: bool,
    /// Whether the data is compressed.
    pub compressed: bool,
    /// Where the first byte lies, and in which file.
    pub place: Option<(u64, Arc<str>)>,
}

impl MapEntry {
    fn new(extent: &Extent, file: Option<Arc<str>>) -> Self {
        Self {
            start: extent.at.0,
            length: extent.len,
            depth: extent.depth,
            present: extent.is_present(),
            zero: extent.is_zero(),
            data: extent.is_data(),
            compressed: extent.is_compressed(),
            place: extent.host_offset().map(|at| at.0).zip(file),
        }
    }

    /// Whether `next` is more of the same.
    fn continues(&self, next: &Self) -> bool {
        let place = self
            .place
            .as_ref()
            .map(|(at, file)| (at.saturating_add(self.length), Arc::clone(file)));
        let expected = Self {
            start: self.start.saturating_add(self.length),
            length: next.length,
            place,
            ..self.clone()
        };
        expected == *next
    }
}

/// Calls `show` with every line of the map of `image`, from `start` to `end`, in their order.
///
/// # Errors
/// Those of [`Image::allocation`], and what `show` fails with.
pub async fn map(
    image: &Arc<dyn Image>,
    start: u64,
    end: u64,
    mut show: impl FnMut(&MapEntry) -> Result<()>,
) -> Result<()> {
    let mut extents = Extents::new(image);
    let end = end.min(image.virtual_size());
    let mut files: Vec<Option<Arc<str>>> = Vec::new();
    let mut last: Option<MapEntry> = None;
    let mut at = start;
    while at < end {
        let extent = extents.next(GuestOffset(at), end).await?;
        at = extent.end().0;
        if files.len() <= extent.depth {
            files.resize(extent.depth + 1, None);
        }
        if let (Some(file @ None), Some(layer)) =
            (files.get_mut(extent.depth), extents.layer(&extent))
        {
            *file = Some(layer.data_file().into());
        }
        let file = files.get(extent.depth).cloned().flatten();
        let entry = MapEntry::new(&extent, file);
        match &mut last {
            Some(last) if last.continues(&entry) => last.length += entry.length,
            Some(shown) => {
                show(shown)?;
                *shown = entry;
            }
            None => last = Some(entry),
        }
    }
    last.map_or(Ok(()), |last| show(&last))
}
