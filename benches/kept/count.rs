//! An allocator that counts: the bytes that are in use, their peak, and the arrays that operations write.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

pub struct Counting;

static IN_USE: AtomicI64 = AtomicI64::new(0);
static PEAK: AtomicI64 = AtomicI64::new(0);
static ARRAYS: AtomicU64 = AtomicU64::new(0);

/// The smallest array that counts.
const ARRAY: usize = 256;

fn add(layout: Layout) {
    let bytes = layout.size() as i64;
    PEAK.fetch_max(IN_USE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
    // Values in F16 and F32 are aligned to their own size, text and the buffers of a GEMM to other ones.
    if matches!(layout.align(), 2 | 4) && layout.size() >= ARRAY {
        ARRAYS.fetch_add(1, Relaxed);
    }
}

// SAFETY: all memory is the system allocator's, and none is touched here.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout);
        System.alloc(layout)
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout);
        System.alloc_zeroed(layout)
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size() as i64, Relaxed);
        System.dealloc(at, layout);
    }
}

/// What has been counted so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Count {
    /// In use now.
    pub bytes: i64,
    /// Arrays that were allocated since the program began: each operation of candle writes one.
    #[allow(dead_code)] // Not for a test of memory.
    pub arrays: u64,
}

pub fn now() -> Count {
    Count { bytes: IN_USE.load(Relaxed), arrays: ARRAYS.load(Relaxed) }
}

/// The most bytes in use since the last call.
pub fn peak() -> i64 {
    PEAK.swap(IN_USE.load(Relaxed), Relaxed)
}
