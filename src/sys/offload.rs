//! Long computations, beside the threads that serve guests.
//!
//! A thread that serves a guest says so once, with [`keep_this_thread_responsive`]. What it hands to [`offload`] from
//! then on runs on one of as many threads as there are processors; on every other thread it runs where it is asked for.

use std::cell::Cell;
use std::num::NonZero;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use async_task::Runnable;

thread_local! {
    static RESPONSIVE: Cell<bool> = const { Cell::new(false) };
}

/// Where jobs go; `None` if there is no thread to take them.
static JOBS: OnceLock<Option<Sender<Runnable>>> = OnceLock::new();

/// Says that others wait for the calling thread: from now on, nothing long runs on it.
pub fn keep_this_thread_responsive() {
    RESPONSIVE.set(true);
}

/// Runs `job`, on another thread if the calling one is to stay responsive. A job whose future is dropped before it has
/// begun does not run.
pub async fn offload<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    let jobs = match RESPONSIVE.get() {
        true => JOBS.get_or_init(start_threads).as_ref(),
        false => None,
    };
    let Some(jobs) = jobs else {
        return job();
    };
    let schedule = |runnable| {
        if let Err(unsent) = jobs.send(runnable) {
            // Nobody takes jobs any more: this thread does.
            unsent.0.run();
        }
    };
    let (runnable, task) = async_task::spawn(async move { job() }, schedule);
    runnable.schedule();
    task.await
}

fn start_threads() -> Option<Sender<Runnable>> {
    let (sender, receiver) = channel();
    let receiver = Arc::new(Mutex::new(receiver));
    let count = thread::available_parallelism().map_or(1, NonZero::get);
    let started = (0..count).filter(|number| {
        let receiver = Arc::clone(&receiver);
        let name = format!("compute-{number}");
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || run_jobs(&receiver));
        thread.is_ok()
    });
    (started.count() > 0).then_some(sender)
}

fn run_jobs(jobs: &Mutex<Receiver<Runnable>>) {
    loop {
        // The one that waits for a job holds the lock; the others wait for it.
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match next {
            Ok(job) => job.run(),
            Err(_) => return,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::block_on;

    fn where_it_runs() -> thread::ThreadId {
        block_on(offload(|| thread::current().id()))
    }

    #[test]
    fn a_job_leaves_the_thread_that_is_to_stay_responsive_and_no_other() {
        assert_eq!(where_it_runs(), thread::current().id());
        let responsive = thread::spawn(|| {
            keep_this_thread_responsive();
            (thread::current().id(), where_it_runs())
        });
        let (own, other) = responsive.join().unwrap();
        assert_ne!(own, other);
    }

    #[test]
    fn jobs_run_beside_each_other_and_give_their_results_to_those_who_asked() {
        let sum = thread::spawn(|| {
            keep_this_thread_responsive();
            let mut sum = 0;
            for number in 0..1000u64 {
                sum += block_on(offload(move || number));
            }
            sum
        });
        assert_eq!(sum.join().unwrap(), 999 * 1000 / 2);
    }
}
