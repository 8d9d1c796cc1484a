//! Internal snapshots as `qemu-img` lists them: a table for people, and the JSON fields of QEMU's `SnapshotInfo`.

use std::fmt::Write;

use serde_json::{Value, json};

use super::output::human_size;
use crate::qcow2::snapshot_table::{Snapshot, printable};
use crate::sys::LocalTime;

const NANOSECONDS: u64 = 1_000_000_000;

/// The table, empty without snapshots.
pub(super) fn snapshots_human(snapshots: &[Snapshot]) -> String {
    let mut text = String::new();
    if snapshots.is_empty() {
        return text;
    }
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "Snapshot list:\n{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}",
        "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
    );
    for snapshot in snapshots {
        let date =
            LocalTime::at(snapshot.date_sec).map_or_else(String::new, |date| date.to_string());
        let icount = snapshot
            .icount
            .map_or_else(String::new, |count| count.to_string());
        let _ = writeln!(
            text,
            "{:<9} {:<16} {:>8}{date:>20}{:>13}{icount:>11}",
            printable(&snapshot.id),
            printable(&snapshot.name),
            human_size(snapshot.vm_state_size),
            clock(snapshot.vm_clock_nsec),
        );
    }
    text
}

/// Hours, minutes, seconds and milliseconds.
fn clock(nanoseconds: u64) -> String {
    let seconds = nanoseconds / NANOSECONDS;
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        nanoseconds / 1_000_000 % 1000
    )
}

/// A list of objects.
pub(super) fn snapshots_json(snapshots: &[Snapshot]) -> Value {
    let object = |snapshot: &Snapshot| {
        let mut object = json!({
            "id": snapshot.id.to_string_lossy(),
            "name": snapshot.name.to_string_lossy(),
            "vm-state-size": snapshot.vm_state_size,
            "date-sec": snapshot.date_sec,
            "date-nsec": snapshot.date_nsec,
            "vm-clock-sec": snapshot.vm_clock_nsec / NANOSECONDS,
            "vm-clock-nsec": snapshot.vm_clock_nsec % NANOSECONDS,
        });
        if let (Some(fields), Some(icount)) = (object.as_object_mut(), snapshot.icount) {
            fields.insert("icount".to_owned(), icount.into());
        }
        object
    };
    snapshots.iter().map(object).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::HostOffset;

    #[test]
    fn names_from_an_image_cannot_forge_lines() {
        let snapshot = Snapshot {
            l1_table_offset: HostOffset(0),
            l1_size: 0,
            id: "1".into(),
            name: "a\n2         b".into(),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 3_723_004_000_000,
            vm_state_size: 3 << 20,
            disk_size: None,
            icount: None,
            unknown_extra: Vec::new(),
        };
        let text = snapshots_human(std::slice::from_ref(&snapshot));
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(
            text.contains("1         a?2         b       3 MiB"),
            "{text}"
        );
        assert!(text.contains("01:02:03.004"), "{text}");
        let json = snapshots_json(&[snapshot]);
        assert_eq!(json[0]["vm-clock-nsec"], 4_000_000);
        assert!(json[0].get("icount").is_none());
    }
}
