//! GGUF files: what a model gets from them, its configuration and tokenizer, adapters in llama.cpp's form, and merged files.

mod adapters;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod damaged;
mod errors;
mod fidelity;
mod fixture;
mod merged;
mod one_layer;
mod tied;
mod to_safetensors;
mod tokenizer;

use candle_core::{Device, Tensor};

const CPU: Device = Device::Cpu;

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}
