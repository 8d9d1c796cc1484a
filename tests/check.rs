//! `check` against `qemu-img check`: what stock tools make is clean, and of images that somebody has tampered with
//! both say the same, but for the differences that [`Expected`] states.
//!
//! `SEETHROUGH_TEST_ROUNDS=n` runs n times as many seeds, `SEETHROUGH_TEST_SEED=s` a single one.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

mod engine;
mod tampering;

use std::path::Path;
use std::sync::Arc;

use engine::{for_each_seed, rng, run};
use rand::RngExt;
use rand::rngs::StdRng;
use seethrough::image::{Access, Image};
use seethrough::progress::Progress;
use seethrough::qcow2::Qcow2;
use seethrough::qcow2::check::{Finding, Repair, Repaired, Report, check, repair};
use seethrough::qcow2::header::Header;
use seethrough::storage::{CrashStorage, Delays, Lost, MemoryStorage, Moment, Storage};
use seethrough::sys::{IoBuf, block_on};
use seethrough::units::GuestOffset;
use tampering::{KINDS, Tampered, sound_image, tamper};

/// What stock tools say of an image.
#[derive(Debug)]
struct Stock {
    code: i32,
    corruptions: u64,
    leaks: u64,
    figures: [u64; 5],
    text: String,
}

fn stock_check(path: &Path) -> Stock {
    let path = path.display().to_string();
    let arguments = ["check", "-f", "qcow2", "--output", "json", &path];
    let (code, text) = run("qemu-img", &arguments);
    let json = text.find('{').zip(text.rfind("}\n"));
    let value: serde_json::Value = json
        .and_then(|(start, end)| serde_json::from_str(&text[start..=end]).ok())
        .unwrap_or_default();
    let field = |name: &str| value[name].as_u64().unwrap_or(0);
    Stock {
        code,
        corruptions: field("corruptions"),
        leaks: field("leaks"),
        figures: [
            "total-clusters",
            "allocated-clusters",
            "fragmented-clusters",
            "compressed-clusters",
            "image-end-offset",
        ]
        .map(field),
        text,
    }
}

fn figures(report: &Report) -> [u64; 5] {
    [
        report.total_clusters,
        report.allocated_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
        report.image_end_offset,
    ]
}

fn our_check(image: &[u8]) -> (seethrough::error::Result<Report>, String) {
    let storage = MemoryStorage::new(image.to_vec());
    let mut lines = String::new();
    let mut listener = |finding: Finding| lines.push_str(&format!("{finding}\n"));
    let report = block_on(check(&storage, &mut listener, &Progress::default()));
    (report, lines)
}

#[test]
fn sound_images_are_clean_and_have_the_same_figures() {
    let directory = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let path = sound_image(kind, directory.path());
        let stock = stock_check(&path);
        let (report, lines) = our_check(&std::fs::read(&path).unwrap());
        let report = report.unwrap();
        assert_eq!(stock.code, 0, "{kind:?}: {}", stock.text);
        assert!(report.is_clean(), "{kind:?}: {lines}");
        assert_eq!(figures(&report), stock.figures, "{kind:?}");
    }
}

/// Refcounts behind the end of the file, which stock tools do not look at: leaks as soon as the file grows.
fn leaks_behind_end(image: &[u8], lines: &str) -> u64 {
    let Ok(header) = Header::parse(image) else {
        return 0;
    };
    let clusters = (image.len() as u64).div_ceil(header.cluster_size());
    let leaked = lines
        .lines()
        .filter_map(|line| line.strip_prefix("Leaked cluster "))
        .filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    leaked.filter(|cluster| *cluster >= clusters).count() as u64
}

