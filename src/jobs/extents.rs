//! What holds the bytes of a disk: a walk over a chain of images that says for every range which layer decides, and
//! what it says.
//!
//! # Invariants
//!
//! 1. Every layer is asked once for every run of its own, however finely the layers below cut it: the walk is linear
//!    in what the layers say, not in its product. So the walk goes forward only, and a layer that changes ahead of
//!    the walk may not be seen to.

use std::sync::Arc;

use crate::error::Result;
use crate::image::{Allocation, Image};
use crate::units::{GuestOffset, HostOffset};

/// A walk over the layers of a chain, from its first byte to its last.
pub struct Extents {
    layers: Vec<Layer>,
}

/// A range of a disk that one layer decides in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first byte.
    pub at: GuestOffset,
    /// Bytes.
    pub len: u64,
    /// The layer that decides: 0 is the topmost.
    pub depth: usize,
    /// What it says. Where it says nothing, no layer of the walk does, and what lies below the walk decides if
    /// there is anything.
    pub allocation: Allocation,
    /// Whether the range lies behind the end of all that is below.
    below_ends: bool,
}

struct Layer {
    image: Arc<dyn Image>,
    /// What the image has said last, of a run that begins and ends there.
    known: Option<(u64, u64, Allocation)>,
}

impl Layer {
    /// What the layer says at `at`, where it has a byte, and where that ends.
    async fn look(&mut self, at: u64) -> Result<(Allocation, u64)> {
        if let Some((start, end, allocation)) = self.known
            && (start..end).contains(&at)
        {
            return Ok((allocation.after(at - start), end));
        }
        let left = self.image.virtual_size().saturating_sub(at);
        let (allocation, len) = self.image.allocation(GuestOffset(at), left).await?;
        // An answer for nothing would keep the walk where it is.
        let end = at + len.clamp(1, left.max(1));
        self.known = Some((at, end, allocation));
        Ok((allocation, end))
    }
}

impl Extents {
    /// A walk over `image` and all that lies behind it.
    #[must_use]
    pub fn new(image: &Arc<dyn Image>) -> Self {
        Self::above(image, None)
    }

    /// A walk over `image` and what lies between it and `base`, which is a layer of the same chain and no part of
    /// the walk; over the whole chain without one.
    #[must_use]
    pub fn above(image: &Arc<dyn Image>, base: Option<&Arc<dyn Image>>) -> Self {
        let mut layers = Vec::new();
        let mut next = Some(image);
        while let Some(image) = next
            && !base.is_some_and(|base| Arc::ptr_eq(base, image))
        {
            layers.push(Layer {
                image: Arc::clone(image),
                known: None,
            });
            next = image.backing();
        }
        Self { layers }
    }

    /// The image that decides an extent.
    #[must_use]
    pub fn layer(&self, extent: &Extent) -> Option<&Arc<dyn Image>> {
        self.layers.get(extent.depth).map(|layer| &layer.image)
    }

    /// The extent that begins at `at`, which is not before that of the last call and inside the disk, and ends at
    /// `end` at the latest.
    ///
    /// # Errors
    /// Those of [`Image::allocation`].
    pub async fn next(&mut self, at: GuestOffset, end: u64) -> Result<Extent> {
        let mut end = end;
        let mut depth = 0;
        let mut extent = Extent {
            at,
            len: 0,
            depth,
            allocation: Allocation::Unallocated(None),
            below_ends: true,
        };
        while let Some(layer) = self.layers.get_mut(depth) {
            let (allocation, until) = layer.look(at.0).await?;
            end = end.min(until);
            let below = layer.image.backing().map(|below| below.virtual_size());
            extent = Extent {
                at,
                len: end - at.0,
                depth,
                allocation,
                below_ends: below.is_none_or(|size| at.0 >= size),
            };
            let decides = !matches!(allocation, Allocation::Unallocated(_));
            if decides || extent.below_ends {
                break;
            }
            // Not further than the layer below goes.
            end = below.map_or(end, |size| end.min(size));
            extent.len = end - at.0;
            depth += 1;
        }
        Ok(extent)
    }
}

impl Extent {
    /// The byte behind the last.
    #[must_use]
    pub fn end(&self) -> GuestOffset {
        GuestOffset(self.at.0.saturating_add(self.len))
    }

    /// Whether it is known to read as zeros.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        match self.allocation {
            Allocation::Zero(_) | Allocation::Sparse(_) => true,
            Allocation::Unallocated(_) => self.below_ends,
            Allocation::Data(_) | Allocation::Compressed => false,
        }
    }

    /// Whether a layer of the walk decides, and not what is or might be put below it.
    #[must_use]
    pub fn is_present(&self) -> bool {
        !matches!(self.allocation, Allocation::Unallocated(_))
    }

    /// Whether a layer has room for data allocated.
    #[must_use]
    pub fn is_data(&self) -> bool {
        matches!(
            self.allocation,
            Allocation::Data(_) | Allocation::Compressed | Allocation::Sparse(_)
        )
    }

    /// Whether the data is compressed.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        self.allocation == Allocation::Compressed
    }

    /// Where the first byte lies, or would if it was written, in the data file of the layer.
    #[must_use]
    pub fn host_offset(&self) -> Option<HostOffset> {
        match self.allocation {
            Allocation::Data(at) | Allocation::Zero(at) | Allocation::Unallocated(at) => at,
            Allocation::Sparse(at) => Some(at),
            Allocation::Compressed => None,
        }
    }
}
