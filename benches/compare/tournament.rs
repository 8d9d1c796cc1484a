//! Every cell, every round, every contender: interleaved, so that what changes on the machine hits all alike.

use std::path::PathBuf;
use std::time::Duration;

use crate::Result;
use crate::bound::{self, Engine};
use crate::cells::Cell;
use crate::client::Span;
use crate::contender::{Contender, Role};
use crate::cpus::Cpus;
use crate::images::{Family, Images};
use crate::load::{Load, Pattern};
use crate::measure::measure;
use crate::results::{CellResult, Entry, Sample};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    pub(crate) rounds: usize,
    pub(crate) measured: Duration,
}

/// Everybody, and the ground.
pub(crate) struct Tournament {
    pub(crate) images: Images,
    pub(crate) cpus: Cpus,
    pub(crate) contenders: Vec<Contender>,
    /// fio is there.
    pub(crate) with_bound: bool,
    pub(crate) effort: Effort,
    /// Of the stamps written last.
    pub(crate) generation: u32,
}

/// Who takes part in a cell.
enum Player {
    Daemon(Contender, Family),
    Bound(Engine),
}

impl Tournament {
    /// Measures a cell in every round.
    pub(crate) fn play(&mut self, cell: &Cell) -> CellResult {
        let players = self.players(cell);
        let mut entries: Vec<Entry> = players.iter().map(entry).collect();
        for _ in 0..self.effort.rounds {
            for (player, entry) in players.iter().zip(&mut entries) {
                if entry.gap.is_some() {
                    continue;
                }
                match self.turn(player, cell) {
                    Ok(sample) => entry.samples.push(sample),
                    Err(reason) => {
                        eprintln!("{}: {}: {reason}", cell.name(), entry.contender);
                        entry.gap = Some(reason);
                    }
                }
            }
        }
        CellResult {
            image: cell.image.name().into(),
            load: cell.load.name.into(),
            cache: cell.place.name().into(),
            by_bandwidth: cell.load.len >= 64 << 10,
            entries,
        }
    }

    fn players(&self, cell: &Cell) -> Vec<Player> {
        let mut players = Vec::new();
        for contender in self
            .contenders
            .iter()
            .filter(|contender| contender.works_with(cell.place.cache()))
        {
            let family = if contender.role == Role::Own {
                Family::Child
            } else {
                Family::Overlay
            };
            players.push(Player::Daemon(contender.clone(), family));
            if contender.role == Role::Own && cell.image.has_view() {
                let name = "seethrough, no view".to_owned();
                let without = Contender {
                    name,
                    role: Role::Reference,
                    program: contender.program.clone(),
                };
                players.push(Player::Daemon(without, Family::Overlay));
            }
        }
        if self.with_bound && cell.has_bound() {
            players.extend([Engine::IoUring, Engine::Psync].map(Player::Bound));
        }
        players
    }

    fn turn(&mut self, player: &Player, cell: &Cell) -> Result<Sample> {
        let measured = self.effort.measured;
        match player {
            Player::Daemon(contender, family) => {
                let disks = self
                    .images
                    .disks(cell.image, cell.place, *family, cell.load.disks)?;
                self.generation += 1;
                let span = Span {
                    warm_up: warm_up(&cell.load, measured),
                    measured,
                };
                let scratch: PathBuf = self.images.scratch().to_owned();
                measure(
                    contender,
                    cell,
                    &disks,
                    span,
                    self.generation,
                    &self.cpus,
                    &scratch,
                )
            }
            Player::Bound(engine) => {
                let path = self.images.for_bound(cell.place)?;
                let cpus = self.cpus.contenders(cell.load.room).to_vec();
                self.cpus.release()?;
                bound::run(
                    *engine,
                    &path,
                    &cell.load,
                    cell.place.cache(),
                    measured,
                    &cpus,
                )
            }
        }
    }
}

/// What can be done only once is measured from the start.
fn warm_up(load: &Load, measured: Duration) -> Duration {
    match load.pattern {
        Pattern::Once { .. } => Duration::ZERO,
        Pattern::Random | Pattern::Sequential => measured / 4,
    }
}

fn entry(player: &Player) -> Entry {
    let (contender, role) = match player {
        Player::Daemon(contender, _) => (contender.name.clone(), contender.role),
        Player::Bound(engine) => (engine.name().to_owned(), Role::Bound),
    };
    Entry {
        contender,
        role,
        samples: Vec::new(),
        gap: None,
    }
}
