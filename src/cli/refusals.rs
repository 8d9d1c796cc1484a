//! `seethrough refusals`: which writes a running daemon has refused, and whose files they were aimed at.

use std::fmt::Write;
use std::path::PathBuf;

use super::output::{self, OutputFormat};
use crate::control::{RefusalReport, Refusals as Ask, RefusedWrite, VmRefusals, call};
use crate::error::Result;
use crate::sys::LocalTime;

/// Show which writes were refused, and whose files they were aimed at.
///
/// A file is searched for in the base's filesystem: the owner of a block, and then its name. Both are bounded; what is
/// told says so if there may be more.
#[derive(Debug, clap::Args)]
pub struct Refusals {
    /// Where the daemon listens: its --control-socket
    #[arg(long, value_name = "PATH")]
    control_socket: PathBuf,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    /// Those of this VM alone
    #[arg(value_name = "VM")]
    vm: Option<String>,
}

impl Refusals {
    /// Prints them.
    ///
    /// # Errors
    /// If no daemon can be asked, or it serves no such VM.
    pub fn run(self) -> Result<()> {
        let report = call::<Ask>(&self.control_socket, &Ask { vm: self.vm })?;
        output::print(&match self.output {
            OutputFormat::Human => human(&report),
            OutputFormat::Json => output::json(&report)?,
        })
    }
}

fn human(report: &RefusalReport) -> String {
    let mut text = String::new();
    for vm in &report.vms {
        describe(&mut text, vm);
    }
    if report.vms.is_empty() {
        text.push_str("no VM shares a disk: nothing is ever refused\n");
    }
    text
}

fn describe(text: &mut String, vm: &VmRefusals) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}: {} writes refused", output::one_line(&vm.name), vm.total);
    for refused in &vm.refusals {
        describe_one(text, refused);
    }
    for kind in vm.kinds.iter().filter(|kind| kind.others > 0) {
        let _ = writeln!(text, "    {}: {} more elsewhere", kind.kind, kind.others);
    }
    if vm.search_given_up {
        text.push_str("    the search for files was given up at its limit: there may be more of them\n");
    }
}

fn describe_one(text: &mut String, refused: &RefusedWrite) {
    let RefusedWrite { kind, count, operation, offset, length, answer, .. } = refused;
    let mut what = kind.clone();
    if let Some(inode) = refused.inode {
        let _ = write!(what, " {inode}");
    }
    if let Some(group) = refused.group {
        let _ = write!(what, " of block group {group}");
    }
    let last = u32::try_from(refused.last).ok().and_then(LocalTime::at);
    let last = last.map_or_else(|| "an unknown time".to_owned(), |time| time.to_string());
    let _ = writeln!(
        text,
        "    {what}: {count} times, last at {last}: {operation} of {length} bytes at {offset}, {answer}"
    );
    for file in &refused.files {
        let path = file.path.as_deref().map_or("a file without a known name".to_owned(), output::one_line);
        let _ = writeln!(text, "        {} of {path} (inode {})", file.part, file.inode);
    }
}
