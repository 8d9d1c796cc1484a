//! A dump for people: its JSON as indented lines of names and values, with offsets, entries and masks in hexadecimal
//! digits and every entry of a table in one line.

use serde_json::{Map, Value};

use super::output::one_line;

/// Names whose numbers are addresses or bits.
const HEXADECIMAL: &[&str] = &[
    "magic",
    "backing_file_offset",
    "l1_table_offset",
    "refcount_table_offset",
    "snapshots_offset",
    "incompatible_features",
    "compatible_features",
    "autoclear_features",
    "type",
    "at",
    "entry",
    "bitmap",
    "offset",
    "host-offset",
    "guest-offset",
    "cluster",
    "l1-table-offset",
    "table-offset",
    "allocated-subclusters",
    "zero-subclusters",
];

/// The order in which named values are shown; others come behind.
const ORDER: &[&str] = &[
    "filename",
    "guest-offset",
    "host-offset",
    "header",
    "extensions",
    "backing-file",
    "broken",
    "magic",
    "version",
    "backing_file_offset",
    "backing_file_size",
    "cluster_bits",
    "size",
    "crypt_method",
    "l1_size",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
    "incompatible_features",
    "compatible_features",
    "autoclear_features",
    "refcount_order",
    "header_length",
    "compression_type",
    "type",
    "name",
    "l1",
    "l2-table-refcount",
    "l2",
    "index",
    "l1-index",
    "at",
    "entry",
    "bitmap",
    "kind",
    "offset",
    "length",
    "copied",
    "refcount",
    "subcluster",
    "allocated-subclusters",
    "zero-subclusters",
    "l1-table",
    "l2-tables",
    "refcount-table",
    "snapshots",
    "bitmaps",
    "holds",
    "host-clusters",
];

/// The text of a dump.
pub(super) fn human(value: &Value) -> String {
    let mut text = String::new();
    if let Value::Object(object) = value {
        object_lines(&mut text, object, 0);
    }
    text
}

fn object_lines(text: &mut String, object: &Map<String, Value>, depth: usize) {
    for (name, value) in in_order(object) {
        match value {
            Value::Object(inner) if is_flat(inner) => {
                line(text, depth, &format!("{name}: {}", in_one_line(inner)));
            }
            Value::Object(inner) => {
                line(text, depth, &format!("{name}:"));
                object_lines(text, inner, depth + 1);
            }
            Value::Array(list) => {
                line(text, depth, &format!("{name}: {}", count(list.len())));
                for one in list {
                    list_lines(text, one, depth + 1);
                }
            }
            _ => line(text, depth, &format!("{name}: {}", scalar(name, value))),
        }
    }
}

fn list_lines(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(object) if is_flat(object) => line(text, depth, &in_one_line(object)),
        Value::Object(object) => {
            line(text, depth, "-");
            object_lines(text, object, depth + 1);
        }
        _ => line(text, depth, &scalar("", value)),
    }
}

fn in_order(object: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let rank = |name: &str| {
        ORDER
            .iter()
            .position(|other| *other == name)
            .unwrap_or(ORDER.len())
    };
    let mut values: Vec<_> = object.iter().collect();
    values.sort_by_key(|(name, _)| rank(name));
    values
}

fn count(len: usize) -> String {
    match len {
        0 => "none".to_owned(),
        _ => len.to_string(),
    }
}

/// Whether an object is an entry, and not a group of named values.
fn is_flat(object: &Map<String, Value>) -> bool {
    object.len() <= 9
        && !object
            .values()
            .any(|value| value.is_object() || value.is_array())
}

fn in_one_line(object: &Map<String, Value>) -> String {
    let parts = object.iter().filter(|(_, value)| !value.is_null());
    let parts: Vec<String> = parts
        .map(|(name, value)| format!("{name} {}", scalar(name, value)))
        .collect();
    parts.join(", ")
}

fn scalar(name: &str, value: &Value) -> String {
    match value {
        Value::Number(number) if HEXADECIMAL.contains(&name) => number
            .as_u64()
            .map_or_else(|| number.to_string(), |number| format!("{number:#x}")),
        Value::String(text) => one_line(text),
        Value::Null => "none".to_owned(),
        _ => value.to_string(),
    }
}

fn line(text: &mut String, depth: usize, content: &str) {
    for _ in 0..depth {
        text.push_str("    ");
    }
    text.push_str(content);
    text.push('\n');
}
