#![forbid(unsafe_code)]
#![deny(missing_docs)]
//! loralib

mod error;
pub mod layers;
mod ops;
pub mod utils;

pub use candle_core;
pub use error::{Error, Result};
pub use layers::*;
pub use utils::*;
