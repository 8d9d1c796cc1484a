//! Machine, versions and settings that a run's numbers hold for.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use crate::contender::{Contender, Program};
use crate::cpus::{Cpus, Room};
use crate::tournament::Effort;

/// What to print above the table.
pub(crate) fn conditions(
    contenders: &[Contender],
    cpus: &Cpus,
    effort: Effort,
) -> BTreeMap<String, String> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut facts = BTreeMap::new();
    let mut add = |name: &str, value: String| facts.insert(name.to_owned(), value);
    add(
        "machine",
        format!(
            "{} CPUs, {}; Linux {}",
            cpus.count(),
            cpu_model(),
            kernel.trim()
        ),
    );
    add(
        "method",
        format!(
            "medians of {} interleaved rounds of {} s each, every block read verified",
            effort.rounds,
            effort.measured.as_secs_f64()
        ),
    );
    add(
        "CPUs",
        format!(
            "the client has the last one for itself; contenders have {:?}, or all for compressed images, 4 queues and \
             8 VMs",
            cpus.contenders(Room::Beside)
        ),
    );
    let mut versions: Vec<String> = contenders.iter().filter_map(version).collect();
    versions.dedup();
    add("versions", versions.join("; "));
    add("peer's settings", "an iothread for each disk, l2-cache-size covers the disk, cache-clean-interval=0, discard=unmap; aio as named".into());
    facts
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split(": ").nth(1))
        .unwrap_or("of an unknown kind")
        .to_owned()
}

/// The first line of what a program says of its version.
fn version(contender: &Contender) -> Option<String> {
    let (Program::Seethrough(path) | Program::Qemu(path, _)) = &contender.program;
    let output = Command::new(path).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .next()
        .map(str::to_owned)
}
