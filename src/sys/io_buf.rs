//! Scatter-gather memory that I/O reads into or writes from.
//!
//! # Invariants
//!
//! 1. Every segment points into memory that `keep` keeps mapped, readable and writable.
//! 2. The memory is shared: with the guest, with the kernel, with clones of the buffer. It is therefore
//!    only ever touched by copying through raw pointers; no reference into it is made.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::cell::RefCell;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// What keeps the memory of a buffer's segments alive.
type Keep = Arc<dyn Any + Send + Sync>;

/// A list of memory segments, and what keeps them alive: guest pages, or aligned memory of our own.
///
/// Cloning and slicing share the memory. Contents can change at any moment when a guest owns the
/// pages: copy once, and judge the copy.
#[derive(Clone)]
pub struct IoBuf {
    segments: SmallVec<[libc::iovec; 8]>,
    len: usize,
    keep: SmallVec<[Keep; 1]>,
}

// SAFETY: the segments point into memory that `keep` owns, which is itself Send and Sync, and all access
// is by copying through raw pointers (invariants 1 and 2).
unsafe impl Send for IoBuf {}
// SAFETY: as above; no method hands out a reference into the memory.
unsafe impl Sync for IoBuf {}

/// Initialised heap memory with an alignment.
struct Heap {
    start: *mut u8,
    layout: Layout,
}

/// What buffers are aligned to: a page, so that any device takes them.
const PAGE: usize = 4096;
/// The longest memory that is kept to be used again, in bytes.
const KEPT_LEN: usize = 256 << 10;
/// How many bytes of it a thread keeps.
const KEPT_BYTES: usize = 512 << 10;

thread_local! {
    static KEPT: RefCell<Kept> = const { RefCell::new(Kept { memory: Vec::new(), bytes: 0 }) };
}

/// Memory that a thread keeps to use it again: fresh memory costs page faults, and zeroing it as much as filling it.
struct Kept {
    memory: Vec<Heap>,
    bytes: usize,
}

impl Kept {
    fn take(&mut self, layout: Layout) -> Option<Heap> {
        let index = self.memory.iter().rposition(|heap| heap.layout == layout)?;
        self.bytes -= layout.size();
        Some(self.memory.swap_remove(index))
    }

    /// Keeps `heap`, or gives it back.
    fn put(&mut self, heap: Heap) -> Option<Heap> {
        let bytes = self.bytes + heap.layout.size();
        if bytes > KEPT_BYTES {
            return Some(heap);
        }
        self.bytes = bytes;
        self.memory.push(heap);
        None
    }
}

/// Memory that goes back to a thread's own when nobody uses it any more.
struct Reused(Option<Heap>);

impl Drop for Reused {
    fn drop(&mut self) {
        let Some(heap) = self.0.take() else {
            return;
        };
        // What is not kept, also because the thread is ending, is freed here.
        let _ = KEPT.try_with(move |kept| match kept.try_borrow_mut() {
            Ok(mut kept) => kept.put(heap),
            Err(_) => Some(heap),
        });
    }
}

// SAFETY: the allocation belongs to this value alone and is only reached through `IoBuf`.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

impl Heap {
    fn zeroed(layout: Layout) -> Self {
        // SAFETY: nobody asks for no memory at all.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Self { start, layout }
    }
}

fn layout_of(len: usize) -> Layout {
    Layout::from_size_align(len, PAGE).expect("a buffer is far below isize::MAX")
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: allocated in `Heap::zeroed` with this very layout, and freed only here.
        unsafe { dealloc(self.start, self.layout) }
    }
}

