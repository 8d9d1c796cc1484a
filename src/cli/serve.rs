//! `seethrough serve`: serves disks to VMs, one front-end per disk at a time, until it is told to end.

use std::num::NonZero;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::disks::open_disks;
use super::options::parse_size;
use super::output;
use super::vm_options::{VmOptions, check_apart, read_config};
use crate::chain::format::Format;
use crate::control::{ControlSocket, Daemon, Served};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::cache_budget::CacheSize;
use crate::storage::CacheMode;
use crate::sys::{share_freed_memory, take_inherited_fd};
use crate::view::refresh::Policy;
use crate::vhost_user::{Audience, Endpoint, Listener, MAX_QUEUES, Server, Vm};

/// The option that asks what the program can do, whatever else is on the command line.
pub(super) const PRINT_CAPABILITIES: &str = "--print-capabilities";

/// The fewest queues to offer: a QEMU front-end wants one for each vCPU, and fails if there are fewer. Those that
/// a guest leaves alone cost nothing.
const MIN_DEFAULT_QUEUES: u16 = 16;

/// Entries of a queue, unless told otherwise.
const DEFAULT_QUEUE_SIZE: u16 = 256;

/// Serve disks to VMs over vhost-user.
///
/// One disk is named by --blk-file and --socket-path (or --fd), many by --vm or --config. The program stays in the
/// foreground; SIGTERM or SIGINT ends it with everything flushed. A front-end may leave and another come.
#[derive(Debug, Args)]
pub struct Serve {
    /// Listen for the front-end at this Unix socket
    #[arg(long, value_name = "PATH", requires = "blk_file", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,

    /// Use this inherited Unix socket, which listens or is connected
    #[arg(long, value_name = "FDNUM", requires = "blk_file")]
    fd: Option<RawFd>,

    /// The disk image of a single VM
    #[arg(long, value_name = "PATH", conflicts_with_all = ["vm", "config"])]
    blk_file: Option<PathBuf>,

    /// A VM: name=NAME,image=PATH,socket=PATH[,format=raw|qcow2][,readonly=on][,serial=TEXT][,num-queues=N]
    /// [,queue-size=N][,refresh=live|on-mount|manual]; may be repeated
    #[arg(long, value_name = "KEY=VALUE,…")]
    vm: Vec<String>,

    /// Read VMs from a TOML file: a [[vm]] table for each, with the keys of --vm; relative paths in it start at its
    /// directory
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The format of --blk-file, raw or qcow2; without it, the image has to be qcow2, for raw is never guessed
    #[arg(long, value_name = "FORMAT", requires = "blk_file")]
    format: Option<Format>,

    /// Refuse all writes to --blk-file
    #[arg(long, requires = "blk_file")]
    read_only: bool,

    /// The serial of --blk-file that the guest reads, up to 20 bytes [default: its name]
    #[arg(long, value_name = "TEXT", requires = "blk_file")]
    serial: Option<String>,

    /// When --blk-file, a child, sees what its base has written: at once (live), when it mounts (on-mount), or when it
    /// is told to (manual)
    #[arg(long, value_name = "POLICY", default_value = "live", requires = "blk_file")]
    refresh: Policy,

    /// Queues to offer per disk, 1 to 64 [default: the number of CPUs, but at least 16]
    #[arg(long, value_name = "N")]
    num_queues: Option<u16>,

    /// Entries of each queue, a power of two up to 1024 [default: 256]
    #[arg(long, value_name = "N")]
    queue_size: Option<u16>,

    /// Keep image data in the host's page cache (writeback) or bypass it (none)
    #[arg(long, value_enum, default_value_t = Cache::Writeback)]
    cache: Cache,

    /// Memory for the metadata of all disks together (L2 tables and refcount blocks): a size, or full for as much as
    /// there is [default: what covers the disks, up to 40M each and 256M in all]
    #[arg(long, value_name = "SIZE|full", value_parser = parse_cache_size)]
    l2_cache_size: Option<CacheSize>,

    /// Listen at this Unix socket for what an operator asks, as `seethrough status` does; only this user can connect
    #[arg(long, value_name = "PATH")]
    control_socket: Option<PathBuf>,

    /// Log this and worse to standard error: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: log::LevelFilter,

