//! What was measured, in all rounds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::contender::Role;

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) iops: f64,
    pub(crate) megabytes_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// CPU time of the daemon for each request.
    pub(crate) cpu_us_per_io: Option<f64>,
    /// Context switches of the daemon for each request.
    pub(crate) switches_per_io: Option<f64>,
    /// CPUs that the daemon kept busy.
    pub(crate) cpus_used: Option<f64>,
    /// The share of the time that the client ran: near 1, with interrupts, it is what limits.
    pub(crate) client_busy: Option<f64>,
    /// Of several disks: the rate of the slowest, as a share of their mean.
    pub(crate) worst_share: Option<f64>,
}

/// One contender in one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) contender: String,
    pub(crate) role: Role,
    /// One for each round.
    pub(crate) samples: Vec<Sample>,
    /// Why there are no numbers: a contender that failed once has none.
    pub(crate) gap: Option<String>,
}

impl Entry {
    /// The median of a figure over all rounds, if every round has it.
    pub(crate) fn median(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let (_, median, _) = self.spread(figure)?;
        Some(median)
    }

    /// Minimum, median and maximum.
    pub(crate) fn spread(
        &self,
        figure: impl Fn(&Sample) -> Option<f64>,
    ) -> Option<(f64, f64, f64)> {
        if self.gap.is_some() {
            return None;
        }
        let mut values = self
            .samples
            .iter()
            .map(figure)
            .collect::<Option<Vec<f64>>>()?;
        values.sort_by(f64::total_cmp);
        let (first, last) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some((first, median, last))
    }

    pub(crate) fn iops(&self) -> Option<f64> {
        self.median(|sample| Some(sample.iops))
    }
}

/// One cell: a load on a disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct CellResult {
    pub(crate) image: String,
    pub(crate) load: String,
    pub(crate) cache: String,
    /// Whether megabytes a second say more than requests.
    pub(crate) by_bandwidth: bool,
    pub(crate) entries: Vec<Entry>,
}

impl CellResult {
    pub(crate) fn name(&self) -> String {
        format!("{}: {} ({})", self.image, self.load, self.cache)
    }

    fn of_role(&self, role: Role) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |entry| entry.role == role)
    }

    pub(crate) fn own(&self) -> Option<&Entry> {
        self.of_role(Role::Own).next()
    }

    /// The fastest of a kind.
    pub(crate) fn best(&self, role: Role) -> Option<&Entry> {
        let measured = self.of_role(role).filter(|entry| entry.iops().is_some());
        measured.max_by(|a, b| a.iops().unwrap_or(0.0).total_cmp(&b.iops().unwrap_or(0.0)))
    }

    /// The named contender.
    pub(crate) fn entry(&self, contender: &str) -> Option<&Entry> {
        self.entries
            .iter()
            .find(|entry| entry.contender == contender)
    }

    /// seethrough's rate, in units of the best peer's.
    pub(crate) fn ratio(&self) -> Option<f64> {
        Some(self.own()?.iops()? / self.best(Role::Peer)?.iops()?)
    }

    /// A figure of seethrough's, in units of the best peer's.
    pub(crate) fn figure_ratio(
        &self,
        figure: impl Fn(&Sample) -> Option<f64> + Copy,
    ) -> Option<f64> {
        Some(self.own()?.median(figure)? / self.best(Role::Peer)?.median(figure)?)
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Machine, versions and settings, by name.
    pub(crate) conditions: BTreeMap<String, String>,
    pub(crate) rounds: usize,
    pub(crate) cells: Vec<CellResult>,
}

/// The geometric mean; `None` of nothing.
pub(crate) fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logarithms: Vec<f64> = values.map(f64::ln).collect();
    (!logarithms.is_empty())
        .then(|| (logarithms.iter().sum::<f64>() / logarithms.len() as f64).exp())
}
