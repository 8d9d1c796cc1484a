//! Writes stamped blocks to a disk through a daemon, where an image cannot be made of a file.

use std::path::Path;
use std::time::Duration;

use crate::Result;
use crate::client::{Client, Span};
use crate::contender::{Cache, Contender, Service};
use crate::cpus::Room;
use crate::daemon::Daemon;
use crate::device::{Device, Shape, Waiting};
use crate::disk::Disk;
use crate::load::{Kind, Load, WRITE_QD32};
use crate::places::Places;

/// Writes `len` bytes at each of `places`, with stamps of `generation`, and flushes.
pub(crate) fn fill_through(
    seethrough: &Path,
    scratch: &Path,
    disk: Disk,
    places: Vec<u64>,
    len: usize,
    generation: u32,
) -> Result<()> {
    let load = Load {
        name: "preparing",
        len,
        kind: Kind::Write,
        room: Room::Everywhere,
        ..WRITE_QD32
    };
    let sockets = [scratch.join("fill.sock")];
    let service = Service {
        disks: std::slice::from_ref(&disk),
        sockets: &sockets,
        cache: Cache::PageCache,
        queues: 1,
        depth: load.depth,
    };
    let mut command = Contender::seethrough(seethrough).command(service);
    let mut daemon = Daemon::start(&mut command, &scratch.join("fill.log"))?;
    let shape = Shape {
        queues: 1,
        depth: load.depth,
        slot_len: len,
    };
    let device = Device::connect(&mut daemon, &sockets[0], shape, Waiting::Interrupts)?;
    let mut client = Client::new(vec![(device, disk)], load, generation, &mut daemon)?;
    client.go_to(vec![Places::these(places)]);
    let until_done = Duration::from_secs(3600);
    client.run(Span {
        warm_up: until_done,
        measured: Duration::ZERO,
    })?;
    drop(client);
    daemon.stop()
}
