//! What a hostile guest tries, drawn by chance.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use seethrough::ext4::group_descriptor;
use seethrough::ext4::inode;
use seethrough::ext4::layout::Kind;
use seethrough::ext4::superblock::{self, SUPERBLOCK_SIZE};
use seethrough::units::{BlockGroup, FsBlock, InodeNumber};
use seethrough::view::declaration::GroupList;
use seethrough::view::probe::Probe;
use virtio_queue::desc::split::Descriptor;

use super::guest::{DATA_LEN, DISCARD, Flicker, Guest, QUEUES, READ, SLOTS, WRITE, WRITE_ZEROES};

/// The disk that is attacked, as an attacker knows it, and what of it is the attacker's own.
pub(crate) struct Ground {
    pub(crate) probe: Probe,
    pub(crate) owned: GroupList,
    /// Whether the attacker owns what `owned` names, or everything else.
    pub(crate) owns_the_rest: bool,
    pub(crate) disk_len: u64,
    /// Where blocks of each kind are.
    targets: Vec<Vec<u64>>,
    /// Where the owner changes, in bytes.
    borders: Vec<u64>,
    own: Vec<u64>,
    foreign: Vec<u64>,
}

impl Ground {
    pub(crate) fn new(probe: Probe, owned: GroupList, owns_the_rest: bool, disk_len: u64) -> Self {
        let mut ground = Self {
            probe,
            owned,
            owns_the_rest,
            disk_len,
            targets: vec![Vec::new(); 10],
            borders: vec![disk_len],
            own: Vec::new(),
            foreign: Vec::new(),
        };
        let mut before = None;
        for block in 0..ground.probe.superblock().blocks_count {
            let (kind, _) = ground.kind(block);
            let (class, owner) = match kind {
                Kind::Superblock => (0, None),
                Kind::Descriptors { .. } => (1, None),
                Kind::BlockBitmap { group } => (2, Some(ground.owns(group))),
                Kind::InodeBitmap { group } => (3, Some(ground.owns(group))),
                Kind::InodeTable { group, .. } => (4, Some(ground.owns(group))),
                Kind::Journal { .. } | Kind::MultipleMount => (5, Some(true)),
                Kind::OrphanFile { .. } => (6, Some(true)),
                Kind::Boot | Kind::Backup { .. } | Kind::ReservedDescriptors => {
                    (7, Some(owns_the_rest))
                }
                Kind::Data { group } if ground.owns(group) => (8, Some(true)),
                Kind::Data { .. } => (9, Some(false)),
            };
            let at = ground.offset(block);
            ground.targets[class].push(at);
            match owner {
                Some(true) if class == 8 => ground.own.push(at),
                Some(false) if class == 9 => ground.foreign.push(at),
                _ => {}
            }
            if before != Some(owner) {
                ground.borders.push(at);
            }
            before = Some(owner);
        }
        let end = ground.offset(ground.probe.superblock().blocks_count);
        ground.borders.push(end);
        ground.targets.retain(|blocks| !blocks.is_empty());
        ground
    }

    fn owns(&self, group: BlockGroup) -> bool {
        self.owned.contains(group) != self.owns_the_rest
    }

    fn kind(&self, block: u64) -> (Kind, u64) {
        self.probe
            .layout()
            .classify(FsBlock(block))
            .expect("a block of the filesystem")
    }

    pub(crate) fn block_len(&self) -> u64 {
        u64::from(self.probe.superblock().block_size)
    }

    fn offset(&self, block: u64) -> u64 {
        self.probe.place().start.0 + block * self.block_len()
    }

    fn own_groups(&self) -> Vec<BlockGroup> {
        self.probe
            .superblock()
            .groups()
            .filter(|group| self.owns(*group))
            .collect()
    }

