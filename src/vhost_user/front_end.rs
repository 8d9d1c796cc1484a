//! What a front-end's messages do (vhost-user protocol, "Front-end message types").
//!
//! Vrings begin disabled if the front-end takes `VHOST_USER_F_PROTOCOL_FEATURES`, enabled otherwise. Both
//! `SET_VRING_ENABLE` with 0 and `GET_VRING_BASE` answer after the vring's last request has ended.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as ProtocolError, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::memory::{MAX_REGIONS, MemoryTable};
use super::server::Vm;
use super::vring::{Addresses, EventIdx, Shared, Vring};
use crate::error::Error;

/// A connected front-end, and what it has set up.
pub(super) struct FrontEnd {
    vm: Arc<Vm>,
    owned: bool,
    memory: MemoryTable,
    event_idx: EventIdx,
    vrings: Vec<Vring>,
}

impl FrontEnd {
    /// A front-end that has not said anything yet.
    pub(super) fn new(vm: Arc<Vm>) -> Self {
        let vrings = (0..vm.queue_count()).map(|index| Vring::new(index, vm.queue_size()));
        Self {
            vrings: vrings.collect(),
            vm,
            owned: false,
            memory: MemoryTable::default(),
            event_idx: EventIdx::Off,
        }
    }

    /// Ends all requests under way; nothing runs afterwards.
    pub(super) fn stop(&mut self) {
        for vring in &mut self.vrings {
            vring.reset();
            vring.disable();
        }
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.vrings
            .get_mut(index)
            .ok_or(ProtocolError::InvalidParam)
    }

    /// Starts every vring that is complete.
    fn run_vrings(&mut self) -> Result<()> {
        let Self {
            vm,
            memory,
            event_idx,
            vrings,
            ..
        } = self;
        let shared = Shared {
            vm: vm.as_ref(),
            memory: memory.map(),
            event_idx: *event_idx,
        };
        for vring in vrings {
            vring.run_if_ready(&shared).map_err(protocol_error)?;
        }
        Ok(())
    }

    /// Changes guest memory while no vring uses it.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&mut MemoryTable) -> crate::error::Result<()>,
    ) -> Result<()> {
        for vring in &mut self.vrings {
            vring.stop();
        }
        let changed = change(&mut self.memory).map_err(protocol_error);
        self.run_vrings()?;
        changed
    }

    fn guest_address(&self, user_address: u64) -> Result<vm_memory::GuestAddress> {
        self.memory
            .guest_address(user_address)
            .ok_or(ProtocolError::InvalidParam)
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.stop();
        if self.memory.is_lost() {
            self.vm.note(
                log::Level::Error,
                format_args!(
                    "the front-end has cut its guest's memory short while it was in use; what was lost reads as zeros"
                ),
            );
        }
    }
}

/// Hands an error of ours to the protocol's code, which answers and ends the session.
fn protocol_error(error: Error) -> ProtocolError {
    ProtocolError::ReqHandlerError(io::Error::other(error))
}

fn not_offered<T>(what: &'static str) -> Result<T> {
    Err(ProtocolError::InvalidOperation(what))
}

/// Messages of features that are offered. Of the others, the protocol's code refuses most on its own.
impl VhostUserBackendReqHandlerMut for FrontEnd {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(ProtocolError::InvalidOperation(
                "the session has an owner already",
            ));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop();
        self.owned = false;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        not_offered("device reset")
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.vm.device().features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(ProtocolError::InvalidParam);
        }
        for vring in &mut self.vrings {
            vring.stop();
        }
        self.event_idx = if features & (1 << VIRTIO_RING_F_EVENT_IDX) == 0 {
            EventIdx::Off
        } else {
            EventIdx::On
        };
        self.vm.device().negotiated(features);
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.vrings.iter_mut().for_each(Vring::enable);
        }
        self.run_vrings()
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.vm.queue_count()))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(u64::try_from(MAX_REGIONS).expect("a small constant"))
    }

    fn set_mem_table(
        &mut self,
        told: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.change_memory(|memory| memory.replace(told, files))?;
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        told: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.change_memory(|memory| memory.add(told, file))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, told: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_memory(|memory| memory.remove(told))
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.vring(index)?.set_size(num).map_err(protocol_error)?;
        self.run_vrings()
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses {
            descriptor_table: self.guest_address(descriptor)?,
            avail_ring: self.guest_address(available)?,
            used_ring: self.guest_address(used)?,
        };
        self.vring(index)?.set_addresses(addresses);
        self.run_vrings()
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| ProtocolError::InvalidParam)?;
        self.vring(index)?.set_next_avail(base);
        self.run_vrings()
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.reset();
        Ok(VhostUserVringState::new(
            index,
            u32::from(vring.next_avail()),
        ))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(kick) = fd else {
            return not_offered("vrings without a kick descriptor");
        };
        self.vring(u32::from(index))?.set_kick(kick);
        self.run_vrings()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(u32::from(index))?;
        vring.set_call(fd.as_ref()).map_err(protocol_error)
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(u32::from(index)).map(|_| ())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        if enable {
            vring.enable();
            self.run_vrings()
        } else {
            vring.disable();
            Ok(())
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        Ok(self.vm.device().read_config(offset, size))
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> Result<()> {
        self.vm.device().write_config(offset, bytes);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        not_offered("GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered("shared objects")
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        not_offered("in-flight tracking")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        not_offered("in-flight tracking")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        not_offered("device state transfer")
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered("device state transfer")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered("shared memory regions")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered("dirty logging")
    }
}
