//! `seethrough dump`: the header and the tables of a qcow2 image as they lie on disk, the way of a guest offset through
//! them, and what lies at a host offset. Broken entries are shown and named: this is a tool for broken images.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::dump_text;
use super::options::parse_size;
use super::output::{self, OutputFormat};
use super::tool::Sharing;
use crate::chain::backing::Backing;
use crate::chain::format::Format;
use crate::chain::host::{HostOptions, open_file};
use crate::chain::inspect::MAX_CHAIN_DEPTH;
use crate::error::{Context, Result};
use crate::image::Access;
use crate::qcow2::bitmap::BitmapDirectory;
use crate::qcow2::dump::{Dump as Tables, Entry, Found, Holds, Meaning, Refcount, Trace, Use};
use crate::qcow2::header::Header;
use crate::qcow2::header_extension::{
    ExtensionType, HeaderExtensions, SEETHROUGH_EXTENSION, VOID_EXTENSION,
};
use crate::qcow2::snapshot_table::read_snapshots;
use crate::storage::{FileStorage, Storage};
use crate::sys::{IoBuf, block_on};
use crate::units::{GuestOffset, HostOffset};

use super::snapshot_list::snapshots_json;

/// Arguments of `dump`.
#[derive(Debug, clap::Args)]
pub struct Dump {
    /// All tables: as --l1 --l2 --refcount-table --snapshots --bitmaps
    #[arg(long)]
    tables: bool,

    /// The active L1 table
    #[arg(long)]
    l1: bool,

    /// The L2 tables of the active L1 table, or the one of this L1 entry
    #[arg(long, value_name = "L1-INDEX", num_args = 0..=1)]
    l2: Option<Option<u64>>,

    /// The refcount table
    #[arg(long)]
    refcount_table: bool,

    /// The snapshot table
    #[arg(long)]
    snapshots: bool,

    /// The directory of persistent bitmaps
    #[arg(long)]
    bitmaps: bool,

    /// The way of this guest offset through the tables, and through the images behind
    #[arg(long, value_name = "OFFSET", value_parser = parse_size)]
    guest_offset: Option<u64>,

    /// Everything that refers to the cluster at this offset of the file
    #[arg(long, value_name = "OFFSET", value_parser = parse_size, conflicts_with = "guest_offset")]
    host_offset: Option<u64>,

    /// How to print
    #[arg(long, value_enum, default_value_t = OutputFormat::Human)]
    output: OutputFormat,

    #[command(flatten)]
    sharing: Sharing,

    /// The qcow2 image
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// The header's fields, in the specification's words: where each begins, and how many bytes it has.
const FIELDS: &[(&str, usize, usize)] = &[
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
];

/// Bytes of the fields that a version 2 header has.
const V2_LENGTH: usize = 72;

impl Dump {
    /// Prints what was asked for; the header without anything.
    ///
    /// # Errors
    /// If the file cannot be read, or its header cannot and more was asked for.
    pub fn run(self) -> Result<()> {
        let value = block_on(self.value())?;
        output::print(&match self.output {
            OutputFormat::Human => dump_text::human(&value),
            OutputFormat::Json => output::json(&value)?,
        })
    }

    async fn value(&self) -> Result<Value> {
        if let Some(at) = self.guest_offset {
            return self.way(GuestOffset(at)).await;
        }
        let file = self.open(&self.file)?;
        if let Some(at) = self.host_offset {
            let header = Header::read(&file).await.context(|| self.named())?;
            let found = Tables::new(&file, &header).find(HostOffset(at)).await?;
            return Ok(found_json(at, &found));
        }
        let (mut value, header) = header_json(&file).await?;
        let wants_tables = self.tables
            || self.l1
            || self.l2.is_some()
            || self.refcount_table
            || self.snapshots
            || self.bitmaps;
        if wants_tables {
            let header = header.context(|| self.named())?;
            self.add_tables(&mut value, &file, &header).await?;
        }
        Ok(value.into())
    }

    fn named(&self) -> String {
        self.file.display().to_string()
    }

