//! `seethrough bench`: how fast a disk can be read or written, read as `qemu-img bench` reads its arguments.

use std::path::PathBuf;
use std::time::Duration;

use super::options::{parse_cache, parse_format, parse_size};
use super::output::{self, OutputFormat};
use super::tool::{Sharing, open, reading};
use crate::chain::format::Format;
use crate::chain::host::HostOptions;
use crate::chain::registry::Registry;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Access;
use crate::jobs::bench::{Flushes, Kind, Load, bench};
use crate::storage::CacheMode;
use crate::sys::block_on;

/// Read a disk at regular steps, or write to it, and tell how long that took.
///
/// Requests go the way of a guest's in the daemon, without a guest.
#[derive(Debug, clap::Args)]
pub struct Bench {
    /// The image's format; it may be left out for a qcow2 image
    #[arg(short = 'f', value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,

    /// Requests
    #[arg(short = 'c', value_name = "COUNT", default_value_t = 75_000)]
    count: u64,

    /// Requests under way at the same time
    #[arg(short = 'd', value_name = "DEPTH", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    depth: u64,

    /// Bytes of a request
    #[arg(short = 's', value_name = "SIZE", value_parser = parse_size, default_value = "4k")]
    size: u64,

    /// Bytes from one request to the next [default: the size]
    #[arg(short = 'S', value_name = "STEP", value_parser = parse_size)]
    step: Option<u64>,

    /// Where the first request begins
    #[arg(short = 'o', value_name = "OFFSET", value_parser = parse_size, default_value = "0")]
    offset: u64,

    /// Write, which destroys what is there
    #[arg(short = 'w')]
    write: bool,

    /// The byte to write
    #[arg(long, value_name = "BYTE", default_value_t = 0, requires = "write")]
    pattern: u8,

    /// Flush every so many writes, when those under way have ended
    #[arg(long, value_name = "COUNT", requires = "write")]
    flush_interval: Option<u64>,

    /// Flush beside the writes under way
    #[arg(long, requires = "flush_interval")]
    no_drain: bool,

    /// How the host caches the image: writeback or none
    #[arg(short = 't', value_name = "CACHE", value_parser = parse_cache, default_value = "writeback")]
    cache: CacheMode,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    /// Print nothing
    #[arg(short = 'q')]
    quiet: bool,

    #[command(flatten)]
    sharing: Sharing,

    /// The image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Bench {
    /// Runs the requests, and prints how long they took.
    ///
    /// # Errors
    /// Those of opening the image and of [`bench`].
    pub fn run(self) -> Result<()> {
        let load = self.load()?;
        let (registry, access) = if self.write {
            let locking = self.sharing.locking();
            let options = HostOptions {
                cache: self.cache,
                locking,
            };
            (Registry::new(options), Access::ReadWrite)
        } else {
            (reading(self.sharing, self.cache), Access::ReadOnly)
        };
        let disk = block_on(open(&registry, &self.file, self.format, access))?;
        if self.output == OutputFormat::Human {
            self.print(&announce(&load))?;
        }
        let took = bench(&disk.image, load)?;
        self.print(&match self.output {
            OutputFormat::Human => human(&load, took),
            OutputFormat::Json => json(&load, took),
        })
    }

    fn load(&self) -> Result<Load> {
        if self.flush_interval.is_some_and(|every| every < self.depth) {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                "--flush-interval cannot be smaller than the depth, -d",
            ));
        }
        let flushes = match (self.flush_interval, self.no_drain) {
            (None, _) => Flushes::None,
            (Some(every), false) => Flushes::Drained(every),
            (Some(every), true) => Flushes::Beside(every),
        };
        Ok(Load {
            kind: if self.write {
                Kind::Write(self.pattern, flushes)
            } else {
                Kind::Read
            },
            count: self.count,
            depth: self.depth,
            size: self.size,
            step: self.step.unwrap_or(self.size),
            offset: self.offset,
        })
    }

    fn print(&self, text: &str) -> Result<()> {
        if self.quiet {
            return Ok(());
        }
        output::print(text)
    }
}

fn announce(load: &Load) -> String {
    let (what, flushes) = match load.kind {
        Kind::Read => ("read", Flushes::None),
        Kind::Write(_, flushes) => ("write", flushes),
    };
    let flushes = match flushes {
        Flushes::None => String::new(),
        Flushes::Drained(every) | Flushes::Beside(every) => {
            format!("Sending flush every {every} requests\n")
        }
    };
    format!(
        "Sending {} {what} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n{flushes}",
        load.count, load.size, load.depth, load.offset, load.step
    )
}

/// Requests and bytes per second.
fn rates(load: &Load, took: Duration) -> (u64, u64) {
    let micros = took.as_micros().max(1);
    let per_second = |amount: u128| u64::try_from(amount * 1_000_000 / micros).unwrap_or(u64::MAX);
    let count = u128::from(load.count);
    (per_second(count), per_second(count * u128::from(load.size)))
}

fn human(load: &Load, took: Duration) -> String {
    let (requests, bytes) = rates(load, took);
    format!(
        "Run completed in {:.3} seconds.\n{requests} requests/s, {} MiB/s\n",
        took.as_secs_f64(),
        bytes >> 20
    )
}

fn json(load: &Load, took: Duration) -> String {
    let (requests, bytes) = rates(load, took);
    let outcome = serde_json::json!({
        "requests": load.count,
        "request-size": load.size,
        "depth": load.depth,
        "seconds": took.as_secs_f64(),
        "requests-per-second": requests,
        "bytes-per-second": bytes,
    });
    format!("{outcome:#}\n")
}
