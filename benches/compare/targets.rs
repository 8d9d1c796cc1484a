//! The targets, and which of them a run has met.

use crate::bound::Engine;
use crate::cells::{Image, Place};
use crate::contender::Role;
use crate::load::{EIGHT_VMS, READ_QD32, READ_QD128};
use crate::results::{CellResult, Results, Sample, geometric_mean};

/// What a target asks of every value that it is about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

/// A target.
pub(crate) struct Target {
    pub(crate) text: &'static str,
    pub(crate) wanted: Wanted,
    /// What it is about, each with the name of its cell.
    values: fn(&Results) -> Vec<Value>,
}

/// A value, and where it was found.
pub(crate) type Value = (String, f64);

/// What became of a target.
pub(crate) struct Verdict {
    /// The value furthest from what is wanted; `None` if nothing was measured.
    pub(crate) worst: Option<Value>,
    /// How many values meet the target, of how many.
    pub(crate) met: usize,
    pub(crate) total: usize,
}

impl Verdict {
    pub(crate) fn is_met(&self) -> bool {
        self.total > 0 && self.met == self.total
    }
}

impl Target {
    pub(crate) fn judge(&self, results: &Results) -> Verdict {
        let values = (self.values)(results);
        let total = values.len();
        let is_met = |value: f64| match self.wanted {
            Wanted::AtLeast(bound) => value >= bound,
            Wanted::AtMost(bound) => value <= bound,
        };
        let met = values.iter().filter(|(_, value)| is_met(*value)).count();
        let by_value = |a: &Value, b: &Value| a.1.total_cmp(&b.1);
        let worst = match self.wanted {
            Wanted::AtLeast(_) => values.into_iter().min_by(by_value),
            Wanted::AtMost(_) => values.into_iter().max_by(by_value),
        };
        Verdict { worst, met, total }
    }
}