impl IoBuf {
    /// Fresh zero bytes, aligned to a page so that any device takes them.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self::concat([]);
        }
        let heap = Heap::zeroed(layout_of(len));
        let start = heap.start;
        Self::of_own_memory(start, len, Arc::new(heap))
    }

    /// Bytes to be filled, aligned as those of [`Self::zeroed`]; until then they may be anything that the process has
    /// moved earlier. To be shown to nobody before all of it has been written.
    #[must_use]
    pub fn to_be_filled(len: usize) -> Self {
        if len > KEPT_LEN || len == 0 {
            return Self::zeroed(len);
        }
        let layout = layout_of(len.next_power_of_two().max(PAGE));
        let kept = KEPT.try_with(|kept| kept.borrow_mut().take(layout));
        let heap = kept.ok().flatten().unwrap_or_else(|| Heap::zeroed(layout));
        let start = heap.start;
        Self::of_own_memory(start, len, Arc::new(Reused(Some(heap))))
    }

    fn of_own_memory(start: *mut u8, len: usize, keep: Keep) -> Self {
        let mut segments = SmallVec::new();
        segments.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: len,
        });
        let mut keeps: SmallVec<[Keep; 1]> = SmallVec::new();
        keeps.push(keep);
        Self {
            segments,
            len,
            keep: keeps,
        }
    }

    /// A copy of `bytes` in aligned memory.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let buf = Self::zeroed(bytes.len());
        buf.copy_from(0, bytes);
        buf
    }

    /// The guest's pages at `ranges` (address and length in bytes), in their order; `None` if any of them lies
    /// outside the guest's memory.
    #[must_use]
    pub fn from_guest(
        memory: &Arc<GuestMemoryMmap>,
        ranges: impl IntoIterator<Item = (GuestAddress, u32)>,
    ) -> Option<Self> {
        let mut segments: SmallVec<[libc::iovec; 8]> = SmallVec::new();
        let mut total = 0usize;
        for (address, len) in ranges {
            let len = usize::try_from(len).ok()?;
            total = total.checked_add(len)?;
            // Mostly one region holds all of it.
            if let Ok(slice) = memory.get_slice(address, len) {
                segments.push(segment_of(&slice));
                continue;
            }
            for slice in memory.get_slices(address, len) {
                segments.push(segment_of(&slice.ok()?));
            }
        }
        let mut keep: SmallVec<[Keep; 1]> = SmallVec::new();
        keep.push(Arc::clone(memory) as Keep);
        Some(Self {
            segments,
            len: total,
            keep,
        })
    }

    /// The parts one after the other.
    #[must_use]
    pub fn concat(parts: impl IntoIterator<Item = Self>) -> Self {
        let mut whole = Self {
            segments: SmallVec::new(),
            len: 0,
            keep: SmallVec::new(),
        };
        for part in parts {
            whole.segments.extend(part.segments);
            whole.len += part.len;
            whole.keep.extend(part.keep);
        }
        whole
    }

    /// The same memory, which keeps `what` alive too, for as long as anyone (the kernel too) holds it or a part of it.
    #[must_use]
    pub fn keeping(mut self, what: Arc<dyn Any + Send + Sync>) -> Self {
        self.keep.push(what);
        self
    }

    /// The same memory, which keeps alive what `other` does.
    #[must_use]
    pub fn keeping_as(mut self, other: &Self) -> Self {
        self.keep.extend(other.keep.iter().cloned());
        self
    }

    /// Bytes in all segments together.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a single byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments, for the kernel; the memory lives as long as this buffer or a clone of it.
    #[must_use]
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.segments
    }

    /// Whether every segment starts and ends on a multiple of `align` bytes, as direct I/O asks for.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        self.segments
            .iter()
            .all(|s| (s.iov_base as usize).is_multiple_of(align) && s.iov_len.is_multiple_of(align))
    }

    /// The bytes of `range`, sharing the memory.
    ///
    /// # Panics
    /// If the range does not lie inside the buffer: the caller has computed it.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let mut segments = SmallVec::new();
        self.for_each_in(range.clone(), |start, len| {
            segments.push(libc::iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
        });
        Self {
            segments,
            len: range.len(),
            keep: self.keep.clone(),
        }
    }

    /// Copies `into.len()` bytes out of the buffer, from `offset` on.
    ///
    /// # Panics
    /// If they do not lie inside the buffer.
    pub fn copy_to(&self, offset: usize, into: &mut [u8]) {
        let mut done = 0;
        self.for_each_in(offset..offset + into.len(), |start, len| {
            // SAFETY: the source is valid (invariant 1); the target is `into`, whose length bounds the
            // sum of all segment lengths visited.
            unsafe { ptr::copy(start, into.as_mut_ptr().add(done), len) };
            done += len;
        });
    }

    /// Copies `bytes` into the buffer at `offset`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) {
        let mut done = 0;
        self.for_each_in(offset..offset + bytes.len(), |start, len| {
            // SAFETY: as in `copy_to`, with the directions exchanged.
            unsafe { ptr::copy(bytes.as_ptr().add(done), start, len) };
            done += len;
        });
    }

    /// Copies all of `source` into the buffer at `offset`, whatever their segments.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn copy_from_buf(&self, offset: usize, source: &Self) {
        let mut done = 0;
        source.for_each_in(0..source.len, |from, from_len| {
            let mut within = 0;
            self.for_each_in(offset + done..offset + done + from_len, |to, to_len| {
                // SAFETY: both sides are valid (invariant 1) and `copy` allows overlap.
                unsafe { ptr::copy(from.add(within), to, to_len) };
                within += to_len;
            });
            done += from_len;
        });
    }

    /// Sets every byte of `range` to zero.
    ///
    /// # Panics
    /// If the range does not lie inside the buffer.
    pub fn zero(&self, range: Range<usize>) {
        self.for_each_in(range, |start, len| {
            // SAFETY: the segment is valid for writes (invariant 1).
            unsafe { ptr::write_bytes(start, 0, len) };
        });
    }

    /// Whether every byte of `range` is zero.
    ///
    /// # Panics
    /// If the range does not lie inside the buffer.
    #[must_use]
    pub fn is_zero(&self, range: Range<usize>) -> bool {
        const PIECE: usize = 512;
        let mut piece = [0; PIECE];
        let mut at = range.start;
        while at < range.end {
            let len = PIECE.min(range.end - at);
            self.copy_to(at, &mut piece[..len]);
            if piece[..len].iter().any(|byte| *byte != 0) {
                return false;
            }
            at += len;
        }
        true
    }

    /// A copy of the whole contents.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// Calls `visit` with every piece of a segment that `range` covers, in order.
    fn for_each_in(&self, range: Range<usize>, mut visit: impl FnMut(*mut u8, usize)) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range outside the buffer"
        );
        let mut skip = range.start;
        let mut left = range.len();
        for segment in &self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let len = left.min(segment.iov_len - skip);
            // SAFETY: `skip` is below the segment's length.
            visit(unsafe { segment.iov_base.cast::<u8>().add(skip) }, len);
            left -= len;
            skip = 0;
        }
    }
}

