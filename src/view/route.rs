//! Cutting a request into pieces that are each treated in one way.
//!
//! # Invariants
//!
//! 1. The pieces of a request are its bytes, in order, each once.
//! 2. Two pieces side by side that are read from the same store, or both lead through to one, are one piece: what
//!    needs no treatment is not cut up.
//! 3. The work is bounded by the number of stretches of the layout that the request covers, and nothing is
//!    allocated: the fast path asks here.

use std::ops::Range;

use super::refusal::Structure;
use super::territory::Territory;
use crate::units::{BlockGroup, GuestOffset};

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Anything plain may be read, whoever owns it.
    Read,
    /// Only one's own may be written.
    Write,
}

/// How a piece is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Treatment {
    /// Straight through to the VM's own store.
    Through,
    /// A shared region of the VM's: straight through to the base's store.
    InPlace,
    /// The base's own journal: straight through, and whoever shows the base to children is told of what was written.
    Journal,
    /// Composed when read, scattered when written.
    Composed(Composed),
    /// Read from the base, and not this VM's to write.
    Foreign(Foreign),
}

/// A structure of which a VM does not see, or does not write, the stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Composed {
    /// The block of the superblock.
    Superblock,
    /// One block of the descriptor table: the one with this index.
    Descriptors(u32),
    /// A foreign group's block bitmap.
    BlockBitmap(BlockGroup),
    /// A foreign group's inode bitmap.
    InodeBitmap(BlockGroup),
    /// Blocks of a foreign group's inode table.
    Inodes(BlockGroup),
    /// A block of a foreign group that holds extended attributes: composed when it is read, and foreign data when it
    /// is written.
    Attributes(BlockGroup),
}

/// What kind of foreign data a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    pub(super) structure: Structure,
    pub(super) group: Option<BlockGroup>,
}

/// A stretch of the disk, up to `end`, that is treated in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) treatment: Treatment,
    pub(super) end: GuestOffset,
}

/// A part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) at: GuestOffset,
    pub(super) len: u64,
    pub(super) treatment: Treatment,
}

impl Piece {
    /// Where the piece lies in the buffer of a request that starts at `request`.
    pub(super) fn within(&self, request: GuestOffset) -> Range<usize> {
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let start = self.at.0.saturating_sub(request.0);
        index(start)..index(start.saturating_add(self.len))
    }

    /// The offset behind the piece's last byte.
    pub(super) fn end(&self) -> GuestOffset {
        GuestOffset(self.at.0.saturating_add(self.len))
    }
}

/// The pieces of a request, in order.
pub(super) struct Pieces<'a> {
    territory: &'a Territory,
    route: Route,
    at: GuestOffset,
    end: GuestOffset,
    /// The stretch at `at`, if it is known already.
    ahead: Option<Stretch>,
}

impl<'a> Pieces<'a> {
    /// The pieces of `len` bytes at `at`.
    pub(super) fn new(territory: &'a Territory, at: GuestOffset, len: u64, route: Route) -> Self {
        Self {
            territory,
            route,
            at,
            end: GuestOffset(at.0.saturating_add(len)),
            ahead: None,
        }
    }

    /// How the bytes from `at` on are treated.
    fn stretch_at(&self, at: GuestOffset) -> Stretch {
        let mut stretch = self.territory.stretch_at(at, self.end);
        if self.route == Route::Read {
            match stretch.treatment {
                Treatment::Foreign(foreign) => {
                    let end = stretch.end.min(self.end);
                    stretch = self.territory.readable(at, foreign, end);
                }
                Treatment::Journal => stretch.treatment = Treatment::Through,
                Treatment::Through | Treatment::InPlace | Treatment::Composed(_) => {}
            }
        }
        // Every stretch moves on, whatever the layout says.
        stretch.end = stretch
            .end
            .max(GuestOffset(at.0.saturating_add(1)))
            .min(self.end);
        stretch
    }

    /// Whether a piece may go on in the next stretch.
    fn may_grow(&self, treatment: Treatment) -> bool {
        self.is_the_same(treatment, treatment)
    }

    /// Invariant 2.
    fn is_the_same(&self, one: Treatment, next: Treatment) -> bool {
        match (one, next) {
            (Treatment::Through, Treatment::Through) | (Treatment::InPlace, Treatment::InPlace) => {
                true
            }
            (Treatment::Foreign(_), Treatment::Foreign(_)) => self.route == Route::Read,
            _ => false,
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let at = self.at;
        if at >= self.end {
            return None;
        }
        let Stretch { treatment, mut end } =
            self.ahead.take().unwrap_or_else(|| self.stretch_at(at));
        while end < self.end && self.may_grow(treatment) {
            let next = self.stretch_at(end);
            if !self.is_the_same(treatment, next.treatment) {
                self.ahead = Some(next);
                break;
            }
            end = next.end;
        }
        self.at = end;
        Some(Piece {
            at,
            len: end.0 - at.0,
            treatment,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::territory::{Area, Owner, Side};

    /// Bytes 100 to 200 are this child's, 200 to 300 another's, 400 to 500 this one's; the rest is the base's.
    fn territory() -> Territory {
        let area = |start, owner| Area {
            start: GuestOffset(start),
            end: GuestOffset(start + 100),
            owner,
        };
        let areas = vec![
            area(400, Owner::Own),
            area(100, Owner::Own),
            area(200, Owner::Foreign),
        ];
        Territory::new(Side::Child, None, areas)
    }

    fn cut(at: u64, len: u64, route: Route) -> Vec<(u64, u64, bool)> {
        let territory = territory();
        Pieces::new(&territory, GuestOffset(at), len, route)
            .map(|piece| (piece.at.0, piece.len, piece.treatment == Treatment::Through))
            .collect()
    }

    #[test]
    fn a_write_is_cut_where_owners_change() {
        let whole = cut(0, 600, Route::Write);
        let owned: Vec<_> = whole.iter().filter(|piece| piece.2).collect();
        assert_eq!(owned, [&(100, 100, true), &(400, 100, true)]);
        let mut at = 0;
        for (start, len, _) in whole {
            assert_eq!(start, at);
            at += len;
        }
        assert_eq!(at, 600);
        assert_eq!(cut(150, 20, Route::Write), [(150, 20, true)]);
        assert_eq!(cut(199, 2, Route::Write), [(199, 1, true), (200, 1, false)]);
    }

    #[test]
    fn a_read_is_cut_where_the_store_changes() {
        let whole = cut(0, 600, Route::Read);
        let expected = [
            (0, 100, false),
            (100, 100, true),
            (200, 200, false),
            (400, 100, true),
            (500, 100, false),
        ];
        assert_eq!(whole, expected);
        assert!(cut(50, 0, Route::Read).is_empty());
    }

    #[test]
    fn a_range_at_the_end_of_the_address_space_ends() {
        assert_eq!(cut(u64::MAX - 1, 5, Route::Write).len(), 1);
    }
}
