//! The table of all cells, and that of the targets: on a terminal, or as Markdown.

use std::fmt::Write as _;

use crate::contender::Role;
use crate::results::{CellResult, Entry, Results, Sample, geometric_mean};
use crate::targets::{TARGETS, Wanted};

/// How a table looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Terminal,
    Markdown,
}

const HEADER: [&str; 10] = [
    "disk",
    "load",
    "cache",
    "seethrough (min–max)",
    "best peer (min–max)",
    "ratio",
    "p50/p99/p99.9 µs",
    "peer's",
    "CPU µs",
    "bound (fio)",
];

/// The cells, the targets and what to know about both.
pub(crate) fn report(results: &Results, style: Style) -> String {
    let mut rows = vec![HEADER.map(str::to_owned).to_vec()];
    rows.extend(results.cells.iter().map(row));
    let mut text = conditions(results, style);
    text.push_str(&draw(&rows, style));
    let mean = geometric_mean(results.cells.iter().filter_map(CellResult::ratio));
    if let Some(mean) = mean {
        let _ = writeln!(text, "\nGeometric mean of the ratios: {mean:.2}");
    }
    text.push('\n');
    text.push_str(&draw(&targets(results), style));
    let gaps: Vec<String> = results.cells.iter().flat_map(gaps).collect();
    if !gaps.is_empty() {
        let _ = write!(text, "\nGaps:\n\n");
        gaps.iter().for_each(|gap| {
            let _ = writeln!(text, "- {gap}");
        });
    }
    text
}

fn conditions(results: &Results, style: Style) -> String {
    let mut text = String::new();
    for (name, value) in &results.conditions {
        let bullet = if style == Style::Markdown { "- " } else { "" };
        let _ = writeln!(text, "{bullet}{name}: {value}");
    }
    text.push('\n');
    text
}

fn row(cell: &CellResult) -> Vec<String> {
    let (own, peer) = (cell.own(), cell.best(Role::Peer));
    let rate = |entry: Option<&Entry>| {
        entry
            .and_then(|entry| rate(cell, entry))
            .unwrap_or_else(|| "–".into())
    };
    let name = |entry: Option<&Entry>| {
        entry
            .map(|entry| format!(" {}", entry.contender))
            .unwrap_or_default()
    };
    let bound = cell
        .best(Role::Bound)
        .or_else(|| cell.best(Role::Reference));
    let ratio = cell
        .ratio()
        .map_or_else(|| "–".into(), |ratio| format!("{ratio:.2}"));
    let cpu = |entry: Option<&Entry>| {
        let cpu = entry.and_then(|entry| entry.median(|sample| sample.cpu_us_per_io));
        cpu.map_or_else(|| "–".into(), three_digits)
    };
    vec![
        cell.image.clone(),
        cell.load.clone(),
        cell.cache.clone(),
        rate(own),
        format!("{}{}", rate(peer), name(peer)),
        ratio,
        latencies(own),
        latencies(peer),
        format!("{} / {}", cpu(own), cpu(peer)),
        bound.map_or_else(String::new, |entry| {
            format!("{}{}", rate(Some(entry)), name(Some(entry)))
        }),
    ]
}

/// The rate in the cell's unit: requests or bytes a second.
fn rate(cell: &CellResult, entry: &Entry) -> Option<String> {
    let figure = |sample: &Sample| {
        Some(if cell.by_bandwidth {
            sample.megabytes_per_s
        } else {
            sample.iops
        })
    };
    let (low, median, high) = entry.spread(figure)?;
    let (unit, scale) = match (cell.by_bandwidth, median) {
        (true, 1000.0..) => ("GB/s", 1e3),
        (true, _) => ("MB/s", 1.0),
        (false, _) => ("k/s", 1e3),
    };
    let [low, median, high] = [low, median, high].map(|value| three_digits(value / scale));
    Some(format!("{median} {unit} ({low}–{high})"))
}

fn latencies(entry: Option<&Entry>) -> String {
    let figure = |figure: fn(&Sample) -> f64| {
        entry.and_then(|entry| entry.median(|sample| Some(figure(sample))))
    };
    let all = [
        figure(|sample| sample.p50_us),
        figure(|sample| sample.p99_us),
        figure(|sample| sample.p999_us),
    ];
    let texts = all.map(|value| value.map_or_else(|| "–".into(), three_digits));
    texts.join("/")
}

fn targets(results: &Results) -> Vec<Vec<String>> {
    let mut rows = vec![
        ["target", "met", "cells", "worst", "where"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for target in TARGETS {
        let verdict = target.judge(results);
        let word = match (verdict.is_met(), verdict.total) {
            (_, 0) => "not measured",
            (true, _) => "yes",
            (false, _) => "NO",
        };
        let sign = match target.wanted {
            Wanted::AtLeast(bound) => format!("≥ {bound}"),
            Wanted::AtMost(bound) => format!("≤ {bound}"),
        };
        let (place, value) = match verdict.worst {
            Some((place, value)) => (place, format!("{value:.2} ({sign})")),
            None => (String::new(), format!("({sign})")),
        };
        rows.push(vec![
            target.text.into(),
            word.into(),
            format!("{}/{}", verdict.met, verdict.total),
            value,
            place,
        ]);
    }
    rows
}

fn gaps(cell: &CellResult) -> Vec<String> {
    let gaps = cell
        .entries
        .iter()
        .filter_map(|entry| Some((entry, entry.gap.as_ref()?)));
    gaps.map(|(entry, reason)| format!("{}: {}: {reason}", cell.name(), entry.contender))
        .collect()
}

/// A table whose first row is its header.
fn draw(rows: &[Vec<String>], style: Style) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let separator = if style == Style::Markdown {
        " | "
    } else {
        "  "
    };
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join(separator);
        match style {
            Style::Markdown => {
                let _ = writeln!(text, "| {line} |");
                if number == 0 {
                    let dashes = widths
                        .iter()
                        .map(|width| "-".repeat(*width))
                        .collect::<Vec<_>>()
                        .join(separator);
                    let _ = writeln!(text, "| {dashes} |");
                }
            }
            Style::Terminal => {
                let _ = writeln!(text, "{}", line.trim_end());
            }
        }
    }
    text
}

/// A number as short as three digits of it allow.
fn three_digits(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
