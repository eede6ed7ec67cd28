//! What a set of adapters holds, and for how long.

use super::Adapters;
use crate::adapter::Adapter;
use crate::nn::{linear, Linear};
use crate::{LoraConfig, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::VarBuilder;
use std::sync::Arc;

fn model(adapters: &Adapters) -> Result<Linear> {
    let base = VarBuilder::zeros(DType::F32, &Device::Cpu);
    Ok(linear(4, 3, adapters.var_builder(base).pp("fc"))?)
}

#[test]
fn a_removed_adapter_is_freed_with_the_last_forward() -> Result<()> {
    let adapters = Adapters::new();
    let model = model(&adapters)?;
    let adapter = Adapter::new(LoraConfig { r: 2, ..Default::default() }).targets(["fc"]);
    adapters.add("a", &adapter)?;
    let updates = Arc::downgrade(&adapters.added()["a"].updates);
    let state = Arc::downgrade(&adapter.state);
    drop(adapter);
    let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu)?;
    let y = adapters.with("a", || -> Result<Tensor> {
        drop(adapters.remove("a")?);
        assert!(state.upgrade().is_none() && updates.upgrade().is_some());
        Ok(model.forward(&x)?)
    })?;
    assert!(updates.upgrade().is_none());
    drop(y);
    Ok(())
}

#[test]
fn the_layers_are_the_models() -> Result<()> {
    let adapters = Adapters::new();
    let (first, second) = (model(&adapters)?, model(&adapters)?);
    assert_eq!(adapters.record.layers().len(), 2);
    drop(first);
    assert_eq!(adapters.record.layers().len(), 1);
    drop(second);
    assert!(adapters.record.layers().is_empty());
    Ok(())
}
