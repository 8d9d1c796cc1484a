//! `seethrough status`: whom a running daemon serves, from what, and what it has done.

use std::fmt::Write;
use std::path::PathBuf;

use super::output::{self, OutputFormat, human_size};
use crate::control::{Role, Status as Ask, StatusReport, VmStatus, call};
use crate::error::Result;

/// Show whom a running daemon serves, from what, and what it has done.
#[derive(Debug, clap::Args)]
pub struct Status {
    /// Where the daemon listens: its --control-socket
    #[arg(long, value_name = "PATH")]
    control_socket: PathBuf,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,
}

impl Status {
    /// Prints the status.
    ///
    /// # Errors
    /// If no daemon can be asked.
    pub fn run(self) -> Result<()> {
        let report = call::<Ask>(&self.control_socket, &Ask::default())?;
        output::print(&match self.output {
            OutputFormat::Human => human(&report),
            OutputFormat::Json => output::json(&report)?,
        })
    }
}

fn human(report: &StatusReport) -> String {
    let mut text = format!("seethrough {}, process {}\n", report.version, report.process);
    for vm in &report.vms {
        describe(&mut text, vm);
    }
    text
}

fn describe(text: &mut String, vm: &VmStatus) {
    let role = match vm.role {
        Role::Base => "owns the base",
        Role::Child => "a child",
        Role::Alone => "shares nothing",
    };
    let connected = if vm.connected {
        "connected"
    } else {
        "no front-end is connected"
    };
    let access = if vm.read_only { ", read-only" } else { "" };
    let name = output::one_line(&vm.name);
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{name}: {role}, {}{access}, {connected}", human_size(vm.virtual_size));
    for (depth, image) in vm.images.iter().enumerate() {
        let what = if depth == 0 { "image" } else { "behind it" };
        let _ = writeln!(text, "    {what}: {}", output::one_line(image));
    }
    let _ = writeln!(text, "    {}", vm.queues);
    if vm.role != Role::Alone {
        let _ = writeln!(text, "    refused writes: {}", vm.refused);
    }
}
