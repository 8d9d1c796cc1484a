//! Is a history of concurrent requests explainable by an order of them that agrees with real time?
//!
//! What virtio promises, and no more: a sector is read and written as a whole; of requests that are under way at the
//! same time any order will do; a request that begins after another has ended comes after it. So every sector of a
//! chain of images is judged by itself, as a register in each of its layers:
//!
//! - A layer *shows* the layer below until it has its own value. A write or zeroes give it one, for good.
//! - A discard may give it zeros, or do nothing.
//! - A read looks first which layer has the value, and then fetches it. Only a base that is written at the same time
//!   lets the difference show: what a child has begun to read from its base, it reads as of the end of its read, even
//!   where the child was written meanwhile.
//! - Three at once are less orderly, since zeroes may keep a sector's room: where it is zeroed, and it or a neighbour
//!   in its cluster written, while an earlier request is under way all the time, an earlier read may see the new write
//!   before others do, and an earlier write may show once more when the new one ends.
//! - A write to other sectors of the same cluster may copy this sector up: it reads it from the layer below, and at a
//!   later moment gives that to the layer as its own, both while the write is under way. Between the two the lower
//!   layer may have been written: that, too, is a base that changes while a child copies from it.
//!
//! The search goes through the orders that real time allows, and remembers what it has been through.

use std::collections::HashSet;

/// A sector's contents; every write has one of its own. Zeros are 0.
pub type Value = u64;

/// What a request does to one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// A read begins, number so-and-so of the sector's history…
    Look(usize),
    /// …and has found this.
    Fetch(usize, Value),
    Write(Value),
    Zero,
    /// Zeros, or nothing.
    Discard,
    /// Other sectors of the same cluster are written.
    Beside,
    /// This write shows once more, or not.
    Again(Value),
    /// Has found whatever there is: for a copy that is perhaps made.
    Take(usize),
    /// Makes what was taken the layer's own, unless it has something of its own.
    Publish(usize),
}

/// One request, as one sector sees it.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// The layer that the request goes to; the lowest is 0.
    pub layer: usize,
    pub act: Act,
    /// When the request began and ended.
    pub began: u64,
    pub ended: u64,
}

/// What a read under way has found out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Looked {
    /// The layer that has the value.
    layer: usize,
    /// Whether the layer was zeroed since.
    zeroed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// Each layer's own value.
    own: Vec<Option<Value>>,
    taken: Vec<Option<Value>>,
    looked: Vec<Looked>,
}

impl State {
    /// The layer that decides what a layer shows.
    fn source(&self, layer: usize) -> usize {
        self.own[..=layer]
            .iter()
            .rposition(Option::is_some)
            .unwrap_or(0)
    }

    fn zeroed(&self, layer: usize) -> Self {
        let mut next = self.clone();
        next.own[layer] = Some(0);
        for looked in next
            .looked
            .iter_mut()
            .filter(|looked| looked.layer == layer)
        {
            looked.zeroed = true;
        }
        next
    }

    /// Whether an act that can be next leads to no less if it is next than if it comes later, and changes nothing
    /// for others.
    fn is_free(&self, event: &Event) -> bool {
        let is_own = |layer: usize| self.own.get(layer).is_some_and(Option::is_some);
        match event.act {
            Act::Fetch(number, value) => self.own[self.looked[number].layer] == Some(value),
            // Once a layer has something of its own, it always has.
            Act::Look(_) | Act::Publish(_) => is_own(event.layer),
            Act::Take(_) => is_own(event.layer + 1),
            Act::Beside => true,
            Act::Write(_) | Act::Again(_) | Act::Zero | Act::Discard => false,
        }
    }

    /// The states that an act may lead to; none if it cannot have happened now, when `is_under_way` tells which
    /// writes of a layer are under way.
    fn after(&self, event: &Event, is_under_way: impl Fn(usize, Value) -> bool) -> Vec<State> {
        let Event { layer, act, .. } = *event;
        match act {
            Act::Look(number) => {
                let mut next = self.clone();
                next.looked[number] = Looked {
                    layer: self.source(layer),
                    zeroed: false,
                };
                vec![next]
            }
            Act::Fetch(number, value) => {
                let looked = self.looked[number];
                let is_there = self.own[looked.layer] == Some(value)
                    || looked.zeroed && is_under_way(looked.layer, value);
                // No one asks again: states that differ in nothing else are one.
                let mut next = self.clone();
                next.looked[number] = Looked::default();
                if is_there { vec![next] } else { Vec::new() }
            }
            Act::Write(value) => {
                let mut next = self.clone();
                next.own[layer] = Some(value);
                vec![next]
            }
            Act::Beside => vec![self.clone()],
            Act::Again(value) => {
                let mut next = self.clone();
                next.own[layer] = Some(value);
                vec![self.clone(), next]
            }
            Act::Zero => vec![self.zeroed(layer)],
            Act::Discard => vec![self.clone(), self.zeroed(layer)],
            Act::Take(number) => {
                let mut taken = self.clone();
                taken.taken[number] = self.own[self.looked[number].layer];
                taken.looked[number] = Looked::default();
                vec![taken]
            }
            Act::Publish(number) => {
                let (mut next, mut copied) = (self.clone(), self.clone());
                next.taken[number] = None;
                copied.own[layer] = copied.taken[number].take();
                if self.own[layer].is_none() {
                    vec![next, copied]
                } else {
                    vec![next]
                }
            }
        }
    }
}

