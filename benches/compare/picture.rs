//! The results as a picture: a bar for each cell, from the best peer's rate to seethrough's.

use std::fmt::Write as _;

use crate::results::{CellResult, Results};

const ROW: usize = 18;
const TOP: usize = 50;
const LABELS: f64 = 430.0;
const WIDTH: f64 = 900.0;
/// Ratios at the edges of the scale, which is logarithmic.
const LOWEST: f64 = 0.25;
const HIGHEST: f64 = 16.0;

/// An SVG picture of the ratios.
pub(crate) fn draw(results: &Results) -> String {
    let measured: Vec<(&CellResult, f64)> = results
        .cells
        .iter()
        .filter_map(|cell| Some((cell, cell.ratio()?)))
        .collect();
    let height = TOP + ROW * measured.len() + 20;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-size=\"14\">seethrough's rate in units of the best qemu-storage-daemon's</text>\n"
    );
    for ratio in [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0] {
        let (x, bottom) = (position(ratio), height - 20);
        let color = if ratio == 1.0 { "black" } else { "#ccc" };
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" stroke=\"{color}\"/>"
        );
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{ratio}×</text>",
            TOP - 6
        );
    }
    for (number, (cell, ratio)) in measured.iter().enumerate() {
        bar(&mut svg, TOP + ROW * number, &cell.name(), *ratio);
    }
    svg.push_str("</svg>\n");
    svg
}

fn bar(svg: &mut String, y: usize, label: &str, ratio: f64) {
    let (one, end) = (position(1.0), position(ratio));
    let (left, right) = (one.min(end), one.max(end));
    let color = if ratio < 1.0 { "#c0392b" } else { "#2980b9" };
    let label = label.replace('&', "&amp;").replace('<', "&lt;");
    let text_y = y + 13;
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{text_y}\" text-anchor=\"end\">{label}</text>\
         <rect x=\"{left:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\" fill=\"{color}\"/>\
         <text x=\"{:.1}\" y=\"{text_y}\">{ratio:.2}</text>",
        LABELS - 10.0,
        y + 3,
        (right - left).max(1.0),
        ROW - 6,
        right + 4.0,
    );
}

fn position(ratio: f64) -> f64 {
    let share = (ratio.clamp(LOWEST, HIGHEST) / LOWEST).ln() / (HIGHEST / LOWEST).ln();
    LABELS + share * (WIDTH - LABELS - 40.0)
}
