//! `seethrough refresh`: has a running daemon show a child its base as it is now.

use std::path::PathBuf;

use super::output;
use crate::control::{Refresh as Ask, call};
use crate::error::Result;

/// Show a child its base as it is now.
///
/// For a child that is served with refresh=manual (or on-mount), and has nothing mounted: its view never moves under a
/// mounted filesystem.
#[derive(Debug, clap::Args)]
pub struct Refresh {
    /// Where the daemon listens: its --control-socket
    #[arg(long, value_name = "PATH")]
    control_socket: PathBuf,

    /// The child's name
    #[arg(value_name = "VM")]
    vm: String,
}

impl Refresh {
    /// Refreshes the view, and prints whether that has changed anything.
    ///
    /// # Errors
    /// If no daemon can be asked, or the view cannot be moved.
    pub fn run(self) -> Result<()> {
        let name = output::one_line(&self.vm);
        let report = call::<Ask>(&self.control_socket, &Ask { vm: self.vm })?;
        output::print(&if report.moved {
            format!("{name} sees its base as it is now\n")
        } else {
            format!("{name} sees its base as it is now already\n")
        })
    }
}
