//! Partition tables that sfdisk and sgdisk make, and damaged ones.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seethrough::error::{ErrorKind, Result};
use seethrough::partition::{Partition, PartitionKind, Scan};
use seethrough::units::GuestOffset;
use tempfile::NamedTempFile;

const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
/// The type GUID of Linux data, 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is on disk.
const LINUX: [u8; 16] = [
    0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4,
];

fn scan(disk: &[u8]) -> Result<Vec<Partition>> {
    let mut scan = Scan::new(u64::try_from(disk.len()).unwrap());
    let mut reads = 0;
    while let Some((at, len)) = scan.next_read() {
        let at = usize::try_from(at.0).unwrap();
        scan.supply(&disk[at..at + len])?;
        reads += 1;
        assert!(reads < 300, "a scan is bounded");
    }
    Ok(scan.finish())
}

fn empty_disk() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(DISK).unwrap();
    file
}

/// A disk that sfdisk partitions by `script`.
fn sfdisk(script: &str) -> Vec<u8> {
    let file = empty_disk();
    let mut child = Command::new("sfdisk")
        .args(["--quiet", "--no-reread"])
        .arg(file.path())
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk is installed");
    child
        .stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success());
    fs::read(file.path()).unwrap()
}

/// A disk that sgdisk partitions by `arguments`.
fn sgdisk(arguments: &[&str]) -> Vec<u8> {
    let file = empty_disk();
    let done = Command::new("sgdisk")
        .args(arguments)
        .arg(file.path())
        .output()
        .expect("sgdisk is installed");
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    fs::read(file.path()).unwrap()
}

fn mbr_partition(number: u32, start: u64, len: u64) -> Partition {
    Partition {
        number,
        start: GuestOffset(start),
        len,
        kind: PartitionKind::Mbr(0x83),
    }
}

/// A disk with partitions 1 and 3: sgdisk takes its time, so it makes it once.
fn two_gpt_partitions() -> Vec<u8> {
    static DISK: OnceLock<Vec<u8>> = OnceLock::new();
    DISK.get_or_init(|| sgdisk(&["-n", "1:2048:+16M", "-n", "3:0:+8M"]))
        .clone()
}

fn expected_gpt() -> Vec<Partition> {
    let kind = PartitionKind::Gpt(LINUX);
    vec![
        Partition {
            number: 1,
            start: GuestOffset(MIB),
            len: 16 * MIB,
            kind,
        },
        Partition {
            number: 3,
            start: GuestOffset(17 * MIB),
            len: 8 * MIB,
            kind,
        },
    ]
}

fn kind_of(result: Result<Vec<Partition>>) -> ErrorKind {
    result.unwrap_err().kind()
}

#[test]
fn a_disk_without_a_table_has_no_partitions() {
    assert_eq!(scan(&vec![0; 4096]).unwrap(), []);
    assert_eq!(scan(&[]).unwrap(), []);
    assert_eq!(scan(&[0xff; 511]).unwrap(), []);
}

#[test]
fn primary_and_logical_partitions_are_numbered_as_the_kernel_does() {
    let disk = sfdisk(
        "label: dos\n\
         2: start=2048, size=8M, type=83\n\
         3: start=20480, size=40M, type=5\n\
         5: start=22528, size=4M, type=83\n\
         6: start=32768, size=6M, type=83\n\
         7: start=47104, size=8M, type=83\n",
    );
    let expected = [
        mbr_partition(2, MIB, 8 * MIB),
        mbr_partition(5, 11 * MIB, 4 * MIB),
        mbr_partition(6, 16 * MIB, 6 * MIB),
        mbr_partition(7, 23 * MIB, 8 * MIB),
    ];
    assert_eq!(scan(&disk).unwrap(), expected);
}

#[test]
fn gpt_partitions_keep_their_place_in_the_table_as_number() {
    assert_eq!(scan(&two_gpt_partitions()).unwrap(), expected_gpt());
}

#[test]
fn a_damaged_first_copy_of_a_gpt_is_read_from_the_second() {
    for at in [512, 512 + 0x18, 512 + 0x58, 1024, 1024 + 0x28] {
        let mut disk = two_gpt_partitions();
        disk[at] ^= 0xff;
        assert_eq!(scan(&disk).unwrap(), expected_gpt(), "byte {at}");
    }
}

