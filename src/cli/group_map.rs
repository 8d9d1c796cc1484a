//! `seethrough map --groups`: who writes each block group and how full it is, as text and JSON.

use std::fmt::Write;

use serde::Serialize;

use super::output::{human_size, one_line};
use crate::view::group_map::{Fill, GroupMap, GroupUse, Owner};

/// Cells in a line.
const WIDTH: usize = 64;
/// The most cells that a text has: where there are more groups, a cell is a run of them.
const MAX_CELLS: usize = 16 * WIDTH;

/// An image and its groups.
pub(super) struct Shown<'a> {
    pub(super) filename: &'a str,
    pub(super) is_child: bool,
    pub(super) map: &'a GroupMap,
}

/// A group, or a run of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// The number of its first group.
    pub(super) first: usize,
    /// How many there are.
    pub(super) count: usize,
    /// Whose they are, and whether they are the VM's own; `None` if that differs.
    pub(super) owner: Option<(Owner, bool)>,
    pub(super) blocks: Fill,
    pub(super) inodes: Fill,
}

/// The groups in at most `most` cells, all but the last of the same number of groups, a power of two.
pub(super) fn cells(groups: &[GroupUse], most: usize) -> Vec<Cell> {
    let count = groups.len().div_ceil(most.max(1)).next_power_of_two();
    let runs = groups.chunks(count).enumerate();
    runs.map(|(index, run)| {
        let owner = run.first().map(|group| (group.owner, group.is_own));
        let is_one = run
            .iter()
            .all(|group| Some((group.owner, group.is_own)) == owner);
        let blocks = run
            .iter()
            .fold(Fill::default(), |sum, group| sum.plus(group.blocks));
        let inodes = run
            .iter()
            .fold(Fill::default(), |sum, group| sum.plus(group.inodes));
        Cell {
            first: index * count,
            count: run.len(),
            owner: owner.filter(|_| is_one),
            blocks,
            inodes,
        }
    })
    .collect()
}

/// One line of the legend: everybody who has groups, with all that is theirs together.
pub(super) struct Party {
    pub(super) owner: Owner,
    pub(super) is_own: bool,
    pub(super) groups: usize,
    pub(super) blocks: Fill,
    pub(super) inodes: Fill,
}

impl Shown<'_> {
    /// Everybody who has groups: the base, its regions in their order, nobody.
    pub(super) fn parties(&self) -> Vec<Party> {
        let regions = (0..self.map.regions.len()).map(Owner::Region);
        let owners = std::iter::once(Owner::Base)
            .chain(regions)
            .chain([Owner::Nobody]);
        let mut parties = Vec::new();
        for owner in owners {
            for is_own in [true, false] {
                let mut party = Party {
                    owner,
                    is_own,
                    groups: 0,
                    blocks: Fill::default(),
                    inodes: Fill::default(),
                };
                let theirs = |group: &&GroupUse| group.owner == owner && group.is_own == is_own;
                for group in self.map.groups.iter().filter(theirs) {
                    party.groups += 1;
                    party.blocks = party.blocks.plus(group.blocks);
                    party.inodes = party.inodes.plus(group.inodes);
                }
                if party.groups > 0 {
                    parties.push(party);
                }
            }
        }
        parties
    }

    /// What an owner is called.
    pub(super) fn name(&self, owner: Owner, is_own: bool) -> String {
        let name = match owner {
            Owner::Base => "the base".to_owned(),
            Owner::Nobody => "nobody yet".to_owned(),
            Owner::Region(index) => {
                let name = self.map.regions.get(index).map_or("", String::as_str);
                format!("region {}", one_line(name))
            }
        };
        // Whatever is not a child's own is foreign to it; nothing of a base's is worth a word.
        if self.is_child && is_own {
            format!("{name}, own")
        } else {
            name
        }
    }

    /// What somebody has, and how much of it is in use.
    pub(super) fn describe(&self, party: &Party) -> String {
        let groups = match party.groups {
            1 => "1 group".to_owned(),
            count => format!("{count} groups"),
        };
        format!(
            "{}: {groups}, {} of blocks and {} of inodes in use",
            self.name(party.owner, party.is_own),
            percent(party.blocks),
            percent(party.inodes)
        )
    }

    pub(super) fn title(&self) -> String {
        let map = self.map;
        let group = u64::from(map.blocks_per_group) * u64::from(map.block_size);
        format!(
            "{} ({}): {} block groups of {}",
            one_line(self.filename),
            if self.is_child { "child" } else { "base" },
            map.groups.len(),
            human_size(group)
        )
    }

    /// For people, in lines of 80 columns.
    pub(super) fn text(&self) -> String {
        let cells = cells(&self.map.groups, MAX_CELLS);
        let mut text = self.title();
        // Writing to a string cannot fail.
        if let Some(cell) = cells.first().filter(|cell| cell.count > 1) {
            let _ = write!(text, ", {} in a cell", cell.count);
        }
        text.push('\n');
        for line in cells.chunks(WIDTH) {
            let (Some(first), Some(last)) = (line.first(), line.last()) else {
                continue;
            };
            let row = |mark: &dyn Fn(&Cell) -> char| line.iter().map(mark).collect::<String>();
            let _ = write!(
                text,
                "\ngroups {first} to {last}\n  owner   {owner}\n  blocks  {blocks}\n  inodes  {inodes}\n",
                first = first.first,
                last = last.first + last.count - 1,
                owner = row(&|cell| mark(cell.owner)),
                blocks = row(&|cell| tenths(cell.blocks)),
                inodes = row(&|cell| tenths(cell.inodes)),
            );
        }
        text.push('\n');
        for party in self.parties() {
            let _ = writeln!(
                text,
                "  {}  {}",
                mark(Some((party.owner, party.is_own))),
                self.describe(&party),
            );
        }
        if cells.iter().any(|cell| cell.owner.is_none()) {
            text.push_str("  +  several of them\n");
        }
        text.push_str("  0-9  tenths in use; * if nothing is free\n");
        text
    }
}