    fn open(&self, path: &Path) -> Result<FileStorage> {
        let options = HostOptions {
            locking: self.sharing.locking(),
            ..HostOptions::default()
        };
        open_file(path, Access::ReadOnly, options)
    }

    async fn add_tables(&self, value: &mut Map<String, Value>, file: &FileStorage, header: &Header) -> Result<()> {
        let tables = Tables::new(file, header);
        let l1 = tables.l1_table().await?;
        let per_table = header.l2_entries();
        if self.tables || self.l1 {
            value.insert("l1-table".to_owned(), entries_json(&l1));
        }
        if self.tables || self.l2.is_some() {
            let wanted = self.l2.flatten();
            let mut list = Vec::new();
            for entry in l1.iter().filter(|entry| wanted.is_none_or(|index| index == entry.index)) {
                let Meaning::Table { at, .. } = entry.meaning else {
                    continue;
                };
                let first = entry.index.saturating_mul(per_table).saturating_mul(header.cluster_size());
                list.push(json!({
                    "l1-index": entry.index,
                    "offset": at.0,
                    "guest-offset": first,
                    "entries": entries_json(&tables.l2_table(at).await?),
                }));
                // Tables that several entries share are shown for each, but not without end.
                if (list.len() as u64).saturating_mul(header.cluster_size()) > file.len() {
                    break;
                }
            }
            value.insert("l2-tables".to_owned(), list.into());
        }
        if self.tables || self.refcount_table {
            let entries = tables.refcount_table().await?;
            value.insert("refcount-table".to_owned(), entries_json(&entries));
        }
        if self.tables || self.snapshots {
            value.insert("snapshots".to_owned(), snapshot_table_json(file, header).await);
        }
        if self.tables || self.bitmaps {
            value.insert("bitmaps".to_owned(), bitmaps_json(file, header).await);
        }
        Ok(())
    }

