//! What a copy reads: one disk or several in a row, whole or as far as they differ from a base.

use std::sync::Arc;

use super::extents::Extents;
use crate::image::{Image, ImageFuture};
use crate::sys::IoBuf;
use crate::units::GuestOffset;

/// What is known of a range before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// It has to be read.
    Data,
    /// It reads as zeros.
    Zero,
    /// It is what the base has there, or nothing.
    Inherited,
}

/// What a copy reads. Its contents do not change meanwhile.
pub trait Source: Send + Sync {
    /// Bytes to copy.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `at`.
    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_>;

    /// A walk over what there is to copy.
    fn walk(&self) -> Box<dyn Walk + '_>;
}

/// A walk over a source, forward only.
pub trait Walk: Send {
    /// What is known of the range that begins at `at`, and how long it is: at least one byte, and not beyond `end`.
    fn next(&mut self, at: GuestOffset, end: u64) -> ImageFuture<'_, (Content, u64)>;
}

/// A chain of images, as a source.
pub struct Chain {
    image: Arc<dyn Image>,
    base: Option<Arc<dyn Image>>,
}

impl Chain {
    /// All that `image` reads.
    #[must_use]
    pub fn whole(image: Arc<dyn Image>) -> Self {
        Self { image, base: None }
    }

    /// What `image` holds above `base`, a layer of its chain.
    #[must_use]
    pub fn above(image: Arc<dyn Image>, base: Arc<dyn Image>) -> Self {
        Self {
            image,
            base: Some(base),
        }
    }
}

impl Source for Chain {
    fn size(&self) -> u64 {
        self.image.virtual_size()
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        self.image.read(at, buf)
    }

    fn walk(&self) -> Box<dyn Walk + '_> {
        Box::new(ChainWalk(Extents::above(&self.image, self.base.as_ref())))
    }
}

struct ChainWalk(Extents);

impl Walk for ChainWalk {
    fn next(&mut self, at: GuestOffset, end: u64) -> ImageFuture<'_, (Content, u64)> {
        Box::pin(async move {
            let extent = self.0.next(at, end).await?;
            let content = if extent.is_zero() {
                Content::Zero
            } else if extent.is_present() {
                Content::Data
            } else {
                Content::Inherited
            };
            Ok((content, extent.len))
        })
    }
}

/// Disks one after the other.
pub struct Concatenation {
    /// Where each begins.
    parts: Vec<(u64, Chain)>,
    size: u64,
}

impl Concatenation {
    /// `images` in this order.
    #[must_use]
    pub fn new(images: impl IntoIterator<Item = Arc<dyn Image>>) -> Self {
        let mut parts = Vec::new();
        let mut size: u64 = 0;
        for image in images {
            let start = size;
            size = size.saturating_add(image.virtual_size());
            parts.push((start, Chain::whole(image)));
        }
        Self { parts, size }
    }

    /// The part that holds the byte at `at`, and where that begins.
    fn part(&self, at: u64) -> Option<(usize, u64, &Chain)> {
        let number = self.parts.partition_point(|(start, _)| *start <= at);
        // Of those that begin there, the last has bytes.
        let number = number.checked_sub(1)?;
        let (start, chain) = self.parts.get(number)?;
        Some((number, *start, chain))
    }
}

impl Source for Concatenation {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move {
            let mut done = 0;
            while done < buf.len() {
                let at = at.0 + done as u64;
                let Some((_, start, chain)) = self.part(at) else {
                    break;
                };
                let left = (start + chain.size()).saturating_sub(at);
                let len = usize::try_from(left)
                    .map_or(buf.len() - done, |left| left.min(buf.len() - done));
                if len == 0 {
                    break;
                }
                let part = buf.slice(done..done + len);
                chain.read(GuestOffset(at - start), part).await?;
                done += len;
            }
            Ok(())
        })
    }

    fn walk(&self) -> Box<dyn Walk + '_> {
        Box::new(ConcatenationWalk {
            whole: self,
            number: usize::MAX,
            walk: None,
        })
    }
}

struct ConcatenationWalk<'a> {
    whole: &'a Concatenation,
    /// The part that `walk` walks over.
    number: usize,
    walk: Option<Box<dyn Walk + 'a>>,
}

impl Walk for ConcatenationWalk<'_> {
    fn next(&mut self, at: GuestOffset, end: u64) -> ImageFuture<'_, (Content, u64)> {
        Box::pin(async move {
            let Some((number, start, chain)) = self.whole.part(at.0) else {
                return Ok((Content::Zero, end.saturating_sub(at.0)));
            };
            if self.number != number {
                self.number = number;
                self.walk = None;
            }
            let walk = self.walk.get_or_insert_with(|| chain.walk());
            let end = end.min(start + chain.size()) - start;
            walk.next(GuestOffset(at.0 - start), end).await
        })
    }
}
