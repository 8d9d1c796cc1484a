//! How much memory a daemon takes that serves many children of one base. By hand:
//!
//!     cargo test --release --test client -- --ignored --nocapture memory_for_a_hundred_children

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::Backend;
use crate::driver::{Client, all_features};

const CHILDREN: usize = 100;
const DISK: u64 = 100 << 30;
/// What an L2 table maps, at 64 KiB clusters.
const PER_TABLE: u64 = 512 << 20;
/// What a slice of one maps, as it is cached.
const PER_SLICE: u64 = 128 << 20;

#[test]
#[ignore = "a measurement, which takes gigabytes of disk"]
fn memory_for_a_hundred_children() {
    for options in [&[][..], &["--l2-cache-size", "full"]] {
        measure(options);
    }
}

fn measure(options: &[&str]) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let base = path("base.qcow2");
    qemu_img(&["-o", "preallocation=metadata"], &base, Some(DISK));
    let backing = base.to_str().expect("UTF-8");
    let mut config = String::new();
    let mut sockets = Vec::new();
    for number in 0..CHILDREN {
        let image = path(&format!("{number}.qcow2"));
        qemu_img(&["-b", backing, "-F", "qcow2"], &image, None);
        let socket = path(&format!("{number}.sock"));
        let _ = write!(
            config,
            "[[vm]]\nname = \"child{number}\"\nimage = \"{number}.qcow2\"\nsocket = \"{number}.sock\"\n"
        );
        sockets.push(socket);
    }
    fs::write(path("family.toml"), config).expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_seethrough"));
    command
        .arg("serve")
        .arg("--config")
        .arg(path("family.toml"))
        .args(options);
    // Disks that nobody has written to: the children share clusters of zeros with the base.
    let daemon = Backend::spawn(&mut command, &sockets);
    let report = |what: &str| println!("{options:?}: {what}: {} MiB", resident(dir.path()) >> 20);
    report("started");
    let mut clients: Vec<Client> = sockets
        .iter()
        .map(|socket| Client::connect(socket, 1, 64, all_features()))
        .collect();
    for client in &mut clients {
        client.read(0, 512);
    }
    report("with a front-end each");
    for client in &mut clients {
        for at in (0..DISK).step_by(usize::try_from(PER_SLICE).expect("small")) {
            client.read(at, 512);
        }
    }
    report("with all metadata of the base in use by every child");
    for client in &mut clients {
        for at in (0..DISK).step_by(usize::try_from(PER_TABLE).expect("small")) {
            client.write(at, &[7; 4096]);
        }
    }
    report("with every L2 table of every child in use");
    drop(clients);
    daemon.stop();
}

fn qemu_img(options: &[&str], image: &Path, size: Option<u64>) {
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(options)
        .arg(image)
        .args(size.map(|size| size.to_string()))
        .status();
    assert!(status.expect("qemu-img runs").success());
}

/// The resident memory of the daemon that serves the images in `dir`, in bytes.
fn resident(dir: &Path) -> u64 {
    let config: PathBuf = dir.join("family.toml");
    let config = config.to_str().expect("UTF-8");
    let is_it = |process: &fs::DirEntry| {
        let arguments = fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&arguments)
            .split('\0')
            .any(|argument| argument == config)
    };
    let processes = fs::read_dir("/proc").expect("there").flatten();
    let daemon = processes.into_iter().find(is_it).expect("the daemon runs");
    let status = fs::read_to_string(daemon.path().join("status")).expect("readable");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("a number") << 10
}
