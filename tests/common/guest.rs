//! A guest: stock QEMU, Debian's kernel, and the agent of `vm-images/init` at the other end of QEMU's
//! standard input and output, through a virtio-serial port.

use std::fmt;
use std::fs;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::requirements::{find_tool, vm_images};

/// How long a command may take before the test fails. Emulated CPUs on a busy machine are slow.
const COMMAND_DEADLINE: Duration = Duration::from_secs(240);

/// A disk of a guest. They appear in this order as `/dev/vda`, `/dev/vdb`, …
#[derive(Debug, Clone)]
pub enum Disk {
    /// A vhost-user-blk device, served on this socket.
    VhostUser(PathBuf),
    /// The data tree like `/usr/share`, read-only; to be mounted by the guest.
    Share,
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// Names the console log, and the guest in messages.
    pub name: String,
    /// Where the console log goes.
    pub dir: PathBuf,
    pub disks: Vec<Disk>,
    pub cpus: u8,
    pub memory_mib: u32,
}

impl GuestConfig {
    /// A guest of one CPU with these disks.
    pub fn new(name: &str, dir: &Path, disks: Vec<Disk>) -> GuestConfig {
        GuestConfig {
            name: name.to_owned(),
            dir: dir.to_owned(),
            disks,
            cpus: 1,
            memory_mib: 256,
        }
    }
}

/// What a command in a guest came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The shell's exit status.
    pub status: u8,
    /// Output and errors as they came.
    pub bytes: Vec<u8>,
}

impl Output {
    /// The output as text, without the newline at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes)
            .trim_end_matches('\n')
            .to_owned()
    }
}

/// A running virtual machine. Killed when dropped.
pub struct Guest {
    name: String,
    qemu: Child,
    to_agent: ChildStdin,
    from_agent: Receiver<Vec<u8>>,
    /// Received, and not yet claimed by a command.
    received: Vec<u8>,
    /// The marker that ends the running command's output.
    running: Option<String>,
    last_script: String,
    console: PathBuf,
}

impl Guest {
    /// Boots a guest and waits for its shell.
    ///
    /// # Panics
    ///
    /// When QEMU ends or the deadline passes before that.
    pub fn boot(config: &GuestConfig) -> Guest {
        let mut guest = Guest::start_boot(config);
        guest.ok("true");
        guest
    }

