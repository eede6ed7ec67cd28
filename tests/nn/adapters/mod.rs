//! `Adapters`: several adapters over one base, beside a model of each adapter alone.

mod choices;
mod disabled;
mod errors;
mod kinds;
mod pools;
mod rows;
mod threads;
mod training;

use crate::adapter::{base, ids, randomize, vb, Model};
use candle_core::Tensor;
use loralib::adapter::AdapterConfig;
use loralib::layers::LayerKind;
use loralib::{Adapter, Adapters, LoraConfig, Result};
use std::collections::HashMap;

fn cfg(r: usize, lora_alpha: f64) -> LoraConfig {
    LoraConfig { r, lora_alpha, ..Default::default() }
}

/// Adapters with random factors that differ in rank, alpha, targets and the kind of a layer.
fn different() -> Vec<(&'static str, Adapter)> {
    let fused = AdapterConfig::from(cfg(2, 3.))
        .with_layer("qkv", LayerKind::MergedLinear(vec![true, false, true]));
    let rslora = LoraConfig { rslora: true, ..cfg(4, 2.) };
    vec![
        ("sql", Adapter::new(cfg(2, 3.)).targets(["qkv", "down_proj", "up_proj"])),
        ("chat", Adapter::new(cfg(3, 5.)).targets(["embed", "layers.2.up_proj"])),
        ("fused", Adapter::new(fused).targets(["qkv", "embed"])),
        ("rslora", Adapter::new(rslora).targets("all-linear")),
    ]
}

/// A set of adapters that serve, its model, and the model of each adapter alone over the same base.
struct Served {
    base: HashMap<String, Tensor>,
    adapters: Adapters,
    model: Model,
    alone: Vec<(&'static str, Adapter, Model)>,
}

impl Served {
    fn new() -> Result<Self> {
        let (base, adapters) = (base(), Adapters::new());
        let model = Model::new(adapters.var_builder(vb(&base)))?;
        let mut alone = vec![];
        for (name, adapter) in different() {
            let own = Model::new(adapter.var_builder(vb(&base)))?;
            randomize(&adapter)?;
            adapters.add(name, &adapter)?;
            adapter.eval()?;
            alone.push((name, adapter, own));
        }
        Ok(Self { base, adapters, model, alone })
    }

    fn forward(&self) -> candle_core::Result<Tensor> {
        self.model.forward(&ids())
    }
}