    /// A byte of the disk at which something may be, at a sector.
    fn place(&self, rng: &mut StdRng) -> u64 {
        let at = match rng.random_range(0..10) {
            0..6 => {
                let kind = self.targets.choose(rng).expect("some");
                let at = kind.choose(rng).expect("some");
                at + rng.random_range(0..self.block_len() / 512) * 512
            }
            6..9 => {
                let border = self.borders.choose(rng).expect("the disk's end");
                border.saturating_sub(rng.random_range(0..16) * 512)
            }
            _ => rng.random_range(0..self.disk_len / 512) * 512,
        };
        if rng.random_range(0..500) == 0 {
            !511 - at
        } else {
            at
        }
    }
}

/// What was tried so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) attacks: u64,
    pub(crate) requests: u64,
    pub(crate) refused: u64,
}

/// One attack.
pub(crate) fn attack(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    tally.attacks += 1;
    match rng.random_range(0..100) {
        0..25 => scattered_writes(guest, ground, rng, tally),
        25..35 => one_block_from_all_queues(guest, ground, rng, tally),
        35..45 => ranges(guest, ground, rng, tally),
        45..53 => forged_superblock(guest, ground, rng, tally),
        53..59 => forged_descriptors(guest, ground, rng, tally),
        59..63 => forged_counts(guest, ground, rng, tally),
        63..70 => forged_inodes(guest, ground, rng, tally),
        70..85 => races(guest, ground, rng, tally),
        85..91 => wild_chains(guest, rng, tally),
        91..94 => forged_journal(guest, ground, rng, tally),
        94..97 => {
            let queue = rng.random_range(0..QUEUES);
            guest.reset(queue);
        }
        97..99 => {
            fill(guest, ground, rng, tally);
            guest.reconnect();
        }
        _ => {
            // A ring that claims more than it holds stops until it is set up anew.
            let queue = rng.random_range(0..QUEUES);
            guest.claim(queue, rng.random());
            guest.reset(queue);
        }
    }
}

fn noise(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes
}

fn length(rng: &mut StdRng) -> usize {
    match rng.random_range(0..10) {
        0 => rng.random_range(1..=DATA_LEN),
        1..4 => rng.random_range(1..=DATA_LEN / 512) * 512,
        _ => rng.random_range(1..=17) * 512,
    }
}

/// Offers requests on all queues, in all slots that are free.
pub(crate) fn fill(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    for queue in 0..QUEUES {
        for slot in 0..rng.random_range(1..=SLOTS) {
            let at = ground.place(rng);
            let len = length(rng);
            let data = noise(rng, len);
            guest.offer((queue, slot), WRITE, at / 512, &data, len);
            tally.requests += 1;
        }
        guest.kick(queue);
    }
}

fn settle(guest: &Guest, tally: &mut Tally) {
    for queue in 0..QUEUES {
        guest.settle(queue);
        for slot in 0..SLOTS {
            tally.refused += u64::from(guest.status((queue, slot)) == 1);
        }
    }
}

/// Noise all over the disk, across every border.
fn scattered_writes(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    fill(guest, ground, rng, tally);
    settle(guest, tally);
}

/// Overlapping writes to a shared block, all at once.
fn one_block_from_all_queues(
    guest: &mut Guest,
    ground: &Ground,
    rng: &mut StdRng,
    tally: &mut Tally,
) {
    let shared: Vec<u64> = ground.targets[..2].concat();
    let at = *shared.choose(rng).expect("a superblock");
    let block = guest.read(at, usize::try_from(ground.block_len()).expect("small"));
    for queue in 0..QUEUES {
        for slot in 0..4 {
            let mut bytes = block.clone();
            for _ in 0..rng.random_range(1..40) {
                let byte = rng.random_range(0..bytes.len());
                bytes[byte] = rng.random();
            }
            let skip = rng.random_range(0..bytes.len() / 512) * 512;
            let len = rng.random_range(1..=(bytes.len() - skip) / 512) * 512;
            guest.offer(
                (queue, slot),
                WRITE,
                (at + skip as u64) / 512,
                &bytes[skip..skip + len],
                len,
            );
            tally.requests += 1;
        }
    }
    for queue in 0..QUEUES {
        guest.kick(queue);
    }
    settle(guest, tally);
}

