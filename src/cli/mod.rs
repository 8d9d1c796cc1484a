//! The command line: clap types, and one file per verb.
//!
//! To add a verb: a file with its arguments (`#[derive(clap::Args)]`) and their `run`, which returns nothing or an
//! exit code of its own, and its name in [`verbs!`] below.
//!
//! VMMs start a vhost-user back-end with options alone, so `serve` may be left out: arguments that begin with an
//! option are `serve`'s.

mod create_child;
mod creation_options;
mod disks;
mod dump_text;
mod figures;
mod group_map;
mod group_picture;
pub mod options;
pub mod output;
mod prepare_plan;
pub mod progress;
mod snapshot_list;
pub mod tool;
pub mod vm_options;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::{Error, ErrorKind, Result};

/// The verb of arguments that name none.
const DEFAULT_VERB: &str = "serve";

/// Options in front of any verb, which are not the default verb's.
const GLOBAL_OPTIONS: &[&str] = &["-h", "--help", "-V", "--version"];

const FAILURE: u8 = 1;
const USAGE: u8 = 2;

/// What a verb that succeeded comes to.
trait Outcome {
    fn code(self) -> ExitCode;
}

impl Outcome for () {
    fn code(self) -> ExitCode {
        ExitCode::SUCCESS
    }
}

impl Outcome for ExitCode {
    fn code(self) -> ExitCode {
        self
    }
}

macro_rules! verbs {
    ($($(#[$doc:meta])* $name:ident in $module:ident;)*) => {
        $(pub mod $module;)*

        #[derive(Subcommand)]
        enum Verb {
            $($(#[$doc])* $name($module::$name),)*
        }

        impl Verb {
            fn run(self) -> Result<ExitCode> {
                match self {
                    $(Self::$name(arguments) => arguments.run().map(Outcome::code),)*
                }
            }
        }
    };
}

verbs! {
    /// Make a new, empty image
    Create in create;
    /// Show what an image says of itself
    Info in info;
    /// Check an image for errors in its metadata
    Check in check;
    /// Show what holds each range of a disk, or who writes each block group
    Map in map;
    /// Give an overlay another backing image
    Rebase in rebase;
    /// Tell how fast a disk can be read or written
    Bench in bench;
    /// Write what an overlay holds into its backing image
    Commit in commit;
    /// Tell whether two disks have the same contents
    Compare in compare;
    /// Copy a disk into an image of another kind
    Convert in convert;
    /// Take, apply, delete or list internal snapshots
    Snapshot in snapshot;
    /// Make a disk longer or shorter
    Resize in resize;
    /// Tell how large an image would be
    Measure in measure;
    /// Show the tables of a qcow2 image as they lie on disk
    Dump in dump;
    /// Serve disks to VMs over vhost-user
    Serve in serve;
    /// Show whom a running daemon serves, and what it has done
    Status in status;
    /// Show which writes were refused, and whose files they were aimed at
    Refusals in refusals;
    /// Show a child its base as it is now
    Refresh in refresh;
    /// Reserve parts of a base for its children
    Prepare in prepare;
    /// Show how full bases and children are
    Df in df;
    /// Show which regions there are, whose they are and how full
    Regions in regions;
    /// Make a standalone image of a child
    Flatten in flatten;
}

/// Disks for VMs that see through their copy-on-write overlays to a base image that stays writable.
#[derive(Parser)]
#[command(name = "seethrough", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

/// Runs the program; the exit code is 0 on success, 1 on a failure and 2 on a usage error.
#[must_use]
pub fn main() -> ExitCode {
    start_logging();
    let arguments = with_verb(std::env::args_os());
    if asks_for_capabilities(&arguments) {
        return exit(serve::print_capabilities());
    }
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return report_usage(&error),
    };
    exit(arguments.verb.run())
}

fn exit(result: Result<impl Outcome>) -> ExitCode {
    match result {
        Ok(outcome) => outcome.code(),
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("seethrough: {error}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// Arguments that make no sense together are found by the verbs, and are as much a usage error as those that
/// clap finds.
fn exit_code(error: &Error) -> u8 {
    match error.kind() {
        ErrorKind::InvalidConfig => USAGE,
        _ => FAILURE,
    }
}

/// Logs to standard error, warnings and worse; a verb that has an option for it calls [`log::set_max_level`].
fn start_logging() {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Trace)
        .init();
    log::set_max_level(log::LevelFilter::Warn);
}

/// Puts the default verb in front of arguments that begin with an option.
fn with_verb(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let is_option = arguments
        .get(1)
        .and_then(|first| first.to_str())
        .is_some_and(|first| first.starts_with('-') && !GLOBAL_OPTIONS.contains(&first));
    if is_option {
        arguments.insert(1, DEFAULT_VERB.into());
    }
    arguments
}

/// VMMs ask a back-end what it can do with whatever options they like beside, which are then ignored.
fn asks_for_capabilities(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|verb| verb == DEFAULT_VERB)
        && arguments
            .iter()
            .any(|argument| argument == serve::PRINT_CAPABILITIES)
}

/// Prints what clap has to say: help and version to standard output, mistakes to standard error.
fn report_usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A reader that goes away has seen what it wanted.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    eprint!(
        "seethrough: {}",
        text.strip_prefix("error: ").unwrap_or(&text)
    );
    ExitCode::from(USAGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn completed(arguments: &[&str]) -> Vec<OsString> {
        with_verb(arguments.iter().map(OsString::from))
    }

    #[test]
    fn the_verbs_are_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn options_without_a_verb_are_those_of_serve() {
        assert_eq!(
            completed(&["seethrough", "--socket-path=s", "--blk-file=f"]),
            ["seethrough", "serve", "--socket-path=s", "--blk-file=f"]
        );
        assert_eq!(
            completed(&["seethrough", "--print-capabilities"]),
            ["seethrough", "serve", "--print-capabilities"]
        );
        for kept in [
            &["seethrough"][..],
            &["seethrough", "--help"],
            &["seethrough", "info", "--output"],
        ] {
            assert_eq!(completed(kept), kept);
        }
    }
}
