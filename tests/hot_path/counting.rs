//! Counts what a vring's worker asks of the kernel and of the allocator, and the pages that it copies.
//!
//! Every call that a Rust program makes of the kernel goes through the C library's functions. This test binary defines
//! those that I/O could use itself, counts them and passes them on to the kernel: nothing in the product counts, and
//! nothing that the product does goes uncounted, whichever crate does it. Only one worker is watched, which is known by
//! its thread's name.

// Standing in for functions of the C library takes raw pointers, and assembly that cannot call them in its turn.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::arch::asm;
use std::cell::Cell;
use std::ffi::{c_int, c_long, c_void};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The watched thread's name: the worker of vring 0 of the VM `hot`.
pub(crate) const VM: &str = "hot";
const THREAD: &[u8] = b"hot-q0\0";
/// `IORING_REGISTER_EVENTFD`.
const REGISTER_EVENTFD: usize = 4;
/// The smallest copy that counts.
const PAGE: usize = 4096;

/// What has been counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Calls of `io_uring_enter` that hand operations to the kernel, but for notifications.
    pub(crate) submissions: usize,
    /// The operations that they hand over.
    pub(crate) submitted: usize,
    /// Calls of `preadv2`: reads that end in the call.
    pub(crate) prompt_reads: usize,
    /// Calls of `io_uring_enter` that only let the kernel finish what it has.
    pub(crate) reaping: usize,
    /// Calls of `io_uring_enter` on the ring whose completions are signalled on an eventfd: notifications of the driver.
    pub(crate) notifications: usize,
    /// Calls of `epoll_wait`.
    pub(crate) sleeps: usize,
    /// All other system calls.
    pub(crate) others: usize,
    /// Allocations.
    pub(crate) allocations: usize,
    /// Copies of a page or more.
    pub(crate) copies: usize,
}

static SUBMISSIONS: AtomicUsize = AtomicUsize::new(0);
static SUBMITTED: AtomicUsize = AtomicUsize::new(0);
static PROMPT_READS: AtomicUsize = AtomicUsize::new(0);
static REAPING: AtomicUsize = AtomicUsize::new(0);
/// The ring by which the driver is notified.
static NOTIFIER: AtomicI64 = AtomicI64::new(-1);
static NOTIFICATIONS: AtomicUsize = AtomicUsize::new(0);
static SLEEPS: AtomicUsize = AtomicUsize::new(0);
static OTHERS: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static COPIES: AtomicUsize = AtomicUsize::new(0);
/// Whether the worker sleeps, or is about to and will see a kick.
static ASLEEP: AtomicBool = AtomicBool::new(false);

thread_local! {
    static IS_WATCHED: Cell<bool> = const { Cell::new(false) };
    static OWN_ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// What has been counted so far.
pub(crate) fn counts() -> Counts {
    let get = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
    Counts {
        submissions: get(&SUBMISSIONS),
        submitted: get(&SUBMITTED),
        prompt_reads: get(&PROMPT_READS),
        reaping: get(&REAPING),
        notifications: get(&NOTIFICATIONS),
        sleeps: get(&SLEEPS),
        others: get(&OTHERS),
        allocations: get(&ALLOCATIONS),
        copies: get(&COPIES),
    }
}

/// What was counted between two moments.
pub(crate) fn difference(before: Counts, after: Counts) -> Counts {
    Counts {
        submissions: after.submissions - before.submissions,
        submitted: after.submitted - before.submitted,
        prompt_reads: after.prompt_reads - before.prompt_reads,
        reaping: after.reaping - before.reaping,
        notifications: after.notifications - before.notifications,
        sleeps: after.sleeps - before.sleeps,
        others: after.others - before.others,
        allocations: after.allocations - before.allocations,
        copies: after.copies - before.copies,
    }
}

/// Waits until the worker has gone to sleep, having nothing to do.
pub(crate) fn wait_until_asleep() {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ASLEEP.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "the worker does not sleep");
        std::thread::yield_now();
    }
}

/// Allocations of the calling thread.
pub(crate) fn own_allocations() -> usize {
    OWN_ALLOCATIONS.get()
}

/// Counts if the calling thread is the worker.
fn count(counter: &AtomicUsize, by: usize) {
    if is_watched() {
        counter.fetch_add(by, Ordering::SeqCst);
    }
}

fn is_watched() -> bool {
    if IS_WATCHED.get() {
        return true;
    }
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    unsafe {
        kernel(
            libc::SYS_prctl,
            [
                libc::PR_GET_NAME.into(),
                name.as_mut_ptr() as c_long,
                0,
                0,
                0,
                0,
            ],
        )
    };
    let is_watched = name.starts_with(THREAD);
    IS_WATCHED.set(is_watched);
    is_watched
}

/// The system call itself; a negative error number for a failure.
///
/// # Safety
/// As for the system call.
unsafe fn kernel(number: c_long, arguments: [c_long; 6]) -> c_long {
    let answer;
    // SAFETY: the kernel's calling convention on x86-64; the caller vouches for the arguments.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => answer,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    answer
}

