//! Printing results to standard output.

use std::io::{self, Write};

use crate::error::{Error, Result};

/// How a verb prints what it has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputFormat {
    /// For people
    Human,
    /// For programs
    Json,
}

/// Prints `text` as it is.
///
/// # Errors
/// If standard output does not take it.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Error::io("standard output", error))
}

/// Whether the reader of standard output has gone away, which is how pipes end and no failure.
#[must_use]
pub fn is_broken_pipe(error: &Error) -> bool {
    std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|source| source.kind() == io::ErrorKind::BrokenPipe)
}