/// What both say of an image, and how far it may differ:
///
/// - Where stock tools give up (exit code 1), as they do for a broken directory of bitmaps or a refcount block that
///   is not aligned, ours go on and find the corruption, or cannot go on either.
/// - Stock tools read an L2 table also where it is not aligned, or in the header, and count its accidental contents;
///   ours count the entry that leads there.
/// - Refcounts behind the end of the file are leaks for ours alone.
/// - Ours find zero flags where the format has none, and compressed clusters that begin in the header.
fn compare(image: &Tampered, path: &Path) -> Result<(), String> {
    std::fs::write(path, &image.bytes).unwrap();
    let stock = stock_check(path);
    let (report, lines) = our_check(&image.bytes);
    let (corruptions, leaks) = report
        .as_ref()
        .map_or((0, 0), |report| (report.corruptions, report.leaks));
    let leaks = leaks - leaks_behind_end(&image.bytes, &lines)..=leaks;
    let has_line = |begin: &str, end: &str| {
        let mut lines = lines.lines();
        lines.any(|line| line.starts_with(begin) && line.ends_with(end))
    };
    let misplaced_l2 = has_line("ERROR L1 entry", "not aligned to a cluster")
        || has_line("ERROR L1 entry", "has flags, but no table");
    let only_ours = has_line("ERROR L2 entry", "which such an image does not have")
        || has_line("ERROR L2 entry", "points into the header");
    let agree = match (stock.code, &report) {
        (0, Ok(_)) => leaks.contains(&0) && (corruptions == 0 || only_ours),
        (1, Ok(_)) => corruptions > 0,
        (1, Err(_)) => true,
        (_, Err(_)) => false,
        _ if misplaced_l2 => corruptions > 0 && stock.corruptions > 0,
        _ if only_ours => corruptions > stock.corruptions,
        _ => corruptions == stock.corruptions && leaks.contains(&stock.leaks),
    };
    if agree {
        return Ok(());
    }
    Err(format!(
        "{:x?}: ours {corruptions} {leaks:?}, stock {} {:?}\n--- ours {:?}\n{}--- stock\n{}",
        image.changes,
        stock.code,
        (stock.corruptions, stock.leaks),
        report.err().map(|error| error.to_string()),
        lines
            .lines()
            .take(10)
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
        stock
            .text
            .lines()
            .filter(|line| !line.starts_with("    "))
            .take(10)
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    ))
}

#[test]
fn of_tampered_images_both_say_the_same() {
    let directory = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.iter().enumerate() {
        let sound = std::fs::read(sound_image(kind, directory.path())).unwrap();
        for_each_seed(10, &format!("{kind:?}"), |seed| {
            let mut rng = rng(seed << 8 | number as u64);
            let changes = if rng.random_bool(0.7) {
                1
            } else {
                rng.random_range(2..5)
            };
            let image = tamper(&sound, changes, &mut rng);
            let path = directory.path().join("tampered.qcow2");
            if let Err(error) = compare(&image, &path) {
                panic!("{error}");
            }
        });
    }
}

/// The contents of a disk in 512 pieces; `None` for what cannot be read.
fn pieces(image: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let storage = Arc::new(MemoryStorage::new(image.to_vec()));
    let disk = block_on(Qcow2::open(storage, None, Access::ReadOnly)).ok()?;
    let piece = usize::try_from(disk.virtual_size() / 512).unwrap();
    let read = |at: u64| {
        let buf = IoBuf::zeroed(piece);
        block_on(disk.read(GuestOffset(at), buf.clone())).ok()?;
        Some(buf.to_vec())
    };
    Some((0..disk.virtual_size()).step_by(piece).map(read).collect())
}

fn our_repair(
    storage: &dyn Storage,
    what: Repair,
) -> (seethrough::error::Result<Repaired>, String) {
    let mut lines = String::new();
    let mut listener = |finding: Finding| lines.push_str(&format!("{finding}\n"));
    let outcome = block_on(repair(storage, what, &mut listener, &Progress::default()));
    (outcome, lines)
}

/// Whether somebody has tampered with the table of snapshots itself.
fn snapshots_are_broken(image: &Tampered) -> bool {
    let Ok(header) = Header::parse(&image.bytes) else {
        return false;
    };
    let start = header.snapshots_offset.0;
    let is_there =
        |place: &usize| (start..start + header.cluster_size()).contains(&(*place as u64));
    image.changes.iter().any(|(_, place, _)| is_there(place))
}