    /// Print what the program can do as JSON and exit; all other options are ignored
    #[arg(long)]
    print_capabilities: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Cache {
    Writeback,
    None,
}

impl From<Cache> for CacheMode {
    fn from(cache: Cache) -> Self {
        match cache {
            Cache::Writeback => Self::Writeback,
            Cache::None => Self::None,
        }
    }
}

/// Prints what VMMs ask a vhost-user back-end for.
///
/// # Errors
/// If standard output does not take it.
pub(super) fn print_capabilities() -> Result<()> {
    let capabilities = serde_json::json!({
        "type": "block",
        "features": ["read-only", "blk-file"],
    });
    output::print(&format!("{capabilities:#}\n"))
}

impl Serve {
    /// Serves until it is told to end.
    ///
    /// # Errors
    /// If anything is missing before a front-end could be accepted, or a disk cannot be flushed at the end.
    pub fn run(self) -> Result<()> {
        if self.print_capabilities {
            return print_capabilities();
        }
        log::set_max_level(self.log_level);
        let vms = self.vms()?;
        check_apart(&vms)?;
        // Before anything else is opened, so that the number means what the parent process meant.
        let inherited = match self.fd {
            Some(fd) => Some(Endpoint::adopt(
                take_inherited_fd(fd).map_err(|error| Error::io(format!("--fd={fd}"), error))?,
            )?),
            None => None,
        };
        raise_descriptor_limit();
        share_freed_memory();
        let mut server = Server::new()?;
        let disks = open_disks(&vms, self.cache.into(), self.l2_cache_size.unwrap_or_default())?;
        let mut ready = Vec::with_capacity(vms.len());
        let mut served = Vec::with_capacity(vms.len());
        for (options, disk) in vms.iter().zip(disks) {
            let queue_count = options.num_queues.or(self.num_queues).unwrap_or_else(default_queue_count);
            let queue_size = options.queue_size.or(self.queue_size).unwrap_or(DEFAULT_QUEUE_SIZE);
            let image = disk.served.image();
            let vm = Arc::new(Vm::new(&options.name, image, options.serial(), queue_count, queue_size)?);
            ready.push(Arc::clone(&vm));
            served.push(Served { vm, view: disk.served.view().cloned(), images: disk.images });
        }
        // Nobody can connect before all is well.
        let endpoints = match inherited {
            Some(endpoint) => vec![endpoint],
            None => vms.iter().map(|vm| Endpoint::listen(&vm.socket)).collect::<Result<_>>()?,
        };
        if let Some(path) = &self.control_socket {
            let listener = Listener::bind(path, Audience::Owner)?;
            server.end_with(ControlSocket::serve(listener, Arc::new(Daemon::new(served)))?);
        }
        for (vm, endpoint) in ready.into_iter().zip(endpoints) {
            log::info!("{}: serving {}", vm.name(), vm.device().image().name());
            server.add(vm, endpoint)?;
        }
        server.run()
    }

    /// The VMs that the options name.
    fn vms(&self) -> Result<Vec<VmOptions>> {
        if let Some(image) = &self.blk_file {
            if self.socket_path.is_none() && self.fd.is_none() {
                return Err(invalid("say where the front-end connects: --socket-path or --fd"));
            }
            let name = image.file_stem().unwrap_or(image.as_os_str()).to_string_lossy();
            return Ok(vec![VmOptions {
                name: name.into_owned(),
                image: image.clone(),
                socket: self.socket_path.clone().unwrap_or_default(),
                format: self.format,
                readonly: self.read_only,
                serial: self.serial.clone(),
                num_queues: None,
                queue_size: None,
                refresh: self.refresh,
            }]);
        }
        let mut vms = Vec::new();
        if let Some(path) = &self.config {
            vms.extend(read_config(path)?);
        }
        for list in &self.vm {
            vms.push(VmOptions::parse(list)?);
        }
        if vms.is_empty() {
            return Err(invalid("no disk is named: give one with --blk-file, or several with --vm or --config"));
        }
        Ok(vms)
    }
}

fn parse_cache_size(text: &str) -> Result<CacheSize, String> {
    match text {
        "full" => Ok(CacheSize::Full),
        _ => parse_size(text).map(CacheSize::Bytes),
    }
}

fn invalid(why: &str) -> Error {
    Error::new(ErrorKind::InvalidConfig, why)
}

/// As many queues as the largest VM on this host can have vCPUs.
fn default_queue_count() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    u16::try_from(cpus).unwrap_or(u16::MAX).clamp(MIN_DEFAULT_QUEUES, MAX_QUEUES)
}

/// Every running queue takes a handful of descriptors, and every image some: allows as many as the system lets us.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        log::debug!("the limit of open descriptors stays as it is: {error}");
    }
}
