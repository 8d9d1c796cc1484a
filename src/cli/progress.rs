//! A progress bar on standard error for a long job, where `-p` asks for one.

use std::sync::mpsc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::progress::Progress;

/// How often the bar is drawn anew.
const REDRAW: Duration = Duration::from_millis(100);
const TEMPLATE: &str = "{bar:40} {percent:>3}% {eta:>4} left";

/// The option that every long job has.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ShowProgress {
    /// Show a progress bar
    #[arg(short = 'p', long = "progress")]
    wanted: bool,
}

impl ShowProgress {
    /// Runs `job`, and draws how far it has come where that was asked for and standard error is a terminal.
    pub fn during<T>(self, job: impl FnOnce(&Progress) -> T) -> T {
        let progress = Progress::default();
        if !self.wanted {
            return job(&progress);
        }
        std::thread::scope(|scope| {
            let (finished, is_finished) = mpsc::channel::<()>();
            let watched = &progress;
            scope.spawn(move || draw(watched, &is_finished));
            let outcome = job(watched);
            drop(finished);
            outcome
        })
    }
}

/// Draws until the other end of the channel is dropped.
fn draw(progress: &Progress, is_finished: &mpsc::Receiver<()>) {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
        bar.set_style(style);
    }
    while is_finished.recv_timeout(REDRAW) == Err(mpsc::RecvTimeoutError::Timeout) {
        bar.set_length(progress.total());
        bar.set_position(progress.done());
    }
    bar.finish_and_clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcome_of_the_job_comes_back_drawn_or_not() {
        for wanted in [false, true] {
            let done = ShowProgress { wanted }.during(|progress| {
                progress.expect(3);
                progress.advance(2);
                progress.done()
            });
            assert_eq!(done, 2);
        }
    }
}
