#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod error;
pub mod layers;
mod ops;
pub mod peft;
pub mod utils;

#[doc(hidden)] // for lora_module!
pub use candle_core;
pub use error::{Error, Result};
pub use layers::*;
pub use utils::*;
