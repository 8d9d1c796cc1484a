//! The control socket: what an operator asks a running daemon.
//!
//! # Protocol
//!
//! A Unix stream socket. A request is one line, a JSON object with the command's name and its arguments side by side;
//! the answer is one line, too:
//!
//! ```text
//! → {"command": "refusals", "vm": "tom"}
//! ← {"return": …}
//! ← {"error": "there is no VM \"tom\"; the VMs are base, ann"}
//! ```
//!
//! Requests of one client are answered in their order, those of several clients beside each other.
//!
//! # Adding a command
//!
//! A file with a type that is a [`Command`], and its name in [`commands!`] below. The verb that asks for it is a file
//! of the command line's, which calls [`call`].
//!
//! # Invariants
//!
//! 1. A command runs on a thread of the socket's, never on one that serves a VM, and takes no lock that one of those
//!    holds for longer than short work in memory.
//! 2. What a client can take is bounded: [`MAX_CLIENTS`] threads, [`MAX_LINE`] bytes of a request, and what the
//!    commands bound their reports to.
//! 3. Only the user that runs the daemon can connect, from the socket's first moment on.

mod client;
mod daemon;
mod refresh;
mod refusals;
mod server;
mod status;

pub use client::call;
pub use daemon::{Daemon, Served};
pub use refresh::{Refresh, RefreshReport};
pub use refusals::{KindCount, RefusalReport, Refusals, RefusedWrite, TargetFile, VmRefusals};
pub use server::ControlSocket;
pub use status::{Role, Status, StatusReport, VmStatus};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};

/// The most clients at a time; one more is told so and let go.
const MAX_CLIENTS: usize = 16;

/// The most bytes of a request, its end of line aside.
const MAX_LINE: usize = 64 << 10;

/// Where a request has its command's name.
const COMMAND: &str = "command";

/// Something to ask a daemon.
pub trait Command {
    /// Its name in requests.
    const NAME: &'static str;

    /// What it is told; an object.
    type Arguments: Serialize + DeserializeOwned;

    /// What it answers.
    type Report: Serialize + DeserializeOwned;

    /// Carries it out, on a thread of its client's.
    ///
    /// # Errors
    /// What the client is to read.
    fn run(daemon: &Daemon, arguments: Self::Arguments) -> Result<Self::Report>;
}

macro_rules! commands {
    ($($command:ty,)*) => {
        /// The names of all commands.
        const NAMES: &[&str] = &[$(<$command>::NAME),*];

        /// Carries a request out.
        fn dispatch(daemon: &Daemon, name: &str, arguments: Map<String, Value>) -> Result<Value> {
            match name {
                $(<$command>::NAME => carry_out::<$command>(daemon, arguments),)*
                _ => Err(invalid(format!(
                    "there is no command \"{}\"; the commands are {}",
                    name.escape_debug(),
                    NAMES.join(", ")
                ))),
            }
        }
    };
}

commands! {
    refresh::Refresh,
    status::Status,
    refusals::Refusals,
}

fn carry_out<C: Command>(daemon: &Daemon, arguments: Map<String, Value>) -> Result<Value> {
    let arguments = serde_json::from_value(Value::Object(arguments))
        .map_err(|error| invalid(format!("\"{}\": {error}", C::NAME)))?;
    let report = C::run(daemon, arguments)?;
    serde_json::to_value(report).map_err(|error| {
        Error::with_source(ErrorKind::Io, "the report does not become JSON", error)
    })
}

/// The request for `C`, on one line.
fn request_line<C: Command>(arguments: &C::Arguments) -> Result<String> {
    let unfit = |what: String| invalid(format!("the arguments of \"{}\": {what}", C::NAME));
    let mut request = match serde_json::to_value(arguments) {
        Ok(Value::Object(request)) => request,
        Ok(other) => return Err(unfit(format!("{other} is no object"))),
        Err(error) => return Err(unfit(error.to_string())),
    };
    request.insert(COMMAND.to_owned(), C::NAME.into());
    Ok(format!("{}\n", Value::Object(request)))
}

/// The answer to a request's line: what to send back, without the end of line.
fn answer(daemon: &Daemon, line: &[u8]) -> Value {
    let result = parse(line).and_then(|(name, arguments)| dispatch(daemon, &name, arguments));
    match result {
        Ok(report) => serde_json::json!({ "return": report }),
        Err(error) => failure(&error.to_string()),
    }
}

fn failure(why: &str) -> Value {
    serde_json::json!({ "error": why })
}

fn parse(line: &[u8]) -> Result<(String, Map<String, Value>)> {
    let mut request: Map<String, Value> = serde_json::from_slice(line)
        .map_err(|error| invalid(format!("a request is a JSON object on one line: {error}")))?;
    match request.remove(COMMAND) {
        Some(Value::String(name)) => Ok((name, request)),
        _ => Err(invalid(format!(
            "a request has a \"{COMMAND}\", one of {}",
            NAMES.join(", ")
        ))),
    }
}