/// Discards and write-zeroes of several segments, with every flag.
fn ranges(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    for queue in 0..QUEUES {
        let mut segments = Vec::new();
        for _ in 0..rng.random_range(1..6) {
            let at = ground.place(rng);
            let sectors: u32 = match rng.random_range(0..8) {
                0 => rng.random(),
                1 => 0,
                _ => rng.random_range(1..2000),
            };
            let flags: u32 = if rng.random_range(0..6) == 0 {
                rng.random()
            } else {
                rng.random_range(0..2)
            };
            segments.extend((at / 512).to_le_bytes());
            segments.extend(sectors.to_le_bytes());
            segments.extend(flags.to_le_bytes());
        }
        let kind = if rng.random() { DISCARD } else { WRITE_ZEROES };
        guest.offer((queue, 0), kind, 0, &segments, segments.len());
        tally.requests += 1;
        guest.kick(queue);
    }
    settle(guest, tally);
}

/// A superblock that says something else of the filesystem, with a checksum that is right.
fn forged_superblock(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    /// Counts, block size, groups, state, features, journal, descriptors, checksum seed, and so on.
    const FIELDS: [usize; 22] = [
        0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x28, 0x3a, 0x54, 0x58, 0x5c, 0x60,
        0x64, 0x68, 0xce, 0xe0, 0xe8, 0xfe, 0x104,
    ];
    let at = ground.probe.place().start.0 + 1024;
    let mut bytes = guest.read(at, SUPERBLOCK_SIZE);
    for _ in 0..rng.random_range(1..4) {
        let field = *FIELDS.choose(rng).expect("some");
        let value: u32 = if rng.random() {
            1 << rng.random_range(0..32)
        } else {
            rng.random()
        };
        bytes[field..field + 4].copy_from_slice(&value.to_le_bytes());
    }
    let mut forged: [u8; SUPERBLOCK_SIZE] = bytes.try_into().expect("as long");
    superblock::seal(&mut forged);
    guest.write(at, &forged);
    tally.requests += 2;
    if rng.random_range(0..4) == 0 {
        guest.reconnect();
    }
    scattered_writes(guest, ground, rng, tally);
}

/// Descriptors whose bitmaps and inode tables are foreign ones: in owned slots, where they are the guest's to write,
/// and in others. Then writes to what they point at.
fn forged_descriptors(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    let superblock = ground.probe.superblock();
    let groups: Vec<BlockGroup> = if rng.random_range(0..3) == 0 {
        superblock.groups().collect()
    } else {
        ground.own_groups()
    };
    let group = *groups.choose(rng).expect("some");
    let per_block = superblock.descriptors_per_block();
    let size = usize::from(superblock.descriptor_size);
    let at = ground.offset(superblock.descriptor_block(group.0 / per_block).0);
    let mut block = guest.read(at, usize::try_from(ground.block_len()).expect("small"));
    let start = (group.0 % per_block) as usize * size;
    let descriptor = &mut block[start..start + size];
    let mut pointed = Vec::new();
    for field in [0, 4, 8] {
        let target = *ground.foreign.choose(rng).expect("some");
        let number = u32::try_from((target - ground.probe.place().start.0) / ground.block_len())
            .expect("small");
        descriptor[field..field + 4].copy_from_slice(&number.to_le_bytes());
        pointed.push(target);
    }
    group_descriptor::seal(&superblock.checksums, group, descriptor);
    guest.write(at, &block);
    tally.requests += 2;
    if rng.random_range(0..8) == 0 {
        guest.reconnect();
    }
    for target in pointed {
        let bytes = noise(rng, 4096);
        tally.refused += u64::from(guest.write(target, &bytes) == 1);
        tally.requests += 1;
    }
}

