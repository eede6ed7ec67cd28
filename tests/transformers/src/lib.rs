//! candle-transformers on `lora::nn`: compiles if `lora::nn` has candle_nn's names and signatures.
#![allow(warnings, clippy::all, macro_expanded_macro_exports_accessed_by_absolute_paths)]

pub use candle_transformers::{generation, object_detection, quantized_var_builder, utils};

pub mod composed;

include!(concat!(env!("OUT_DIR"), "/modules.rs"));