fn invalid(why: String) -> Error {
    Error::new(ErrorKind::InvalidConfig, why)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::image::{Access, RawImage};
    use crate::storage::MemoryStorage;
    use crate::vhost_user::{Audience, Listener, Vm};

    struct Bed {
        dir: tempfile::TempDir,
        control: Option<ControlSocket>,
    }

    impl Bed {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let storage = Arc::new(MemoryStorage::new(vec![0; 1 << 20]));
            let image = Arc::new(RawImage::new(storage, Access::ReadWrite));
            let vm = Vm::new("tom", image, "tom", 1, 16).unwrap();
            let served = Served {
                vm: Arc::new(vm),
                view: None,
                images: vec!["tom.qcow2".to_owned()],
            };
            let path = dir.path().join("control");
            let listener = Listener::bind(&path, Audience::Owner).unwrap();
            let daemon = Arc::new(Daemon::new(vec![served]));
            let control = ControlSocket::serve(listener, daemon).unwrap();
            Self {
                dir,
                control: Some(control),
            }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("control")
        }

        fn connect(&self) -> Talk {
            Talk(BufReader::new(UnixStream::connect(self.path()).unwrap()))
        }
    }

    struct Talk(BufReader<UnixStream>);

    impl Talk {
        fn ask(&mut self, line: &str) -> Value {
            self.0.get_mut().write_all(line.as_bytes()).unwrap();
            self.0.get_mut().write_all(b"\n").unwrap();
            self.hear()
        }

        fn hear(&mut self) -> Value {
            let mut line = String::new();
            self.0.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        }

        fn is_let_go(&mut self) -> bool {
            // What was sent and not read makes it a reset.
            self.0.read_line(&mut String::new()).is_ok_and(|n| n == 0) || self.0.buffer().is_empty()
        }
    }

    fn error_of(answer: &Value) -> &str {
        answer["error"].as_str().unwrap()
    }

    #[test]
    fn the_client_half_asks_what_the_daemon_answers() {
        let bed = Bed::new();
        let report = call::<Status>(&bed.path(), &Status::default()).unwrap();
        let [tom] = &report.vms[..] else {
            panic!("{report:?}")
        };
        assert_eq!((tom.name.as_str(), tom.role), ("tom", Role::Alone));
        assert!(!tom.connected);
        assert_eq!(tom.images, ["tom.qcow2"]);
        assert_eq!(tom.virtual_size, 1 << 20);
    }

    #[test]
    fn only_the_owner_may_connect() {
        let bed = Bed::new();
        let mode = std::fs::metadata(bed.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn wrong_requests_are_told_apart_and_the_client_may_go_on() {
        let bed = Bed::new();
        let mut talk = bed.connect();
        for (request, what) in [
            ("", "JSON object"),
            ("status", "JSON object"),
            ("[]", "JSON object"),
            ("{}", "\"command\""),
            (r#"{"command": 1}"#, "\"command\""),
            (
                r#"{"command": "none\n"}"#,
                "there is no command \"none\\n\"",
            ),
            (r#"{"command": "status", "more": 1}"#, "unknown field"),
        ] {
            let answer = talk.ask(request);
            assert!(error_of(&answer).contains(what), "{request}: {answer}");
        }
        assert_eq!(
            talk.ask(r#"{"command": "status"}"#)["return"]["vms"][0]["name"],
            "tom"
        );
    }

    #[test]
    fn a_request_without_an_end_is_cut_off() {
        let bed = Bed::new();
        let mut talk = bed.connect();
        talk.0
            .get_mut()
            .write_all(&vec![b' '; MAX_LINE + 1])
            .unwrap();
        assert!(error_of(&talk.hear()).contains("more than"));
        assert!(talk.is_let_go());
        let mut longest = r#"{"command": "status"}"#.to_owned();
        longest.push_str(&" ".repeat(MAX_LINE - longest.len()));
        assert!(bed.connect().ask(&longest)["return"].is_object());
    }

    #[test]
    fn many_clients_are_served_at_once_and_one_too_many_is_told_so() {
        let bed = Bed::new();
        let mut talks: Vec<Talk> = (0..MAX_CLIENTS).map(|_| bed.connect()).collect();
        for talk in &mut talks {
            assert!(talk.ask(r#"{"command": "status"}"#)["return"].is_object());
        }
        assert!(error_of(&bed.connect().hear()).contains("connected already"));
        drop(talks);
        // The threads of those that have left end in their own time.
        while call::<Status>(&bed.path(), &Status::default()).is_err() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_socket_goes_with_the_daemon_and_lets_its_clients_go() {
        let mut bed = Bed::new();
        let mut idle = bed.connect();
        assert!(idle.ask(r#"{"command": "status"}"#)["return"].is_object());
        bed.control = None;
        assert!(idle.is_let_go());
        assert!(!bed.path().exists());
        let error = call::<Status>(&bed.path(), &Status::default()).unwrap_err();
        assert!(
            error.to_string().contains("no daemon can be reached"),
            "{error}"
        );
    }
}
