//! Ctrl-C: a run ends after its step.

use crate::Result;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on the first Ctrl-C (or SIGTERM) asks to stop, and the second stops at once.
pub fn listen() -> Result<()> {
    let asked = || {
        if ASKED.swap(true, Ordering::Relaxed) {
            process::exit(130);
        }
        eprintln!("\nstopping after this step; again to stop at once");
    };
    Ok(ctrlc::set_handler(asked)?)
}

/// Whether it was asked to stop.
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}
