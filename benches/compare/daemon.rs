//! A contender's process: from its start to its end, and what it costs meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;

use crate::Result;

/// How long anything may take that is no measurement.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// What a process has used since it was started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// CPU time of all its threads, those that have ended and the kernel's workers for its rings among them.
    pub(crate) cpu: Duration,
    /// Context switches of the threads that it has now.
    pub(crate) switches: u64,
}

/// A running daemon. Killed when dropped.
pub(crate) struct Daemon {
    process: Child,
    log: PathBuf,
    clock: ClockId,
    /// Watches its standard output, on which it says nothing, for the end.
    epoll: Epoll,
}

impl Daemon {
    /// Starts it on the CPUs of the calling thread; what it says goes to the file `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let file = fs::File::create(log).map_err(|error| format!("{}: {error}", log.display()))?;
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn();
        let process = process.map_err(|error| {
            format!("cannot start {}: {error}", command.get_program().display())
        })?;
        let clock =
            clock_getcpuclockid(pid(&process)?).map_err(|error| format!("its clock: {error}"))?;
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|error| error.to_string())?;
        if let Some(output) = &process.stdout {
            let ended = EpollEvent::new(EpollFlags::empty(), 0);
            epoll
                .add(output, ended)
                .map_err(|error| error.to_string())?;
        }
        Ok(Self {
            process,
            log: log.to_owned(),
            clock,
            epoll,
        })
    }

    /// Waits for its end, but not longer than so many milliseconds.
    pub(crate) fn wait_for_end(&self, at_most_ms: u16) -> Result<()> {
        let mut events = [EpollEvent::empty()];
        match self.epoll.wait(&mut events, EpollTimeout::from(at_most_ms)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(format!("epoll: {error}")),
        }
    }

    /// Fails with its last words if it has ended.
    pub(crate) fn check_alive(&mut self) -> Result<()> {
        match self.process.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("ended ({status}): {}", self.last_words())),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(crate) fn usage(&self) -> Result<Usage> {
        let cpu = self
            .clock
            .now()
            .map_err(|error| format!("its clock: {error}"))?;
        let switches = context_switches(self.process.id());
        Ok(Usage {
            cpu: cpu.into(),
            switches,
        })
    }

    /// Ends it cleanly.
    pub(crate) fn stop(mut self) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        kill(pid(&self.process)?, Signal::SIGTERM).map_err(|error| error.to_string())?;
        loop {
            self.wait_for_end(100)?;
            match self.process.try_wait().map_err(|error| error.to_string())? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    return Err(format!("ended badly ({status}): {}", self.last_words()));
                }
                None if Instant::now() > deadline => return Err("does not end on SIGTERM".into()),
                None => {}
            }
        }
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().last().unwrap_or("without a word").to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn pid(process: &Child) -> Result<Pid> {
    i32::try_from(process.id())
        .map(Pid::from_raw)
        .map_err(|error| error.to_string())
}

fn context_switches(process: u32) -> u64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) else {
        return 0;
    };
    let of_task = |path: PathBuf| -> u64 {
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        let counts = status.lines().filter(|line| line.contains("ctxt_switches"));
        counts
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum()
    };
    tasks.flatten().map(|task| of_task(task.path())).sum()
}
