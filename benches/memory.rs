//! `cargo bench --bench memory`: what a training step keeps and needs, LoRA beside full fine-tuning.
//!
//! A model of 12 linear layers of 1024 with GELU, batch × length 256, one step of AdamW. Each figure
//! comes from a process of its own, as the growth of its peak resident memory over that before the
//! model was made (Linux).

use candle_core::{Module, Result, Tensor};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use lora::{Bias, LoraConfig};
use loralib as lora;
use std::collections::HashMap;
use std::process::Command;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const LAYERS: usize = 12;
const DIM: usize = 1024;
const ROWS: usize = 256;
const METHODS: [&str; 3] = ["full fine-tuning", "naive LoRA", "loralib"];

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "--method") {
        return step(&args[at + 1]);
    }
    println!("{LAYERS} layers of {DIM}, {ROWS} rows, r 16: one step of AdamW");
    println!("{:<18} {:>16} {:>14}", "", "gradients, MiB", "peak, MiB");
    let program = std::env::current_exe()?;
    for method in METHODS {
        let out = Command::new(&program).args(["--method", method]).output()?;
        print!("{method:<18} {}", String::from_utf8_lossy(&out.stdout));
    }
    Ok(())
}

/// The peak of this process's resident memory, in MiB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok());
    kib.map_or(f64::NAN, |kib: f64| kib / 1024.)
}

/// LoRA of plain candle layers.
struct Naive(candle_nn::Linear, Tensor, Tensor);

impl Module for Naive {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let update = x.matmul(&self.1.t()?)?.matmul(&self.2.t()?)?;
        self.0.forward(x)? + (update * 2.)?
    }
}

fn step(method: &str) -> Result<()> {
    let device = candle_core::Device::Cpu;
    let dtype = candle_core::DType::F32;
    let before = peak();
    let vars = VarMap::new();
    let trained = VarBuilder::from_varmap(&vars, dtype, &device);
    let mut model: Vec<Box<dyn Module>> = vec![];
    for i in 0..LAYERS {
        let vb = trained.pp(i);
        if method == METHODS[0] {
            model.push(Box::new(candle_nn::linear_no_bias(DIM, DIM, vb)?));
            continue;
        }
        let base = candle_nn::Linear::new(Tensor::randn(0f32, 0.05, (DIM, DIM), &device)?, None);
        model.push(match method == METHODS[1] {
            true => Box::new(Naive(
                base,
                vb.get_with_hints((16, DIM), "lora_A", candle_nn::init::DEFAULT_KAIMING_NORMAL)?,
                vb.get_with_hints((DIM, 16), "lora_B", candle_nn::init::ZERO)?,
            )),
            false => Box::new(lora::Linear::new(
                base,
                LoraConfig { r: 16, lora_alpha: 32., ..Default::default() },
                vb,
            )?),
        });
    }
    let selected = match method == METHODS[0] {
        true => vars.all_vars(),
        false => lora::mark_only_lora_as_trainable(&vars, Bias::None)?,
    };
    let mut optimizer = AdamW::new_lr(selected, 1e-3)?;
    let mut y = Tensor::randn(0f32, 1., (ROWS, DIM), &device)?;
    for layer in &model {
        y = layer.forward(&y)?.gelu()?;
    }
    let grads = y.sqr()?.mean_all()?.backward()?;
    let kept: HashMap<_, _> = grads.get_ids().map(|id| (*id, grads.get_id(*id))).collect();
    let kept: usize = kept.values().flatten().map(|g| g.elem_count() * 4).sum();
    optimizer.step(&grads)?;
    println!("{:>16.2} {:>14.1}", kept as f64 / (1 << 20) as f64, peak() - before);
    Ok(())
}