    /// The way of a guest offset through a chain, topmost image first.
    async fn way(&self, at: GuestOffset) -> Result<Value> {
        let mut steps = Vec::new();
        let mut next = Some((self.file.clone(), Format::Qcow2));
        while let Some((path, format)) = next.take() {
            if steps.len() >= MAX_CHAIN_DEPTH {
                steps.push(json!({ "broken": "the backing chain does not end" }));
                break;
            }
            let file = match self.open(&path) {
                Ok(file) => file,
                // What lies above it has been followed, and is worth showing.
                Err(error) if !steps.is_empty() => {
                    steps.push(json!({ "filename": path.display().to_string(), "broken": error.to_string() }));
                    break;
                }
                Err(error) => return Err(error),
            };
            let name = path.display().to_string();
            if format == Format::Raw {
                steps.push(raw_step(&name, at, file.len()));
                break;
            }
            let header = match Header::read(&file).await {
                Ok(header) => header,
                Err(error) if !steps.is_empty() => {
                    steps.push(json!({ "filename": name, "broken": error.to_string() }));
                    break;
                }
                Err(error) => return Err(error.context(name)),
            };
            let trace = Tables::new(&file, &header).trace(at).await?;
            let mut step = trace_json(&trace);
            step.insert("filename".to_owned(), name.into());
            if trace.holds == Holds::Unallocated {
                match Backing::of(&path, &header) {
                    Ok(backing) => next = backing.map(|backing| (backing.path, backing.format)),
                    Err(error) => {
                        step.insert("backing-broken".to_owned(), error.to_string().into());
                    }
                }
            }
            steps.push(step.into());
        }
        Ok(json!({ "guest-offset": at.0, "way": steps }))
    }
}

fn raw_step(name: &str, at: GuestOffset, len: u64) -> Value {
    if at.0 < len {
        json!({ "filename": name, "holds": "data", "host-offset": at.0 })
    } else {
        json!({ "filename": name, "holds": "beyond the end" })
    }
}

/// The fields as they lie there, and the header if it makes sense.
async fn header_json(file: &FileStorage) -> Result<(Map<String, Value>, Result<Header>)> {
    let start = IoBuf::zeroed(4096);
    file.readv(HostOffset(0), start.clone()).await?;
    let bytes = start.to_vec();
    let field = |at: usize, width: usize| {
        let bytes = bytes.get(at..at + width).unwrap_or_default();
        bytes.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let is_v2 = field(4, 4) == 2;
    let mut fields = Map::new();
    for (name, at, width) in FIELDS {
        if !is_v2 || at + width <= V2_LENGTH {
            fields.insert((*name).to_owned(), field(*at, *width).into());
        }
    }
    let mut value = Map::new();
    value.insert("filename".to_owned(), file.name().into());
    value.insert("header".to_owned(), fields.into());
    let header = Header::read(file).await;
    match &header {
        Ok(header) => {
            value.insert("extensions".to_owned(), extensions_json(&header.extensions));
            if let Some(name) = &header.backing_file {
                value.insert("backing-file".to_owned(), name.to_string_lossy().into());
            }
        }
        Err(error) => {
            value.insert("broken".to_owned(), error.to_string().into());
        }
    }
    Ok((value, header))
}

fn extensions_json(extensions: &HeaderExtensions) -> Value {
    let one = |kind: ExtensionType| {
        let data = extensions.get(kind).unwrap_or_default();
        let name = match kind {
            ExtensionType::BACKING_FORMAT => "backing file format",
            ExtensionType::FEATURE_NAME_TABLE => "feature name table",
            ExtensionType::BITMAPS => "bitmaps",
            ExtensionType::FULL_DISK_ENCRYPTION => "full disk encryption header",
            ExtensionType::EXTERNAL_DATA_FILE_NAME => "external data file name",
            SEETHROUGH_EXTENSION => "seethrough",
            VOID_EXTENSION => "void",
            _ => "unknown",
        };
        let mut object = json!({ "type": kind.0, "name": name, "length": data.len() });
        let is_text = [
            ExtensionType::BACKING_FORMAT,
            ExtensionType::EXTERNAL_DATA_FILE_NAME,
            SEETHROUGH_EXTENSION,
        ]
        .contains(&kind);
        if is_text && let Some(object) = object.as_object_mut() {
            object.insert("text".to_owned(), String::from_utf8_lossy(data).into());
        }
        object
    };
    extensions.types().map(one).collect()
}

async fn snapshot_table_json(file: &FileStorage, header: &Header) -> Value {
    match read_snapshots(file, header).await {
        Ok(snapshots) => {
            let mut list = snapshots_json(&snapshots);
            let objects = list.as_array_mut().map(Vec::as_mut_slice).unwrap_or_default();
            for (object, snapshot) in objects.iter_mut().filter_map(Value::as_object_mut).zip(&snapshots) {
                object.insert("l1-table-offset".to_owned(), snapshot.l1_table_offset.0.into());
                object.insert("l1-size".to_owned(), snapshot.l1_size.into());
            }
            list
        }
        Err(error) => json!({ "broken": error.to_string() }),
    }
}

async fn bitmaps_json(file: &FileStorage, header: &Header) -> Value {
    match BitmapDirectory::read(file, header).await {
        Ok(directory) => directory
            .iter()
            .flat_map(|directory| &directory.bitmaps)
            .map(|bitmap| {
                json!({
                    "name": bitmap.name,
                    "granularity": bitmap.granularity,
                    "auto": bitmap.is_auto,
                    "in-use": bitmap.is_in_use,
                    "table-offset": bitmap.table_at.0,
                    "table-entries": bitmap.table_entries,
                })
            })
            .collect(),
        Err(error) => json!({ "broken": error.to_string() }),
    }
}

fn entries_json(entries: &[Entry]) -> Value {
    entries.iter().map(|entry| Value::from(entry_json(entry))).collect()
}

fn entry_json(entry: &Entry) -> Map<String, Value> {
    let mut object = Map::new();
    let mut insert = |name: &str, value: Value| object.insert(name.to_owned(), value);
    insert("index", entry.index.into());
    insert("at", entry.at.0.into());
    insert("entry", entry.word.into());
    if let Some(bitmap) = entry.bitmap {
        insert("bitmap", bitmap.into());
    }
    match entry.meaning {
        Meaning::Nothing => {
            insert("kind", "nothing".into());
        }
        Meaning::Table { at, copied } => {
            insert("kind", "table".into());
            insert("offset", at.0.into());
            insert("copied", copied.into());
        }
        Meaning::Cluster {
            host,
            copied,
            allocated,
            zero,
        } => {
            let kind = match (host, allocated, zero) {
                (_, 0, 0) => "unallocated",
                (_, 0, _) => "zero",
                _ => "data",
            };
            insert("kind", kind.into());
            insert("offset", host.map(|host| host.0).into());
            insert("copied", copied.into());
            insert("allocated-subclusters", allocated.into());
            insert("zero-subclusters", zero.into());
        }
        Meaning::Compressed { at, len } => {
            insert("kind", "compressed".into());
            insert("offset", at.0.into());
            insert("length", len.into());
        }
        Meaning::Broken(rule) => {
            insert("kind", "broken".into());
            insert("broken", rule.into());
        }
    }
    object
}

fn refcount_json(refcount: Refcount) -> Value {
    match refcount {
        Refcount::Is(count) => count.into(),
        Refcount::NoBlock => "no refcount block".into(),
        Refcount::Broken(rule) => format!("the refcount table's entry {rule}").into(),
    }
}

fn trace_json(trace: &Trace) -> Map<String, Value> {
    let mut step = Map::new();
    let mut insert = |name: &str, value: Value| step.insert(name.to_owned(), value);
    if let Some(l1) = &trace.l1 {
        insert("l1", entry_json(l1).into());
    }
    if let Some(refcount) = trace.table_refcount {
        insert("l2-table-refcount", refcount_json(refcount));
    }
    if let Some(l2) = &trace.l2 {
        insert("l2", entry_json(l2).into());
    }
    if let Some(subcluster) = trace.subcluster {
        insert("subcluster", subcluster.into());
    }
    let (holds, at) = match trace.holds {
        Holds::Data(at) => ("data", Some(at)),
        Holds::Compressed(at) => ("compressed data", Some(at)),
        Holds::Zero => ("zeros", None),
        Holds::Unallocated => ("nothing", None),
        Holds::Unknown => ("unknown, for an entry is broken", None),
        Holds::BeyondEnd => ("beyond the end", None),
    };
    insert("holds", holds.into());
    if let Some(at) = at {
        insert("host-offset", at.0.into());
    }
    if !trace.refcounts.is_empty() {
        let clusters = trace.refcounts.iter();
        let clusters = clusters.map(|(at, refcount)| json!({ "offset": at.0, "refcount": refcount_json(*refcount) }));
        insert("host-clusters", clusters.collect());
    }
    step
}

fn found_json(at: u64, found: &Found) -> Value {
    json!({
        "host-offset": at,
        "cluster": found.cluster.0,
        "beyond-end": found.is_beyond_end,
        "refcount": refcount_json(found.refcount),
        "uses": found.uses.iter().map(use_json).collect::<Vec<_>>(),
        "gaps": found.gaps,
    })
}

fn use_json(one: &Use) -> Value {
    match one {
        Use::Header => json!({ "kind": "header" }),
        Use::L1Table => json!({ "kind": "L1 table" }),
        Use::SnapshotL1Table(snapshot) => json!({ "kind": "L1 table", "snapshot": snapshot }),
        Use::RefcountTable => json!({ "kind": "refcount table" }),
        Use::RefcountBlock(index) => json!({ "kind": "refcount block", "index": index }),
        Use::SnapshotTable => json!({ "kind": "snapshot table" }),
        Use::L2Table { snapshot, l1_index } => {
            json!({ "kind": "L2 table", "snapshot": snapshot, "l1-index": l1_index })
        }
        Use::Data { snapshot, guest } => {
            json!({ "kind": "data", "snapshot": snapshot, "guest-offset": guest.0 })
        }
        Use::Compressed { snapshot, guest } => {
            json!({ "kind": "compressed data", "snapshot": snapshot, "guest-offset": guest.0 })
        }
        Use::BitmapDirectory => json!({ "kind": "bitmap directory" }),
        Use::BitmapTable(name) => json!({ "kind": "bitmap table", "bitmap": name }),
        Use::Bitmap(name) => json!({ "kind": "bitmap", "bitmap": name }),
    }
}
