//! What becomes of a VM's writes to shared structures: its own records are stored, foreign ones dropped.
//!
//! A foreign record that equals what the VM reads was written by an honest kernel, which writes whole
//! blocks: nothing to tell. One that differs is a refusal. It is answered like a success all the same:
//! such writes come from write-back or a journal checkpoint, where an error would stop the guest's whole
//! filesystem.

use super::compose::{SharedBlock, put_superblock, superblock_in};
use super::disk::{Payload, View};
use super::refresh::Mounted;
use super::refusal::{Answer, Operation, Refusal, Structure};
use super::route::{Composed, Piece};
use super::territory::{Filesystem, Side};
use crate::error::Result;
use crate::ext4::group_descriptor::{self, GroupDescriptor};
use crate::ext4::volatile::FreeCounts;
use crate::ext4::{bitmap, volatile};
use crate::sys::IoBuf;
use crate::units::{BlockGroup, FsBlock, GuestOffset, InodeNumber};

/// The most bytes of a piece that are held in memory at once.
const CHUNK: u64 = 64 << 10;

impl View {
    /// Takes what a request brings for `piece`.
    pub(super) async fn scatter(
        &self,
        filesystem: &Filesystem,
        what: Composed,
        piece: &Piece,
        payload: Payload,
    ) -> Result<()> {
        let bytes_of = |at: GuestOffset, len: u64| payload.bytes(at.0 - piece.at.0, len);
        let operation = payload.operation();
        match what {
            // What is not needed reads as before.
            Composed::Superblock | Composed::Descriptors(_) if operation == Operation::Discard => {
                Ok(())
            }
            Composed::Superblock | Composed::Descriptors(_) => {
                let bytes = bytes_of(piece.at, piece.len);
                self.scatter_shared(filesystem, what, piece, &bytes, operation)
                    .await
            }
            _ if operation == Operation::Discard => {
                let (structure, group) = foreign_metadata(what);
                self.drop_record(operation, (piece.at, piece.len), structure, group, None);
                Ok(())
            }
            Composed::Inodes(group) => {
                let mut at = piece.at;
                while at < piece.end() {
                    let chunk = filesystem.inode_chunk(at, piece.end(), CHUNK);
                    let len = chunk.wanted.len() as u64;
                    let served = self.foreign_inodes(filesystem, group, &chunk).await?;
                    let written = bytes_of(at, len);
                    let changed = changed_records(
                        &served,
                        &written,
                        chunk.wanted.start,
                        usize::from(filesystem.superblock().inode_size),
                    );
                    for record in changed {
                        let index = chunk.first_index.saturating_add(record);
                        let inode = filesystem.superblock().inode_number(group, index);
                        self.drop_record(
                            operation,
                            (at, len),
                            Structure::Inode,
                            group,
                            Some(inode),
                        );
                    }
                    at = GuestOffset(at.0 + len);
                }
                Ok(())
            }
            // Written, a block of attributes is foreign data, and never comes here.
            Composed::Attributes(_) => Ok(()),
            Composed::BlockBitmap(_) | Composed::InodeBitmap(_) => {
                let bytes = bytes_of(piece.at, piece.len);
                if bytes.iter().any(|&byte| byte != bitmap::FULL) {
                    let (structure, group) = foreign_metadata(what);
                    self.drop_record(operation, (piece.at, piece.len), structure, group, None);
                }
                Ok(())
            }
        }
    }

    /// Stores the own records of a block that holds records of several owners.
    async fn scatter_shared(
        &self,
        filesystem: &Filesystem,
        what: Composed,
        piece: &Piece,
        bytes: &[u8],
        operation: Operation,
    ) -> Result<()> {
        let block = filesystem.block_at(piece.at);
        let _writer = self.ledger.lock(block).await;
        let _writer_in_base = match what {
            Composed::Descriptors(index) if filesystem.describes_in_place(index) => {
                Some(self.in_place()?.ledger.lock(block).await)
            }
            _ => None,
        };
        let refresher = self.refresher.as_ref();
        let refresher = refresher.filter(|_| what == Composed::Superblock);
        if let Some(refresher) = refresher {
            refresher.begin_superblock();
        }
        let shared = self.shared_block(filesystem, what, block).await?;
        let mut written = shared.served.clone();
        written[filesystem.within_block(piece)].copy_from_slice(bytes);
        let range = (piece.at, piece.len);
        let store = match what {
            Composed::Descriptors(index) => {
                let scattered = scatter_descriptors(filesystem, index, &shared, &written);
                for group in &scattered.refused {
                    self.drop_record(operation, range, Structure::GroupDescriptor, *group, None);
                }
                self.store_in_place(filesystem, block, &shared, &scattered)
                    .await?;
                scattered.store
            }
            _ => {
                let foreign_free = self.ledger.foreign_free();
                let (store, honest) =
                    scatter_superblock(filesystem, &shared, &written, foreign_free)?;
                if !honest {
                    self.drop_record(operation, range, Structure::Superblock, BlockGroup(0), None);
                }
                store
            }
        };
        if store != shared.stored {
            let at = filesystem.offset_of(block);
            self.own.write(at, IoBuf::from_bytes(&store)).await?;
        }
        if let Some(refresher) = refresher {
            refresher.end_superblock(Mounted::as_told_by(&store));
        }
        Ok(())
    }

