//! A model with an adapter from disk, which computes without a graph.

use crate::model::{Base, Llama};
use crate::Result;
use lora::{peft, Adapter};
use loralib as lora;
use std::path::Path;

/// Merged into the weights, or with `unmerged`, and over quantised weights, beside them.
pub fn adapted(base: &Base, folder: &Path, unmerged: bool) -> Result<Llama> {
    if base.merges() && !unmerged {
        let adapter = Adapter::load(folder, &base.device)?;
        return base.model(adapter.merged(base.to_merge()?)?);
    }
    let (mut config, tensors) = peft::load_pretrained(folder, &base.device)?;
    config.lora.merge_weights = false;
    let layers = tensors.keys().filter_map(|name| name.strip_suffix(".lora_A"));
    let adapter = Adapter::new(config).targets(layers.collect::<Vec<_>>());
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    adapter.check()?;
    let _ = adapter.restore(folder)?;
    adapter.eval()?;
    Ok(model)
}