impl Event {
    fn overlaps(&self, other: &Self) -> bool {
        self.layer == other.layer && self.began < other.ended && other.began < self.ended
    }
}

/// Where an earlier write may show once more: at the end of a later one, if both zeroes and that one come while it
/// is under way.
fn repeated(events: &[Event]) -> Vec<Event> {
    let with_overlap = |event: &Event, of: fn(&Act) -> bool| -> Vec<Event> {
        let others = events
            .iter()
            .filter(|other| of(&other.act) && other.overlaps(event));
        others.copied().collect()
    };
    let mut repeated = Vec::new();
    for event in events {
        let Act::Write(value) = event.act else {
            continue;
        };
        let cleared = with_overlap(event, |act| matches!(act, Act::Zero | Act::Discard));
        let mut later = with_overlap(event, |act| matches!(act, Act::Write(_) | Act::Beside));
        later.retain(|write| {
            write.act != event.act && cleared.iter().any(|one| one.began < write.ended)
        });
        let began = later.iter().map(|write| write.began).min();
        let ended = later.iter().map(|write| write.ended).max();
        if let (Some(began), Some(ended)) = (began, ended) {
            repeated.push(Event {
                act: Act::Again(value),
                began,
                ended,
                ..*event
            });
        }
    }
    repeated
}

/// Whether some order explains the history of a sector whose lowest layer held `initial` at first.
///
/// # Panics
/// With more than 128 events: the search would take too long.
pub fn is_explainable(initial: Value, layers: usize, events: &[Event]) -> bool {
    let repeated = repeated(events);
    let mut events = events.to_vec();
    events.retain(|event| event.act != Act::Beside);
    if explain(initial, layers, &events) {
        return true;
    }
    events.extend(&repeated);
    !repeated.is_empty() && explain(initial, layers, &events)
}

fn explain(initial: Value, layers: usize, events: &[Event]) -> bool {
    assert!(events.len() <= 128, "{} events in one sector", events.len());
    let mut own = vec![None; layers];
    own[0] = Some(initial);
    let start = State {
        own,
        taken: vec![None; events.len()],
        looked: vec![Looked::default(); events.len()],
    };
    let all = events.len();
    let mut seen: HashSet<(u128, State)> = HashSet::new();
    let mut open = vec![(0u128, start)];
    while let Some((done, state)) = open.pop() {
        let left = || (0..all).filter(move |index| done >> index & 1 == 0);
        // Whoever began after another ended has to wait for it.
        let Some(first_end) = left().map(|index| events[index].ended).min() else {
            return true;
        };
        let may_be_next =
            |index: &usize| events[*index].began <= first_end && may_come(events, done, *index);
        // What others cannot notice may as well be next: no other order has to be tried.
        let free = left()
            .filter(may_be_next)
            .find(|index| state.is_free(&events[*index]));
        let candidates: Vec<usize> = match free {
            Some(index) => vec![index],
            None => left().filter(may_be_next).collect(),
        };
        for index in candidates {
            let is_under_way = |layer, value| {
                left().map(|index| &events[index]).any(|event| {
                    (event.layer, event.act) == (layer, Act::Write(value))
                        && event.began <= first_end
                })
            };
            for next in state.after(&events[index], is_under_way) {
                let key = (done | 1 << index, next);
                if seen.insert(key.clone()) {
                    open.push(key);
                }
            }
        }
    }
    false
}