/// The base's groups, those of each region (in small letters if they are foreign), groups in which nobody has anything,
/// and groups of several.
fn mark(owner: Option<(Owner, bool)>) -> char {
    const LETTERS: [char; 26] = [
        'A', 'B', 'C', 'D', 'E', 'F', 'G', 'H', 'I', 'J', 'K', 'L', 'M', 'N', 'O', 'P', 'Q', 'R',
        'S', 'T', 'U', 'V', 'W', 'X', 'Y', 'Z',
    ];
    match owner {
        None => '+',
        Some((Owner::Base, _)) => '#',
        Some((Owner::Nobody, _)) => '.',
        Some((Owner::Region(index), is_own)) => {
            let letter = LETTERS[index % LETTERS.len()];
            if is_own {
                letter
            } else {
                letter.to_ascii_lowercase()
            }
        }
    }
}

fn tenths(fill: Fill) -> char {
    if fill.used >= fill.total {
        return '*';
    }
    let tenths = u128::from(fill.used) * 10 / u128::from(fill.total.max(1));
    u32::try_from(tenths)
        .ok()
        .and_then(|tenths| char::from_digit(tenths, 10))
        .unwrap_or('*')
}

/// How much is in use, in words.
pub(super) fn percent(fill: Fill) -> String {
    let percent = u128::from(fill.used) * 100 / u128::from(fill.total.max(1));
    format!("{percent}%")
}

/// A base or a child for programs.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Document<'a> {
    filename: &'a str,
    role: &'static str,
    block_size: u32,
    groups: Vec<Group<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Group<'a> {
    group: usize,
    owner: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    region: Option<&'a str>,
    own: bool,
    blocks: u64,
    free_blocks: u64,
    inodes: u64,
    free_inodes: u64,
}

impl<'a> Document<'a> {
    pub(super) fn of(shown: &Shown<'a>) -> Self {
        let group = |(number, group): (usize, &GroupUse)| {
            let (owner, region) = match group.owner {
                Owner::Base => ("base", None),
                Owner::Nobody => ("nobody", None),
                Owner::Region(index) => ("region", shown.map.regions.get(index)),
            };
            Group {
                group: number,
                owner,
                region: region.map(String::as_str),
                own: group.is_own,
                blocks: group.blocks.total,
                free_blocks: group.blocks.total.saturating_sub(group.blocks.used),
                inodes: group.inodes.total,
                free_inodes: group.inodes.total.saturating_sub(group.inodes.used),
            }
        };
        Self {
            filename: shown.filename,
            role: if shown.is_child { "child" } else { "base" },
            block_size: shown.map.block_size,
            groups: shown.map.groups.iter().enumerate().map(group).collect(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli) fn map() -> GroupMap {
        let group = |owner, is_own, used, inodes| GroupUse {
            owner,
            is_own,
            blocks: Fill { total: 100, used },
            inodes: Fill {
                total: 10,
                used: inodes,
            },
        };
        GroupMap {
            block_size: 1024,
            blocks_per_group: 100,
            regions: vec!["one".into(), "<two>\n".into()],
            groups: vec![
                group(Owner::Base, false, 100, 2),
                group(Owner::Region(0), true, 19, 10),
                group(Owner::Region(1), false, 5, 0),
                group(Owner::Nobody, false, 2, 0),
            ],
        }
    }

    #[test]
    fn a_child_sees_who_has_what_and_how_full() {
        let map = map();
        let shown = Shown {
            filename: "tom.qcow2",
            is_child: true,
            map: &map,
        };
        let expected = "\
tom.qcow2 (child): 4 block groups of 100 KiB

groups 0 to 3
  owner   #Ab.
  blocks  *100
  inodes  2*00

  #  the base: 1 group, 100% of blocks and 20% of inodes in use
  A  region one, own: 1 group, 19% of blocks and 100% of inodes in use
  b  region <two>?: 1 group, 5% of blocks and 0% of inodes in use
  .  nobody yet: 1 group, 2% of blocks and 0% of inodes in use
  0-9  tenths in use; * if nothing is free
";
        assert_eq!(shown.text(), expected);
    }

    #[test]
    fn thousands_of_groups_are_summarised_in_lines_of_80_columns() {
        let mut map = map();
        map.groups = map.groups.repeat(1000);
        let shown = Shown {
            filename: "base.qcow2",
            is_child: false,
            map: &map,
        };
        let text = shown.text();
        assert!(
            text.contains("4000 block groups of 100 KiB, 4 in a cell\n"),
            "{text}"
        );
        assert!(
            text.contains("groups 3840 to 3999\n  owner   ++++"),
            "{text}"
        );
        assert!(text.contains("  +  several of them\n"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        assert_eq!(cells(&map.groups, 1).len(), 1);
        assert_eq!(cells(&[], 10).len(), 0);
    }

    #[test]
    fn programs_get_every_group() {
        let map = map();
        let shown = Shown {
            filename: "tom.qcow2",
            is_child: true,
            map: &map,
        };
        let json = serde_json::to_value(Document::of(&shown)).unwrap();
        assert_eq!(json["groups"][1]["region"], "one");
        assert_eq!(json["groups"][1]["own"], true);
        assert_eq!(json["groups"][1]["free-blocks"], 81);
        assert_eq!(json["groups"][3]["owner"], "nobody");
        assert!(json["groups"][0].get("region").is_none());
    }
}
