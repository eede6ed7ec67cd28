//! Models of candle-transformers, tiny and with random weights: `lora::nn` trains them, and the unmodified
//! ones serve the adapter.
//!
//! Each test builds one model three times: the copy with an adapter in F32, on the fused operations of
//! `lora::nn`; the copy in F64, where these are composed of candle's; and the original over the merged
//! weights. `cargo test -- --nocapture` prints a row of README.md's table for each.

mod harness;
mod weights;

mod audio;
mod configs;
mod diffusion;
mod encoders;
mod experts;
mod language;
mod recurrent;
mod vision;