fn segment_of(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

impl std::fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoBuf")
            .field("len", &self.len)
            .field("segments", &self.segments.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three_segments() -> IoBuf {
        IoBuf::concat([
            IoBuf::from_bytes(b"abc"),
            IoBuf::from_bytes(b""),
            IoBuf::from_bytes(b"defg"),
            IoBuf::from_bytes(b"hi"),
        ])
    }

    #[test]
    fn memory_to_be_filled_is_used_again_up_to_a_bound() {
        let first = IoBuf::to_be_filled(5000);
        assert_eq!(first.len(), 5000);
        assert!(first.slice(0..4096).is_aligned(4096));
        first.copy_from(0, &[7; 5000]);
        let start = first.iovecs()[0].iov_base;
        drop(first);
        let again = IoBuf::to_be_filled(8192);
        assert_eq!(again.iovecs()[0].iov_base, start);
        let all: Vec<_> = (0..100).map(|_| IoBuf::to_be_filled(KEPT_LEN)).collect();
        drop(all);
        KEPT.with_borrow(|kept| {
            assert!(kept.bytes <= KEPT_BYTES);
            let bytes: usize = kept.memory.iter().map(|heap| heap.layout.size()).sum();
            assert_eq!(bytes, kept.bytes);
        });
        assert!(IoBuf::to_be_filled(KEPT_LEN + 1).is_zero(0..KEPT_LEN + 1));
    }

    #[test]
    fn slices_cross_segments_and_share_the_memory() {
        let buf = three_segments();
        let middle = buf.slice(2..8);
        assert_eq!(middle.to_vec(), b"cdefgh");
        middle.copy_from(1, b"XY");
        assert_eq!(buf.to_vec(), b"abcXYfghi");
        assert!(buf.slice(4..4).is_empty());
    }

    #[test]
    fn copies_between_buffers_ignore_where_segments_end() {
        let buf = IoBuf::zeroed(9);
        let source = three_segments();
        buf.copy_from_buf(2, &source.slice(1..8));
        assert_eq!(buf.to_vec(), b"\0\0bcdefgh");
        buf.zero(3..5);
        assert_eq!(buf.to_vec(), b"\0\0b\0\0efgh");
    }

    #[test]
    fn alignment_looks_at_every_segment() {
        assert!(IoBuf::zeroed(8192).is_aligned(4096));
        assert!(!IoBuf::zeroed(8192).slice(512..4096).is_aligned(4096));
        assert!(!three_segments().is_aligned(512));
    }

    #[test]
    fn guest_ranges_outside_memory_are_refused() {
        let memory =
            Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap());
        let good = IoBuf::from_guest(&memory, [(GuestAddress(0x1000), 0x1000)]).unwrap();
        good.copy_from(0xffe, b"ok");
        assert_eq!(good.len(), 0x1000);
        assert!(IoBuf::from_guest(&memory, [(GuestAddress(0x1fff), 2)]).is_none());
        assert!(IoBuf::from_guest(&memory, [(GuestAddress(u64::MAX), 1)]).is_none());
    }
}
