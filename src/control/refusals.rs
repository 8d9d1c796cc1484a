//! The command `refusals`: which writes were refused, and whose files they were aimed at.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Command;
use super::daemon::{Daemon, Served};
use crate::error::{Context, Result};
use crate::sys::block_on;
use crate::units::GuestOffset;
use crate::view::View;
use crate::view::file_search::{Findings, Found, Part, Wanted};
use crate::view::refusal::{Answer, Entry, Structure};

/// Asks which writes were refused.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusals {
    /// Of this VM alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}

/// The writes that were refused since the daemon started.
#[derive(Debug, Serialize, Deserialize)]
pub struct RefusalReport {
    /// Every VM that shares a disk, or the one that was asked for.
    pub vms: Vec<VmRefusals>,
}

/// The refused writes of one VM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmRefusals {
    /// The VM's name.
    pub name: String,
    /// How many there were.
    pub total: u64,
    /// How many there were of each kind of structure; those without any are left out.
    pub kinds: Vec<KindCount>,
    /// What they were aimed at, the last one first.
    pub refusals: Vec<RefusedWrite>,
    /// Whether the search for files ended at its limit: there may be owners and paths that were not found.
    pub search_given_up: bool,
}

/// The refused writes to one kind of structure.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct KindCount {
    /// The kind.
    pub kind: String,
    /// How many there were.
    pub count: u64,
    /// How many of them are not told one by one, for there were too many.
    pub others: u64,
}

/// Refused writes that were aimed at the same thing.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RefusedWrite {
    /// What kind of structure it is.
    pub kind: String,
    /// The block group it serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
    /// The inode it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inode: Option<u32>,
    /// How many there were.
    pub count: u64,
    /// When the first came, in seconds since 1970.
    pub first: u64,
    /// When the last came.
    pub last: u64,
    /// What the last one was: write, write-zeroes or discard.
    pub operation: String,
    /// The first byte of the disk that the last one may not write.
    pub offset: u64,
    /// How many bytes follow it.
    pub length: u64,
    /// What the guest heard: failed or dropped.
    pub answer: String,
    /// The files that they were aimed at, in the base's filesystem.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<TargetFile>,
}

/// A file that refused writes were aimed at.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TargetFile {
    /// Its inode.
    pub inode: u32,
    /// Its path from the filesystem's root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What was to be written: data, entries, map, attributes or inode.
    pub part: String,
}

impl Command for Refusals {
    const NAME: &'static str = "refusals";
    type Arguments = Self;
    type Report = RefusalReport;

    fn run(daemon: &Daemon, arguments: Self) -> Result<RefusalReport> {
        let asked = match &arguments.vm {
            Some(name) => std::slice::from_ref(daemon.vm(name)?),
            None => daemon.vms(),
        };
        let reports = asked.iter().filter_map(report_of);
        Ok(RefusalReport {
            vms: reports.collect::<Result<_>>()?,
        })
    }
}

/// The refusals of a VM, if it shares a disk: others are refused nothing.
fn report_of(served: &Served) -> Option<Result<VmRefusals>> {
    let view = served.view.as_ref()?;
    Some(look_at(view).context(|| format!("vm {}", served.vm.name())))
}

fn look_at(view: &View) -> Result<VmRefusals> {
    let refusals = view.refusals();
    let mut entries = refusals.entries();
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.last));
    let wanted: Vec<Wanted> = entries.iter().map(wanted_by).collect();
    let Findings { owners, given_up } = block_on(view.find_files(&wanted))?;
    let kinds = Structure::ALL.iter().filter_map(|&structure| {
        let count = refusals.count(structure);
        (count > 0).then(|| KindCount {
            kind: structure.name().to_owned(),
            count,
            others: refusals.others(structure),
        })
    });
    let told = entries.iter().zip(owners);
    Ok(VmRefusals {
        name: refusals.vm().to_owned(),
        total: refusals.total(),
        kinds: kinds.collect(),
        refusals: told.map(|(entry, files)| told_of(entry, files)).collect(),
        search_given_up: given_up,
    })
}

/// Whose file is to be found for an entry: nobody's, for structures that are the filesystem's own.
fn wanted_by(entry: &Entry) -> Wanted {
    match (entry.structure(), entry.inode()) {
        (_, Some(inode)) => Wanted::Inode(inode),
        (Structure::Data, None) => Wanted::Bytes(entry.span.0..entry.span.1),
        _ => Wanted::Bytes(GuestOffset(0)..GuestOffset(0)),
    }
}

fn told_of(entry: &Entry, files: Vec<Found>) -> RefusedWrite {
    let latest = &entry.latest;
    RefusedWrite {
        kind: entry.structure().name().to_owned(),
        group: entry.group().map(|group| group.0),
        inode: entry.inode().map(|inode| inode.0),
        count: entry.count,
        first: seconds(entry.first),
        last: seconds(entry.last),
        operation: latest.operation.to_string(),
        offset: latest.range.0.0,
        length: latest.range.1,
        answer: match latest.answer {
            Answer::Failed => "failed",
            Answer::Dropped => "dropped",
        }
        .to_owned(),
        files: files.into_iter().map(target).collect(),
    }
}

fn target(found: Found) -> TargetFile {
    let part = match found.part {
        Part::Data if found.is_directory => "entries",
        Part::Data => "data",
        Part::Map => "map",
        Part::Attributes => "attributes",
        Part::Inode => "inode",
    };
    TargetFile {
        inode: found.inode.0,
        path: found.path,
        part: part.to_owned(),
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
