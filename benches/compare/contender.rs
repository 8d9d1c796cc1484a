//! Who competes: seethrough, and `qemu-storage-daemon` at its best settings.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::device::ring_entries;
use crate::disk::{Disk, Format, Layer};

/// Whether images go through the host's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    PageCache,
    Direct,
}

/// How a `qemu-storage-daemon` does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aio {
    Threads,
    IoUring,
    /// With O_DIRECT alone.
    Native,
}

impl Aio {
    fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::IoUring => "io_uring",
            Self::Native => "native",
        }
    }
}

/// A program that serves disks.
#[derive(Clone, Debug)]
pub(crate) enum Program {
    Seethrough(PathBuf),
    Qemu(PathBuf, Aio),
}

/// What a contender's results are compared for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum Role {
    /// seethrough as it is.
    Own,
    /// Others' daemons: the best of them is what seethrough is measured against.
    Peer,
    /// seethrough in another way, to tell what one thing costs.
    Reference,
    /// What the host does without any daemon.
    Bound,
}

/// A contender.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) program: Program,
}

/// How a daemon is to serve.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service<'a> {
    pub(crate) disks: &'a [Disk],
    /// The socket of each disk.
    pub(crate) sockets: &'a [PathBuf],
    pub(crate) cache: Cache,
    pub(crate) queues: usize,
    /// Requests under way in each queue.
    pub(crate) depth: usize,
}

impl Contender {
    pub(crate) fn seethrough(program: &Path) -> Self {
        Self {
            name: "seethrough".into(),
            role: Role::Own,
            program: Program::Seethrough(program.to_owned()),
        }
    }

    pub(crate) fn qemu(name: &str, program: &Path, aio: Aio) -> Self {
        Self {
            name: format!("{name} {}", aio.name()),
            role: Role::Peer,
            program: Program::Qemu(program.to_owned(), aio),
        }
    }

    /// Whether it can be had with this cache at all.
    pub(crate) fn works_with(&self, cache: Cache) -> bool {
        !matches!(
            (&self.program, cache),
            (Program::Qemu(_, Aio::Native), Cache::PageCache)
        )
    }

    /// The command that serves.
    pub(crate) fn command(&self, service: Service<'_>) -> Command {
        match &self.program {
            Program::Seethrough(path) => seethrough(path, service),
            Program::Qemu(path, aio) => qemu(path, *aio, service),
        }
    }
}

fn seethrough(path: &Path, service: Service<'_>) -> Command {
    let mut command = Command::new(path);
    command.args(["serve", "--log-level=warn"]);
    command.arg(match service.cache {
        Cache::PageCache => "--cache=writeback",
        Cache::Direct => "--cache=none",
    });
    for (number, (disk, socket)) in service.disks.iter().zip(service.sockets).enumerate() {
        let Layer { path, format } = disk.top();
        command.arg("--vm").arg(format!(
            "name=vm{number},image={},format={},socket={},num-queues={},queue-size={}",
            path.display(),
            format.name(),
            socket.display(),
            service.queues,
            ring_entries(service.depth)
        ));
    }
    command
}

/// An I/O thread for each disk, metadata caches that cover it and keep what they have, discards passed on.
fn qemu(path: &Path, aio: Aio, service: Service<'_>) -> Command {
    let mut command = Command::new(path);
    for (number, (disk, socket)) in service.disks.iter().zip(service.sockets).enumerate() {
        command
            .arg("--object")
            .arg(format!("iothread,id=thread{number}"));
        let mut below = None;
        for (depth, layer) in disk.layers.iter().enumerate().rev() {
            let node = format!("disk{number}layer{depth}");
            let blockdev = QemuLayer {
                node: &node,
                layer,
                is_top: depth == 0,
                below: below.as_deref(),
            };
            blockdev.add_to(&mut command, aio, service.cache, disk.len);
            below = Some(node);
        }
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export{number},node-name=disk{number}layer0,addr.type=unix,addr.path={},\
             writable=on,num-queues={},iothread=thread{number}",
            socket.display(),
            service.queues
        ));
    }
    command
}

struct QemuLayer<'a> {
    node: &'a str,
    layer: &'a Layer,
    is_top: bool,
    below: Option<&'a str>,
}

impl QemuLayer<'_> {
    fn add_to(&self, command: &mut Command, aio: Aio, cache: Cache, disk_len: u64) {
        let read_only = if self.is_top { "off" } else { "on" };
        let direct = if cache == Cache::Direct { "on" } else { "off" };
        let options = format!("read-only={read_only},discard=unmap,cache.direct={direct}");
        let Self { node, layer, .. } = self;
        let file_node = match layer.format {
            Format::Raw => (*node).to_owned(),
            Format::Qcow2 => format!("{node}file"),
        };
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name={file_node},filename={},aio={},{options}",
            layer.path.display(),
            aio.name()
        ));
        if layer.format == Format::Qcow2 {
            let backing = self
                .below
                .map(|below| format!(",backing={below}"))
                .unwrap_or_default();
            let l2_cache_size = (disk_len / 8192).max(1 << 20);
            command.arg("--blockdev").arg(format!(
                "driver=qcow2,node-name={node},file={file_node},l2-cache-size={l2_cache_size},\
                 cache-clean-interval=0,{options}{backing}"
            ));
        }
    }
}
