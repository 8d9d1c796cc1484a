//! The `seethrough` program: parses its arguments, starts logging, runs the verb, and maps the error
//! to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    seethrough::cli::main()
}
