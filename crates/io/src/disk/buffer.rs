//! Memory for direct I/O: aligned, reused, and alive for as long as the kernel may touch it.
//!
//! O_DIRECT wants buffers at multiples of the device's block size; 4 KiB suits all devices. Allocating
//! a fresh one for each operation would cost a page fault per 4 KiB, so buffers go back to a pool when
//! they are dropped. A read gives its buffer away as [`Bytes`] without copying; the pool gets it back
//! when the last clone of those bytes is dropped, on whatever thread that happens.
//!
//! The pool keeps at most [`KEPT_BYTES_MAX`] bytes; what exceeds it goes back to the allocator. So
//! memory is bounded by what is in flight plus that.

#![allow(unsafe_code)]

use bytes::Bytes;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Alignment of all buffers.
pub const ALIGNMENT: usize = 4096;
/// Smallest buffer is 4 KiB, largest pooled one 4 MiB (a full batch of the journal): 11 powers of two.
const CLASSES: usize = 11;
/// What an idle pool keeps: 16 batches of data in flight at 4 MiB would be 64 MiB, but such bursts are
/// rare; 16 MiB hold 4,096 single blocks.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// Memory at a multiple of [`ALIGNMENT`], initialised, owned.
struct AlignedMemory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned by this value alone, and nothing in it is bound to a thread.
unsafe impl Send for AlignedMemory {}
// SAFETY: shared access is only `&[u8]` through `Buffer`, which hands out no interior mutability.
unsafe impl Sync for AlignedMemory {}

impl AlignedMemory {
    fn new(bytes: usize) -> AlignedMemory {
        assert!(bytes > 0, "a buffer of no bytes");
        let layout = Layout::from_size_align(bytes, ALIGNMENT).expect("a buffer that fits into memory");
        // SAFETY: the layout has a size above zero (asserted). Zeroed, so that the bytes are initialised
        // however much of them the kernel fills.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        AlignedMemory { start, layout }
    }
}

impl Drop for AlignedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and freed only here.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// Buffers that wait for their next use, by size. Cheap to clone: all clones are one pool.
#[derive(Clone, Default)]
pub struct BufferPool(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    bytes: usize,
    by_class: [Vec<AlignedMemory>; CLASSES],
}

/// The class whose buffers hold `length` bytes, if there is one.
fn class_of(length: usize) -> Option<usize> {
    let class = length.div_ceil(ALIGNMENT).next_power_of_two().trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

impl BufferPool {
    /// An empty pool.
    pub fn new() -> BufferPool {
        BufferPool::default()
    }

    /// A buffer of `length` bytes with arbitrary content.
    pub fn take(&self, length: usize) -> Buffer {
        let memory = match class_of(length) {
            None => AlignedMemory::new(length.next_multiple_of(ALIGNMENT)),
            Some(class) => {
                let kept = {
                    let mut pool = self.lock();
                    let kept = pool.by_class[class].pop();
                    pool.bytes -= kept.as_ref().map_or(0, |memory| memory.layout.size());
                    kept
                };
                kept.unwrap_or_else(|| AlignedMemory::new(ALIGNMENT << class))
            }
        };
        Buffer { memory: Some(memory), length, pool: self.clone() }
    }

    /// Bytes that the idle pool holds.
    pub fn kept_bytes(&self) -> usize {
        self.lock().bytes
    }

    fn give_back(&self, memory: AlignedMemory) {
        let size = memory.layout.size();
        let Some(class) = class_of(size) else { return };
        let mut pool = self.lock();
        if pool.bytes + size <= KEPT_BYTES_MAX {
            pool.bytes += size;
            pool.by_class[class].push(memory);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        // A panic while the lock is held leaves the lists in order: each step is one push or pop.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// An aligned buffer that returns to its pool when it is dropped.
pub struct Buffer {
    /// `None` only while it is being dropped.
    memory: Option<AlignedMemory>,
    length: usize,
    pool: BufferPool,
}

impl Buffer {
    /// Where it begins; stays there however the `Buffer` is moved, until it is dropped.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.memory().start.as_ptr()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Makes it shorter.
    pub fn truncate_to(&mut self, length: usize) {
        assert!(length <= self.length, "a buffer does not grow");
        self.length = length;
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Copies `pieces` one behind the other to the beginning; they must fill it exactly.
    pub fn gather(&mut self, pieces: &[Bytes]) {
        let mut at = 0;
        for piece in pieces {
            self[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        assert_eq!(at, self.length, "pieces that do not fill the buffer made for them");
    }

    /// The buffer as shared bytes, without a copy.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn memory(&self) -> &AlignedMemory {
        self.memory.as_ref().expect("memory is there until drop")
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is initialised (zeroed at birth, only ever overwritten), at least `length`
        // long, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.memory().start.as_ptr(), self.length) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.memory().start.as_ptr(), self.length) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.give_back(memory);
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back_to_the_pool() {
        let pool = BufferPool::new();
        for length in [1, 512, 4096, 4097, 65536, 1 << 20, (4 << 20) + 1] {
            let mut buffer = pool.take(length);
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_mut_ptr() as usize % ALIGNMENT, 0);
            buffer.fill(7);
        }
        assert_eq!(pool.kept_bytes(), 4096 + 8192 + 65536 + (1 << 20), "one of each class; 4 KiB was reused");
    }

    #[test]
    fn bytes_of_a_read_return_their_buffer_when_the_last_clone_is_dropped() {
        let pool = BufferPool::new();
        let mut buffer = pool.take(8192);
        buffer.fill(9);
        let address = buffer.as_mut_ptr() as usize;
        let bytes = buffer.into_bytes();
        let slice = bytes.slice(4096..);
        assert_eq!(bytes.as_ptr() as usize, address, "no copy was made");
        drop(bytes);
        assert_eq!(pool.kept_bytes(), 0);
        assert_eq!(slice[0], 9);
        std::thread::spawn(move || drop(slice)).join().unwrap();
        assert_eq!(pool.kept_bytes(), 8192);
    }

    #[test]
    fn an_idle_pool_is_bounded() {
        let pool = BufferPool::new();
        let all: Vec<Buffer> = (0..32).map(|_| pool.take(1 << 20)).collect();
        drop(all);
        assert_eq!(pool.kept_bytes(), KEPT_BYTES_MAX);
    }
}
