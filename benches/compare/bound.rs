//! The bound: what the host does without any daemon, as fio measures it on the raw file.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::Result;
use crate::contender::Cache;
use crate::load::{Kind, Load, Pattern};
use crate::results::Sample;

/// How fio reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    IoUring,
    /// One thread with pread(2) and pwrite(2): for a queue depth of 1, and otherwise to compare with.
    Psync,
}

impl Engine {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::IoUring => "fio io_uring",
            Self::Psync => "fio psync",
        }
    }

    fn option(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Psync => "psync",
        }
    }
}

/// Runs `load` on the raw file `path`.
pub(crate) fn run(
    engine: Engine,
    path: &Path,
    load: &Load,
    cache: Cache,
    span: Duration,
    cpus: &[usize],
) -> Result<Sample> {
    let depth = if engine == Engine::Psync {
        1
    } else {
        load.under_way()
    };
    let cpus: Vec<String> = cpus.iter().map(usize::to_string).collect();
    let direct = u8::from(cache == Cache::Direct);
    let mut command = Command::new("fio");
    command
        .args([
            "--name=bound",
            "--output-format=json",
            "--time_based",
            "--randrepeat=0",
            "--norandommap",
        ])
        // The page cache is to stay as it is.
        .args([
            "--invalidate=0",
            "--fallocate=none",
            "--allow_file_create=0",
        ])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--ioengine={}", engine.option()))
        .arg(format!("--rw={}", pattern(load)))
        .arg(format!("--bs={}", load.len))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--direct={direct}"))
        .arg(format!("--runtime={}ms", span.as_millis()))
        .arg(format!("--cpus_allowed={}", cpus.join(",")));
    if load.kind == Kind::WriteFlush {
        command.arg("--fdatasync=1");
    }
    if !load.writes() {
        command.arg("--readonly");
    }
    let output = command
        .output()
        .map_err(|error| format!("cannot start fio: {error}"))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!(
            "fio failed: {}",
            words.lines().last().unwrap_or("without a word")
        ));
    }
    let answer: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| format!("fio: {error}"))?;
    let side = if load.writes() { "write" } else { "read" };
    sample(&answer["jobs"][0][side], load)
        .ok_or_else(|| "fio answers in another format than version 3's".into())
}

fn pattern(load: &Load) -> &'static str {
    match (load.pattern, load.writes()) {
        (Pattern::Sequential, false) => "read",
        (Pattern::Sequential, true) => "write",
        (_, false) => "randread",
        (_, true) => "randwrite",
    }
}

fn sample(side: &Value, load: &Load) -> Option<Sample> {
    let iops = side["iops"].as_f64()?;
    let percentile = |name: &str| Some(side["clat_ns"]["percentile"][name].as_f64()? / 1000.0);
    Some(Sample {
        iops,
        megabytes_per_s: iops * load.len as f64 / 1e6,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        p999_us: percentile("99.900000")?,
        cpu_us_per_io: None,
        switches_per_io: None,
        cpus_used: None,
        client_busy: None,
        worst_share: None,
    })
}