/// Answers as the C library does: -1, and the error's number in `errno`.
fn answered(answer: c_long) -> c_long {
    if answer >= 0 {
        return answer;
    }
    // SAFETY: the C library gives every thread its errno.
    unsafe { *libc::__errno_location() = c_int::try_from(-answer).unwrap_or(libc::EIO) };
    -1
}

/// Defines functions of the C library that count and go to the kernel.
macro_rules! counted {
    ($($name:ident = $number:ident counts $counter:ident: ($($argument:ident: $type:ty),*) -> $answer:ty;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> $answer {
            count(&$counter, 1);
            let mut arguments = [0; 6];
            for (place, argument) in arguments.iter_mut().zip([$($argument as c_long),*]) {
                *place = argument;
            }
            // SAFETY: the caller keeps the contract of the function that this stands in for.
            answered(unsafe { kernel(libc::$number, arguments) }) as $answer
        }
    )*};
}

counted! {
    write = SYS_write counts OTHERS: (fd: c_int, from: *const c_void, len: usize) -> isize;
    read = SYS_read counts OTHERS: (fd: c_int, into: *mut c_void, len: usize) -> isize;
    readv = SYS_readv counts OTHERS: (fd: c_int, list: *const c_void, count: c_int) -> isize;
    writev = SYS_writev counts OTHERS: (fd: c_int, list: *const c_void, count: c_int) -> isize;
    pread64 = SYS_pread64 counts OTHERS: (fd: c_int, into: *mut c_void, len: usize, at: i64) -> isize;
    pwrite64 = SYS_pwrite64 counts OTHERS: (fd: c_int, from: *const c_void, len: usize, at: i64) -> isize;
    fdatasync = SYS_fdatasync counts OTHERS: (fd: c_int) -> c_int;
    fsync = SYS_fsync counts OTHERS: (fd: c_int) -> c_int;
    poll = SYS_poll counts OTHERS: (list: *mut c_void, count: u64, timeout: c_int) -> c_int;
    sched_yield = SYS_sched_yield counts OTHERS: () -> c_int;
    madvise = SYS_madvise counts OTHERS: (start: *mut c_void, len: usize, advice: c_int) -> c_int;
}

#[unsafe(no_mangle)]
extern "C" fn epoll_wait(fd: c_int, events: *mut c_void, count_of: c_int, timeout: c_int) -> c_int {
    count(&SLEEPS, 1);
    let is_watched = is_watched();
    if is_watched {
        ASLEEP.store(true, Ordering::SeqCst);
    }
    let arguments = [
        fd.into(),
        events as c_long,
        count_of.into(),
        timeout.into(),
        0,
        0,
    ];
    // SAFETY: the caller keeps the contract of epoll_wait(2).
    let answer = unsafe { kernel(libc::SYS_epoll_wait, arguments) };
    if is_watched {
        ASLEEP.store(false, Ordering::SeqCst);
    }
    answered(answer) as c_int
}

#[unsafe(no_mangle)]
extern "C" fn preadv2(
    fd: c_int,
    list: *const c_void,
    count_of: c_int,
    at: i64,
    flags: c_int,
) -> isize {
    count(&PROMPT_READS, 1);
    // The kernel takes the offset in two halves, of which the first is the whole where registers are wide enough.
    let arguments = [
        fd.into(),
        list as c_long,
        count_of.into(),
        at,
        0,
        flags.into(),
    ];
    // SAFETY: the caller keeps the contract of preadv2(2).
    answered(unsafe { kernel(libc::SYS_preadv2, arguments) }) as isize
}

/// Takes as many arguments as any system call has; those that the caller did not give are of no interest to the kernel.
#[unsafe(no_mangle)]
extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    match (number, usize::try_from(b)) {
        (libc::SYS_io_uring_register, Ok(REGISTER_EVENTFD)) => {
            NOTIFIER.store(a, Ordering::SeqCst);
            count(&OTHERS, 1);
        }
        (libc::SYS_io_uring_enter, Ok(1)) if a == NOTIFIER.load(Ordering::SeqCst) => {
            count(&NOTIFICATIONS, 1);
        }
        (libc::SYS_io_uring_enter, Ok(0)) => count(&REAPING, 1),
        (libc::SYS_io_uring_enter, Ok(operations)) => {
            count(&SUBMISSIONS, 1);
            count(&SUBMITTED, operations);
        }
        _ => count(&OTHERS, 1),
    }
    // SAFETY: the caller keeps the contract of the system call.
    answered(unsafe { kernel(number, [a, b, c, d, e, f]) })
}

#[unsafe(no_mangle)]
extern "C" fn memcpy(to: *mut c_void, from: *const c_void, len: usize) -> *mut c_void {
    if len >= PAGE {
        count(&COPIES, 1);
    }
    // SAFETY: the caller keeps the contract of memcpy(3): both ranges are there and do not overlap.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _);
    };
    to
}

/// The system's allocator, which counts.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        OWN_ALLOCATIONS.set(OWN_ALLOCATIONS.get() + 1);
        count(&ALLOCATIONS, 1);
        // SAFETY: the caller keeps the contract of this same method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(start, layout) }
    }
}
