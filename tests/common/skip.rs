//! Skipping a test on a machine that cannot run it: said aloud, and a failure where the gate runs.

// Each test binary includes this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::env;
use std::io::Write;

/// Where mounts are an oracle: the gate's machine has them.
pub const IN_CI: &[&str] = &["CI"];

/// Where guests are booted.
pub const WITH_GUESTS: &[&str] = &["CI", "SEETHROUGH_REQUIRE_GUESTS"];

/// Says on the terminal, past the test runner's capture, why the test is skipped.
///
/// # Panics
///
/// Where it must not be: one of the variables `required_by` is set.
pub fn skip(reason: &str, required_by: &[&str]) {
    let is_set =
        |name: &&str| env::var(name).is_ok_and(|value| !matches!(&*value, "" | "0" | "false"));
    let required = required_by.iter().find(|name| is_set(name));
    assert!(
        required.is_none(),
        "{required:?} forbids to skip, but {reason}"
    );
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Not eprintln: the test runner would keep it to itself.
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}
