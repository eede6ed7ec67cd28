// On docs.rs these definitions of the README's links come first, and so count.
#![doc = "[design]: docs::design"]
#![doc = "[benchmarks]: docs::benchmarks"]
#![doc = "[coming-from-loralib]: docs::coming_from_loralib"]
#![doc = "[walkthrough]: docs::candle_transformers"]
#![doc = "[language-model]: docs::fine_tune_a_language_model"]
#![doc = "[peft]: docs::peft"]
#![doc = "[formats]: docs::formats"]
#![doc = "[data-parallel]: docs::data_parallel"]
#![doc = ""]
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod adapter;
pub mod adapters;
pub mod base;
#[cfg(doc)]
pub mod docs;
mod error;
pub mod files;
pub mod formats;
pub mod gguf;
pub mod layers;
pub mod merge;
pub mod nn;
mod ops;
#[cfg(test)]
mod random;
mod regex;
pub mod train;
pub mod utils;
mod weights;

#[doc(no_inline)]
pub use adapter::{Adapter, LoraWeights};
#[doc(no_inline)]
pub use adapters::Adapters;
#[doc(no_inline)]
pub use base::{safetensors_var_builder, var_builder};
#[doc(hidden)] // for lora_module!
pub use candle_core;
pub use error::{Error, Result};
#[doc(no_inline)]
pub use layers::{
    conv1d, conv1d_no_bias, conv2d, conv2d_no_bias, conv3d, conv3d_no_bias, embedding, linear,
    linear_no_bias, merged_linear, merged_linear_no_bias, Conv1d, Conv2d, Conv3d, Embedding,
    Linear, LoraConfig, LoraModule, MergedLinear, Mode,
};
#[doc(no_inline)]
pub use utils::{
    load_checkpoint, load_state_dict, lora_state_dict, mark_only_lora_as_trainable, missing_grads,
    read_state_dict, save_state_dict, Bias, Strict,
};
