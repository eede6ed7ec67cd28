//! Threads with a state of their own for a closure of a rayon pool's worker.
//!
//! A worker that waits for a part of its work runs other tasks of its pool meanwhile. Here they are parts of one closure
//! alone: it runs in a pool of its own, all of whose threads have its state, and the calling worker waits without
//! running tasks. A closure has as many threads as the caller's pool if none is running yet, else one, so that hardly
//! more threads are at work than before.

use crate::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::OnceCell;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Whether this thread is a worker of a rayon pool.
pub(super) fn is_worker() -> bool {
    rayon::current_thread_index().is_some()
}

/// Runs `f` in a pool after `enter` and before `leave`, which all of its threads call. A panic of `f` goes on in the
/// caller.
pub(super) fn run<R: Send>(
    enter: impl Fn() + Sync + Send,
    leave: impl Fn() + Sync + Send,
    f: impl FnOnce() -> R + Send,
) -> Result<R> {
    let threads = rayon::current_num_threads();
    let _waiting = Waiting::new();
    let running = Running::new();
    let pool = Pool::take(if running.is_alone { threads } else { 1 })?;
    let run = || {
        pool.threads.install(|| {
            rayon::broadcast(|_| enter());
            let _leave = OnDrop(|| drop(rayon::broadcast(|_| leave())));
            f()
        })
    };
    // A thread that is no worker waits for a pool without running tasks.
    let result = thread::scope(|scope| scope.spawn(run).join());
    pool.put_back();
    Ok(result.unwrap_or_else(|panic| resume_unwind(panic)))
}

/// Calls a closure when it is dropped.
pub(super) struct OnDrop<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)()
    }
}

/// Closures that run and do not wait for one that they have started themselves.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

struct Running {
    is_alone: bool,
}

impl Running {
    fn new() -> Self {
        Self { is_alone: RUNNING.fetch_add(1, Ordering::Relaxed) == 0 }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::Relaxed);
    }
}

thread_local! {
    /// Whether the closure of this thread's pool waits for another.
    static WAITS: OnceCell<Arc<AtomicBool>> = const { OnceCell::new() };
}

/// The closure that this thread belongs to, if it belongs to one, waits for another.
struct Waiting(Option<Arc<AtomicBool>>);

impl Waiting {
    fn new() -> Self {
        let waits = WAITS.with(|waits| waits.get().cloned());
        let waits = waits.filter(|waits| !waits.swap(true, Ordering::Relaxed));
        if waits.is_some() {
            RUNNING.fetch_sub(1, Ordering::Relaxed);
        }
        Self(waits)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(waits) = &self.0 {
            waits.store(false, Ordering::Relaxed);
            RUNNING.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The bytes of a thread's stack, of which only what is used takes memory. A backward of candle's is as deep as the graph,
/// and the caller's stack is not known.
const STACK: usize = 1 << 27;

/// A pool for one closure at a time.
struct Pool {
    threads: ThreadPool,
}

/// Those that run nothing: to start threads takes longer than a small forward.
static IDLE: Mutex<Vec<Pool>> = Mutex::new(vec![]);

fn idle() -> MutexGuard<'static, Vec<Pool>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    fn take(threads: usize) -> Result<Self> {
        let mut idle = idle();
        let fits = idle.iter().position(|pool| pool.threads.current_num_threads() == threads);
        if let Some(at) = fits {
            return Ok(idle.swap_remove(at));
        }
        drop(idle);
        let waits = Arc::new(AtomicBool::new(false));
        let belongs = move |_| WAITS.with(|own| drop(own.set(waits.clone())));
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .stack_size(STACK)
            .start_handler(belongs)
            .build();
        match pool {
            Ok(threads) => Ok(Self { threads }),
            Err(e) => Err(Error::Invalid(format!("no thread for a choice of adapters: {e}"))),
        }
    }

    fn put_back(self) {
        idle().push(self);
    }
}
