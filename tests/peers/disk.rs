//! What a disk may hold, sector by sector, and the steps of a sequence that change it.
//!
//! Writes fill whole sectors with one byte, so that a sector's contents are one number, and `qemu-io` can tell
//! whether it reads the same.

#![allow(unreachable_pub)]

use std::ops::Range;

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::storage::ZeroMode;

pub const SECTOR: u64 = 512;

/// The bytes that a sector may be filled with: one, unless a discard has left it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Possible([u64; 4]);

impl Possible {
    pub fn only(byte: u8) -> Self {
        Self([0; 4]).or(byte)
    }

    pub fn or(mut self, byte: u8) -> Self {
        self.0[usize::from(byte / 64)] |= 1 << (byte % 64);
        self
    }

    pub fn contains(self, byte: u8) -> bool {
        self.or(byte) == self
    }

    /// The byte, if it is certain.
    pub fn certain(self) -> Option<u8> {
        let is_one = self.0.iter().map(|word| word.count_ones()).sum::<u32>() == 1;
        (0..=255).find(|byte| is_one && self.contains(*byte))
    }
}

/// What is done to a range.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Write(u8),
    Zero(ZeroMode),
    Discard,
    Read,
    Flush,
    Reopen,
}

/// One step of a sequence.
#[derive(Clone, Debug)]
pub struct Step {
    /// In bytes, whole sectors.
    pub range: Range<u64>,
    pub operation: Operation,
}

impl Step {
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// What whole clusters read after a discard; parts of clusters may always stay as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// Zeros.
    Zeros,
    /// Zeros, or as before.
    ZerosOrOld,
    /// Zeros, or as before, or what the backing image has there (version 2 knows no zero flag).
    ZerosOrOldOrBacking,
}

/// A disk.
#[derive(Clone)]
pub struct Disk {
    pub sectors: Vec<Possible>,
    /// What its backing image has.
    backing: Vec<u8>,
    cluster_size: u64,
}

impl Disk {
    /// A disk that shows its backing image, whose sectors are filled with these bytes.
    pub fn over(mut backing: Vec<u8>, size: u64, cluster_size: u64) -> Self {
        backing.resize(index(size), 0);
        Self {
            sectors: backing.iter().map(|byte| Possible::only(*byte)).collect(),
            backing,
            cluster_size,
        }
    }

    pub fn size(&self) -> u64 {
        self.sectors.len() as u64 * SECTOR
    }

    pub fn part(&mut self, range: &Range<u64>) -> &mut [Possible] {
        &mut self.sectors[index(range.start)..index(range.end)]
    }

    /// Takes a step in.
    pub fn apply(&mut self, step: &Step, discarded: Discarded) {
        match step.operation {
            Operation::Write(byte) => self.part(&step.range).fill(Possible::only(byte)),
            Operation::Zero(_) => self.part(&step.range).fill(Possible::only(0)),
            Operation::Discard => self.discard(&step.range, discarded),
            Operation::Read | Operation::Flush | Operation::Reopen => {}
        }
    }

    fn discard(&mut self, range: &Range<u64>, discarded: Discarded) {
        let whole_from = range.start.next_multiple_of(self.cluster_size);
        let whole_to = if range.end == self.size() {
            range.end
        } else {
            range.end / self.cluster_size * self.cluster_size
        };
        for at in index(range.start)..index(range.end) {
            let is_whole = (index(whole_from)..index(whole_to)).contains(&at);
            let sector = &mut self.sectors[at];
            *sector = match discarded {
                Discarded::Zeros if is_whole => Possible::only(0),
                Discarded::Zeros | Discarded::ZerosOrOld => sector.or(0),
                Discarded::ZerosOrOldOrBacking => sector.or(0).or(self.backing[at]),
            };
        }
    }

    /// Whether the disk may hold these bytes; from now on it holds no others.
    pub fn settle(&mut self, start: u64, found: &[u8]) -> Result<(), String> {
        let size = usize::try_from(SECTOR).expect("small");
        for (number, bytes) in found.chunks(size).enumerate() {
            let at = index(start) + number;
            let byte = bytes[0];
            let sector = &mut self.sectors[at];
            if bytes.iter().any(|other| *other != byte) || !sector.contains(byte) {
                let expected: Vec<u8> = (0..=255).filter(|byte| sector.contains(*byte)).collect();
                return Err(format!(
                    "the sector at {:#x} holds {:02x?}… and should be filled with one of {expected:02x?}",
                    at as u64 * SECTOR,
                    &bytes[..4]
                ));
            }
            *sector = Possible::only(byte);
        }
        Ok(())
    }

    /// A range around `at` that is filled with one certain byte, and the byte.
    pub fn certain_run(&self, range: &Range<u64>) -> Option<(Range<u64>, u8)> {
        let byte = self.sectors[index(range.start)].certain()?;
        let run = self.sectors[index(range.start)..index(range.end)]
            .iter()
            .take_while(|sector| sector.certain() == Some(byte))
            .count() as u64;
        Some((range.start..range.start + run * SECTOR, byte))
    }

    /// A random step: whole clusters as often as sectors, and now and then up to the disk's end.
    pub fn random_step(&self, rng: &mut StdRng) -> Step {
        let unit = match rng.random_range(0..5) {
            0 | 1 => SECTOR,
            2 => 4096.min(self.cluster_size),
            _ => self.cluster_size,
        };
        let units = self.size().div_ceil(unit);
        let first = rng.random_range(0..units);
        let longest = [1, 3, 20, 300][rng.random_range(0..4)]
            .min((3 << 20) / unit)
            .max(1);
        let count = rng.random_range(1..=longest);
        let end = if rng.random_range(0..30) == 0 {
            self.size()
        } else {
            ((first + count) * unit).min(self.size())
        };
        let operation = match rng.random_range(0..20) {
            0..7 => Operation::Write(rng.random()),
            7..9 => Operation::Zero(ZeroMode::MayUnmap),
            9..11 => Operation::Zero(ZeroMode::KeepAllocated),
            11..14 => Operation::Discard,
            14..18 => Operation::Read,
            18 => Operation::Flush,
            _ => Operation::Reopen,
        };
        Step {
            range: first * unit..end,
            operation,
        }
    }

    pub fn random_steps(&self, rng: &mut StdRng, count: usize) -> Vec<Step> {
        (0..count).map(|_| self.random_step(rng)).collect()
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at / SECTOR).expect("small")
}
