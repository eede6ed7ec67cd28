//! Steps of models like Llama with random weights in BF16, of single layers and of the head's loss, on the first GPU in a
//! build with `cuda`, else on the CPU: beside LoRA of plain candle operations.
//!
//!     cargo bench --bench steps -- models      # 0.5B, 1.5B and 7B: a step, its peak, tokens a second
//!     cargo bench --bench steps -- layers      # a linear layer of 4096, 5120 and 8192 features
//!     cargo bench --bench steps -- head        # the loss of 8192 tokens and 131,072 classes
//!
//! With `--small` the sizes are those of a test. Each ends after a few minutes. `benches/compare/steps.py` is the same with
//! PEFT on torch.

#[path = "../cases/device.rs"]
mod device;
#[path = "../llama/layer.rs"]
mod layer;
#[path = "../cases/peak.rs"]
mod peak;
#[path = "../llama/shapes.rs"]
mod shapes;

use candle_core::{DType, Module, Result, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use device::device;
use layer::{By, Layer, Observer, RANK};
use loralib::train::{linear_cross_entropy, AdamW};
use loralib::{nn, Adapter, LoraConfig};
use shapes::{Shape, SHAPES};
use std::sync::Arc;
use std::time::{Duration, Instant};

const DTYPE: DType = DType::BF16;

/// The time for one row of a table.
const LIMIT: Duration = Duration::from_secs(20);

const SMALL: Shape = Shape {
    name: "small",
    hidden: 128,
    intermediate: 256,
    heads: 4,
    kv_heads: 2,
    d: 32,
    layers: 2,
    vocabulary: 1000,
};

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let has = |name: &str| args.iter().any(|arg| arg == name);
    let (small, all) = (has("--small"), !["models", "layers", "head"].iter().any(|part| has(part)));
    if all || has("models") {
        println!("\n| a step of | tokens | by | ms | tokens a second | peak, MiB |\n|---|---|---|---|---|---|");
        let shapes = if small { &[SMALL][..] } else { &SHAPES[..3] };
        for shape in shapes {
            for (by, checkpointing) in [(By::Lora, false), (By::Lora, true), (By::Candle, false)] {
                let name = match (by, checkpointing) {
                    (By::Lora, false) => "loralib",
                    (By::Lora, true) => "loralib, checkpointing",
                    (By::Candle, _) => "plain candle",
                };
                let tokens = if small { 64 } else { 2048 };
                row(&format!("| {} | 1 x {tokens} | {name}", shape.name), tokens, || {
                    step(shape, tokens, by, checkpointing)
                })?;
            }
        }
    }
    if all || has("layers") {
        println!("\n| a step of a linear layer | tokens | by | ms | tokens a second | peak, MiB |\n|---|---|---|---|---|---|");
        let (features, lengths) = match small {
            true => (vec![64], vec![32]),
            false => (vec![4096, 5120, 8192], vec![2048, 8192]),
        };
        for n in features {
            for tokens in &lengths {
                for (by, name) in [(By::Lora, "loralib"), (By::Candle, "plain candle")] {
                    row(&format!("| {n} x {n} | {tokens} | {name}"), *tokens, || {
                        linear(n, *tokens, by)
                    })?;
                }
            }
        }
    }
    if all || has("head") {
        println!("\n| the loss of a head | tokens | by | ms | tokens a second | peak, MiB |\n|---|---|---|---|---|---|");
        let (tokens, hidden, classes) = if small { (64, 32, 1000) } else { (8192, 4096, 131_072) };
        row(&format!("| {hidden} x {classes} | {tokens} | loralib"), tokens, || {
            head(tokens, hidden, classes)
        })?;
    }
    Ok(())
}

struct Unobserved;

impl Observer for Unobserved {
    fn stage<T>(&self, _: &'static str, f: impl FnOnce() -> Result<T>) -> Result<T> {
        f()
    }
}

type Step = Box<dyn FnMut() -> Result<()>>;

/// Prints the median of the steps within the limit, or why there is none.
fn row(name: &str, tokens: usize, new: impl FnOnce() -> Result<Step>) -> Result<()> {
    match time(new) {
        Ok((ms, peak)) => {
            println!("{name} | {ms:.1} | {:.0} | {peak:.0} |", tokens as f64 / ms * 1e3);
        }
        // A device without the memory for it.
        Err(error) => {
            let error = error.to_string();
            println!("{name} | {} | | |", error.lines().next().unwrap_or_default());
        }
    }
    device().synchronize()
}

fn time(new: impl FnOnce() -> Result<Step>) -> Result<(f64, f64)> {
    let mut step = new()?;
    let start = Instant::now();
    let mut times = vec![];
    let mut peak = 0f64;
    // The first two build kernels and fill the allocator.
    while times.len() < 12 && (times.len() < 3 || start.elapsed() < LIMIT) {
        device().synchronize()?;
        let start = Instant::now();
        step()?;
        peak = peak.max(peak::peak()?);
        device().synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.drain(..2);
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], peak))
}