    /// Stores those of the own records that are the base's to keep. The block is locked in the base.
    async fn store_in_place(
        &self,
        filesystem: &Filesystem,
        block: FsBlock,
        shared: &SharedBlock,
        scattered: &Scattered,
    ) -> Result<()> {
        let Some(store) = &scattered.in_place else {
            return Ok(());
        };
        if Some(store) == shared.in_place.as_ref() {
            return Ok(());
        }
        let base = self.in_place()?;
        let buf = IoBuf::from_bytes(store);
        base.disk.write(filesystem.offset_of(block), buf).await?;
        let (before, after) = scattered.free;
        base.ledger
            .note_free(&*base.disk, filesystem, before, after)
            .await
    }

    fn drop_record(
        &self,
        operation: Operation,
        range: (GuestOffset, u64),
        structure: Structure,
        group: BlockGroup,
        inode: Option<InodeNumber>,
    ) {
        self.refusals.record(&Refusal {
            operation,
            range,
            structure,
            group: Some(group),
            inode,
            answer: Answer::Dropped,
        });
    }
}

/// What a wholly foreign metadata block is, and whose.
fn foreign_metadata(what: Composed) -> (Structure, BlockGroup) {
    match what {
        Composed::BlockBitmap(group) => (Structure::BlockBitmap, group),
        Composed::InodeBitmap(group) => (Structure::InodeBitmap, group),
        Composed::Inodes(group) => (Structure::Inode, group),
        Composed::Attributes(group) => (Structure::Data, group),
        Composed::Superblock => (Structure::Superblock, BlockGroup(0)),
        Composed::Descriptors(_) => (Structure::GroupDescriptor, BlockGroup(0)),
    }
}

/// The records of `size` bytes in which `written`, which lies `skip` bytes into `served`, differs from it.
fn changed_records(served: &[u8], written: &[u8], skip: usize, size: usize) -> Vec<u32> {
    let mut changed: Vec<u32> = Vec::new();
    for (at, (old, new)) in (skip..).zip(served.iter().skip(skip).zip(written)) {
        if old != new
            && let Ok(record) = u32::try_from(at / size)
            && changed.last() != Some(&record)
        {
            changed.push(record);
        }
    }
    changed
}

/// What becomes of a block of descriptors.
struct Scattered {
    /// The block to store.
    store: Vec<u8>,
    /// The block to store in the base, if records in it are the VM's own.
    in_place: Option<Vec<u8>>,
    /// What these had free, and have.
    free: (FreeCounts, FreeCounts),
    /// The groups whose descriptors were to change, and do not: foreign ones, and shared ones that no kernel writes so.
    refused: Vec<BlockGroup>,
}

fn scatter_descriptors(
    filesystem: &Filesystem,
    index: u32,
    shared: &SharedBlock,
    written: &[u8],
) -> Scattered {
    let superblock = filesystem.superblock();
    let size = usize::from(superblock.descriptor_size);
    let mut scattered = Scattered {
        store: shared.stored.clone(),
        in_place: shared.in_place.clone(),
        free: (FreeCounts::default(), FreeCounts::default()),
        refused: Vec::new(),
    };
    let places = (0..).step_by(size).map(|at| at..at + size);
    for (group, at) in filesystem.groups_of_descriptor_block(index).zip(places) {
        let (Some(record), Some(served)) = (written.get(at.clone()), shared.served.get(at.clone()))
        else {
            break;
        };
        let in_place = match &mut scattered.in_place {
            Some(block) if filesystem.is_in_place(group) => block.get_mut(at.clone()),
            _ => None,
        };
        if let Some(stored) = in_place {
            let is_sound = filesystem.locations(group).is_some_and(|locations| {
                group_descriptor::is_sound(superblock, group, locations, record)
            });
            if is_sound {
                let free = |bytes: &[u8]| GroupDescriptor::parse(bytes).free();
                let (before, after) = scattered.free;
                scattered.free = (
                    [before, free(stored)].into_iter().sum(),
                    [after, free(record)].into_iter().sum(),
                );
                stored.copy_from_slice(record);
            } else if record != served {
                scattered.refused.push(group);
            }
        } else if filesystem.owns(group) {
            scattered.store[at].copy_from_slice(record);
        } else if record != served {
            scattered.refused.push(group);
        }
    }
    scattered
}

/// The block to store, and whether nothing foreign in it was to change.
fn scatter_superblock(
    filesystem: &Filesystem,
    shared: &SharedBlock,
    written: &[u8],
    foreign_free: FreeCounts,
) -> Result<(Vec<u8>, bool)> {
    let mut superblock = superblock_in(written)?;
    if filesystem.side() == Side::Base {
        if superblock != superblock_in(&shared.served)? {
            volatile::reveal_free(&mut superblock, foreign_free);
            volatile::reveal_features(&mut superblock, &superblock_in(&shared.stored)?);
        } else {
            superblock = superblock_in(&shared.stored)?;
        }
        let mut store = written.to_vec();
        put_superblock(&mut store, &superblock);
        return Ok((store, true));
    }
    let served = superblock_in(&shared.served)?;
    let mut expected = shared.served.clone();
    put_superblock(&mut expected, &superblock);
    let honest = expected == written && volatile::is_honest_write(&served, &superblock);
    let mut store = shared.stored.clone();
    let stored = superblock_in(&shared.stored)?;
    put_superblock(
        &mut store,
        &volatile::scatter_superblock(&stored, &superblock),
    );
    Ok((store, honest))
}
