//! `loralib::nn`: operations with gradients, layers that are adapted by name, and the `Adapter`.

#[path = "../common/mod.rs"]
mod common;

mod adapter;
mod adapters;
mod bad_input;
mod batch_norm;
mod building;
mod checkpointing;
mod crossings;
mod dora;
mod dora_magnitude;
mod half;
#[cfg(feature = "faer")]
mod initial;
mod numbers;
mod operations;
mod peft_config;
mod selection;
mod token_rows;
mod unread;
