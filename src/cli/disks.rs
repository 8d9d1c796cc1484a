//! Opening the disks of all VMs together, so that an image that several of them use is one object.

use std::sync::Arc;

use super::vm_options::VmOptions;
use crate::chain::host::{HostOptions, Locking};
use crate::chain::registry::{DiskRequest, Registry};
use crate::error::Result;
use crate::image::{Access, Image};
use crate::storage::CacheMode;
use crate::sys::block_on;

/// Opens the disk of every VM, in their order.
///
/// # Errors
/// If one of them cannot be opened, or is used in a way that excludes this one.
pub(super) fn open_disks(vms: &[VmOptions], cache: CacheMode) -> Result<Vec<Arc<dyn Image>>> {
    let locking = Locking::Lock;
    let registry = Registry::new(HostOptions { cache, locking });
    let requests: Vec<DiskRequest> = vms.iter().map(request).collect();
    let disks = block_on(registry.open_family(&requests))?;
    Ok(disks.into_iter().map(|disk| disk.image).collect())
}

fn request(vm: &VmOptions) -> DiskRequest {
    let access = if vm.readonly {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    DiskRequest {
        path: vm.image.clone(),
        format: vm.format,
        access,
    }
}
