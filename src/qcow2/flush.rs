//! Writing metadata back, and the order in which it becomes durable.
//!
//! # Crash order
//!
//! What must be durable before what, whatever a crash lets through of the writes between two barriers:
//!
//! 1. Allocate: the refcount block before the L2 entry that links the cluster.
//! 2. Copied-up data before the L2 entry that makes it hide its source.
//! 3. Guest data before its L2 entry too, so that a cluster's former contents never show.
//! 4. Free: the L2 entry's unlink before the refcount decrement and before any reuse.
//! 5. New L2 table: its refcount and its contents before the L1 entry.
//! 6. New refcount block: the block before its refcount table entry.
//! 7. Growing the refcount table: the new table before the header, the header before the old table is freed.
//! 8. A table or cluster that a snapshot shares is never written: the entry moves to a copy.
//! 9. With lazy refcounts rules 1, 5 and 6 need not hold for refcounts, blocks and table: the dirty bit is durable
//!    before any of what they are for (`qcow2::health`), and cleared durably only after all of them.
//! 10. A flush returns after everything that completed before it is durable: data, and its whole path L1 → L2.
//!
//! One write-back captures (copies) metadata, then writes the copies:
//!
//! ```text
//! capture   references dropped │ L1 │ L2 │ refcount table │ refcount blocks      later ones ⊇ what earlier ones need
//! write     refcount blocks, fresh L2 tables
//! barrier   only with new refcount blocks (6);  then the refcount table
//! barrier   only if something below needs something above, or data (1, 2, 3, 5)
//! write     L2 tables, L1
//! barrier   (10)
//! then      the references dropped are freed (4, `qcow2::quarantine`), refcounts written without a barrier:
//!           that they come too late is a leak at worst
//! ```
//!
//! With lazy refcounts (9) the refcount table and its blocks are captured only when memory is short, or when the image
//! is closed.
//!
//! Data is written before its entry changes in memory (`qcow2::write`), so a barrier after the capture covers it.
//!
//! A failed write of metadata, a failed barrier or a write-back that is dropped poisons the image; a full disk does
//! not, since all copies are dirty again and the next write-back repeats them in the same order.

use std::sync::atomic::Ordering;

use super::allocator;
use super::engine::Qcow2;
use super::features::IncompatibleFeatures;
use super::join::{Piece, join_all};
use super::l1;
use super::quarantine::Dropped;
use super::table_cache::Captured;
use crate::error::{ErrorKind, Result};
use crate::storage::Storage;
use crate::sys::IoBuf;
use crate::units::HostOffset;

/// Whether refcounts are written back with all else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refcounts {
    Written,
    Postponed,
}

/// Copies of everything dirty.
struct Capture {
    dropped: Dropped,
    l1: Vec<l1::CapturedSector>,
    l2: Vec<Captured>,
    table: Vec<allocator::CapturedSector>,
    blocks: Vec<Captured>,
}

