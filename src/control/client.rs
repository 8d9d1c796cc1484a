//! The other end of a control socket: a verb asks a daemon.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Command, request_line};
use crate::error::{Context, Error, ErrorKind, Result};

/// The most bytes of an answer: many times what any command reports.
const MAX_ANSWER: u64 = 256 << 20;

/// Has the daemon that listens at `socket` carry out `C`.
///
/// # Errors
/// If nobody listens there, what listens there is no daemon, or the daemon answers with an error.
pub fn call<C: Command>(socket: &Path, arguments: &C::Arguments) -> Result<C::Report> {
    let name = || socket.display().to_string();
    let request = request_line::<C>(arguments)?;
    let mut stream = UnixStream::connect(socket).context(|| {
        format!(
            "{}: no daemon can be reached; start one with `seethrough serve --control-socket`",
            socket.display()
        )
    })?;
    stream.write_all(request.as_bytes()).context(name)?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER))
        .read_until(b'\n', &mut line)
        .context(name)?;
    report::<C>(&line).context(name)
}

fn report<C: Command>(line: &[u8]) -> Result<C::Report> {
    if line.last() != Some(&b'\n') {
        return Err(failed(
            "the daemon has gone away in the middle of its answer",
        ));
    }
    let mut answer: Map<String, Value> = serde_json::from_slice(line)
        .map_err(|error| failed(format!("what listens there is no daemon of ours: {error}")))?;
    if let Some(Value::String(why)) = answer.get("error") {
        return Err(failed(why.as_str()));
    }
    let report = answer.remove("return").unwrap_or_default();
    serde_json::from_value(report).map_err(|error| {
        failed(format!(
            "the daemon is of another version than this program: {error}"
        ))
    })
}

fn failed(why: impl Into<Box<str>>) -> Error {
    Error::new(ErrorKind::Io, why)
}
