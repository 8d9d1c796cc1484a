//! Opening the disks of all VMs together, so that an image that several of them use is one object.

use std::sync::Arc;

use super::vm_options::VmOptions;
use crate::chain::host::{HostOptions, Locking};
use crate::chain::registry::{DiskRequest, Registry, Source};
use crate::error::{Context, Result};
use crate::image::Access;
use crate::qcow2::cache_budget::CacheSize;
use crate::storage::CacheMode;
use crate::sys::block_on;
use crate::view::declared::{Served, Views, bases_to_write};
use crate::view::refresh::base_to_pin;

/// A VM's disk.
pub(super) struct Disk {
    /// What the VM is served.
    pub(super) served: Served,
    /// The images that it is made of, topmost first.
    pub(super) images: Vec<String>,
}

/// Opens the disk of every VM, in their order: what each may see of it, if it shares it with others.
///
/// # Errors
/// If one of them cannot be opened, or is used in a way that excludes this one.
pub(super) fn open_disks(
    vms: &[VmOptions],
    cache: CacheMode,
    metadata: CacheSize,
) -> Result<Vec<Disk>> {
    let locking = Locking::Lock;
    let registry = Registry::with_metadata_cache(HostOptions { cache, locking }, metadata);
    let mut requests: Vec<DiskRequest> = vms.iter().map(request).collect();
    block_on(async {
        requests.extend(bases_to_write(&requests).await?);
        for vm in vms {
            if let Some(base) = base_to_pin(&request(vm), vm.refresh).await? {
                registry.expect_snapshots(&base.path)?;
                requests.push(base);
            }
        }
        let disks = registry.open_family(&requests).await?;
        let mut family = Views::default();
        let mut views = Vec::with_capacity(disks.len());
        for (vm, disk) in vms.iter().zip(&disks) {
            let served = family.view_of(&vm.name, disk, vm.refresh).await;
            views.push(Disk {
                served: served.context(|| format!("vm {}", vm.name))?,
                images: chain_of(&disk.source),
            });
        }
        Ok(views)
    })
}

fn chain_of(top: &Arc<Source>) -> Vec<String> {
    std::iter::successors(Some(top), |source| source.backing.as_ref())
        .map(|source| source.path.display().to_string())
        .collect()
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