    /// Starts a guest without waiting for its shell; its first command does.
    pub fn start_boot(config: &GuestConfig) -> Guest {
        let console = config.dir.join(format!("{}.console", config.name));
        let errors = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&console)
            .expect("the console log can be written");
        let mut qemu = qemu_command(config, &console)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("QEMU starts");
        let to_agent = qemu.stdin.take().expect("standard input is a pipe");
        let mut output = qemu.stdout.take().expect("standard output is a pipe");
        let (sender, from_agent) = mpsc::channel();
        thread::spawn(move || forward(&mut output, &sender));
        Guest {
            name: config.name.clone(),
            qemu,
            to_agent,
            from_agent,
            received: Vec::new(),
            running: None,
            last_script: String::new(),
            console,
        }
    }

    /// Runs a shell script as root and returns what it came to.
    pub fn run(&mut self, script: &str) -> Output {
        self.start(script);
        self.wait()
    }

    /// Runs a script that must succeed; its output as text.
    pub fn ok(&mut self, script: &str) -> String {
        let output = self.run(script);
        if output.status != 0 {
            self.fail(&format!(
                "exit status {}, output:\n{}",
                output.status,
                output.text()
            ));
        }
        output.text()
    }

    /// Runs a script that must fail, with an output that contains `message`.
    pub fn fails(&mut self, script: &str, message: &str) -> String {
        let output = self.run(script);
        if output.status == 0 || !output.text().contains(message) {
            self.fail(&format!(
                "expected a failure with {message:?}; exit status {}, output:\n{}",
                output.status,
                output.text()
            ));
        }
        output.text()
    }

    /// Runs a script that prints one number.
    pub fn number(&mut self, script: &str) -> u64 {
        let text = self.ok(script);
        match text.trim().parse() {
            Ok(number) => number,
            Err(_) => self.fail(&format!("expected a number, got {text:?}")),
        }
    }

    /// Starts a script; [`Guest::wait_for`] and [`Guest::wait`] hear of it.
    pub fn start(&mut self, script: &str) {
        assert!(
            self.running.is_none(),
            "{}: a script is still running",
            self.name
        );
        let marker = next_marker();
        self.last_script = script.to_owned();
        let request = format!("{marker} {}\n{script}", script.len());
        if let Err(error) = self.to_agent.write_all(request.as_bytes()) {
            self.fail(&format!("the guest is gone: {error}"));
        }
        self.running = Some(marker);
    }

    /// Waits until the running script has printed `text`, anywhere in its output so far.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + COMMAND_DEADLINE;
        let mut searched = 0;
        while find(&self.received[searched..], text.as_bytes()).is_none() {
            searched = self.received.len().saturating_sub(text.len());
            self.receive(deadline);
            let marker = self.running.clone().expect("a script is running");
            if find(&self.received, text.as_bytes()).is_none()
                && find(&self.received, format!("\n{marker} ").as_bytes()).is_some()
            {
                self.fail(&format!("the script ended without printing {text:?}"));
            }
        }
    }

    /// Waits for the end of the running script.
    pub fn wait(&mut self) -> Output {
        let marker = self.running.clone().expect("a script is running");
        let end = format!("\n{marker} ");
        let deadline = Instant::now() + COMMAND_DEADLINE;
        let mut searched = 0;
        loop {
            if let Some(at) = find(&self.received[searched..], end.as_bytes()) {
                let at = searched + at;
                let status_at = at + end.len();
                if let Some(length) = find(&self.received[status_at..], b"\n") {
                    let status =
                        String::from_utf8_lossy(&self.received[status_at..status_at + length])
                            .into_owned();
                    let bytes = self.received[..at].to_vec();
                    self.received.drain(..=status_at + length);
                    self.running = None;
                    let status = status.parse().expect("the agent sends a status");
                    return Output { status, bytes };
                }
            } else {
                searched = self.received.len().saturating_sub(end.len());
            }
            self.receive(deadline);
        }
    }

    /// Takes in the rest of what a guest without a disk or without power has printed: kills it, and returns the
    /// output of the script that was running.
    pub fn kill_and_read(mut self) -> String {
        self.qemu.kill().expect("QEMU can be killed");
        self.qemu.wait().expect("QEMU can be waited for");
        let deadline = Instant::now() + COMMAND_DEADLINE;
        while self.try_receive(deadline) {}
        String::from_utf8_lossy(&self.received).into_owned()
    }

    /// Unmounts what is mounted from disks, powers off and waits for QEMU's end.
    pub fn shutdown(mut self) {
        self.ok("cd /; for at in $(grep ^/dev/vd /proc/mounts | cut -d ' ' -f 2 | sort -r); do umount $at || exit 1; done");
        self.start("poweroff -f");
        let deadline = Instant::now() + COMMAND_DEADLINE;
        while self.try_receive(deadline) {}
        let status = self.qemu.wait().expect("QEMU can be waited for");
        if !status.success() {
            self.fail(&format!("QEMU ended with {status}"));
        }
    }

    /// Cuts the power: SIGKILL for QEMU.
    pub fn kill(mut self) {
        self.qemu.kill().expect("QEMU can be killed");
        self.qemu.wait().expect("QEMU can be waited for");
    }

    /// What the guest's kernel and QEMU have printed so far.
    pub fn console(&self) -> String {
        fs::read(&self.console).map_or_else(
            |e| e.to_string(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// Takes in what the agent sends next.
    fn receive(&mut self, deadline: Instant) {
        if !self.try_receive(deadline) {
            self.fail("QEMU ended, or its guest died");
        }
    }

    /// Takes in what the agent sends next; false when QEMU has ended.
    fn try_receive(&mut self, deadline: Instant) -> bool {
        match self
            .from_agent
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            Ok(bytes) => {
                self.received.extend_from_slice(&bytes);
                true
            }
            Err(RecvTimeoutError::Disconnected) => false,
            Err(RecvTimeoutError::Timeout) => {
                let so_far = String::from_utf8_lossy(&self.received).into_owned();
                self.fail(&format!(
                    "no end within {COMMAND_DEADLINE:?}; output so far:\n{so_far}"
                ))
            }
        }
    }

    fn fail(&self, message: &str) -> ! {
        panic!(
            "guest {}: {message}\n--- script\n{}\n--- console\n{}",
            self.name,
            self.last_script,
            last_lines(&self.console(), 60)
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// KVM only where it is asked for: `SEETHROUGH_ACCEL=kvm`.
fn qemu_command(config: &GuestConfig, console: &Path) -> Command {
    let accelerator = std::env::var("SEETHROUGH_ACCEL").unwrap_or_else(|_| "tcg".into());
    let images = vm_images();
    let mut qemu = Command::new(find_tool("qemu-system-x86_64").expect("QEMU is installed"));
    qemu.args([
        "-accel",
        &accelerator,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ])
    .args(["-display", "none", "-smp", &config.cpus.to_string()])
    // vhost-user back-ends map the guest's memory: it must be shared.
    .args([
        "-m",
        &format!("{}M", config.memory_mib),
        "-machine",
        "q35,memory-backend=mem",
    ])
    .args([
        "-object",
        &format!(
            "memory-backend-memfd,id=mem,size={}M,share=on",
            config.memory_mib
        ),
    ])
    .arg("-kernel")
    .arg(&images.kernel)
    .arg("-initrd")
    .arg(&images.initramfs)
    .args([
        "-append",
        "console=ttyS0 quiet panic=-1 nokaslr mitigations=off",
    ])
    .args([
        "-chardev",
        &format!("file,id=console,append=on,path={}", console.display()),
    ])
    .args(["-serial", "chardev:console"])
    .args([
        "-device",
        "virtio-serial-pci",
        "-chardev",
        "stdio,id=agent,signal=off",
    ])
    .args(["-device", "virtserialport,chardev=agent,name=agent"]);
    for (index, disk) in config.disks.iter().enumerate() {
        add_disk(&mut qemu, index, disk);
    }
    qemu
}

fn add_disk(qemu: &mut Command, index: usize, disk: &Disk) {
    match disk {
        Disk::VhostUser(socket) => {
            qemu.args([
                "-chardev",
                &format!("socket,id=disk{index},path={}", socket.display()),
            ])
            .args([
                "-device",
                &format!("vhost-user-blk-pci,chardev=disk{index}"),
            ]);
        }
        Disk::Share => {
            let share = vm_images().share.display();
            qemu.args([
                "-drive",
                &format!("if=none,id=disk{index},format=raw,read-only=on,file={share}"),
            ])
            .args(["-device", &format!("virtio-blk-pci,drive=disk{index}")]);
        }
    }
}

/// Passes on what QEMU prints, until it ends.
fn forward(output: &mut impl Read, sender: &Sender<Vec<u8>>) {
    let mut output = BufReader::with_capacity(1 << 16, output);
    let mut chunk = vec![0; 1 << 16];
    while let Ok(length @ 1..) = output.read(&mut chunk) {
        if sender.send(chunk[..length].to_vec()).is_err() {
            return;
        }
    }
}

/// A marker that no command's output holds, unless it was made for that.
fn next_marker() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(
        "end-of-script-{:08x}-{number}",
        std::process::id().wrapping_mul(2_654_435_761)
    )
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

/// The end of a log, for a message.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
