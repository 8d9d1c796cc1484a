//! The command line: clap types, and one file per verb.

use std::process::ExitCode;

/// Runs the program; the exit code is 0 on success, 1 on a failure and 2 on a usage error.
pub fn main() -> ExitCode {
    ExitCode::from(2)
}