/// What was not taken yet cannot be published, nor fetched what was not looked up.
fn may_come(events: &[Event], done: u128, index: usize) -> bool {
    let first = match events[index].act {
        Act::Publish(number) => Act::Take(number),
        Act::Fetch(number, _) | Act::Take(number) => Act::Look(number),
        _ => return true,
    };
    let first = events.iter().position(|event| event.act == first);
    first.is_some_and(|first| done >> first & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An act in the lowest layer, or in the one above, from one moment to another.
    struct Request(usize, Act, u64, u64);

    fn explained(requests: &[Request]) -> bool {
        let events: Vec<Event> = requests
            .iter()
            .map(|Request(layer, act, began, ended)| Event {
                layer: *layer,
                act: *act,
                began: *began,
                ended: *ended,
            })
            .collect();
        is_explainable(5, 2, &events)
    }

    fn write(layer: usize, value: Value, began: u64, ended: u64) -> Request {
        Request(layer, Act::Write(value), began, ended)
    }

    fn reads(layer: usize, began: u64, values: &[Value]) -> Vec<Request> {
        let one = |(number, value): (usize, &Value)| {
            let at = began + 2 * number as u64;
            [Act::Look(number), Act::Fetch(number, *value)]
                .map(|act| Request(layer, act, at, at + 1))
        };
        values.iter().enumerate().flat_map(one).collect()
    }

    fn together(requests: impl IntoIterator<Item = Request>, reads: Vec<Request>) -> bool {
        let all: Vec<Request> = requests.into_iter().chain(reads).collect();
        explained(&all)
    }

    #[test]
    fn a_read_after_a_write_that_ended_sees_it() {
        assert!(together([write(0, 7, 0, 1)], reads(0, 2, &[7])));
        assert!(!together([write(0, 7, 0, 1)], reads(0, 2, &[5])));
        assert!(together([write(0, 7, 0, 3)], reads(0, 2, &[5])));
    }

    #[test]
    fn readers_agree_on_the_order_of_two_writes() {
        let writes = || [write(0, 1, 0, 9), write(0, 2, 0, 9)];
        assert!(together(writes(), reads(0, 1, &[5, 1, 2])));
        assert!(together(writes(), reads(0, 1, &[2, 2, 1])));
        assert!(!together(writes(), reads(0, 1, &[1, 2, 1])));
    }

    #[test]
    fn a_discard_is_zeros_or_nothing_and_stays_so() {
        let discard = || [Request(0, Act::Discard, 0, 1)];
        assert!(together(discard(), reads(0, 2, &[5, 5])));
        assert!(together(discard(), reads(0, 2, &[0, 0])));
        assert!(!together(discard(), reads(0, 2, &[0, 5])));
    }

    #[test]
    fn a_read_sees_a_write_that_others_do_not_see_yet_only_where_it_began_before_zeroes() {
        let history = |zeroes_begin, read_begins| {
            let zero = Request(0, Act::Zero, zeroes_begin, zeroes_begin + 1);
            let early = [Act::Look(2), Act::Fetch(2, 9)].map(|act| Request(0, act, read_begins, 7));
            let all = early.into_iter().chain([zero, write(0, 9, 6, 12)]);
            together(all, reads(0, 8, &[0, 9]))
        };
        assert!(history(4, 3));
        assert!(!history(0, 3));
    }

    #[test]
    fn a_write_shows_once_more_only_where_it_overlaps_zeroes_and_a_later_write() {
        let history = |ended| {
            let zero = Request(0, Act::Zero, 1, 2);
            let late = [Act::Look(1), Act::Fetch(1, 7)].map(|act| Request(0, act, 20, 21));
            let all = late
                .into_iter()
                .chain([write(0, 7, 0, ended), zero, write(0, 9, 5, 12)]);
            together(all, reads(0, 10, &[0]))
        };
        assert!(history(6));
        assert!(!history(4));
    }

    #[test]
    fn a_child_shows_its_base_until_it_is_written() {
        assert!(together([write(0, 6, 0, 1)], reads(1, 2, &[6])));
        assert!(!together([write(0, 6, 0, 1)], reads(1, 2, &[5])));
        let hidden = || [write(1, 8, 0, 1), write(0, 6, 2, 3)];
        assert!(together(hidden(), reads(1, 4, &[8])));
        assert!(!together(hidden(), reads(1, 4, &[6])));
    }

    #[test]
    fn a_write_beside_copies_up_what_the_base_shows_meanwhile() {
        let copying = || {
            let copy = [
                Request(0, Act::Look(2), 2, 5),
                Request(0, Act::Take(2), 2, 5),
            ];
            let publish = Request(1, Act::Publish(2), 2, 5);
            let writes = [write(0, 6, 0, 1), write(0, 7, 8, 9)];
            copy.into_iter().chain([publish]).chain(writes)
        };
        assert!(together(copying(), reads(1, 10, &[6])));
        assert!(
            together(copying(), reads(1, 10, &[7])),
            "nothing had to be copied"
        );
        assert!(!together(copying(), reads(1, 10, &[5])));
        assert!(!together(copying(), reads(1, 10, &[7, 6])));
    }
}
