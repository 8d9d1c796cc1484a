//! `seethrough check`: whether an image contradicts itself, in the words, JSON fields and exit codes of
//! `qemu-img check`.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::options::parse_format;
use super::output::{self, OutputFormat};
use super::progress::ShowProgress;
use super::tool::Sharing;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, open_file};
use crate::chain::inspect::{Unnamed, detect};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Access;
use crate::progress::Progress;
use crate::qcow2::check::{Finding, Repair, Repaired, Report, check, repair};
use crate::storage::Storage;
use crate::sys::block_on;

/// Exit code for an image with corruptions, perhaps with leaks, too.
const CORRUPTIONS: u8 = 2;
/// Exit code for an image with leaks alone.
const LEAKS: u8 = 3;
/// Exit code for a format in which there is nothing to check.
const NO_CHECKS: u8 = 63;

/// What `-r` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum RepairMode {
    /// Free clusters that nothing uses
    Leaks,
    /// Mend everything: what tables lead nowhere to reads as zeros
    All,
}

/// Check an image for errors in its metadata, and repair it.
///
/// The exit code is 0 for a sound image, 1 if the check failed, 2 for corruptions, 3 for leaks alone, and 63 for a
/// format without checks.
#[derive(Debug, clap::Args)]
pub struct Check {
    /// The image's format; without it, an image that is not qcow2 is taken to be raw
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    /// Repair the image, which nobody may use meanwhile
    #[arg(short = 'r', value_enum, value_name = "WHAT", conflicts_with = "force_share")]
    repair: Option<RepairMode>,

    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,

    #[command(flatten)]
    progress: ShowProgress,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Check {
    /// Checks the image and prints what was found.
    ///
    /// # Errors
    /// If the image cannot be checked.
    pub fn run(self) -> Result<ExitCode> {
        let options = HostOptions {
            locking: self.sharing.locking(),
            ..HostOptions::default()
        };
        let access = match self.repair {
            Some(_) => Access::ReadWrite,
            None => Access::ReadOnly,
        };
        let storage = open_file(&self.file, access, options)?;
        let format = match self.format {
            Some(format) => format,
            None => block_on(detect(&storage, Unnamed::Raw))?,
        };
        if format == Format::Raw {
            eprintln!("seethrough: the format raw has no metadata that could be checked");
            return Ok(ExitCode::from(NO_CHECKS));
        }
        let outcome = self
            .progress
            .during(|progress| block_on(self.work(&storage, progress)))?;
        if !self.quiet {
            output::print(&self.text(storage.name(), &outcome)?)?;
        }
        Ok(ExitCode::from(exit_code(&outcome.after)))
    }

    async fn work(&self, storage: &dyn Storage, progress: &Progress) -> Result<Repaired> {
        let mut tell = |finding: Finding| eprintln!("{finding}");
        let what = match self.repair {
            Some(RepairMode::Leaks) => Repair::Leaks,
            Some(RepairMode::All) => Repair::All,
            None => {
                let report = check(storage, &mut tell, progress).await?;
                return Ok(Repaired {
                    before: report,
                    after: report,
                });
            }
        };
        repair(storage, what, &mut tell, progress).await
    }

    fn text(&self, name: &str, outcome: &Repaired) -> Result<String> {
        match self.output {
            OutputFormat::Human => Ok(repaired(outcome) + &human(&outcome.after)),
            OutputFormat::Json => json(name, outcome),
        }
    }
}

fn exit_code(report: &Report) -> u8 {
    match report {
        _ if report.corruptions > 0 => CORRUPTIONS,
        _ if report.leaks > 0 => LEAKS,
        _ => 0,
    }
}

/// What was repaired, if anything.
fn repaired(outcome: &Repaired) -> String {
    let (leaks, corruptions) = (outcome.leaks_fixed(), outcome.corruptions_fixed());
    if leaks == 0 && corruptions == 0 {
        return String::new();
    }
    format!("Repaired and checked again:\n\n    {leaks} leaked clusters\n    {corruptions} corruptions\n\n")
}

fn human(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    if report.is_clean() {
        let _ = writeln!(text, "No errors were found on the image.");
    }
    if report.corruptions > 0 {
        let _ = writeln!(
            text,
            "\n{} errors were found on the image.\n\
             Data may be lost, and writing to the image may destroy more.",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        let _ = writeln!(
            text,
            "\n{} leaked clusters were found on the image.\n\
             They take up room, and do no harm.",
            report.leaks
        );
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let allocated = report.allocated_clusters;
        let _ = writeln!(
            text,
            "{allocated}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.total_clusters,
            percent(allocated, report.total_clusters),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(text, "Image end offset: {}", report.image_end_offset);
    }
    text
}

/// The report with the field names of QEMU's `ImageCheck`; what is 0 is left out, as there.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ImageCheck<'a> {
    filename: &'a str,
    format: &'static str,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn json(name: &str, outcome: &Repaired) -> Result<String> {
    let report = &outcome.after;
    let image = ImageCheck {
        filename: name,
        format: Format::Qcow2.name(),
        // A check that fails is reported as an error of its own.
        check_errors: 0,
        image_end_offset: report.image_end_offset,
        corruptions: report.corruptions,
        leaks: report.leaks,
        corruptions_fixed: outcome.corruptions_fixed(),
        leaks_fixed: outcome.leaks_fixed(),
        total_clusters: report.total_clusters,
        allocated_clusters: report.allocated_clusters,
        fragmented_clusters: report.fragmented_clusters,
        compressed_clusters: report.compressed_clusters,
    };
    let mut text = serde_json::to_string_pretty(&image).map_err(|error| {
        Error::with_source(ErrorKind::Io, "the report does not become JSON", error)
    })?;
    text.push('\n');
    Ok(text)
}
