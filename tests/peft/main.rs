//! PEFT's format: adapters that PEFT saved (`fixtures/checkpoints.py`), and all kinds of layers converted
//! to PEFT's factors and back.

#[cfg(feature = "faer")]
mod combined;
#[path = "../common/mod.rs"]
mod common;
mod groups;
#[cfg(feature = "faer")]
mod initial;
mod into_variables;
mod kinds;
mod merged_alone;
mod patterns;
mod refused;
mod saved_by_peft;
mod served;
mod steps;
mod tied;

use candle_core::{Device, Tensor};
use lora::utils::StateDict;
use loralib as lora;
use std::path::PathBuf;

const CPU: Device = Device::Cpu;

fn folder(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(case)
}

/// The base, PEFT's merged weights, and the inputs and outputs of the layers.
fn model(case: &str) -> lora::Result<[StateDict; 4]> {
    let all = lora::read_state_dict(folder(case).join("model.safetensors"), &CPU)?.tensors;
    Ok(["base.", "merged.", "x.", "y."].map(|prefix| {
        let own =
            |(name, t): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.into(), t.clone()));
        all.iter().filter_map(own).collect()
    }))
}
