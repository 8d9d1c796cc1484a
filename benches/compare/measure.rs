//! One measurement: a contender is started, loaded, checked and ended.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::cells::Cell;
use crate::client::{Client, Outcome, Span};
use crate::contender::{Contender, Role, Service};
use crate::cpus::Cpus;
use crate::daemon::Daemon;
use crate::device::{Device, Shape};
use crate::disk::Disk;
use crate::load::Load;
use crate::results::Sample;

/// The smallest slots where writes are read back, so that this takes few requests.
const SWEEP_LEN: usize = 256 << 10;

/// Measures a contender in a cell.
pub(crate) fn measure(
    contender: &Contender,
    cell: &Cell,
    disks: &[Disk],
    span: Span,
    generation: u32,
    cpus: &Cpus,
    scratch: &Path,
) -> Result<Sample> {
    let load = cell.load;
    let sockets: Vec<PathBuf> = (0..disks.len())
        .map(|number| scratch.join(format!("{number}.sock")))
        .collect();
    for socket in &sockets {
        let _ = fs::remove_file(socket);
    }
    let service = Service {
        disks,
        sockets: &sockets,
        cache: cell.place.cache(),
        queues: load.queues,
        depth: load.depth,
    };
    let mut command = contender.command(service);
    let log = scratch.join("contender.log");
    let mut daemon = cpus.start_on(load.room, || Daemon::start(&mut command, &log))??;
    let slot_len = if load.writes() {
        load.len.max(SWEEP_LEN)
    } else {
        load.len
    };
    let shape = Shape {
        queues: load.queues,
        depth: load.depth,
        slot_len,
    };
    let mut devices = Vec::new();
    for (disk, socket) in disks.iter().zip(&sockets) {
        devices.push((
            Device::connect(&mut daemon, socket, shape, load.waiting)?,
            disk.clone(),
        ));
    }
    let mut client = Client::new(devices, load, generation, &mut daemon)?;
    let outcome = client.run(span)?;
    if load.writes() {
        client
            .sweep()
            .map_err(|error| format!("reading back: {error}"))?;
    }
    drop(client);
    if contender.role != Role::Peer {
        // A qemu-storage-daemon 7.2 that is told to end while it loses its front-end may wait for that forever.
        daemon.stop()?;
    }
    sample(&outcome, &load)
}

fn sample(outcome: &Outcome, load: &Load) -> Result<Sample> {
    let total: u64 = outcome.ended.iter().sum();
    if total == 0 {
        return Err("ended no request in the time it had".into());
    }
    let seconds = outcome.elapsed.as_secs_f64();
    let requests = total as f64;
    let cpu = outcome
        .after
        .cpu
        .saturating_sub(outcome.before.cpu)
        .as_secs_f64();
    let switches = outcome
        .after
        .switches
        .saturating_sub(outcome.before.switches);
    let worst = outcome
        .ended
        .iter()
        .min()
        .map(|worst| *worst as f64 * outcome.ended.len() as f64 / requests);
    Ok(Sample {
        iops: requests / seconds,
        megabytes_per_s: requests * load.len as f64 / seconds / 1e6,
        p50_us: outcome.latencies.percentile_us(500),
        p99_us: outcome.latencies.percentile_us(990),
        p999_us: outcome.latencies.percentile_us(999),
        cpu_us_per_io: Some(cpu * 1e6 / requests),
        switches_per_io: Some(switches as f64 / requests),
        cpus_used: Some(cpu / seconds),
        client_busy: Some(outcome.client_cpu.as_secs_f64() / seconds),
        worst_share: worst.filter(|_| load.disks > 1),
    })
}
