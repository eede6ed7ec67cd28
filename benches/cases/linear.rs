//! Linear layers: rows × features, forward and step.

use super::naive::Naive;
use super::{adapter, case, config, device, forward, rand, step, var, Case};
use candle_core::{DType, Result};
use lora::{LoraConfig, LoraModule};
use loralib as lora;

/// (rows, features, r)
fn sizes() -> &'static [(usize, usize, usize)] {
    match device().is_cpu() {
        true => &[(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)],
        false => &[(4096, 4096, 16), (8192, 2048, 16)],
    }
}

pub fn linear() -> Result<Vec<Case>> {
    of_sizes(|m, d, r| linear_of(m, d, r, DType::F32))
}

/// BF16 bases; their adapters are F32.
pub fn half() -> Result<Vec<Case>> {
    of_sizes(|m, d, r| linear_of(m, d, r, DType::BF16))
}

/// From `d` features to 3·`d`, with an update of the first and the last third.
pub fn merged_linear() -> Result<Vec<Case>> {
    of_sizes(merged_linear_of)
}

/// Beside the same layer without `use_dora`.
pub fn dora() -> Result<Vec<Case>> {
    of_sizes(dora_of)
}

fn of_sizes(make: fn(usize, usize, usize) -> Result<Vec<Case>>) -> Result<Vec<Case>> {
    let all = sizes().iter().map(|&(m, d, r)| make(m, d, r)).collect::<Result<Vec<_>>>()?;
    Ok(all.into_iter().flatten().collect())
}

fn linear_of(m: usize, d: usize, r: usize, dtype: DType) -> Result<Vec<Case>> {
    // Inside a model the input has a gradient.
    let x = var(&[m, d], dtype)?;
    let data = x.detach();
    let plain = candle_nn::Linear::new(rand(&[d, d], dtype)?, None);
    let full = candle_nn::Linear::new(var(&[d, d], dtype)?, None);
    let naive = Naive { base: plain.clone(), a: var(&[r, d], dtype)?, b: var(&[d, r], dtype)? };
    let ours = lora::Linear::new(plain.clone(), config(r), adapter(dtype))?;
    let mut merged = ours.clone();
    merged.eval()?;
    let half = if dtype == DType::F32 { "" } else { "BF16 " };
    let name = |what: &str| format!("{half}Linear {m}x{d} r {r} {what}");
    let plain = || ("candle_nn::Linear", forward(&plain, &data));
    Ok(vec![
        case(
            name("forward"),
            forward(&ours, &data),
            vec![plain(), ("naive LoRA", forward(&naive, &data))],
        ),
        case(name("forward, merged"), forward(&merged, &data), vec![plain()]),
        case(
            name("step"),
            step(&ours, &x)?,
            vec![("full fine-tuning", step(&full, &x)?), ("naive LoRA", step(&naive, &x)?)],
        ),
    ])
}

fn merged_linear_of(m: usize, d: usize, r: usize) -> Result<Vec<Case>> {
    let x = var(&[m, d], DType::F32)?;
    let data = x.detach();
    let plain = candle_nn::Linear::new(rand(&[3 * d, d], DType::F32)?, None);
    let full = candle_nn::Linear::new(var(&[3 * d, d], DType::F32)?, None);
    let enable = [true, false, true];
    let ours = lora::MergedLinear::new(plain.clone(), &enable, config(r), adapter(DType::F32))?;
    let mut merged = ours.clone();
    merged.eval()?;
    let name = |what: &str| format!("MergedLinear {m}x{d} r {r} {what}");
    let plain = || vec![("candle_nn::Linear", forward(&plain, &data))];
    Ok(vec![
        case(name("forward"), forward(&ours, &data), plain()),
        case(name("forward, merged"), forward(&merged, &data), plain()),
        case(name("step"), step(&ours, &x)?, vec![("full fine-tuning", step(&full, &x)?)]),
    ])
}

fn dora_of(m: usize, d: usize, r: usize) -> Result<Vec<Case>> {
    let x = var(&[m, d], DType::F32)?;
    let data = x.detach();
    let plain = candle_nn::Linear::new(rand(&[d, d], DType::F32)?, None);
    let lora = lora::Linear::new(plain.clone(), config(r), adapter(DType::F32))?;
    let cfg = LoraConfig { use_dora: true, ..config(r) };
    let ours = lora::Linear::new(plain, cfg, adapter(DType::F32))?;
    let name = |what: &str| format!("DoRA {m}x{d} r {r} {what}");
    Ok(vec![
        case(name("forward"), forward(&ours, &data), vec![("LoRA", forward(&lora, &data))]),
        case(name("step"), step(&ours, &x)?, vec![("LoRA", step(&lora, &x)?)]),
    ])
}
