//! The Rust side of `interop.py` and `resaved.py`, which describe the comparisons: `write DIR` and `read DIR`, and
//! `resave FROM TO`.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use common::CFG;
use lora::layers::LayerKind;
use lora::peft;
use lora::AdapterConfig;
use lora::{Bias, LoraConfig, StateDict, Strict};
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
fn logits(
    base: &StateDict,
    adapter: &StateDict,
    config: &AdapterConfig,
    enable: &[bool],
) -> Result<Tensor> {
    let (vars, all) = (VarMap::new(), base.clone().into_iter().collect());
    let vb = lora::var_builder(VarBuilder::from_tensors(all, DType::F32, &CPU), &vars, Bias::None);
    let model = Toy::new(config, enable, vb)?;
    let report = lora::load_state_dict(&vars, adapter, Strict::Yes)?;
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
    peft::save_pretrained(dir.join("rust_served"), &served, config)?;
    for (name, rslora) in [("rust", false), ("rust_rslora", true)] {
        let cfg = LoraConfig { rslora, ..CFG };
        lora::save_state_dict(&adapter, cfg, dir.join(format!("{name}.safetensors")))?;
        peft::save_pretrained(dir.join(format!("{name}_peft")), &adapter, declared(cfg))?;
        let one = AdapterConfig { one_rank: true, ..declared(cfg) };
        peft::save_pretrained(dir.join(format!("{name}_one")), &adapter, one)?;
        let merged = dir.join(format!("{name}_merged.safetensors"));
        let from = dir.join("base.safetensors");
        lora::merge_files(from, &adapter, declared(cfg), merged, |_| {})?;
        let logits = logits(&base, &adapter, &declared(cfg), &[true, false, true])?;
        save(dir, &format!("{name}_logits.safetensors"), logits)?;
    }
    Ok(())
}

fn read(dir: &Path) -> Result<()> {
    let base = lora::read_state_dict(dir.join("base.safetensors"), &CPU)?.tensors;
    let adapter = lora::read_state_dict(dir.join("python.pt"), &CPU)?.tensors;
    let logits_pt = logits(&base, &adapter, &declared(CFG), &[true, false, true])?;
    save(dir, "python_pt_logits.safetensors", logits_pt)?;
    for name in ["python_peft", "python_peft_rslora"] {
        let kinds = [("qkv", LayerKind::MergedLinear(vec![true; 3]))];
        let (config, adapter) = peft::load_pretrained_as(dir.join(name), &kinds, &CPU)?;
        let logits = logits(&base, &adapter, &config, &[true; 3])?;
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
