//! How the figures of images are shown, for people and for programs.

use serde_json::{Map, Value, json};

use super::output::human_size;
use crate::jobs::figures::{Commitment, Family, FileFigures, Filesystem};

/// The figures of one image: its file, and its external data file if it has one.
pub(super) fn figures_json(files: &[FileFigures]) -> Value {
    let mut files = files.iter().map(file_json);
    let mut figures = files.next().unwrap_or_default();
    for data_file in files {
        figures.insert("data-file".to_owned(), data_file.into());
    }
    figures.into()
}

fn file_json(file: &FileFigures) -> Map<String, Value> {
    let mut figures = Map::new();
    let mut insert = |name: &str, value: Value| figures.insert(name.to_owned(), value);
    if let Some(capacity) = file.capacity {
        insert("capacity", capacity.into());
    } else {
        insert("filename", file.path.display().to_string().into());
    }
    insert("length", file.length.into());
    insert("allocation", file.allocation.into());
    insert("commitment", file.commitment.bytes().into());
    match &file.commitment {
        Commitment::Bytes(_) => {}
        Commitment::Unbounded { as_is } => {
            insert("commitment-without-new-snapshots", (*as_is).into());
        }
        Commitment::Unknown(why) => {
            insert("commitment-unknown", why.as_str().into());
        }
    }
    if let Some(free) = file.free {
        insert("filesystem-free", free.into());
        let shortfall = file.growth().map(|growth| growth.saturating_sub(free));
        insert("filesystem-shortfall", shortfall.into());
    }
    figures
}

/// The figures of several images together.
pub(super) fn family_json(family: &Family) -> Value {
    let filesystem = |filesystem: &Filesystem| {
        json!({
            "of": filesystem.of.display().to_string(),
            "free": filesystem.free,
            "growth": filesystem.growth,
            "shortfall": filesystem.shortfall(),
        })
    };
    json!({
        "files": family.files,
        "capacity": family.capacity,
        "length": family.length,
        "allocation": family.allocation,
        "commitment": family.commitment,
        "filesystems": family.filesystems.iter().map(filesystem).collect::<Vec<_>>(),
    })
}

/// As [`figures_json`], as lines of a name and a value.
pub(super) fn figures_human(files: &[FileFigures], line: &mut impl FnMut(&str, &str)) {
    for file in files {
        match file.capacity {
            Some(capacity) => {
                line("Figures", "");
                line("    capacity", &bytes(capacity));
            }
            None => line("Figures of the data file", &file.path.display().to_string()),
        }
        line("    length", &bytes(file.length));
        line("    allocation", &bytes(file.allocation));
        line("    commitment", &commitment(&file.commitment));
        if let Some(free) = file.free {
            line("    free on its filesystem", &verdict(free, file.growth()));
        }
    }
}

/// As [`family_json`], as lines of a name and a value.
pub(super) fn family_human(family: &Family, line: &mut impl FnMut(&str, &str)) {
    line(&format!("All {} files together", family.files), "");
    line("    capacity", &bytes(family.capacity));
    line("    length", &bytes(family.length));
    line("    allocation", &bytes(family.allocation));
    let sum = family.commitment.map_or_else(
        || "no bound, or unknown, since that of a file is".to_owned(),
        bytes,
    );
    line("    commitment", &sum);
    for filesystem in &family.filesystems {
        line(
            &format!("    free on the filesystem of {}", filesystem.of.display()),
            &verdict(filesystem.free, filesystem.growth),
        );
    }
}

fn commitment(commitment: &Commitment) -> String {
    match commitment {
        Commitment::Bytes(most) => bytes(*most),
        Commitment::Unbounded { as_is } => format!(
            "no bound, since further snapshots keep room; {} without new ones",
            bytes(*as_is)
        ),
        Commitment::Unknown(why) => format!("unknown: {why}"),
    }
}

/// Whether a filesystem can hold what is still to come.
fn verdict(free: u64, growth: Option<u64>) -> String {
    match growth {
        None => bytes(free),
        Some(growth) if growth > free => {
            format!("{}, {} too little", bytes(free), bytes(growth - free))
        }
        Some(_) => format!("{}, enough", bytes(free)),
    }
}

fn bytes(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_size(bytes))
}
