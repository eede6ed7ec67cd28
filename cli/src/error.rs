//! Errors: any type, told in one line on the standard error.

use crate::train::Stopped;
use std::error::Error;
use std::process::ExitCode;

pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Runs the program; after `error: ..` its exit code is 1, after Ctrl-C 130.
pub fn reported(run: impl FnOnce() -> Result<()> + Send) -> ExitCode {
    // The backtrace that candle's errors carry says nothing to whoever mistyped a path.
    std::env::set_var("RUST_LIB_BACKTRACE", "0");
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    match rayon::scope(|_| run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Stopped>() => {
            eprintln!("{error}");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
