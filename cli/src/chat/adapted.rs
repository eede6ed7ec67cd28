//! A model with an adapter from disk, which computes without a graph.

use crate::model::{Base, Llama};
use crate::Result;
use lora::{formats::peft, Adapter, LoraWeights};
use loralib as lora;
use std::path::Path;

/// Merged into the weights, or with `unmerged`, and over quantised weights, beside them.
pub fn adapted(base: &Base, folder: &Path, unmerged: bool) -> Result<Llama> {
    if base.merges() && !unmerged {
        let adapter = Adapter::load(folder, &base.device)?;
        return base.model(adapter.merged(base.to_merge()?)?);
    }
    let weights = peft::load(folder, &base.device)?;
    let mut config = weights.config();
    config.lora.merge_weights = false;
    let adapter = Adapter::from_weights(&LoraWeights::new(config, weights.state_dict())?)?;
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    adapter.check()?;
    adapter.eval()?;
    Ok(model)
}