/// Ratios are seethrough's rate in units of the best peer's, unless the text says otherwise.
pub(crate) const TARGETS: &[Target] = &[
    Target {
        text: "2 times the best peer, geometric mean over all cells",
        wanted: Wanted::AtLeast(2.0),
        values: |results| {
            let mean = geometric_mean(results.cells.iter().filter_map(CellResult::ratio));
            mean.map(|mean| ("all cells".to_owned(), mean))
                .into_iter()
                .collect()
        },
    },
    Target {
        text: "no cell below the best peer",
        wanted: Wanted::AtLeast(1.0),
        values: |results| ratios(results, |_| true),
    },
    Target {
        text: "1.7 times for 4K random reads at qd32 and qd128, allocated and see-through",
        wanted: Wanted::AtLeast(1.7),
        values: |results| {
            ratios(results, |cell| {
                is_any(
                    &cell.image,
                    &[Image::Qcow2.name(), Image::SeeThrough.name()],
                ) && is_any(&cell.load, &[READ_QD32.name, READ_QD128.name])
                    && cell.cache == Place::Disk.name()
            })
        },
    },
    Target {
        text: "3 times for first writes into clusters of 64 KiB",
        wanted: Wanted::AtLeast(3.0),
        values: |results| {
            ratios(results, |cell| {
                cell.image == Image::FirstWrite.name() && is_4k_write(cell)
            })
        },
    },
    Target {
        text: "2 times for first writes with subclusters",
        wanted: Wanted::AtLeast(2.0),
        values: |results| {
            ratios(results, |cell| {
                cell.image == Image::FirstWriteSubclusters.name() && is_4k_write(cell)
            })
        },
    },
    Target {
        text: "2 times for 4K overwrites",
        wanted: Wanted::AtLeast(2.0),
        values: |results| {
            ratios(results, |cell| {
                cell.image == Image::Qcow2.name()
                    && cell.cache == Place::Memory.name()
                    && is_4k_write(cell)
            })
        },
    },
    Target {
        text: "1.5 times at qd1 with a polling client",
        wanted: Wanted::AtLeast(1.5),
        values: |results| ratios(results, |cell| cell.load.ends_with("qd1 polling")),
    },
    Target {
        text: "no loss at qd1 with an interrupt-driven client",
        wanted: Wanted::AtLeast(1.0),
        values: |results| ratios(results, |cell| cell.load.ends_with("qd1")),
    },
    Target {
        text: "3 times for compressed 4K random reads",
        wanted: Wanted::AtLeast(3.0),
        values: |results| {
            ratios(results, |cell| {
                is_compressed(cell) && cell.load.starts_with("4K random")
            })
        },
    },
    Target {
        text: "both CPUs used for compressed sequential reads (CPUs that the daemon keeps busy)",
        wanted: Wanted::AtLeast(1.5),
        values: |results| {
            let cells = results
                .cells
                .iter()
                .filter(|cell| is_compressed(cell) && cell.load.starts_with("1M"));
            let used = cells.filter_map(|cell| {
                Some((cell.name(), cell.own()?.median(|sample| sample.cpus_used)?))
            });
            used.collect()
        },
    },
    Target {
        text: "CPU per request at most 0.6 of the best peer's",
        wanted: Wanted::AtMost(0.6),
        values: |results| figures(results, |sample| sample.cpu_us_per_io),
    },
    Target {
        text: "p99 no worse than the best peer's (1.05 of it counts as the same)",
        wanted: Wanted::AtMost(1.05),
        values: |results| figures(results, |sample| Some(sample.p99_us)),
    },
    Target {
        text: "0.95 of fio io_uring on the raw file for 4K random reads at qd32 of an allocated qcow2",
        wanted: Wanted::AtLeast(0.95),
        values: |results| {
            let cells = results.cells.iter().filter(|cell| {
                cell.image == Image::Qcow2.name()
                    && cell.load == READ_QD32.name
                    && cell.cache == Place::Disk.name()
            });
            let share = |cell: &CellResult| {
                Some((
                    cell.name(),
                    cell.own()?.iops()? / cell.entry(Engine::IoUring.name())?.iops()?,
                ))
            };
            cells.filter_map(share).collect()
        },
    },
    Target {
        text: "8 VMs on one base: the sum at least 0.9 of one VM's rate at qd32",
        wanted: Wanted::AtLeast(0.9),
        values: |results| {
            let find = |load: &str| {
                let mut cells = results.cells.iter();
                let cell = cells.find(|cell| {
                    cell.image == Image::SeeThrough.name()
                        && cell.load == load
                        && cell.cache == Place::Disk.name()
                })?;
                cell.own()?.iops()
            };
            let share = || Some(find(EIGHT_VMS.name)? / find(READ_QD32.name)?);
            share()
                .map(|share| ("8 VMs".to_owned(), share))
                .into_iter()
                .collect()
        },
    },
    Target {
        text: "8 VMs on one base: the slowest at least 0.7 of the mean",
        wanted: Wanted::AtLeast(0.7),
        values: |results| {
            let share = |cell: &CellResult| {
                Some((
                    cell.name(),
                    cell.own()?.median(|sample| sample.worst_share)?,
                ))
            };
            results.cells.iter().filter_map(share).collect()
        },
    },
    Target {
        text: "a view costs at most 3% (rate without it, in units of the rate with it)",
        wanted: Wanted::AtMost(1.03),
        values: |results| {
            let cost = |cell: &CellResult| {
                Some((
                    cell.name(),
                    cell.best(Role::Reference)?.iops()? / cell.own()?.iops()?,
                ))
            };
            results
                .cells
                .iter()
                .filter(|cell| cell.image == Image::View.name())
                .filter_map(cost)
                .collect()
        },
    },
];

fn ratios(results: &Results, wanted: impl Fn(&CellResult) -> bool) -> Vec<Value> {
    let cells = results.cells.iter().filter(|cell| wanted(cell));
    cells
        .filter_map(|cell| Some((cell.name(), cell.ratio()?)))
        .collect()
}

fn figures(results: &Results, figure: impl Fn(&Sample) -> Option<f64> + Copy) -> Vec<Value> {
    let cells = results.cells.iter();
    cells
        .filter_map(|cell| Some((cell.name(), cell.figure_ratio(figure)?)))
        .collect()
}

fn is_any(text: &str, choices: &[&str]) -> bool {
    choices.contains(&text)
}

fn is_compressed(cell: &CellResult) -> bool {
    is_any(&cell.image, &[Image::Deflate.name(), Image::Zstd.name()])
}

fn is_4k_write(cell: &CellResult) -> bool {
    cell.load.starts_with("4K random write")
}
