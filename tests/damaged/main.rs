//! A damaged file is an error that names the file: no panic, and no memory beyond a small multiple of
//! the file's size. And writers that are killed at any moment or find the disk full.

mod hostile;
mod judge;
mod killed;
mod mutants;
mod reasons;
mod training;

use candle_core::Device;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

const CPU: Device = Device::Cpu;

/// Counts the bytes that are allocated, and remembers the most.
struct Counted;
static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn grown(by: usize) {
    MOST.fetch_max(LIVE.fetch_add(by, Ordering::Relaxed) + by, Ordering::Relaxed);
}

// SAFETY: every call is forwarded to the system's allocator.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        System.alloc(layout)
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        System.alloc_zeroed(layout)
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may be there while the contents are copied.
        grown(size);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        System.realloc(p, layout, size)
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        System.dealloc(p, layout);
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// What `run` gives, and the most memory that it had allocated at one time.
fn measured<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let result = run();
    (result, MOST.load(Ordering::Relaxed) - before)
}

/// The tests measure the allocations of the process: they run one at a time, and their errors have no
/// backtrace, which allocates megabytes.
fn alone() -> impl Sized {
    static ONE: Mutex<()> = Mutex::new(());
    let alone = ONE.lock();
    std::env::set_var("RUST_LIB_BACKTRACE", "0");
    alone
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % n.max(1)
    }
}