fn judge_repair(image: &Tampered, sound: &[Option<Vec<u8>>], path: &Path) -> Result<(), String> {
    let before = pieces(&image.bytes);
    let storage = MemoryStorage::new(image.bytes.clone());
    let (outcome, lines) = our_repair(&storage, Repair::All);
    let context = || {
        format!(
            "{:x?}\n{}",
            image.changes,
            lines.lines().take(30).collect::<Vec<_>>().join("\n")
        )
    };
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(_) if Header::parse(&image.bytes).is_err() => return Ok(()),
        Err(error) => return Err(format!("{error}: {}", context())),
    };
    std::fs::write(path, storage.contents()).unwrap();
    let stock = stock_check(path);
    // An image cannot be mended whose refcounts are too narrow, or whose snapshots are nowhere to be found.
    let is_beyond_repair =
        lines.contains("its refcount can say 1 at most") || snapshots_are_broken(image);
    if !outcome.after.is_clean() && !is_beyond_repair {
        return Err(format!("not clean: {:?} {}", outcome.after, context()));
    }
    if outcome.after.is_clean() != (stock.code == 0) {
        return Err(format!(
            "stock says {}: {}",
            stock.code,
            stock.text + &context()
        ));
    }
    let after = pieces(&storage.contents());
    if let (Some(before), Some(after)) = (before, after) {
        for (number, (before, after)) in before.iter().zip(&after).enumerate() {
            if before.is_some() && *before == sound[number] && before != after {
                return Err(format!("piece {number} has changed: {}", context()));
            }
        }
    }
    Ok(())
}

#[test]
fn a_repair_leaves_a_clean_image_and_all_data_that_was_there() {
    let directory = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.iter().enumerate() {
        let sound = std::fs::read(sound_image(kind, directory.path())).unwrap();
        let contents = pieces(&sound).unwrap();
        for_each_seed(6, &format!("{kind:?}"), |seed| {
            let mut rng = rng(seed << 8 | number as u64);
            let changes = if rng.random_bool(0.5) {
                1
            } else {
                rng.random_range(2..5)
            };
            let image = tamper(&sound, changes, &mut rng);
            let path = directory.path().join("repaired.qcow2");
            if let Err(error) = judge_repair(&image, &contents, &path) {
                panic!("{error}");
            }
        });
    }
}

/// Cuts the power somewhere in a repair, and repairs what is left.
fn judge_interrupted_repair(
    image: &Tampered,
    sound: &[Option<Vec<u8>>],
    rng: &mut StdRng,
) -> Result<(), String> {
    let storage = CrashStorage::new(image.bytes.clone(), Delays::none());
    let (Ok(whole), _) = our_repair(&storage, Repair::All) else {
        return Ok(());
    };
    let before = pieces(&image.bytes);
    for _ in 0..6 {
        let cut = Moment(rng.random_range(0..=storage.now().0));
        let lost = Lost::Some { seed: rng.random() };
        let left = MemoryStorage::new(storage.after_power_cut(cut, lost));
        let (again, lines) = our_repair(&left, Repair::All);
        let context = || format!("{cut:?} {lost:?} {:x?}\n{lines}", image.changes);
        let again = again.map_err(|error| format!("{error}: {}", context()))?;
        if whole.after.is_clean() && !again.after.is_clean() {
            return Err(format!("not clean: {}", context()));
        }
        let (Some(before), Some(after)) = (&before, pieces(&left.contents())) else {
            continue;
        };
        for (number, (before, after)) in before.iter().zip(&after).enumerate() {
            if before.is_some() && *before == sound[number] && before != after {
                return Err(format!("piece {number} has changed: {}", context()));
            }
        }
    }
    Ok(())
}

#[test]
fn a_repair_that_a_power_cut_ends_is_begun_again_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    for (number, kind) in KINDS.iter().enumerate().filter(|(_, kind)| kind.kib < 8192) {
        let sound = std::fs::read(sound_image(kind, directory.path())).unwrap();
        let contents = pieces(&sound).unwrap();
        for_each_seed(4, &format!("{kind:?}"), |seed| {
            let mut rng = rng(seed << 8 | number as u64);
            let changes = rng.random_range(1..5);
            let image = tamper(&sound, changes, &mut rng);
            if let Err(error) = judge_interrupted_repair(&image, &contents, &mut rng) {
                panic!("{error}");
            }
        });
    }
}
