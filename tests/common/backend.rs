//! A vhost-user back-end as a child process: the daemon, or a stock one to compare with.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::guest::last_lines;

const DEADLINE: Duration = Duration::from_secs(60);

/// The lines that a process has logged.
#[derive(Debug, Default)]
struct Log {
    state: Mutex<LogState>,
    changed: Condvar,
}

impl Log {
    /// A test that fails while it waits poisons the lock, and its last words are in here.
    fn lock(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct LogState {
    lines: Vec<String>,
    ended: bool,
}

/// A running back-end. Killed when dropped.
#[derive(Debug)]
pub struct Backend {
    process: Child,
    log: Arc<Log>,
}

impl Backend {
    /// Starts the daemon and waits until it listens on all `sockets`.
    ///
    /// # Panics
    ///
    /// When it ends before that, or the deadline passes; with what it logged.
    pub fn seethrough<I, S>(arguments: I, sockets: &[PathBuf]) -> Backend
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_seethrough"));
        command.args(arguments);
        Backend::spawn(&mut command, sockets)
    }

    /// Starts any back-end and waits until it listens on all `sockets`.
    pub fn spawn(command: &mut Command, sockets: &[PathBuf]) -> Backend {
        // Watched before the start, so that no socket can appear unseen.
        let watches: Vec<Inotify> = sockets.iter().map(|socket| watch_for(socket)).collect();
        let mut process = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the back-end starts");
        let errors = process.stderr.take().expect("standard error is a pipe");
        let log = Arc::new(Log::default());
        let writer = Arc::clone(&log);
        thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                writer.lock().lines.push(line);
                writer.changed.notify_all();
            }
            writer.lock().ended = true;
            writer.changed.notify_all();
        });
        let backend = Backend { process, log };
        backend.wait_until_listening(sockets, watches);
        backend
    }

    fn wait_until_listening(&self, sockets: &[PathBuf], watches: Vec<Inotify>) {
        let (sockets, log) = (sockets.to_vec(), Arc::clone(&self.log));
        let ready = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&ready);
        // Waits for the sockets, while this thread waits for that one or for the process's end.
        thread::spawn(move || {
            for (socket, watch) in sockets.iter().zip(watches) {
                while !listening(socket) {
                    if log.lock().ended {
                        return;
                    }
                    if socket.exists() {
                        // Bound, and a system call away from listening.
                        thread::yield_now();
                    } else {
                        watch.read_events().expect("inotify works");
                    }
                }
            }
            // Under the log's lock, or the other thread could miss the news between its look and its wait.
            let state = log.lock();
            done.store(true, Ordering::Release);
            drop(state);
            log.changed.notify_all();
        });
        self.wait_until("listen on its sockets", |_| ready.load(Ordering::Acquire));
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The log so far, line by line.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().lines.clone()
    }

    /// Waits for a line in the log that `wanted` accepts; returns it.
    pub fn wait_for_log(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        self.wait_until(&format!("log {what}"), |lines| {
            lines.iter().any(|line| wanted(line))
        });
        self.log()
            .into_iter()
            .find(|line| wanted(line))
            .expect("it was seen")
    }

    /// Waits until `condition` holds; the process must be alive until then.
    fn wait_until(&self, what: &str, condition: impl Fn(&[String]) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        let mut state = self.log.lock();
        while !condition(&state.lines) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !state.ended && !left.is_zero(),
                "the back-end {} before it could {what}; its log:\n{}",
                if state.ended {
                    "ended"
                } else {
                    "ran out of time"
                },
                last_lines(&state.lines.join("\n"), 60)
            );
            state = self
                .log
                .changed
                .wait_timeout(state, left)
                .expect("the lock is never poisoned")
                .0;
        }
    }

    /// Ends it with SIGTERM; it must end cleanly.
    pub fn stop(mut self) -> Vec<String> {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(
            status.success(),
            "the back-end ended with {status} on SIGTERM; its log:\n{}",
            last_lines(&self.log().join("\n"), 60)
        );
        self.log()
    }

    /// Ends it with SIGKILL.
    pub fn kill(mut self) -> Vec<String> {
        self.signal(Signal::SIGKILL);
        self.wait();
        self.log()
    }

    fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.process.id()).expect("a process id is positive");
        kill(Pid::from_raw(id), signal).expect("the back-end can be signalled");
    }

    /// Waits for its end, and for the last of its log.
    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        let mut state = self.log.lock();
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "the back-end does not end; its log:\n{}",
                state.lines.join("\n")
            );
            state = self
                .log
                .changed
                .wait_timeout(state, left)
                .expect("the lock is never poisoned")
                .0;
        }
        drop(state);
        self.process.wait().expect("the back-end can be waited for")
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            eprintln!(
                "--- back-end's log\n{}",
                last_lines(&self.log().join("\n"), 60)
            );
        }
    }
}

fn watch_for(socket: &Path) -> Inotify {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).expect("inotify works");
    let dir = socket.parent().expect("a socket lies in a directory");
    inotify
        .add_watch(
            dir,
            AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE_SELF,
        )
        .expect("the socket's directory can be watched");
    inotify
}

/// Whether some process listens on this socket; without connecting, which back-ends would notice.
fn listening(socket: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: &str = "00010000";
    let path = socket.to_str().expect("a socket's path is text");
    fs::read_to_string("/proc/net/unix")
        .expect("/proc is mounted")
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .any(|fields| fields.get(3) == Some(&ACCEPTS_CONNECTIONS) && fields.get(7) == Some(&path))
}
