//! LoRA in sixty lines: a frozen attention block learns a new task by its adapter, which is saved, loaded
//! and merged. `cargo run --release --example minimal`

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_nn::{linear, loss::mse, ops::softmax_last_dim, AdamW, Linear, Optimizer};
use candle_nn::{VarBuilder, VarMap};
use lora::{Adapter, LoraConfig};
use loralib::{self as lora, nn as candle_nn}; // candle_nn's names, with adapters and with gradients everywhere

const DIM: usize = 32;

struct Attention {
    qkv: Linear,
    proj: Linear,
}

impl Attention {
    fn new(vb: VarBuilder) -> Result<Self> {
        let qkv = linear(DIM, 3 * DIM, vb.pp("qkv"))?;
        Ok(Self { qkv, proj: linear(DIM, DIM, vb.pp("proj"))? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?.chunk(3, D::Minus1)?;
        let scores = softmax_last_dim(&(qkv[0].matmul(&qkv[1].t()?)? / 6.)?)?;
        x + self.proj.forward(&scores.matmul(&qkv[2])?)?
    }
}

fn main() -> lora::Result<()> {
    let (dir, device) = (std::path::Path::new("target/minimal"), Device::Cpu);
    std::fs::create_dir_all(dir)?;
    // Instead of a download: a "pretrained" block. The task is to add the mean token to each token.
    let pretrained = VarMap::new();
    let vb = VarBuilder::from_varmap(&pretrained, DType::F32, &device);
    Attention::new(lora::base::seeded(vb, 1))?;
    pretrained.save(dir.join("base.safetensors"))?;
    let x = Tensor::randn(0f32, 1., (64, 8, DIM), &device)?;
    let y = x.broadcast_add(&x.mean_keepdim(1)?)?;

    let base = || lora::safetensors_var_builder(dir.join("base.safetensors"), DType::F32, &device);
    let cfg = LoraConfig { r: 16, lora_alpha: 32., ..Default::default() };
    let adapter = Adapter::new(cfg).targets(["qkv", "proj"]);
    let model = Attention::new(adapter.var_builder(base()?))?;
    adapter.check()?; // every target is a layer of the model
    println!("{}", adapter.summary()?);
    let loss = || mse(&model.forward(&x)?, &y);
    println!("loss before   {:.4}", loss()?.to_scalar::<f32>()?);
    let mut opt = AdamW::new_lr(adapter.vars()?, 5e-3)?;
    for step in 0..400 {
        let grads = loss()?.backward()?;
        if step == 0 {
            adapter.require_grads(&grads)?; // no operation of the model cuts the graph
        }
        opt.step(&grads)?;
    }
    println!("loss after    {:.4}", loss()?.to_scalar::<f32>()?);
    adapter.save(dir.join("adapter.safetensors"))?; // or adapter.save_pretrained("folder")?, PEFT's format

    let adapter = Adapter::load(dir.join("adapter.safetensors"), &device)?;
    let model = Attention::new(adapter.merged(base()?)?)?; // W + ΔW: any candle model can be built on it
    let loss = mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()?;
    println!("loaded, merged: loss {loss:.4}");
    Ok(())
}
