//! Guests that read and write the disks of a chain at the same time, and remember what they saw.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::Image;

use crate::engine::workload::{Operation, perform};
use crate::history::{Act, Event, Value, is_explainable};

const SECTOR: u64 = 512;

/// Sectors that are the same in all their words, each with a number of its own.
pub fn sectors(values: impl IntoIterator<Item = Value>) -> Vec<u8> {
    let words = values.into_iter().flat_map(|value| [value; 64]);
    words.flat_map(u64::to_be_bytes).collect()
}

/// The value of a sector.
///
/// # Panics
/// If it is torn.
fn value_of(sector: &[u8]) -> Value {
    let (words, _) = sector.as_chunks::<8>();
    let value = u64::from_be_bytes(words[0]);
    assert!(
        words.iter().all(|word| *word == words[0]),
        "a torn sector: {:02x?}",
        &sector[..64]
    );
    value
}

/// A request that has ended.
#[derive(Clone, Debug)]
pub struct Record {
    layer: usize,
    range: Range<u64>,
    operation: Kind,
    began: u64,
    ended: u64,
}

#[derive(Clone, Debug)]
enum Kind {
    Read(Vec<Value>),
    /// The first sector's value; the others follow.
    Write(Value),
    Zero,
    Discard,
    Flush,
}

/// The disks of a chain, the lowest first, and the clock of all their guests.
pub struct Guests {
    pub layers: Vec<Arc<dyn Image>>,
    /// Bytes that are allocated together, and so copied up or zeroed with a write to some of them: in each layer.
    pub units: Vec<u64>,
    /// The part of the disks that they fight for.
    pub area: Range<u64>,
    clock: AtomicU64,
    values: AtomicU64,
}

impl Guests {
    pub fn new(layers: Vec<Arc<dyn Image>>, units: Vec<u64>, area: Range<u64>) -> Self {
        Self {
            layers,
            units,
            area,
            clock: AtomicU64::new(0),
            values: AtomicU64::new(1),
        }
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// One queue of one guest: some requests, one after the other.
    pub async fn queue(&self, layer: usize, requests: usize, mut rng: StdRng) -> Vec<Record> {
        let mut records = Vec::new();
        for _ in 0..requests {
            let sectors = self.area.start / SECTOR..self.area.end / SECTOR;
            let first = rng.random_range(sectors.clone());
            let last = (first + rng.random_range(0..6)).min(sectors.end - 1);
            let range = first * SECTOR..(last + 1) * SECTOR;
            let operation = self.random_operation(&mut rng, &range);
            records.push(self.request(layer, range, &operation).await);
        }
        records
    }

    fn random_operation(&self, rng: &mut StdRng, range: &Range<u64>) -> Operation {
        match rng.random_range(0..20) {
            0..7 => Operation::Read,
            7..15 => {
                let count = (range.end - range.start) / SECTOR;
                let first = self.values.fetch_add(count, Ordering::SeqCst);
                Operation::Write(sectors(first..first + count))
            }
            15..17 => Operation::Zero(seethrough::storage::ZeroMode::MayUnmap),
            17 => Operation::Zero(seethrough::storage::ZeroMode::KeepAllocated),
            18 => Operation::Discard,
            _ => Operation::Flush,
        }
    }

    /// Performs a request and notes when.
    pub async fn request(&self, layer: usize, range: Range<u64>, operation: &Operation) -> Record {
        let began = self.now();
        let found = perform(self.layers[layer].as_ref(), range.clone(), operation)
            .await
            .unwrap_or_else(|error| panic!("layer {layer}, {range:?}: {error}"));
        let ended = self.now();
        let operation = match operation {
            Operation::Read => Kind::Read(found.chunks(512).map(value_of).collect()),
            Operation::Write(bytes) => Kind::Write(value_of(&bytes[..512])),
            Operation::Zero(_) => Kind::Zero,
            Operation::Discard => Kind::Discard,
            Operation::Flush => Kind::Flush,
        };
        Record {
            layer,
            range,
            operation,
            began,
            ended,
        }
    }

    /// Finds an order of the requests for each sector, whose lowest layer had `initial(sector)` at first.
    pub fn judge(&self, records: &[Record], initial: impl Fn(u64) -> Value) {
        for sector in self.area.start / SECTOR..self.area.end / SECTOR {
            let events = self.events_of(sector, records);
            assert!(
                is_explainable(initial(sector), self.layers.len(), &events),
                "no order explains sector {sector}, at first {}: {events:#?}",
                initial(sector)
            );
        }
    }

    /// What the requests mean for one sector.
    fn events_of(&self, sector: u64, records: &[Record]) -> Vec<Event> {
        let at = sector * SECTOR;
        let mut events = Vec::new();
        let mut looks = 0;
        for record in records {
            let mut add = |layer, act| {
                events.push(Event {
                    layer,
                    act,
                    began: record.began,
                    ended: record.ended,
                });
            };
            let layer = record.layer;
            let number = at
                .checked_sub(record.range.start)
                .map(|offset| offset / SECTOR);
            match (
                &record.operation,
                number.filter(|_| record.range.contains(&at)),
            ) {
                (Kind::Read(values), Some(number)) => {
                    let value = values[usize::try_from(number).expect("small")];
                    add(layer, Act::Look(looks));
                    add(layer, Act::Fetch(looks, value));
                    looks += 1;
                }
                (Kind::Write(first), Some(number)) => add(layer, Act::Write(first + number)),
                (Kind::Zero, Some(_)) => add(layer, Act::Zero),
                (Kind::Discard, Some(_)) => add(layer, Act::Discard),
                (Kind::Write(_) | Kind::Zero, None) if self.is_beside(record, at) => {
                    add(layer, Act::Beside);
                    if layer > 0 {
                        add(layer - 1, Act::Look(looks));
                        add(layer - 1, Act::Take(looks));
                        add(layer, Act::Publish(looks));
                        looks += 1;
                    }
                }
                _ => {}
            }
        }
        events
    }

    /// Whether a request beside a sector is to the same unit.
    fn is_beside(&self, record: &Record, at: u64) -> bool {
        let unit = self.units[record.layer];
        let around = record.range.start / unit * unit..record.range.end.next_multiple_of(unit);
        around.contains(&at)
    }
}
