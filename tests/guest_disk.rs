//! A plain image as a real guest's disk, without a region: what the guest does to it, and what stock tools make
//! of it afterwards.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::oracle::{self, Ext4, Tolerated};
use common::{Backend, Disk, Guest, GuestConfig, guests_available};
use tempfile::TempDir;

/// A directory with `base.qcow2`, an ext4 filesystem made by stock tools, and `disk.qcow2`, its overlay.
fn overlay() -> TempDir {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let (raw, base) = (path(&dir, "base.raw"), path(&dir, "base.qcow2"));
    fs::File::create(&raw)
        .and_then(|file| file.set_len(128 << 20))
        .expect("a disk");
    oracle::ok("mkfs.ext4", ["-q", text(&raw)]);
    oracle::ok(
        "qemu-img",
        [
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            text(&raw),
            text(&base),
        ],
    );
    fs::remove_file(raw).expect("it was there");
    let disk = path(&dir, "disk.qcow2");
    oracle::ok(
        "qemu-img",
        [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "base.qcow2",
            text(&disk),
        ],
    );
    dir
}

fn path(dir: &TempDir, name: &str) -> PathBuf {
    dir.path().join(name)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths are text")
}

fn serve(dir: &TempDir, options: &[&str]) -> Backend {
    let socket = path(dir, "disk.sock");
    let mut arguments = vec![
        format!("--socket-path={}", socket.display()),
        format!("--blk-file={}", path(dir, "disk.qcow2").display()),
    ];
    arguments.extend(options.iter().map(ToString::to_string));
    Backend::seethrough(arguments, &[socket])
}

fn boot(dir: &TempDir) -> Guest {
    let disks = vec![Disk::VhostUser(path(dir, "disk.sock")), Disk::Share];
    let mut config = GuestConfig::new("guest", dir.path(), disks);
    config.cpus = 2;
    let mut guest = Guest::boot(&config);
    guest.ok("mount -t ext4 -o ro /dev/vdb /usr/share");
    guest
}

/// The images and the filesystem are as they should be.
fn check(dir: &TempDir) {
    oracle::qemu_img_check(&path(dir, "disk.qcow2"), Tolerated::Nothing);
    oracle::qemu_img_check(&path(dir, "base.qcow2"), Tolerated::Nothing);
    let raw = path(dir, "now.raw");
    oracle::to_raw(&path(dir, "disk.qcow2"), &raw);
    Ext4::at(&raw, 0).check_clean();
}

#[test]
fn guest_works_on_an_overlay_and_its_successor_finds_everything() {
    if !guests_available() {
        return;
    }
    let dir = overlay();
    let base = oracle::sha256(&path(&dir, "base.qcow2"));
    let daemon = serve(&dir, &[]);
    let mut guest = boot(&dir);
    // Two queues, and a cache that the guest knows to flush.
    assert_eq!(guest.ok("ls /sys/block/vda/mq | wc -l"), "2");
    assert_eq!(
        guest.ok("cat /sys/block/vda/queue/write_cache"),
        "write back"
    );
    guest.ok("(cd /usr/share && find package-0* -type f -exec md5sum {} +) > /tmp/sums");
    guest.ok("mount -t ext4 /dev/vda /mnt");
    // Both CPUs at once, each to its own queue.
    guest.ok("cp -r /usr/share/package-0[0-4]* /mnt & cp -r /usr/share/package-0[5-9]* /mnt & wait; sync");
    guest.ok(
        "cp /tmp/sums /mnt; cd /mnt; echo 3 > /proc/sys/vm/drop_caches; md5sum -c -s sums; sync",
    );
    // It leaves without a word, in the midst of writing.
    guest.start("echo started; while true; do cp -r /usr/share/package-11* /mnt/late; done");
    guest.wait_for("started");
    guest.kill();

    let mut guest = boot(&dir);
    guest.ok("mount -t ext4 /dev/vda /mnt; cd /mnt; md5sum -c -s sums");
    guest.ok("rm -r /mnt/package-00* && sync && fstrim -v /mnt");
    guest.ok(
        "umount /mnt; mount -t ext4 /dev/vda /mnt; cd /mnt; grep -v package-00 sums | md5sum -c -s",
    );
    guest.shutdown();
    daemon.stop();
    assert_eq!(
        oracle::sha256(&path(&dir, "base.qcow2")),
        base,
        "the base changed"
    );
    check(&dir);
}

#[test]
fn guest_reads_a_read_only_disk_and_cannot_write_it() {
    if !guests_available() {
        return;
    }
    let dir = overlay();
    let image = oracle::sha256(&path(&dir, "disk.qcow2"));
    let daemon = serve(&dir, &["--read-only", "--serial", "a-serial"]);
    let mut guest = boot(&dir);
    assert_eq!(
        guest.ok("cat /sys/block/vda/ro /sys/block/vda/serial"),
        "1\na-serial"
    );
    guest.ok("mount -t ext4 -o ro /dev/vda /mnt && ls /mnt/lost+found");
    guest.fails(
        "dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct",
        "Operation not permitted",
    );
    guest.shutdown();
    daemon.stop();
    assert_eq!(
        oracle::sha256(&path(&dir, "disk.qcow2")),
        image,
        "the image changed"
    );
}
