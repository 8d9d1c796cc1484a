//! Guest memory that its front-end takes away.
//!
//! Guest memory is a file that the front-end shares with this process, and that it can cut short at any moment. An
//! access to a page behind the file's new end raises SIGBUS, which would end the process, and with it the disks of
//! every other VM. Sealing would forbid it, but not all memory can be sealed: files in /dev/shm or in a hugetlbfs
//! cannot.
//!
//! So accesses may fail: a handler puts zeros in place of the whole mapping, notes that it is lost, and lets the access
//! go on. What the VM's own requests then read and write is its own affair. I/O that the kernel does for us on such
//! pages fails with `EFAULT` and needs no handler.
//!
//! # Invariants
//!
//! 1. A [`WatchedMemory`] is dropped before its mapping is unmapped: the handler never touches an address that has
//!    become something else.
//! 2. The handler only reads atomics and calls `mmap`. Entries of the list that it walks are never freed, only used
//!    again, so there are as many as there were mappings at one time.

use std::io;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use vm_memory::GuestRegionMmap;

/// A mapping to watch over.
struct Entry {
    next: *const Entry,
    taken: AtomicBool,
    /// The address, or 0 while nothing is watched.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

// SAFETY: `next` is written before the entry is published and never again; all else is atomic.
unsafe impl Sync for Entry {}
// SAFETY: as above.
unsafe impl Send for Entry {}

static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());

/// What SIGBUS meant before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// All entries.
fn entries() -> impl Iterator<Item = &'static Entry> {
    let first = ENTRIES.load(Ordering::Acquire).cast_const();
    // SAFETY: published entries are complete and never freed.
    std::iter::successors(unsafe { first.as_ref() }, |entry| unsafe {
        // SAFETY: as above.
        entry.next.as_ref()
    })
}

/// A guest's memory that may be lost without harm to anybody else, until this is dropped.
#[derive(Debug)]
pub struct WatchedMemory {
    entry: NonNull<Entry>,
}

// SAFETY: the entry is shared by all threads in any case.
unsafe impl Send for WatchedMemory {}
// SAFETY: as above.
unsafe impl Sync for WatchedMemory {}

impl WatchedMemory {
    /// Watches over `region`, which has to outlive this.
    ///
    /// # Errors
    /// If the kernel takes no handler for the signal.
    pub fn new(region: &GuestRegionMmap) -> io::Result<Self> {
        install()?;
        let entry = claim();
        entry.lost.store(false, Ordering::Relaxed);
        entry.len.store(region.size(), Ordering::Relaxed);
        entry.start.store(region.as_ptr().addr(), Ordering::Release);
        Ok(Self {
            entry: NonNull::from(entry),
        })
    }

    fn entry(&self) -> &Entry {
        // SAFETY: entries are never freed.
        unsafe { self.entry.as_ref() }
    }

    /// Whether the front-end has taken the memory away, or part of it, and zeros were put in its place.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.entry().lost.load(Ordering::Acquire)
    }
}

impl Drop for WatchedMemory {
    fn drop(&mut self) {
        self.entry().start.store(0, Ordering::Release);
        self.entry().taken.store(false, Ordering::Release);
    }
}

/// An entry for a new mapping: one that nobody uses any more, or one more.
fn claim() -> &'static Entry {
    let is_free = |entry: &&Entry| !entry.taken.swap(true, Ordering::AcqRel);
    if let Some(entry) = entries().find(is_free) {
        return entry;
    }
    let entry = Box::leak(Box::new(Entry {
        next: ENTRIES.load(Ordering::Acquire),
        taken: AtomicBool::new(true),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }));
    let new = ptr::from_mut(entry);
    let mut next = ENTRIES.load(Ordering::Acquire);
    loop {
        // SAFETY: the entry is not published yet, so nobody else has it.
        unsafe { (*new).next = next };
        match ENTRIES.compare_exchange(next, new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: entries are never freed.
            Ok(_) => return unsafe { &*new },
            Err(other) => next = other,
        }
    }
}

/// Installs the handler, once.
fn install() -> io::Result<()> {
    let mut failure = None;
    BEFORE.get_or_init(|| {
        let mut before = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: plain integers and a pointer, for which zero is a value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: both structures are ours; the handler keeps to what a handler may do (invariant 2).
        if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, before.as_mut_ptr()) } != 0 {
            failure = Some(io::Error::last_os_error());
        }
        // SAFETY: zeroed, and filled by a call that succeeded.
        unsafe { before.assume_init() }
    });
    failure.map_or(Ok(()), Err)
}

/// Puts zeros in the place of the mapping that could not be accessed, if it is one that is watched.
extern "C" fn on_bus_error(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel hands a valid structure over, for a signal that has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    // SAFETY: the location is this thread's.
    let errno = unsafe { *libc::__errno_location() };
    let replaced = entries().any(|entry| {
        let start = entry.start.load(Ordering::Acquire);
        let len = entry.len.load(Ordering::Relaxed);
        let hit = start != 0 && address >= start && address - start < len;
        hit && replace(entry, start, len)
    });
    if !replaced {
        // Somebody else's: the access fails again, as it would have without us.
        let default = MaybeUninit::<libc::sigaction>::zeroed();
        let before = BEFORE.get().map_or(default.as_ptr(), ptr::from_ref);
        // SAFETY: either what was installed before, or the default action, which is all zeros.
        unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

fn replace(entry: &Entry, start: usize, len: usize) -> bool {
    // SAFETY: the range is a mapping of guest memory that is not unmapped while it is watched (invariant 1). Nothing
    // but bytes that a guest can change at any time is in it, so they may change now.
    let mapped = unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    entry.lost.store(true, Ordering::Release);
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{
        Bytes, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
        MmapRegion,
    };

    use super::*;

    fn region(len: usize) -> (File, GuestRegionMmap) {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let mapping = MmapRegion::from_file(offset, len).unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        (file, region)
    }

    #[test]
    fn memory_that_is_cut_short_reads_as_zeros_and_is_told_lost() {
        let (file, region) = region(1 << 20);
        let (_other_file, other) = self::region(1 << 20);
        let watched = WatchedMemory::new(&region).unwrap();
        let untouched = WatchedMemory::new(&other).unwrap();
        region.write_obj(7u64, MemoryRegionAddress(0x8000)).unwrap();
        other.write_obj(8u64, MemoryRegionAddress(0x8000)).unwrap();
        assert!(!watched.is_lost());
        file.set_len(0x1000).unwrap();
        let value: u64 = region.read_obj(MemoryRegionAddress(0x8000)).unwrap();
        assert_eq!(value, 0);
        assert!(watched.is_lost());
        region
            .write_obj(9u64, MemoryRegionAddress(region.len() - 8))
            .unwrap();
        assert!(!untouched.is_lost());
        let value: u64 = other.read_obj(MemoryRegionAddress(0x8000)).unwrap();
        assert_eq!(value, 8);
    }

    #[test]
    fn entries_are_used_again() {
        let (_file, region) = region(4096);
        for _ in 0..1000 {
            let _watched = WatchedMemory::new(&region).unwrap();
        }
        assert!(entries().count() < 100);
    }
}
