//! The formats of other programs (`fixtures/formats.py`): merged weights agree with theirs, and what is read and
//! written again has its bits.

mod chain;
#[path = "../common/mod.rs"]
mod common;
mod diffusers;
mod kohya;
mod mlx;
mod origins;
mod plain;
mod torch;
mod trained;

use candle_core::{Device, Tensor};
use common::{bits, difference};
use lora::merge::merge_into;
use lora::utils::StateDict;
use lora::LoraWeights;
use loralib as lora;
use std::path::{Path, PathBuf};

const CPU: Device = Device::Cpu;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(name)
}

fn tensors(path: &Path) -> lora::Result<StateDict> {
    Ok(lora::read_state_dict(path, &CPU)?.tensors)
}

/// The weights of a fixture's base, and those that its program merged.
fn model(case: &str) -> lora::Result<[StateDict; 2]> {
    let all = tensors(&fixture(case).join("model.safetensors"))?;
    let of = |prefix: &str| {
        let part = all.iter().filter_map(|(k, t)| Some((k.strip_prefix(prefix)?, t.clone())));
        part.map(|(name, t)| (name.to_owned(), t)).collect()
    };
    Ok([of("base."), of("merged.")])
}

/// Every merged weight agrees with the fixture's.
fn assert_merged(case: &str, weights: &LoraWeights) -> lora::Result<()> {
    let [base, merged] = model(case)?;
    let ours = merge_into(&base, weights)?;
    assert_eq!(weights.state_dict().len(), 2 * merged.len(), "{case}: every layer is changed");
    let mut apart = 0f64;
    for (name, tensor) in &ours {
        apart = apart.max(difference(tensor, &merged[name])?);
        assert!(difference(tensor, &base[name])? > 1e-3, "{case} {name}");
    }
    println!("{case}: {} weights apart {apart:.1e}", ours.len());
    assert!(apart <= 2e-6, "{case}: {apart}");
    Ok(())
}

/// Names, shapes, dtypes and bits are equal.
fn assert_same(a: &StateDict, b: &StateDict) -> lora::Result<()> {
    assert!(a.keys().eq(b.keys()), "{:?} {:?}", a.keys(), b.keys());
    for (name, tensor) in a {
        assert_eq!((tensor.dims(), tensor.dtype()), (b[name].dims(), b[name].dtype()), "{name}");
        assert_eq!(bits(tensor)?, bits(&b[name])?, "{name}");
    }
    Ok(())
}

fn save(path: &Path, tensors: &StateDict) -> lora::Result<()> {
    Ok(candle_core::safetensors::save(&tensors.clone().into_iter().collect(), path)?)
}

/// The message of a failed load, which names the file.
fn failed<T>(file: &str, loaded: lora::Result<T>) -> String {
    let Err(error) = loaded else { panic!("{file} loads") };
    let error = error.to_string();
    assert!(error.contains(file), "{error}");
    error
}

fn zeros(shape: &[usize]) -> lora::Result<Tensor> {
    Ok(Tensor::zeros(shape, candle_core::DType::F32, &CPU)?)
}
