//! `seethrough map --groups --output svg`: the block groups as a picture.
//!
//! A square is a group, or a run of groups where there are thousands. Its colour says whose it is, what is filled of it
//! how many blocks are in use, and the bar at its right edge how many inodes; pointing at it tells the numbers.

use std::fmt::Write;

use super::group_map::{Cell, Shown, cells, percent};
use crate::view::group_map::{Fill, Owner};

const COLUMNS: usize = 40;
/// The most squares: 50 rows.
const MAX_CELLS: usize = 50 * COLUMNS;
/// From square to square, and a square's edge, in pixels.
const PITCH: usize = 22;
const EDGE: usize = 20;
/// The width of the bar of inodes.
const BAR: usize = 3;
const MARGIN: usize = 16;
const LINE: usize = 22;

const BASE: &str = "#4a6f94";
const NOBODY: &str = "#9a9a9a";
const SEVERAL: &str = "#333333";
const EMPTY: &str = "#f1f1f1";
const INODES: &str = "#111111";
const REGIONS: [&str; 8] = [
    "#d1792b", "#3a8f57", "#b5476b", "#7a58b8", "#2a93a3", "#a08a1e", "#c04f38", "#5d7a2d",
];

impl Shown<'_> {
    /// The picture.
    pub(super) fn svg(&self) -> String {
        let cells = cells(&self.map.groups, MAX_CELLS);
        let rows = cells.len().div_ceil(COLUMNS);
        let parties = self.parties();
        let top = MARGIN + LINE;
        let legend = top + rows * PITCH + LINE;
        let width = 2 * MARGIN + COLUMNS * PITCH;
        let height = legend + (parties.len() + 2) * LINE;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
        );
        let mut title = self.title();
        if let Some(cell) = cells.first().filter(|cell| cell.count > 1) {
            let _ = write!(title, ", {} in a square", cell.count);
        }
        add_text(&mut svg, MARGIN, MARGIN + 8, &title);
        for (index, cell) in cells.iter().enumerate() {
            let x = MARGIN + index % COLUMNS * PITCH;
            let y = top + index / COLUMNS * PITCH;
            self.add_square(&mut svg, x, y, cell);
        }
        for (index, party) in parties.iter().enumerate() {
            let y = legend + index * LINE;
            let colour = colour(Some(party.owner));
            let opacity = self.opacity(party.is_own);
            // Writing to a string cannot fail.
            let _ = writeln!(
                svg,
                "<rect x=\"{MARGIN}\" y=\"{y}\" width=\"14\" height=\"14\" fill=\"{colour}\" opacity=\"{opacity}\"/>"
            );
            add_text(&mut svg, MARGIN + 22, y + 12, &self.describe(party));
        }
        let hint = "filled: blocks in use; black bar: inodes in use";
        add_text(&mut svg, MARGIN, legend + parties.len() * LINE + 12, hint);
        svg.push_str("</svg>\n");
        svg
    }

    fn add_square(&self, svg: &mut String, x: usize, y: usize, cell: &Cell) {
        let blocks = height(cell.blocks);
        let inodes = height(cell.inodes);
        let (owner, is_own) = cell.owner.unzip();
        let colour = colour(owner);
        let opacity = self.opacity(is_own.unwrap_or(true));
        let names = match cell.owner {
            Some((owner, is_own)) => self.name(owner, is_own),
            None => "several".to_owned(),
        };
        let groups = match cell.count {
            1 => format!("group {}", cell.first),
            count => format!("groups {} to {}", cell.first, cell.first + count - 1),
        };
        let title = escaped(&format!(
            "{groups}: {names}, {} of blocks and {} of inodes in use",
            percent(cell.blocks),
            percent(cell.inodes)
        ));
        let (block_y, inode_y) = (y + EDGE - blocks, y + EDGE - inodes);
        let (fill_width, bar_x) = (EDGE - BAR, x + EDGE - BAR);
        let _ = writeln!(
            svg,
            "<g opacity=\"{opacity}\"><title>{title}</title>\
             <rect x=\"{x}\" y=\"{y}\" width=\"{EDGE}\" height=\"{EDGE}\" fill=\"{EMPTY}\" stroke=\"{colour}\"/>\
             <rect x=\"{x}\" y=\"{block_y}\" width=\"{fill_width}\" height=\"{blocks}\" fill=\"{colour}\"/>\
             <rect x=\"{bar_x}\" y=\"{inode_y}\" width=\"{BAR}\" height=\"{inodes}\" fill=\"{INODES}\"/></g>"
        );
    }

    /// What is foreign to a child is pale.
    fn opacity(&self, is_own: bool) -> &'static str {
        if self.is_child && !is_own {
            "0.45"
        } else {
            "1"
        }
    }
}

/// Pixels of a square's height, none only if nothing is in use.
fn height(fill: Fill) -> usize {
    let pixels = (u128::from(fill.used) * EDGE as u128).div_ceil(u128::from(fill.total.max(1)));
    usize::try_from(pixels).unwrap_or(EDGE).min(EDGE)
}

fn colour(owner: Option<Owner>) -> &'static str {
    match owner {
        None => SEVERAL,
        Some(Owner::Base) => BASE,
        Some(Owner::Nobody) => NOBODY,
        Some(Owner::Region(index)) => REGIONS[index % REGIONS.len()],
    }
}

fn add_text(svg: &mut String, x: usize, y: usize, text: &str) {
    let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\">{}</text>", escaped(text));
}

/// Text for XML, which control characters may not be in.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::group_map::tests::map;

    #[test]
    fn a_picture_has_a_square_for_each_group_and_names_from_an_image_are_escaped() {
        let map = map();
        let shown = Shown {
            filename: "a<b.qcow2",
            is_child: true,
            map: &map,
        };
        let svg = shown.svg();
        assert_eq!(svg.matches("<g ").count(), 4, "{svg}");
        assert!(
            svg.contains("<title>group 1: region one, own, 19% of blocks"),
            "{svg}"
        );
        assert!(svg.contains("region &lt;two&gt;?"), "{svg}");
        assert!(
            svg.contains(">a&lt;b.qcow2 (child): 4 block groups"),
            "{svg}"
        );
        assert!(svg.ends_with("</svg>\n"));
    }

    #[test]
    fn what_is_in_use_can_be_seen() {
        assert_eq!(
            height(Fill {
                total: 1000,
                used: 1
            }),
            1
        );
        assert_eq!(
            height(Fill {
                total: 1000,
                used: 0
            }),
            0
        );
        assert_eq!(
            height(Fill {
                total: 10,
                used: 10
            }),
            EDGE
        );
    }

    #[test]
    fn thousands_of_groups_fit_a_page() {
        let mut map = map();
        map.groups = map.groups.repeat(5000);
        let shown = Shown {
            filename: "base.qcow2",
            is_child: false,
            map: &map,
        };
        let svg = shown.svg();
        assert!(svg.matches("<g ").count() <= MAX_CELLS);
        assert!(svg.contains("16 in a square"), "{}", &svg[..600]);
    }
}
