//! `cargo run --release` in this folder: a linear layer of loralib beside one of peft-rs with the same
//! factors, run in turn.

#[allow(dead_code)] // the cases of the other benches
#[path = "../../../cases/mod.rs"]
mod cases;
#[path = "../../../ratios/table.rs"]
mod table;
#[path = "../../../ratios/timing.rs"]
mod timing;

use candle_core::{DType, Error, Module, Result, Tensor};
use candle_nn::VarBuilder;
use cases::{case, config, device, forward, rand, step, var, Case};
use peft_rs::model::LinearWithLora;
use peft_rs::{LoraConfig, LoraLayer};
use std::sync::Arc;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    // As one of rayon's threads: from any other, each parallel loop hands all its work over and waits.
    rayon::scope(|_| run())
}

fn run() -> Result<()> {
    table::print(|_| {
        let sizes = [(2048, 1024, 16), (256, 4096, 16), (512, 768, 8)];
        let all = sizes.into_iter().map(|(m, d, r)| linear(m, d, r)).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().flatten().collect())
    })
}

fn linear(m: usize, d: usize, r: usize) -> Result<Vec<Case>> {
    let x = var(&[m, d], DType::F32)?;
    let data = x.detach();
    let base = candle_nn::Linear::new(rand(&[d, d], DType::F32)?, None);
    let cfg = LoraConfig { r, alpha: 2 * r, ..Default::default() };
    let (a, b) = (var(&[r, d], DType::F32)?, var(&[d, r], DType::F32)?);
    let factors = [("lora_A".to_owned(), a.clone()), ("lora_B".to_owned(), b.clone())];
    let factors = VarBuilder::from_tensors(factors.into(), DType::F32, device());
    let ours = loralib::Linear::new(base.clone(), config(r), factors)?;
    let theirs = LoraLayer::from_weights(a, b, cfg).map_err(Error::wrap)?;
    let theirs = LinearWithLora::from_parts("fc", base, theirs).map_err(Error::wrap)?;
    let theirs = Peft(Arc::new(theirs));
    let apart = (ours.forward(&data)? - theirs.forward(&data)?)?.abs()?.max_all()?;
    if apart.to_scalar::<f32>()? > 1e-4 {
        candle_core::bail!("the layers differ by {apart}")
    }
    let name = |what: &str| format!("Linear {m}x{d} r {r} {what}");
    Ok(vec![
        case(name("forward"), forward(&ours, &data), vec![("peft-rs", forward(&theirs, &data))]),
        case(name("step"), step(&ours, &x)?, vec![("peft-rs", step(&theirs, &x)?)]),
    ])
}

#[derive(Clone)]
struct Peft(Arc<LinearWithLora>);

impl Module for Peft {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x).map_err(Error::wrap)
    }
}
