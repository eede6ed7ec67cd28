// On docs.rs these definitions of the README's links come first, and so count.
#![doc = "[design]: docs::design"]
#![doc = "[benchmarks]: docs::benchmarks"]
#![doc = "[walkthrough]: docs::candle_transformers"]
#![doc = "[language-model]: docs::fine_tune_a_language_model"]
#![doc = "[peft]: docs::peft"]
#![doc = "[formats]: docs::formats"]
#![doc = "[data-parallel]: docs::data_parallel"]
#![doc = ""]
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod adapter;
mod base;
#[cfg(doc)]
pub mod docs;
mod error;
pub mod formats;
pub mod gguf;
pub mod layers;
pub mod merge;
pub mod nn;
mod ops;
pub mod peft;
#[cfg(test)]
#[path = "../tests/common/random.rs"]
mod random;
pub mod train;
pub mod utils;

pub use adapter::adapters::{AdapterWeights, Adapters};
pub use adapter::{Adapter, Targets};
pub use base::{half_var_builder, safetensors_var_builder, seeded, var_builder};
#[doc(hidden)] // for lora_module!
pub use candle_core;
pub use error::{Error, Result};
pub use layers::{
    conv1d, conv1d_no_bias, conv2d, conv2d_no_bias, conv3d, conv3d_no_bias, embedding, linear,
    linear_b, linear_no_bias, merged_linear, merged_linear_no_bias, Adapted, Conv1d, Conv2d,
    Conv3d, Conv3dConfig, Embedding, InitLoraWeights, Linear, LoraConfig, LoraModule, MergedLinear,
    Mode,
};
pub use merge::{add_weighted, merge_files, merge_into};
pub use utils::*;
