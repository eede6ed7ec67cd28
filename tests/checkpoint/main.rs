//! The selection of variables, and checkpoints: saving, loading and resuming.

#[path = "../common/mod.rs"]
mod common;
mod errors;
mod files;
mod layers;
mod loading;
mod misdirected;
mod replaced;
mod resume;
mod seeded;
mod selection;
mod shards;
mod summary;
mod torch;
mod var_builder;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use common::{bits, rnd, CFG};
use loralib as lora;
use std::collections::HashMap;

const CPU: Device = Device::Cpu;

struct Model {
    q: lora::Linear,
    k: candle_nn::Linear,
    head: candle_nn::Linear,
}
lora::lora_module!(Model { q; k, head });

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            q: lora::linear(4, 4, CFG, vb.pp("q"))?,
            k: candle_nn::linear(4, 4, vb.pp("k"))?,
            head: candle_nn::linear(4, 3, vb.pp("classifier"))?,
        })
    }
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.k.forward(&self.q.forward(x)?)?)
    }
}

fn base(with_head: bool) -> Result<VarBuilder<'static>> {
    let mut tensors = HashMap::new();
    for (seed, name) in ["q", "k", "classifier"].into_iter().enumerate() {
        let out = if name == "classifier" { 3 } else { 4 };
        if name != "classifier" || with_head {
            tensors.insert(format!("{name}.weight"), rnd(seed as u64, &[out, 4], DType::F32)?);
            tensors.insert(format!("{name}.bias"), rnd(seed as u64 + 9, &[out], DType::F32)?);
        }
    }
    let tensors =
        tensors.into_iter().map(|(k, t)| Ok((k, t.to_device(&CPU)?))).collect::<Result<_>>()?;
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &CPU))
}

fn randomize(vars: &VarMap, seed: u64) -> Result<()> {
    let vars = vars.data().lock().unwrap();
    let mut names: Vec<_> = vars.keys().collect();
    names.sort();
    for (i, name) in names.into_iter().enumerate() {
        let value = rnd(seed + i as u64, vars[name].dims(), vars[name].dtype())?;
        vars[name].set(&value.to_device(&CPU)?)?;
    }
    Ok(())
}

fn names(vars: &VarMap) -> Vec<String> {
    let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    names
}

fn snapshot(vars: &VarMap) -> Vec<Vec<u64>> {
    let vars_by_name = vars.data().lock().unwrap();
    let mut names: Vec<_> = vars_by_name.keys().collect();
    names.sort();
    names.into_iter().map(|name| bits(&vars_by_name[name]).unwrap()).collect()
}

fn adapter(trainable: impl Into<lora::utils::Trainable>) -> Result<(Model, VarMap)> {
    let adapter = VarMap::new();
    let model = Model::new(lora::var_builder(base(true)?, &adapter, trainable))?;
    Ok((model, adapter))
}

fn fails(result: lora::Result<impl std::fmt::Debug>, words: &[&str]) {
    let error = result.unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{error:?} does not contain {word:?}");
    }
}
