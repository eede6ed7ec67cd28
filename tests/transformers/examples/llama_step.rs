//! A LoRA step of a copied Llama (hidden 576, r 8 on q and v) on `lora::nn`, beside the same file on candle's
//! composed operations: `cargo run --release --example llama_step -- [LAYERS] [BATCH] [TOKENS] [ROUNDS]` prints
//! the medians of alternating steps and of their ratios; with a last word `fused` or `composed` it takes
//! three steps of one of them and prints the peak of the process's memory.

use candle::{DType, Device, Result, Tensor};
use candle_nn::{AdamW, Optimizer, VarBuilder};
use loralib::{Adapter, LoraConfig};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const HIDDEN: usize = 576;

/// Weights of about the usual size, without a file.
struct Random;

impl candle_nn::var_builder::SimpleBackend for Random {
    fn get(
        &self,
        shape: candle::Shape,
        _: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if shape.rank() == 1 {
            return Tensor::ones(shape, dtype, device);
        }
        Tensor::randn(0f32, 0.02, shape, device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle::bail!("{name}: the shape is not known")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

macro_rules! stepper {
    ($name:ident, $models:ident) => {
        fn $name(
            layers: usize,
            batch: usize,
            tokens: usize,
        ) -> Result<impl FnMut() -> Result<f64>> {
            use transformers::$models::llama;
            let device = Device::Cpu;
            let config = llama::Config {
                hidden_size: HIDDEN,
                intermediate_size: 1536,
                vocab_size: 4096,
                num_hidden_layers: layers,
                num_attention_heads: 9,
                num_key_value_heads: 3,
                use_flash_attn: false,
                rms_norm_eps: 1e-5,
                rope_theta: 10_000.,
                bos_token_id: None,
                eos_token_id: None,
                rope_scaling: None,
                max_position_embeddings: 2048,
                tie_word_embeddings: true,
            };
            let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
            let adapter = Adapter::new(cfg).targets(["q_proj", "v_proj"]);
            let base = VarBuilder::from_backend(Box::new(Random), DType::F32, device.clone());
            let model = llama::Llama::load(adapter.var_builder(base), &config)?;
            adapter.check()?;
            let mut opt = AdamW::new_lr(adapter.vars()?, 1e-4)?;
            let ids = Tensor::rand(0f32, 4095., (batch, tokens), &device)?.to_dtype(DType::U32)?;
            Ok(move || {
                let start = Instant::now();
                let mut cache = llama::Cache::new(false, DType::F32, &config, &device)?;
                let loss = model.forward(&ids, 0, &mut cache)?.sqr()?.mean_all()?;
                opt.backward_step(&loss)?;
                loss.to_scalar::<f32>()?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            })
        }
    };
}
stepper!(fused, models);
stepper!(composed, composed_models);

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default| args.get(i).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (layers, batch, tokens, rounds) =
        (number(0, 6), number(1, 2), number(2, 128), number(3, 11));
    let alone = args.last().map_or("", String::as_str);
    if alone == "fused" || alone == "composed" {
        let three =
            |mut step: Box<dyn FnMut() -> Result<f64>>| (0..3).try_for_each(|_| step().map(drop));
        match alone {
            "fused" => three(Box::new(fused(layers, batch, tokens)?))?,
            _ => three(Box::new(composed(layers, batch, tokens)?))?,
        }
        let status = std::fs::read_to_string("/proc/self/status")?;
        let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("no VmHWM");
        println!("{alone}: {peak}");
        return Ok(());
    }
    let (mut a, mut b) = (fused(layers, batch, tokens)?, composed(layers, batch, tokens)?);
    (a()?, b()?);
    let (mut fused, mut composed, mut ratios) = (vec![], vec![], vec![]);
    for _ in 0..rounds {
        let (x, y) = (a()?, b()?);
        fused.push(x);
        composed.push(y);
        ratios.push(x / y);
    }
    let (fused, composed, ratio) = (median(fused), median(composed), median(ratios));
    println!("{layers} layers, {batch} x {tokens}: {fused:.0} ms, composed {composed:.0} ms, ratio {ratio:.2}");
    Ok(())
}

fn main() -> Result<()> {
    // As one of rayon's threads: from any other, each parallel loop hands its work over and waits.
    rayon::scope(|_| run())
}
