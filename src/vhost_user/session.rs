//! One front-end's session, from its connection until it has left and nothing of it is under way any more.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use log::Level;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use super::front_end::FrontEnd;
use super::server::Vm;
use crate::error::{Context, Result};
use crate::sys::block_on;

/// Serves the front-end at the other end of `stream` until it leaves or the stream is shut down; then everything that
/// its guest was told is written is on the host's disk.
pub(super) fn serve(vm: &Arc<Vm>, stream: UnixStream) {
    vm.note(Level::Info, format_args!("a front-end has connected"));
    let _connection = vm.connection();
    vm.device().reset();
    let begun = block_on(vm.device().image().begin_session());
    if let Err(error) = begun {
        vm.note(
            Level::Error,
            format_args!("the disk cannot be served: {error}"),
        );
        return;
    }
    let front_end = Arc::new(Mutex::new(FrontEnd::new(Arc::clone(vm))));
    let end = handle_messages(stream, Arc::clone(&front_end));
    // Ends all requests; the last reference is here.
    drop(front_end);
    match end {
        ProtocolError::Disconnected | ProtocolError::SocketBroken(_) => {
            vm.note(Level::Info, format_args!("the front-end has left"));
        }
        error => vm.note(
            Level::Error,
            format_args!("the session ends on a message that cannot be carried out: {error}"),
        ),
    }
    log::debug!("{}: {}", vm.name(), vm.counters().totals());
    if let Err(error) = flush(vm) {
        log::error!("{error}");
    }
}

/// Makes everything that was written durable.
///
/// # Errors
/// If the image cannot be flushed.
fn flush(vm: &Vm) -> Result<()> {
    if vm.device().image().is_read_only() {
        return Ok(());
    }
    block_on(vm.device().image().flush()).context(|| format!("{}: flushing the disk", vm.name()))
}

/// Makes everything that was written durable, and the image one that was closed cleanly: no session of any VM is left.
///
/// # Errors
/// If the image cannot be written.
pub(super) fn close(vm: &Vm) -> Result<()> {
    if vm.device().image().is_read_only() {
        return Ok(());
    }
    block_on(vm.device().image().close()).context(|| format!("{}: closing the disk", vm.name()))
}

/// Handles one message after the other; returns why there are no more.
fn handle_messages(stream: UnixStream, front_end: Arc<Mutex<FrontEnd>>) -> ProtocolError {
    let mut messages = BackendReqHandler::from_stream(stream, front_end);
    loop {
        match messages.handle_request() {
            Ok(()) => {}
            Err(ProtocolError::SocketRetry(_)) => {}
            Err(error) => return error,
        }
    }
}
