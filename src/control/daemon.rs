//! What commands can reach of a running daemon.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::vhost_user::Vm;
use crate::view::View;

/// A VM that is served.
pub struct Served {
    /// Its device.
    pub vm: Arc<Vm>,
    /// Its view of a disk that it shares; `None` if it shares nothing.
    pub view: Option<Arc<View>>,
    /// The images that its disk is made of, topmost first.
    pub images: Vec<String>,
}

/// The VMs of a daemon, in the order in which they were named.
pub struct Daemon {
    vms: Vec<Served>,
}

impl Daemon {
    /// The daemon that serves `vms`.
    #[must_use]
    pub fn new(vms: Vec<Served>) -> Self {
        Self { vms }
    }

    /// All VMs.
    #[must_use]
    pub fn vms(&self) -> &[Served] {
        &self.vms
    }

    /// The VM called `name`.
    ///
    /// # Errors
    /// If there is none; the message names those that there are.
    pub fn vm(&self, name: &str) -> Result<&Served> {
        let found = self.vms.iter().find(|served| served.vm.name() == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = self.vms.iter().map(|served| served.vm.name()).collect();
            Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "there is no VM \"{}\"; the VMs are {}",
                    name.escape_debug(),
                    names.join(", ")
                ),
            )
        })
    }
}
