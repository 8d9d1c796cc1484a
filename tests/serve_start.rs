//! How the daemon starts, and how it does not: options, inherited sockets, messages, exit codes.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::Backend;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;

fn run(arguments: &[&str], directory: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_seethrough"))
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts")
}

/// Starts with `arguments` where `disk.raw` is a disk; it must fail, with `message` on standard error.
fn fails(arguments: &[&str], exit_code: i32, message: &str) {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = File::create(dir.path().join("disk.raw")).expect("a disk");
    disk.set_len(1 << 20).expect("a disk");
    let _live = UnixListener::bind(dir.path().join("live.sock")).expect("a socket");
    let output = run(arguments, dir.path());
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(exit_code),
        "{arguments:?}: {text}"
    );
    assert!(text.contains(message), "{arguments:?}: {text}");
    assert!(
        !dir.path().join("new.sock").exists(),
        "a socket is left behind"
    );
}

#[test]
fn a_bad_start_ends_at_once_with_a_message() {
    let raw = "--format=raw";
    fails(
        &["--socket-path=new.sock", "--blk-file=none.raw", raw],
        1,
        "none.raw",
    );
    fails(&["--socket-path=new.sock", "--blk-file=disk.raw"], 2, "raw");
    fails(
        &["--socket-path=live.sock", "--blk-file=disk.raw", raw],
        1,
        "live.sock: another process listens",
    );
    fails(
        &["--socket-path=disk.raw", "--blk-file=disk.raw", raw],
        1,
        "no socket",
    );
    fails(&["--blk-file=disk.raw", raw], 2, "--socket-path");
    fails(&["--fd=2", "--blk-file=disk.raw", raw], 1, "--fd=2");
    fails(&["--fd=999", "--blk-file=disk.raw", raw], 1, "--fd=999");
    fails(
        &[
            "--socket-path=new.sock",
            "--blk-file=disk.raw",
            raw,
            "--num-queues=0",
        ],
        2,
        "0 queues",
    );
    fails(
        &[
            "--socket-path=new.sock",
            "--blk-file=disk.raw",
            raw,
            "--queue-size=100",
        ],
        2,
        "100 entries",
    );
    let serial = "--serial=more than twenty bytes";
    fails(
        &["--socket-path=new.sock", "--blk-file=disk.raw", raw, serial],
        2,
        "at most 20",
    );
    fails(
        &["--vm", "name=a,image=disk.raw,socket=new.sock,color=red"],
        2,
        "'color'",
    );
    fails(&["--vm", "name=a,image=disk.raw"], 2, "'socket='");
    fails(&["--config=disk.raw"], 2, "disk.raw");
    fails(&["serve"], 2, "no disk");
}

#[test]
fn one_bad_vm_keeps_all_from_being_served() {
    let good = "name=a,image=disk.raw,socket=new.sock,format=raw";
    fails(
        &[
            "--vm",
            good,
            "--vm",
            "name=b,image=none.raw,socket=b.sock,format=raw",
        ],
        1,
        "none.raw",
    );
    fails(
        &[
            "--vm",
            good,
            "--vm",
            "name=b,image=disk.raw,socket=live.sock,format=raw",
        ],
        1,
        "live.sock",
    );
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    let dir = tempfile::tempdir().expect("a directory");
    for arguments in [
        &["--print-capabilities"][..],
        &["serve", "--print-capabilities"],
        &["--unknown", "--print-capabilities", "--fd=many", "rest"],
    ] {
        let output = run(arguments, dir.path());
        assert!(output.status.success());
        let printed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(printed["type"], "block");
        assert_eq!(
            printed["features"],
            serde_json::json!(["read-only", "blk-file"])
        );
    }
}

#[test]
fn the_description_for_vmms_is_json() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/50-seethrough.json");
    let text = std::fs::read_to_string(path).expect("it is there");
    let description: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(description["type"], "block");
    assert!(description["binary"].is_string() && description["description"].is_string());
}

/// The daemon with a descriptor that it inherits.
fn command_with(descriptor: &(impl AsFd + AsRawFd), directory: &Path) -> Command {
    let disk = File::create(directory.join("disk.raw")).expect("a disk");
    disk.set_len(1 << 20).expect("a disk");
    fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty())).expect("a descriptor");
    let mut command = Command::new(env!("CARGO_BIN_EXE_seethrough"));
    command
        .arg(format!("--fd={}", descriptor.as_raw_fd()))
        .args(["--blk-file=disk.raw", "--format=raw"])
        .current_dir(directory);
    command
}

#[test]
fn an_inherited_listener_serves_one_front_end_after_the_other() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let daemon = Backend::spawn(&mut command_with(&listener, dir.path()), &[]);
    drop(listener);
    for _ in 0..2 {
        let front_end = Frontend::from_stream(UnixStream::connect(&path).expect("it listens"), 1);
        front_end.set_owner().expect("it serves");
        assert_ne!(front_end.get_features().expect("it serves"), 0);
    }
    daemon.stop();
    assert!(path.exists(), "the socket file is not ours to remove");
}

#[test]
fn an_inherited_connection_is_served_until_its_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let mut daemon = command_with(&theirs, dir.path())
        .spawn()
        .expect("the program starts");
    drop(theirs);
    let front_end = Frontend::from_stream(ours, 1);
    front_end.set_owner().expect("it serves");
    assert_ne!(front_end.get_features().expect("it serves"), 0);
    drop(front_end);
    assert!(daemon.wait().expect("it ends").success());
}
