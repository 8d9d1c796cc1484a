//! Shows on the terminal what a person would type, for the demo. Tests keep quiet.

use std::sync::atomic::{AtomicBool, Ordering};

static ENABLED: AtomicBool = AtomicBool::new(false);

/// From now on, commands are shown.
pub fn enable() {
    ENABLED.store(true, Ordering::Relaxed);
}

/// Shows a command that is about to run, after the prompt of whoever runs it.
pub fn command(prompt: &str, command: &str) {
    if ENABLED.load(Ordering::Relaxed) {
        println!("{prompt} {command}");
    }
}