/// Writes all of these, several at a time, in no order.
///
/// # Errors
/// The storage's.
pub(super) async fn write_all<'a>(
    storage: &'a dyn Storage,
    writes: impl IntoIterator<Item = (HostOffset, &'a IoBuf)>,
) -> Result<()> {
    let pieces = writes
        .into_iter()
        .map(|(at, buf)| -> Piece<'a> { storage.writev(at, buf.clone()) });
    join_all(pieces).await
}

impl Qcow2 {
    /// Makes everything durable that completed before the call. Flushes that wait for one another share the next
    /// one.
    ///
    /// # Errors
    /// The storage's; [`ErrorKind::Poisoned`] once one has failed.
    pub(super) async fn flush_all(&self) -> Result<()> {
        let enough = self.flushes_begun.load(Ordering::SeqCst) + 1;
        let mut last_done = self.flushing.lock().await;
        if *last_done >= enough {
            return Ok(());
        }
        let number = self.flushes_begun.fetch_add(1, Ordering::SeqCst) + 1;
        self.check_not_poisoned()?;
        let unless_dropped = self.health.poison_if_dropped("writing metadata back");
        let outcome = self.write_back(self.due_refcounts()).await;
        unless_dropped.settle();
        outcome?;
        *last_done = number;
        Ok(())
    }

    /// Writes back before an operation that would make still more dirty than memory should hold.
    ///
    /// # Errors
    /// As [`Qcow2::flush_all`].
    pub(super) async fn make_room_in_memory(&self) -> Result<()> {
        if self.l2.needs_write_back()
            || self.allocator.blocks.needs_write_back()
            || self.has_much_unlinked()
        {
            self.flush_all().await?;
        }
        Ok(())
    }

    /// Rule 9: refcounts that may wait do so as long as there is memory for them.
    fn due_refcounts(&self) -> Refcounts {
        if self.is_lazy && !self.allocator.blocks.needs_write_back() {
            Refcounts::Postponed
        } else {
            Refcounts::Written
        }
    }

    /// One write-back, with `flushing` held.
    async fn write_back(&self, refcounts: Refcounts) -> Result<()> {
        let capture = self.capture(refcounts);
        if let Err(error) = self.write_in_order(&capture).await {
            self.restore(capture);
            if error.kind() != ErrorKind::NoSpace {
                self.health.poison(&error);
            }
            return Err(error);
        }
        self.l2.written(&capture.l2);
        self.allocator.blocks.written(&capture.blocks);
        // Rule 4: their unlinking is durable by now.
        self.retire(capture.dropped);
        self.free_retired().await;
        if refcounts == Refcounts::Written {
            self.write_refcounts_early().await;
        }
        Ok(())
    }

    /// Makes everything durable, refcounts included, and says in the header that they can be relied on. Nothing may
    /// be under way that changes the disk; a change that follows marks the image again.
    ///
    /// # Errors
    /// As [`Qcow2::flush_all`]. What is on disk is as sound as after a flush then.
    pub(super) async fn close_cleanly(&self) -> Result<()> {
        self.flush_all().await?;
        let dirty = IncompatibleFeatures::DIRTY;
        let _flushing = self.flushing.lock().await;
        let is_marked = self
            .header
            .lock()
            .await
            .incompatible_features
            .contains(dirty);
        if !is_marked {
            return Ok(());
        }
        self.check_not_poisoned()?;
        let unless_dropped = self.health.poison_if_dropped("closing");
        let outcome = self.write_back(Refcounts::Written).await;
        unless_dropped.settle();
        outcome?;
        self.storage.flush().await?;
        if self.allocator.is_dirty() {
            // What could not be written is made anew from the tables when the image is opened next.
            return Ok(());
        }
        self.health.end_writing();
        self.update_header(|header| {
            header.incompatible_features = header.incompatible_features.without(dirty);
        })
        .await?;
        self.storage.flush().await
    }

    /// Copies everything dirty, that which needs something else before what it needs.
    fn capture(&self, refcounts: Refcounts) -> Capture {
        let dropped = self.take_unlinked();
        let l1 = self.l1.capture();
        let l2 = self.l2.capture();
        let (table, blocks) = match refcounts {
            Refcounts::Written => (
                self.allocator.capture_table(),
                self.allocator.blocks.capture(),
            ),
            Refcounts::Postponed => (Vec::new(), Vec::new()),
        };
        Capture {
            dropped,
            l1,
            l2,
            table,
            blocks,
        }
    }

    fn restore(&self, capture: Capture) {
        self.put_unlinked_back(capture.dropped);
        self.l1.restore(&capture.l1);
        self.l2.restore(&capture.l2);
        self.allocator.restore_table(&capture.table);
        self.allocator.blocks.restore(&capture.blocks);
    }

    async fn write_in_order(&self, capture: &Capture) -> Result<()> {
        let storage = self.storage.as_ref();
        let (fresh, linked): (Vec<_>, Vec<_>) = capture.l2.iter().partition(|table| table.fresh);
        let first = capture.blocks.iter().chain(fresh.iter().copied());
        write_all(storage, first.map(|table| (table.at, &table.buf))).await?;
        if !capture.table.is_empty() {
            // Rule 6.
            storage.flush().await?;
            write_all(
                storage,
                capture.table.iter().map(|sector| (sector.at, &sector.buf)),
            )
            .await?;
        }
        let wrote_first =
            !(capture.blocks.is_empty() && fresh.is_empty() && capture.table.is_empty());
        let links = !capture.l1.is_empty() || linked.iter().any(|table| table.links_data);
        let writes_second = !(linked.is_empty() && capture.l1.is_empty());
        // Rules 1, 2, 3 and 5.
        if writes_second && links {
            self.flush_data_file().await?;
        }
        if writes_second && (wrote_first || links && self.data_layout().is_none()) {
            storage.flush().await?;
        }
        let l1 = capture.l1.iter().map(|sector| (sector.at, &sector.buf));
        write_all(
            storage,
            linked.iter().map(|table| (table.at, &table.buf)).chain(l1),
        )
        .await?;
        // Rule 10.
        self.flush_files().await
    }

    /// Writes decremented refcounts out, so that an image that is closed after a flush has no leaks.
    ///
    /// Blocks with increments may be among them. The entries that rely on those link data or an L2 table, and so
    /// come after a barrier of the next write-back anyway.
    async fn write_refcounts_early(&self) {
        if !self.allocator.blocks.is_dirty() {
            return;
        }
        let blocks = self.allocator.blocks.capture();
        let writes = blocks.iter().map(|block| (block.at, &block.buf));
        match write_all(self.storage.as_ref(), writes).await {
            Ok(()) => self.allocator.blocks.written(&blocks),
            Err(error) => {
                self.allocator.blocks.restore(&blocks);
                if error.kind() != ErrorKind::NoSpace {
                    self.health.poison(&error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::{Context, Waker};

    use super::*;
    use crate::image::{Access, Image};
    use crate::progress::Progress;
    use crate::qcow2::check::check;
    use crate::qcow2::create::{CreateOptions, RefcountUpdates, create};
    use crate::storage::{
        CrashStorage, Delays, Fault, FaultStorage, Lost, MemoryStorage, Operation, ZeroMode,
    };
    use crate::sys::block_on;
    use crate::units::GuestOffset;

    const CLUSTER: u64 = 4096;
    /// The last byte of the incompatible features.
    const FEATURES: usize = 79;

    fn is_clean(bytes: &[u8]) -> bool {
        let storage = MemoryStorage::new(bytes.to_vec());
        let report = block_on(check(&storage, &mut |_| (), &Progress::default()));
        report.unwrap().is_clean()
    }

    fn is_marked(bytes: &[u8]) -> bool {
        bytes[FEATURES] & 1 == 1
    }

    /// Closes an image with lazy refcounts while clusters wait to be freed for a read that ends after so many turns,
    /// where the write after so many others finds the disk full.
    fn close_beside_a_read(turns: usize, full: Option<u64>) -> (Arc<CrashStorage>, Result<()>) {
        let new = MemoryStorage::default();
        let options = CreateOptions {
            cluster_size: CLUSTER,
            refcount_updates: RefcountUpdates::Lazy,
            ..CreateOptions::new(1 << 20)
        };
        block_on(create(&new, &options)).unwrap();
        let storage = Arc::new(CrashStorage::new(new.contents(), Delays::none()));
        let below = Arc::clone(&storage) as Arc<dyn Storage>;
        let faulty = Arc::new(FaultStorage::with_delays(below, Delays::up_to(3, 1)));
        let above = Arc::clone(&faulty) as Arc<dyn Storage>;
        let disk = block_on(Qcow2::open(above, None, Access::ReadWrite)).unwrap();
        let data = IoBuf::from_bytes(&[7; 256 << 10]);
        block_on(disk.write(GuestOffset(0), data)).unwrap();
        block_on(disk.flush()).unwrap();
        let read = disk.grace.enter();
        let freed = 32 * CLUSTER;
        block_on(disk.write_zeroes(GuestOffset(0), freed, ZeroMode::MayUnmap)).unwrap();
        if let Some(nth) = full {
            faulty.inject(Fault::nth(nth, ErrorKind::NoSpace).only(Operation::Write));
        }
        let mut closing = pin!(disk.close_cleanly());
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..turns {
            if let std::task::Poll::Ready(outcome) = closing.as_mut().poll(&mut context) {
                return (storage, outcome);
            }
        }
        drop(read);
        let outcome = block_on(closing);
        (storage, outcome)
    }

    #[test]
    fn refcounts_are_sound_on_disk_before_the_dirty_bit_goes() {
        let (mut closed, mut kept) = (0, 0);
        for turns in 0..40 {
            let (storage, outcome) = close_beside_a_read(turns, None);
            outcome.unwrap();
            let left = storage.contents();
            assert!(!is_marked(&left));
            // Where the read ends too late, leaks are left, and nothing else could be.
            if !is_clean(&left) {
                continue;
            }
            closed += 1;
            for (cut, seed) in storage
                .moments()
                .flat_map(|cut| (0..8).map(move |seed| (cut, seed)))
            {
                let left = storage.after_power_cut(cut, Lost::Some { seed });
                assert!(
                    is_marked(&left) || is_clean(&left),
                    "{turns} turns, {cut:?} {seed}"
                );
            }
            for nth in 0..6 {
                let (storage, outcome) = close_beside_a_read(turns, Some(nth));
                let left = storage.contents();
                assert!(
                    is_marked(&left) || is_clean(&left),
                    "{turns} turns, write {nth}"
                );
                kept += u32::from(outcome.is_ok() && is_marked(&left));
            }
        }
        assert!(
            closed > 3 && kept > 0,
            "{closed} closed, {kept} with the bit kept"
        );
    }
}