/// Descriptors of an owned group that count anything, some as a kernel could, in many writes at once.
fn forged_counts(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    /// Free blocks, free inodes, directories, flags, inodes never used.
    const FIELDS: [usize; 5] = [0x0c, 0x0e, 0x10, 0x12, 0x1c];
    let superblock = ground.probe.superblock();
    let group = *ground.own_groups().choose(rng).expect("some");
    let per_block = superblock.descriptors_per_block();
    let size = usize::from(superblock.descriptor_size);
    let at = ground.offset(superblock.descriptor_block(group.0 / per_block).0);
    let start = (group.0 % per_block) as usize * size;
    let sector = start / 512 * 512;
    let bytes = guest.read(at + sector as u64, 512);
    for queue in 0..QUEUES {
        for slot in 0..4 {
            let mut bytes = bytes.clone();
            let descriptor = &mut bytes[start - sector..start - sector + size];
            for _ in 0..rng.random_range(1..4) {
                let field = *FIELDS.choose(rng).expect("some");
                let most = [2, 300, u16::MAX][rng.random_range(0..3)];
                let value = rng.random_range(0..most);
                descriptor[field..field + 2].copy_from_slice(&value.to_le_bytes());
            }
            if rng.random_range(0..4) != 0 {
                group_descriptor::seal(&superblock.checksums, group, descriptor);
            }
            guest.offer(
                (queue, slot),
                WRITE,
                (at + sector as u64) / 512,
                &bytes,
                512,
            );
            tally.requests += 1;
        }
        guest.kick(queue);
    }
    settle(guest, tally);
}

/// Inodes in an owned table whose extents and attributes are foreign blocks, and then writes there.
fn forged_inodes(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    let superblock = ground.probe.superblock();
    let group = *ground.own_groups().choose(rng).expect("some");
    let locations = ground.probe.layout().locations(group).expect("a group");
    let index = rng.random_range(0..superblock.inode_table_blocks());
    let at = ground.offset(locations.inode_table.0 + u64::from(index));
    let mut block = guest.read(at, usize::try_from(ground.block_len()).expect("small"));
    let target = *ground.foreign.choose(rng).expect("some");
    let number =
        u32::try_from((target - ground.probe.place().start.0) / ground.block_len()).expect("small");
    let size = usize::from(superblock.inode_size);
    for (n, record) in block.chunks_exact_mut(size).enumerate() {
        record[0..2].copy_from_slice(&0x81a4u16.to_le_bytes());
        record[0x1a..0x1c].copy_from_slice(&1u16.to_le_bytes());
        record[0x20..0x24].copy_from_slice(&0x8_0000u32.to_le_bytes());
        record[0x28..0x30].copy_from_slice(&[0x0a, 0xf3, 1, 0, 4, 0, 0, 0]);
        record[0x34..0x40].copy_from_slice(&[0; 12]);
        record[0x38..0x3a].copy_from_slice(&8u16.to_le_bytes());
        record[0x3c..0x40].copy_from_slice(&number.to_le_bytes());
        record[0x68..0x6c].copy_from_slice(&number.to_le_bytes());
        let index = index * superblock.inodes_per_block() + u32::try_from(n).expect("small");
        let inode: InodeNumber = superblock.inode_number(group, index);
        inode::seal(&superblock.checksums, inode, record);
    }
    guest.write(at, &block);
    let bytes = noise(rng, 8192);
    tally.refused += u64::from(guest.write(target, &bytes) == 1);
    tally.requests += 3;
}

