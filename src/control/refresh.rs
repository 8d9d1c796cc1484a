//! The command `refresh`: moves a child's view of its base to the present moment.

use serde::{Deserialize, Serialize};

use super::Command;
use super::daemon::Daemon;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::block_on;
use crate::view::refresh::Moved;

/// Asks for the refresh of one VM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refresh {
    /// The VM's name.
    pub vm: String,
}

/// What has come of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RefreshReport {
    /// Whether the VM sees another state of its base than before.
    pub moved: bool,
}

impl Command for Refresh {
    const NAME: &'static str = "refresh";
    type Arguments = Self;
    type Report = RefreshReport;

    fn run(daemon: &Daemon, arguments: Self) -> Result<RefreshReport> {
        let served = daemon.vm(&arguments.vm)?;
        let view = served.view.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "vm {}: it shares nothing, so there is nothing to refresh",
                    served.vm.name()
                ),
            )
        })?;
        let moved = block_on(view.refresh())?;
        Ok(RefreshReport {
            moved: moved == Moved::ToNow,
        })
    }
}