fn random(dims: impl Into<candle_core::Shape>) -> Result<Tensor> {
    (Tensor::rand(-1f32, 1., dims, device())? * 0.05)?.to_dtype(DTYPE)
}

/// The optimizer of each side.
enum Either {
    Lora(AdamW),
    Candle(candle_nn::AdamW),
}

/// A step with AdamW: the forward of all layers, the loss, and the backward.
fn step(shape: &Shape, tokens: usize, by: By, checkpointing: bool) -> Result<Step> {
    let layers = (0..shape.layers).map(|_| Layer::new(by, *shape, tokens, DTYPE, device()));
    let layers = layers.map(|layer| layer.map(Arc::new)).collect::<Result<Vec<_>>>()?;
    let vars: Vec<Var> = layers.iter().flat_map(|layer| layer.vars()).collect();
    let table = random((shape.vocabulary, shape.hidden))?;
    let weight = random((shape.vocabulary, shape.hidden))?;
    let head = nn::Linear::new(weight.clone(), None);
    let norm = Tensor::ones(shape.hidden, DTYPE, device())?;
    let ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % shape.vocabulary) as u32).collect();
    let ids = Tensor::new(ids, device())?;
    let params = ParamsAdamW { lr: 1e-4, ..Default::default() };
    let mut optimizer = match by {
        By::Lora => Either::Lora(AdamW::new(vars, params)?),
        By::Candle => Either::Candle(candle_nn::AdamW::new(vars, params)?),
    };
    Ok(Box::new(move || {
        let mut x = table.index_select(&ids, 0)?.unsqueeze(0)?;
        for layer in &layers {
            x = match layer.adapter().filter(|_| checkpointing) {
                None => layer.forward(&x, &Unobserved)?,
                Some(adapter) => {
                    let layer = layer.clone();
                    adapter.checkpoint("", &x, move |x| layer.forward(x, &Unobserved))?
                }
            };
        }
        match &mut optimizer {
            Either::Lora(optimizer) => {
                let x = nn::ops::rms_norm(&x, &norm, 1e-5)?;
                let loss = linear_cross_entropy(&x, &head, &ids.unsqueeze(0)?)?;
                optimizer.backward_step(&loss)
            }
            Either::Candle(optimizer) => {
                let x = candle_nn::ops::rms_norm_slow(&x, &norm, 1e-5)?;
                let logits = x.squeeze(0)?.matmul(&weight.t()?)?.to_dtype(DType::F32)?;
                optimizer.backward_step(&candle_nn::loss::cross_entropy(&logits, &ids)?)
            }
        }
    }))
}

/// A forward and a backward of one linear layer with an adapter, with a gradient for its input.
fn linear(n: usize, tokens: usize, by: By) -> Result<Step> {
    let (w, x) = (random((n, n))?, Var::from_tensor(&random((tokens, n))?)?);
    let g = random((tokens, n))?;
    match by {
        By::Lora => {
            let base =
                nn::VarBuilder::from_tensors([("fc.weight".to_owned(), w)].into(), DTYPE, device());
            let cfg = LoraConfig { r: RANK, lora_alpha: 32., ..Default::default() };
            let adapter = Adapter::new(cfg).targets(["fc"]);
            let layer = nn::linear_no_bias(n, n, adapter.var_builder(base).pp("fc"))?;
            Ok(Box::new(move || {
                let _ = &adapter;
                (layer.forward(&x)? * &g)?.sum_all()?.backward()?;
                Ok(())
            }))
        }
        By::Candle => {
            let (a, b) =
                (Var::from_tensor(&random((RANK, n))?)?, Var::from_tensor(&random((n, RANK))?)?);
            Ok(Box::new(move || {
                let update = (x.matmul(&a.t()?)?.matmul(&b.t()?)? * 2.)?;
                let y = (x.matmul(&w.t()?)? + update)?;
                (y * &g)?.sum_all()?.backward()?;
                Ok(())
            }))
        }
    }
}

/// A forward and a backward of the loss of a frozen head.
fn head(tokens: usize, hidden: usize, classes: usize) -> Result<Step> {
    let head = nn::Linear::new(random((classes, hidden))?, None);
    let x = Var::from_tensor(&random((1, tokens, hidden))?)?;
    let labels: Vec<u32> = (0..tokens).map(|i| (i * 7919 % classes) as u32).collect();
    let labels = Tensor::new(labels, device())?.unsqueeze(0)?;
    Ok(Box::new(move || {
        linear_cross_entropy(&x, &head, &labels)?.backward()?;
        Ok(())
    }))
}
