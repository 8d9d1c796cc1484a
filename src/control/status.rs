//! The command `status`: who is served, from what, and what its queues did.

use serde::{Deserialize, Serialize};

use super::Command;
use super::daemon::{Daemon, Served};
use crate::error::Result;
use crate::metrics::QueueTotals;
use crate::view::View;
use crate::view::territory::Side;

/// Asks for a daemon's status.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {}

/// A daemon's status.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StatusReport {
    /// The program's version.
    pub version: String,
    /// The daemon's process.
    pub process: u32,
    /// Every VM, in the order in which they were named.
    pub vms: Vec<VmStatus>,
}

/// What a VM is to those that it shares a disk with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It owns the base.
    Base,
    /// It owns regions of a base.
    Child,
    /// It shares nothing.
    Alone,
}

/// A VM's status.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmStatus {
    /// The VM's name.
    pub name: String,
    /// What it is to others.
    pub role: Role,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// The images that its disk is made of, topmost first.
    pub images: Vec<String>,
    /// The disk's length in bytes.
    pub virtual_size: u64,
    /// Whether all writes are refused.
    pub read_only: bool,
    /// Writes that were refused because they were not the VM's to make.
    pub refused: u64,
    /// What its queues did since the daemon started.
    pub queues: QueueTotals,
}

impl Command for Status {
    const NAME: &'static str = "status";
    type Arguments = Self;
    type Report = StatusReport;

    fn run(daemon: &Daemon, _arguments: Self) -> Result<StatusReport> {
        Ok(StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process: std::process::id(),
            vms: daemon.vms().iter().map(status_of).collect(),
        })
    }
}

fn status_of(served: &Served) -> VmStatus {
    let image = served.vm.device().image();
    let view = served.view.as_deref();
    VmStatus {
        name: served.vm.name().to_owned(),
        role: match view.map(View::side) {
            Some(Side::Base) => Role::Base,
            Some(Side::Child) => Role::Child,
            None => Role::Alone,
        },
        connected: served.vm.is_connected(),
        images: served.images.clone(),
        virtual_size: image.virtual_size(),
        read_only: image.is_read_only(),
        refused: view.map_or(0, |view| view.refusals().total()),
        queues: served.vm.counters().totals(),
    }
}
