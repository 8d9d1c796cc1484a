//! A copy-on-write disk in memory, for tests: blocks of one size over a backing image.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use seethrough::error::Result;
use seethrough::image::{Allocation, Image, ImageFuture, Limits, Mapped};
use seethrough::storage::ZeroMode;
use seethrough::sys::IoBuf;
use seethrough::units::GuestOffset;

pub(crate) struct TestOverlay {
    backing: Arc<dyn Image>,
    block_size: u64,
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl TestOverlay {
    pub(crate) fn new(backing: Arc<dyn Image>, block_size: u64) -> Self {
        Self {
            backing,
            block_size,
            blocks: Mutex::default(),
        }
    }

    /// A disk with the same blocks on the same backing image.
    pub(crate) fn copied(&self) -> Self {
        Self {
            backing: self.backing.clone(),
            block_size: self.block_size,
            blocks: Mutex::new(self.blocks.lock().unwrap().clone()),
        }
    }

    /// The blocks that were ever written.
    pub(crate) fn written_blocks(&self) -> Vec<u64> {
        self.blocks.lock().unwrap().keys().copied().collect()
    }

    async fn block(&self, index: u64) -> Result<Vec<u8>> {
        if let Some(block) = self.blocks.lock().unwrap().get(&index) {
            return Ok(block.clone());
        }
        let buf = IoBuf::zeroed(usize::try_from(self.block_size).unwrap());
        self.backing
            .read(GuestOffset(index * self.block_size), buf.clone())
            .await?;
        Ok(buf.to_vec())
    }

    /// Calls `visit` with block, range in it and offset in the request.
    fn cut(&self, at: GuestOffset, len: u64) -> Vec<(u64, usize, usize, usize)> {
        let mut parts = Vec::new();
        let mut done = 0;
        while done < len {
            let position = at.0 + done;
            let within = position % self.block_size;
            let part = (self.block_size - within).min(len - done);
            let index = |n: u64| usize::try_from(n).unwrap();
            parts.push((
                position / self.block_size,
                index(within),
                index(part),
                index(done),
            ));
            done += part;
        }
        parts
    }
}

impl Image for TestOverlay {
    fn virtual_size(&self) -> u64 {
        self.backing.virtual_size()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        self.backing.limits()
    }

    fn map_read(&self, _at: GuestOffset, _len: u64) -> Mapped {
        Mapped::Zeroes
    }

    fn map_write(&self, _at: GuestOffset, _len: u64) -> Mapped {
        Mapped::Zeroes
    }

    fn read(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move {
            for (index, within, len, done) in self.cut(at, buf.len() as u64) {
                buf.copy_from(done, &self.block(index).await?[within..within + len]);
            }
            Ok(())
        })
    }

    fn write(&self, at: GuestOffset, buf: IoBuf) -> ImageFuture<'_> {
        Box::pin(async move {
            for (index, within, len, done) in self.cut(at, buf.len() as u64) {
                let mut block = self.block(index).await?;
                buf.copy_to(done, &mut block[within..within + len]);
                self.blocks.lock().unwrap().insert(index, block);
            }
            Ok(())
        })
    }

    fn write_zeroes(&self, at: GuestOffset, len: u64, _mode: ZeroMode) -> ImageFuture<'_> {
        self.write(at, IoBuf::zeroed(usize::try_from(len).unwrap()))
    }

    fn discard(&self, at: GuestOffset, len: u64) -> ImageFuture<'_> {
        self.write(at, IoBuf::zeroed(usize::try_from(len).unwrap()))
    }

    fn flush(&self) -> ImageFuture<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn allocation(&self, at: GuestOffset, len: u64) -> ImageFuture<'_, (Allocation, u64)> {
        let within = at.0 % self.block_size;
        let known = self
            .blocks
            .lock()
            .unwrap()
            .contains_key(&(at.0 / self.block_size));
        let allocation = if known {
            Allocation::Data(None)
        } else {
            Allocation::Unallocated(None)
        };
        let len = len.min(self.block_size - within);
        Box::pin(std::future::ready(Ok((allocation, len))))
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        Some(&self.backing)
    }

    fn name(&self) -> &'static str {
        "test overlay"
    }
}
