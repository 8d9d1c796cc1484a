//! Images in use are refused by stock QEMU's programs, and images that those use are refused here.

// A failed expectation ends a test: here that is the point.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use seethrough::error::{self, ErrorKind};
use seethrough::storage::{Access, CacheMode, FileStorage, LockRole};

/// A directory with one qcow2 image.
struct Scratch {
    _dir: tempfile::TempDir,
    image: PathBuf,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.qcow2");
        let path = image.to_str().unwrap();
        succeed(&["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"]);
        Self { _dir: dir, image }
    }

    fn path(&self) -> &str {
        self.image.to_str().unwrap()
    }

    fn lock(&self, role: LockRole) -> error::Result<FileStorage> {
        let storage = FileStorage::open(&self.image, Access::ReadWrite, CacheMode::Writeback)?;
        storage.lock(role)?;
        Ok(storage)
    }

    fn refusal(&self, role: LockRole) -> String {
        let Err(error) = self.lock(role) else {
            panic!("{role:?} is granted beside another program");
        };
        assert_eq!(error.kind(), ErrorKind::InUse);
        error.to_string()
    }
}

fn succeed(command: &[&str]) -> String {
    let (is_success, output) = run(command);
    assert!(is_success, "{command:?}: {output}");
    output
}

fn refused(command: &[&str]) -> String {
    let (is_success, output) = run(command);
    assert!(!is_success, "{command:?} was let in: {output}");
    output
}

/// Whether a program ended well, and all that it said.
fn run(command: &[&str]) -> (bool, String) {
    let output = Command::new(command[0])
        .args(&command[1..])
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// A program of QEMU that has the image open until its input ends.
struct Holder {
    process: Child,
    input: Option<ChildStdin>,
}

impl Holder {
    /// QEMU's storage daemon, once it greets: by then its images are open.
    fn storage_daemon(image: &Path) -> Self {
        let file = format!("driver=file,node-name=file,filename={}", image.display());
        let node = "driver=qcow2,node-name=disk,file=file";
        let mut process = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file, "--blockdev", node])
            .args(["--chardev", "stdio,id=control", "--monitor", "control"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut greeting = String::new();
        let output = process.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut greeting).unwrap();
        assert!(greeting.contains("QMP"), "{greeting}");
        Self {
            input: process.stdin.take(),
            process,
        }
    }

    /// An interactive qemu-io, once it has answered a command.
    fn qemu_io(image: &Path, options: &[&str]) -> Self {
        let mut process = Command::new("qemu-io")
            .args(options)
            .args(["-f", "qcow2"])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = process.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, b"read 0 512\n").unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let answer = output.lines().map_while(Result::ok);
        assert!(answer.into_iter().any(|line| line.contains("read 512/512")));
        Self {
            process,
            input: Some(input),
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn qemu_refuses_an_image_that_is_written_here() {
    let scratch = Scratch::new();
    let held = scratch.lock(LockRole::Writer).unwrap();
    let said = refused(&["qemu-img", "info", scratch.path()]);
    assert!(
        said.contains("Failed to get shared \"write\" lock"),
        "{said}"
    );
    assert!(
        said.contains("Is another process using the image"),
        "{said}"
    );
    refused(&["qemu-io", "-r", "-c", "read 0 512", scratch.path()]);
    refused(&["qemu-io", "-c", "write 0 512", scratch.path()]);
    succeed(&["qemu-img", "info", "-U", scratch.path()]);
    drop(held);
    succeed(&["qemu-io", "-c", "write 0 512", scratch.path()]);
}

#[test]
fn qemu_reads_but_does_not_write_an_image_that_is_read_here() {
    let scratch = Scratch::new();
    let _held = scratch.lock(LockRole::Reader).unwrap();
    succeed(&["qemu-img", "info", scratch.path()]);
    succeed(&["qemu-img", "check", scratch.path()]);
    let said = refused(&["qemu-io", "-c", "write 0 512", scratch.path()]);
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
}

#[test]
fn an_image_that_qemu_writes_is_refused_here() {
    let scratch = Scratch::new();
    let refuses_both = |holder: Holder| {
        for role in [LockRole::Reader, LockRole::Writer] {
            let refusal = scratch.refusal(role);
            assert!(refusal.starts_with(scratch.path()), "{refusal}");
            assert!(
                refusal.contains("is another process, such as a VM or qemu-img, using it?"),
                "{refusal}"
            );
        }
        drop(holder);
        scratch.lock(LockRole::Writer).unwrap();
    };
    refuses_both(Holder::storage_daemon(&scratch.image));
    refuses_both(Holder::qemu_io(&scratch.image, &[]));
}

#[test]
fn an_image_that_qemu_reads_can_be_read_but_not_written_here() {
    let scratch = Scratch::new();
    let holder = Holder::qemu_io(&scratch.image, &["-r"]);
    scratch.lock(LockRole::Reader).unwrap();
    let refusal = scratch.refusal(LockRole::Writer);
    assert!(refusal.contains("\"write\" lock"), "{refusal}");
    // The refusal left no lock behind: QEMU's own programs still come in.
    succeed(&["qemu-img", "info", scratch.path()]);
    drop(holder);
    scratch.lock(LockRole::Writer).unwrap();
}
