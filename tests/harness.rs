//! The harness itself, with stock back-ends in place of the daemon: what it reports is what happened.

mod common;
#[path = "../benches/compare/histogram.rs"]
mod histogram;
#[path = "../benches/compare/stamp.rs"]
#[allow(dead_code)]
mod stamp;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::oracle::{self, Ext4};
use common::{Backend, Disk, Guest, GuestConfig, guests_available};

/// QEMU's own vhost-user-blk back-end on a raw image.
fn storage_daemon(image: &Path, socket: &Path) -> Backend {
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!("file,node-name=file,filename={}", image.display()))
        .args(["--blockdev", "raw,node-name=disk,file=file"])
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ));
    Backend::spawn(&mut command, &[socket.to_owned()])
}

#[test]
fn guest_reports_what_its_commands_did() {
    if !guests_available() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let (image, socket) = (dir.path().join("disk.raw"), dir.path().join("disk.sock"));
    let file = fs::File::create(&image).expect("a disk");
    file.set_len(64 << 20).expect("a disk");
    oracle::ok("mkfs.ext4", ["-q", image.to_str().expect("text")]);
    let daemon = storage_daemon(&image, &socket);
    let disks = vec![Disk::VhostUser(socket), Disk::Share];
    let mut guest = Guest::boot(&GuestConfig::new("guest", dir.path(), disks));

    let output = guest.run("echo out; echo err >&2; exit 7");
    assert_eq!((output.status, output.bytes), (7, b"out\nerr\n".to_vec()));
    assert_eq!(guest.run("printf 'no newline'").bytes, b"no newline");
    assert_eq!(guest.run("").bytes, b"");
    let noise = guest.run("head -c 300000 /dev/urandom | tee /tmp/noise; exit $(sha256sum /tmp/noise | head -c 1 | wc -c)");
    assert_eq!((noise.status, noise.bytes.len()), (1, 300_000));
    fs::write(dir.path().join("noise"), &noise.bytes).expect("a file");
    assert_eq!(
        guest.ok("sha256sum < /tmp/noise | cut -c -64"),
        oracle::sha256(&dir.path().join("noise"))
    );
    let long = format!("cat <<'END' | wc -c\n{}\nEND", "x".repeat(100_000));
    assert_eq!(guest.number(&long), 100_001);

    guest.start("echo first; read line < /dev/vdb; echo last");
    guest.wait_for("first");
    assert!(guest.wait().text().ends_with("last"));

    guest.ok("mount -t ext4 /dev/vda /mnt; mount -t ext4 -o ro /dev/vdb /usr/share");
    guest.ok("cp -r /usr/share/package-001 /mnt; touch /mnt/flagged; chattr +i /mnt/flagged");
    guest.fails("rm /mnt/flagged", "Operation not permitted");
    assert!(guest.ok("lsattr /mnt/flagged").contains("i---"));
    assert_eq!(guest.ok("su user -c 'id -u'"), "1000");
    guest.shutdown();
    drop(daemon);
    let filesystem = Ext4::at(&image, 0);
    filesystem.check_clean();
    assert!(filesystem.debugfs("ls /").contains("flagged"));
    let layout = filesystem.layout();
    assert_eq!(layout.groups.len(), 8);
    assert_eq!(layout.group_of_inode(2), 0);
}

#[test]
#[should_panic(expected = "QEMU ended, or its guest died")]
fn guest_that_dies_fails_the_test() {
    assert!(
        guests_available(),
        "QEMU ended, or its guest died: there is none"
    );
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let mut guest = Guest::boot(&GuestConfig::new("guest", dir.path(), Vec::new()));
    guest.ok("echo c > /proc/sysrq-trigger");
}

#[test]
#[should_panic(expected = "before it could listen on its sockets")]
fn backend_that_ends_at_once_fails_the_test() {
    let dir = tempfile::tempdir().expect("a directory");
    Backend::spawn(&mut Command::new("false"), &[dir.path().join("never.sock")]);
}

/// The bench's own measure: a bucket's bound is at most 1/64 above what it holds.
#[test]
fn percentiles_of_the_bench_are_within_a_bucket_of_the_truth() {
    let mut histogram = histogram::Histogram::new();
    for micros in 1..=1000 {
        histogram.add(Duration::from_micros(micros));
    }
    for (per_mille, truth) in [(1, 1.0), (500, 500.0), (990, 990.0), (1000, 1000.0)] {
        let found = histogram.percentile_us(per_mille);
        assert!(
            (truth..truth * 65.0 / 64.0).contains(&found),
            "{per_mille}: {found}"
        );
    }
}

#[test]
fn stamps_of_the_bench_name_their_block() {
    let stamp = stamp::Stamp {
        block: 7 << 40,
        generation: 9,
    };
    assert_eq!(stamp::Stamp::from_bytes(stamp.to_bytes()), Some(stamp));
    assert_eq!(stamp::Stamp::from_bytes([0; stamp::STAMP_LEN]), None);
    let mut block = [0; stamp::BLOCK];
    stamp::fill(5, &mut block);
    let (head, _) = block.split_first_chunk().expect("longer than a stamp");
    let found = stamp::Stamp::from_bytes(*head).expect("filled blocks are stamped");
    assert_eq!((found.block, found.generation), (5, 0));
}
