//! The demo that `ci/demo` runs: a base VM and two children on one ext4 filesystem, all of them writing.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::oracle::Tolerated;
use common::{Family, FamilyConfig, Filesystem, Guest, Placement, guests_available, narration};

fn main() {
    if !guests_available() {
        return;
    }
    let start = Instant::now();
    narration::enable();

    chapter(
        "A base image with an ext4 filesystem of mkfs.ext4's defaults, and two children on top of it",
    );
    let mut family = Family::new(FamilyConfig {
        filesystem: Filesystem::DEFAULTS,
        placement: Placement::WholeDisk,
        children: &["tom", "ann"],
    });

    chapter("One daemon serves all three; three unmodified Linux guests boot under stock QEMU");
    family.serve();
    let [mut base, mut tom, mut ann] = boot_all(&family);

    chapter("The base VM installs a tool in /usr");
    show("base", &mut base, "mount /dev/vda /mnt");
    show(
        "base",
        &mut base,
        "mkdir -p /mnt/usr/bin; echo 'tool, version 1' > /mnt/usr/bin/tool",
    );
    show("base", &mut base, "sync; umount /mnt");

    chapter("Both children see it, and write files of their own, each in its own overlay");
    for (name, child) in [("tom", &mut tom), ("ann", &mut ann)] {
        show(name, child, "mount /dev/vda /mnt; cat /mnt/usr/bin/tool");
        show(
            name,
            child,
            &format!("echo 'notes of {name}' > /mnt/local/notes; sync"),
        );
    }

    chapter("The base VM updates the tool");
    show("base", &mut base, "mount /dev/vda /mnt; ls /mnt/local");
    show(
        "base",
        &mut base,
        "echo 'tool, version 2: a security fix' > /mnt/usr/bin/tool; sync; umount /mnt",
    );

    chapter("After a remount the children have the fix, and still their own files");
    for (name, child) in [("tom", &mut tom), ("ann", &mut ann)] {
        show(name, child, "umount /mnt; mount /dev/vda /mnt");
        let seen = show(name, child, "cat /mnt/usr/bin/tool /mnt/local/notes");
        assert_eq!(
            seen,
            format!("tool, version 2: a security fix\nnotes of {name}")
        );
    }

    chapter("A child changes what is the base's: its own kernel refuses");
    for command in [
        "echo evil > /mnt/usr/bin/tool",
        "rm /mnt/usr/bin/tool",
        "echo evil > /mnt/usr/bin/evil",
    ] {
        assert!(show("tom", &mut tom, command).contains("Operation not permitted"));
    }

    chapter("A hostile child goes around its kernel: the daemon refuses, and logs");
    show("tom", &mut tom, "chattr -i /mnt/usr/bin/tool");
    let overwrite = "printf evil | dd of=/mnt/usr/bin/tool conv=notrunc,fsync 2>&1 | head -n 1";
    assert!(show("tom", &mut tom, overwrite).contains("Input/output error"));
    let raw = "dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek=8 oflag=direct 2>&1 | head -n 1";
    assert!(show("tom", &mut tom, raw).contains("Input/output error"));
    let log = family.daemon().log();
    let refusals: Vec<&str> = log
        .iter()
        .filter_map(|line| line.find("vm tom: refused").map(|at| &line[at..]))
        .filter(|refusal| !refusal.contains("requests so far"))
        .collect();
    assert!(!refusals.is_empty(), "the daemon logged no refusal");
    for refusal in refusals {
        println!("daemon: {refusal}");
    }

    chapter(
        "The VMs shut down; stock tools check the images, and the filesystems that each VM sees",
    );
    tom.kill();
    ann.shutdown();
    base.shutdown();
    recover(&mut family);
    family.stop();
    family.check_images(Tolerated::Nothing);
    println!("qemu-img check: base, tom and ann are clean");
    let filesystem = family.base_filesystem();
    filesystem.check_clean();
    println!("e2fsck -fn: the base's filesystem is clean");
    assert_eq!(
        filesystem.debugfs("cat /usr/bin/tool"),
        "tool, version 2: a security fix\n"
    );
    println!("the base's tool is untouched: version 2");
    family.flattened("ann").check_clean();
    println!("e2fsck -fn: what ann sees is clean");
    let flat = family.flattened("tom");
    assert_eq!(flat.debugfs("cat /local/notes"), "notes of tom\n");
    println!(
        "what tom sees has his notes, and the base's tool: {}",
        flat.debugfs("cat /usr/bin/tool").trim_end()
    );

    println!("\nAll went well, in {} s.", start.elapsed().as_secs());
}

fn chapter(title: &str) {
    println!("\n── {title}");
}

/// Boots side by side, which takes as long as one on a machine with as many CPUs.
fn boot_all(family: &Family) -> [Guest; 3] {
    let mut guests = ["base", "tom", "ann"].map(|member| family.start_boot(member));
    for (name, guest) in ["base", "tom", "ann"].iter().zip(&mut guests) {
        println!("{name}: {}", guest.ok("uname -sr"));
    }
    guests
}

/// Runs a command in a guest, on the terminal; returns its output.
fn show(name: &str, guest: &mut Guest, command: &str) -> String {
    narration::command(&format!("{name}#"), command);
    let output = guest.run(command).text();
    if !output.is_empty() {
        println!("{output}");
    }
    output
}

/// Tom was cut off with a journal full of what he must not write; it recovers without that.
fn recover(family: &mut Family) {
    let mut tom = family.boot("tom");
    println!("tom boots again after a power cut in the midst of it:");
    let seen = show(
        "tom",
        &mut tom,
        "mount /dev/vda /mnt; cat /mnt/usr/bin/tool /mnt/local/notes",
    );
    assert_eq!(seen, "tool, version 2: a security fix\nnotes of tom");
    tom.shutdown();
}