#[test]
fn a_gpt_damaged_in_both_copies_is_corrupt() {
    let mut disk = two_gpt_partitions();
    let end = disk.len();
    disk[512] ^= 0xff;
    disk[end - 512] ^= 0xff;
    let error = scan(&disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("first copy"), "{error}");
    let mut disk = two_gpt_partitions();
    disk[1024] ^= 0xff;
    disk[end - 33 * 512] ^= 0xff;
    assert_eq!(kind_of(scan(&disk)), ErrorKind::Corrupt);
}

#[test]
fn partitions_that_overlap_or_leave_the_disk_are_corrupt() {
    let good = sfdisk("label: dos\nstart=2048, size=8M\nstart=20480, size=8M\n");
    assert_eq!(scan(&good).unwrap().len(), 2);
    for (name, at, value) in [
        ("start of the second in the first", 0x1ce + 8, 4096u32),
        ("length of the first into the second", 0x1be + 12, 20480),
        ("behind the end", 0x1ce + 12, u32::MAX),
        ("at sector 0", 0x1be + 8, 0),
    ] {
        let mut disk = good.clone();
        disk[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert_eq!(kind_of(scan(&disk)), ErrorKind::Corrupt, "{name}");
    }
}

#[test]
fn a_chain_of_logical_partitions_that_turns_back_is_corrupt() {
    let good = sfdisk(
        "label: dos\n1: start=2048, size=40M, type=5\n5: start=4096, size=4M\n6: start=20480, size=4M\n",
    );
    assert_eq!(scan(&good).unwrap().len(), 2);
    let first = 2048 * 512;
    for link in [0u32, 100_000, u32::MAX] {
        let mut disk = good.clone();
        disk[first + 0x1ce + 8..first + 0x1ce + 12].copy_from_slice(&link.to_le_bytes());
        assert_eq!(kind_of(scan(&disk)), ErrorKind::Corrupt, "link to {link}");
        // Without a partition of its own the boot record is a mere link.
        disk[first + 0x1be..first + 0x1ce].fill(0);
        assert_eq!(
            kind_of(scan(&disk)),
            ErrorKind::Corrupt,
            "mere link to {link}"
        );
    }
    let mut disk = good;
    disk[first + 0x1be + 12..first + 0x1be + 16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(kind_of(scan(&disk)), ErrorKind::Corrupt);
}

#[test]
fn a_short_answer_is_refused() {
    let mut scan = Scan::new(DISK);
    assert_eq!(
        scan.supply(&[0; 511]).unwrap_err().kind(),
        ErrorKind::OutOfBounds
    );
}

fn crc32(bytes: &[u8]) -> u32 {
    crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(bytes)
}

/// The checksum of a GPT's usual 128 entries.
fn crc_of_entries(disk: &[u8]) -> u32 {
    crc32(&disk[1024..1024 + 128 * 128])
}

/// Writes 32-bit fields; returns the bytes that were there.
fn put_all(disk: &mut [u8], fields: &[(usize, u32)]) -> Vec<(usize, u8)> {
    let mut before = Vec::new();
    for (at, value) in fields {
        for (at, byte) in (*at..).zip(value.to_le_bytes()) {
            before.push((at, disk[at]));
            disk[at] = byte;
        }
    }
    before
}

#[test]
fn random_damage_never_panics_and_what_is_found_is_sound() {
    let seed = 0x5eed_0004;
    println!("seed {seed:#x}");
    let mut random = StdRng::seed_from_u64(seed);
    let tables = [
        two_gpt_partitions(),
        sfdisk(
            "label: dos\n1: start=2048, size=40M, type=5\n5: start=4096, size=4M\n6: start=20480, size=4M\n",
        ),
    ];
    for mut disk in tables {
        let parts = [
            0x1be..0x200,
            512..604,
            1024..1300,
            2048 * 512 + 0x1be..2048 * 512 + 0x200,
        ];
        for _ in 0..1_000 {
            let mut undo = Vec::new();
            for _ in 0..random.random_range(1..4) {
                let part = parts[random.random_range(0..parts.len())].clone();
                let at = random.random_range(part);
                undo.push((at, disk[at]));
                disk[at] = random.random();
            }
            let sealed = [(0x258, crc_of_entries(&disk)), (0x210, 0)];
            undo.extend(put_all(&mut disk, &sealed));
            let header = crc32(&disk[512..604]);
            undo.extend(put_all(&mut disk, &[(0x210, header)]));
            if let Ok(found) = scan(&disk) {
                for partition in found {
                    assert!(partition.start.0 + partition.len <= DISK);
                }
            }
            while let Some((at, byte)) = undo.pop() {
                disk[at] = byte;
            }
        }
    }
}
