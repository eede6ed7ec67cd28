//! LoRA in sixty lines: a frozen attention block learns a new task by its adapter, which is saved, loaded
//! and merged. `cargo run --release --example minimal`

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_nn::{loss::mse, ops::softmax, AdamW, Optimizer, VarBuilder, VarMap};
use lora::{Bias, LoraConfig, LoraModule, Strict};
use loralib as lora;

const DIM: usize = 32;

struct Attention {
    qkv: lora::Linear,
    proj: lora::Linear,
}
lora::lora_module!(Attention { qkv, proj });

impl Attention {
    fn new(cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let qkv = lora::linear(DIM, 3 * DIM, cfg, vb.pp("qkv"))?;
        Ok(Self { qkv, proj: lora::linear(DIM, DIM, cfg, vb.pp("proj"))? })
    }
}

impl Module for Attention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let qkv = self.qkv.forward(x)?.chunk(3, D::Minus1)?;
        // `softmax` has a backward, candle's fused `softmax_last_dim` has none.
        let scores = softmax(&(qkv[0].matmul(&qkv[1].t()?)? / 6.)?, D::Minus1)?;
        x + self.proj.forward(&scores.matmul(&qkv[2])?)?
    }
}

fn main() -> lora::Result<()> {
    let (dir, device) = (std::path::Path::new("target/minimal"), Device::Cpu);
    std::fs::create_dir_all(dir)?;
    // Instead of a download: a "pretrained" block. The task is to add the mean token to each token.
    let pretrained = VarMap::new();
    let vb = VarBuilder::from_varmap(&pretrained, DType::F32, &device);
    Attention::new(LoraConfig::default(), lora::seeded(vb, 1))?;
    pretrained.save(dir.join("base.safetensors"))?;
    let x = Tensor::randn(0f32, 1., (64, 8, DIM), &device)?;
    let y = x.broadcast_add(&x.mean_keepdim(1)?)?;

    let base = std::fs::read(dir.join("base.safetensors"))?;
    let base = || VarBuilder::from_buffered_safetensors(base.clone(), DType::F32, &device);
    let cfg = LoraConfig { r: 16, lora_alpha: 32., ..Default::default() };
    let adapter = VarMap::new();
    let model = Attention::new(cfg, lora::var_builder(base()?, &adapter, Bias::None))?;
    println!("loss before   {:.4}", mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()?);
    let mut opt = AdamW::new_lr(lora::mark_only_lora_as_trainable(&adapter, Bias::None)?, 5e-3)?;
    for _ in 0..400 {
        opt.backward_step(&mse(&model.forward(&x)?, &y)?)?;
    }
    println!("loss after    {:.4}", mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()?);
    println!("{}", lora::summary(&adapter, Bias::None)?);
    let path = dir.join("adapter.safetensors");
    lora::save_state_dict(&lora::lora_state_dict(&adapter, Bias::None)?, cfg, &path)?;

    let loaded = VarMap::new();
    let mut model = Attention::new(cfg, lora::var_builder(base()?, &loaded, Bias::None))?;
    let report = lora::load_checkpoint(&path, &loaded, cfg, Strict::Yes)?;
    model.eval()?; // merged: one matmul a layer, no graph
    let loss = mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()?;
    println!("loaded {} tensors, merged: loss {loss:.4}", report.loaded.len());
    Ok(())
}
