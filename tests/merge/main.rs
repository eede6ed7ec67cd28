//! Adapters merged into a base by name, from tensors and from files; and sums of adapters.

#[path = "../common/mod.rs"]
mod common;
mod experts;
mod files;
mod kinds;
mod parameters;
mod sums;
mod swap;
mod tied;
mod weights;

use candle_core::{DType, Device, Tensor};
use common::rnd;
use lora::utils::StateDict;
use lora::{LoraConfig, LoraWeights};
use loralib as lora;

const CPU: Device = Device::Cpu;

fn tensor(seed: u64, dims: &[usize], dtype: DType) -> Tensor {
    rnd(seed, dims, dtype).unwrap().to_device(&CPU).unwrap()
}

fn cfg() -> LoraConfig {
    LoraConfig { r: 2, lora_alpha: 3., ..Default::default() }
}

/// A base with two weights in the given dtype, and an adapter of one of them and its bias.
fn model(dtype: DType) -> (StateDict, LoraWeights) {
    let base = [
        ("a.weight", tensor(1, &[5, 4], dtype)),
        ("a.bias", tensor(2, &[5], dtype)),
        ("b.weight", tensor(3, &[4, 4], dtype)),
        ("norm.weight", tensor(4, &[4], DType::F32)),
        ("ids", Tensor::new(&[3u32, 4], &CPU).unwrap()),
    ];
    let adapter = [
        ("a.lora_A", tensor(5, &[2, 4], DType::F32)),
        ("a.lora_B", tensor(6, &[5, 2], DType::F32)),
        ("a.bias", tensor(7, &[5], DType::F32)),
    ];
    let dict = |all: &[(&str, Tensor)]| all.iter().map(|(n, t)| ((*n).into(), t.clone())).collect();
    (dict(&base), LoraWeights::new(cfg(), dict(&adapter)).unwrap())
}
