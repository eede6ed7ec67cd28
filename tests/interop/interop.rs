//! The Rust side of `interop.py` and `resaved.py`, which describe the comparisons: `write DIR` and `read DIR`, and
//! `resave FROM TO`.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use common::CFG;
use lora::adapter::AdapterConfig;
use lora::formats::peft;
use lora::layers::LayerKind;
use lora::merge::merge_files;
use lora::utils::StateDict;
use lora::{Bias, LoraConfig, LoraWeights, Strict};
use loralib as lora;
use std::path::Path;

const CPU: Device = Device::Cpu;

struct Toy {
    embed: lora::Embedding,
    qkv: lora::MergedLinear,
    o: lora::Linear,
    conv: lora::Conv2d,
    head: candle_nn::Linear,
}

impl Toy {
    fn new(config: &AdapterConfig, enable: &[bool], vb: VarBuilder) -> Result<Self> {
        let cfg = |path| config.lora_config(path);
        let options = Conv2dConfig::default();
        Ok(Self {
            embed: lora::embedding(11, 6, cfg("embed"), vb.pp("embed"))?,
            qkv: lora::merged_linear(6, 18, enable, cfg("qkv"), vb.pp("qkv"))?,
            o: lora::linear(18, 6, cfg("o"), vb.pp("o"))?,
            conv: lora::conv2d(1, 4, 3, options, cfg("conv"), vb.pp("conv"))?,
            head: candle_nn::linear(80, 3, vb.pp("head"))?,
        })
    }

    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let x = self.embed.forward(ids)?;
        let x = self.o.forward(&self.qkv.forward(&x)?.tanh()?)?;
        let x = self.conv.forward(&x.unsqueeze(1)?)?;
        self.head.forward(&x.flatten_from(1)?)
    }
}

fn declared(cfg: LoraConfig) -> AdapterConfig {
    AdapterConfig::from(cfg)
        .with_layer("embed", LayerKind::Embedding)
        .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]))
        .with_layer("conv", LayerKind::Conv2d { groups: 1 })
}

/// The logits of the base with the adapter.
fn logits(base: &StateDict, weights: &LoraWeights, enable: &[bool]) -> Result<Tensor> {
    let (vars, all) = (VarMap::new(), base.clone().into_iter().collect());
    let vb = lora::var_builder(VarBuilder::from_tensors(all, DType::F32, &CPU), &vars, Bias::None);
    let model = Toy::new(&weights.config(), enable, vb)?;
    let report = lora::load_state_dict(&vars, &weights.state_dict(), Strict::Yes)?;
    assert_eq!(report.loaded.len(), 8);
    model.forward(&base["ids"])
}

fn values(seed: usize, dims: &[usize]) -> Result<Tensor> {
    let n: usize = dims.iter().product();
    let values: Vec<f32> = (0..n).map(|i| ((i * 37 + seed * 11) as f32).sin() * 0.5).collect();
    Tensor::from_vec(values, dims, &CPU)
}

fn save(dir: &Path, name: &str, logits: Tensor) -> Result<()> {
    candle_core::safetensors::save(&[("logits", logits)].into(), dir.join(name))
}

fn write(dir: &Path) -> Result<()> {
    let base = lora::read_state_dict(dir.join("base.safetensors"), &CPU)?.tensors;
    let shapes: [(&str, [usize; 2], [usize; 2]); 4] = [
        ("embed", [2, 11], [6, 2]),
        ("qkv", [4, 6], [12, 2]),
        ("o", [2, 18], [6, 2]),
        ("conv", [6, 3], [12, 6]),
    ];
    let mut adapter = StateDict::new();
    for (i, (path, a, b)) in shapes.iter().enumerate() {
        adapter.insert(format!("{path}.lora_A"), values(2 * i, a)?);
        adapter.insert(format!("{path}.lora_B"), values(2 * i + 1, b)?);
    }
    let linear = |name: &String| !name.starts_with("embed") && !name.starts_with("conv");
    let served: StateDict = adapter.clone().into_iter().filter(|(n, _)| linear(n)).collect();
    let config = AdapterConfig::from(CFG)
        .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]));
    let config = AdapterConfig { one_rank: true, ..config };
    peft::save(dir.join("rust_served"), &LoraWeights::new(config, served)?)?;
    for (name, rslora) in [("rust", false), ("rust_rslora", true)] {
        let cfg = LoraConfig { rslora, ..CFG };
        lora::save_state_dict(&adapter, cfg, dir.join(format!("{name}.safetensors")))?;
        let weights = LoraWeights::new(declared(cfg), adapter.clone())?;
        peft::save(dir.join(format!("{name}_peft")), &weights)?;
        let one = AdapterConfig { one_rank: true, ..declared(cfg) };
        peft::save(dir.join(format!("{name}_one")), &LoraWeights::new(one, adapter.clone())?)?;
        let merged = dir.join(format!("{name}_merged.safetensors"));
        let from = dir.join("base.safetensors");
        merge_files(from, &weights, merged, |_| {})?;
        let logits = logits(&base, &weights, &[true, false, true])?;
        save(dir, &format!("{name}_logits.safetensors"), logits)?;
    }
    Ok(())
}

fn read(dir: &Path) -> Result<()> {
    let base = lora::read_state_dict(dir.join("base.safetensors"), &CPU)?.tensors;
    let tensors = lora::read_state_dict(dir.join("python.pt"), &CPU)?.tensors;
    let weights = LoraWeights::new(declared(CFG), tensors)?;
    let logits_pt = logits(&base, &weights, &[true, false, true])?;
    save(dir, "python_pt_logits.safetensors", logits_pt)?;
    for name in ["python_peft", "python_peft_rslora"] {
        let weights = peft::load(dir.join(name), &CPU)?;
        let weights = weights.with_kind("qkv", LayerKind::MergedLinear(vec![true; 3]))?;
        let logits = logits(&base, &weights, &[true; 3])?;
        save(dir, &format!("{name}_logits.safetensors"), logits)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "write", dir] => write(Path::new(dir)),
        [_, "read", dir] => read(Path::new(dir)),
        [_, "resave", from, to] => Ok(lora::Adapter::load(from, &CPU)?.save_pretrained(to)?),
        _ => candle_core::bail!("usage: interop write|read DIR, or interop resave FROM TO"),
    }
}