/// Headers, descriptors and data that change between the moment they are looked at and the moment they are used.
fn races(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    for _ in 0..8 {
        let mut flickers = Vec::new();
        for queue in 0..QUEUES {
            for slot in 0..SLOTS {
                let own = ground.own.choose(rng).expect("some") / 512;
                let foreign = ground.place(rng) / 512;
                let data = noise(rng, 4096);
                guest.offer((queue, slot), WRITE, own, &data, 4096);
                tally.requests += 1;
                let header = Guest::header_at(queue, slot);
                let descriptor = Guest::descriptor_at(queue, slot);
                let data_at = Guest::data_at(queue, slot);
                flickers.push(match rng.random_range(0..4) {
                    0 => Flicker {
                        at: descriptor,
                        values: [data_at, data_at + 512],
                    },
                    1 => Flicker {
                        at: descriptor + 8,
                        values: [4096 | 1 << 32, 65536 | 1 << 32],
                    }
                    .keeping_next(guest, descriptor),
                    2 => Flicker {
                        at: data_at,
                        values: [rng.random(), rng.random()],
                    },
                    _ => Flicker {
                        at: header + 8,
                        values: [own, foreign],
                    },
                });
            }
        }
        guest.race(flickers);
        for queue in 0..QUEUES {
            guest.kick(queue);
        }
        for queue in 0..QUEUES {
            guest.settle(queue);
        }
        guest.calm();
    }
}

impl Flicker {
    /// The values of a descriptor's second half, with the link that it has.
    fn keeping_next(self, guest: &Guest, descriptor: u64) -> Self {
        let next = u64::from(guest.link(descriptor)) << 48;
        Self {
            at: self.at,
            values: self.values.map(|value| value | next),
        }
    }
}

/// Chains that break the rules: loops, wild addresses and lengths, indirect tables anywhere.
fn wild_chains(guest: &mut Guest, rng: &mut StdRng, tally: &mut Tally) {
    let queue = rng.random_range(0..QUEUES);
    for slot in 0..SLOTS {
        let first = u16::try_from(slot * 3).expect("small");
        for number in first..first + 3 {
            let at = match rng.random_range(0..4) {
                0 => rng.random(),
                1 => Guest::header_at(queue, slot),
                2 => Guest::descriptor_at(queue, rng.random_range(0..SLOTS)),
                _ => Guest::data_at(queue, slot),
            };
            let len = match rng.random_range(0..4) {
                0 => rng.random(),
                1 => 16,
                _ => rng.random_range(0..9000),
            };
            let next = rng.random_range(0..70);
            guest.descriptor(
                queue,
                number,
                Descriptor::new(at, len, rng.random_range(0..8), next),
            );
        }
        guest.publish(queue, first);
        tally.requests += 1;
    }
    guest.kick(queue);
    // A driver that breaks its ring may not get everything back; one that is reset starts anew.
    guest.reset(queue);
}

/// A journal that says that it is to be replayed, and then the replay: by a guest that "recovers" foreign blocks.
fn forged_journal(guest: &mut Guest, ground: &Ground, rng: &mut StdRng, tally: &mut Tally) {
    let Some(extent) = ground.probe.journal().first() else {
        return;
    };
    let at = ground.offset(extent.start.0);
    let mut journal = guest.read(at, usize::try_from(ground.block_len()).expect("small"));
    journal[0x1c..0x20].copy_from_slice(&rng.random_range(1u32..100).to_be_bytes());
    if rng.random() {
        // The superblock of a journal without a checksum.
        journal[0x28..0x2c].copy_from_slice(&0u32.to_be_bytes());
    }
    guest.write(at, &journal);
    guest.reconnect();
    tally.requests += 2;
    for _ in 0..4 {
        scattered_writes(guest, ground, rng, tally);
    }
    for _ in 0..20 {
        let target = *ground.foreign.choose(rng).expect("some");
        let bytes = noise(rng, 4096);
        guest.write(target, &bytes);
        tally.requests += 1;
    }
    journal[0x1c..0x20].copy_from_slice(&0u32.to_be_bytes());
    guest.write(at, &journal);
    // Reads see what is served, whatever was written.
    guest.offer((0, 0), READ, 0, &[], 512);
    guest.kick(0);
    guest.settle(0);
}
