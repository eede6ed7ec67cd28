//! Base, unmerged and merged side by side, and the saved adapter in a new model.

use crate::adapt::{load, Adapter};
use crate::args::Args;
use crate::base::Base;
use crate::data::{batches, encode, Line};
use crate::describe::describe;
use crate::evaluate::{difference, loss, speeds};
use crate::report::{Figures, Report};
use crate::Result;
use candle_core::Device;
use lora::{LoraConfig, LoraModule};
use loralib as lora;
use std::fs;

pub fn compare(
    args: &Args,
    base: &Base,
    adapter: Adapter,
    valid: &[Line],
    device: &Device,
) -> Result<Report> {
    let Adapter { vars, model: mut merged, trainable, path } = adapter;
    let cfg = args.lora();
    let mut plain = base.plain()?;
    let mut unmerged =
        base.adapted(LoraConfig { merge_weights: false, ..cfg }, &vars, args.bias)?;
    let mut reloaded = load(base, &path, cfg, args.bias)?;
    for model in [&mut plain, &mut unmerged, &mut merged, &mut reloaded] {
        model.eval()?;
    }

    let examples = encode(valid, &base.tokenizer, base.config.n_positions)?;
    let batches = batches(&examples, args.batch as usize, None, device)?;
    let losses = [loss(&plain, &batches)?, loss(&unmerged, &batches)?, loss(&merged, &batches)?];
    let again = loss(&reloaded, &batches)?;
    if again.to_bits() != losses[2].to_bits() {
        return Err(format!("the loaded adapter's loss is {again}, it was {}", losses[2]).into());
    }
    let batch = &batches[batches.len() / 2];
    let speeds = speeds([&plain, &unmerged, &merged], batch)?;

    let (slots, sentences) = describe(args, base, &plain, &merged, valid, device)?;
    Ok(Report {
        trainable,
        total: base.parameters() + lora_parameters(&vars)?,
        adapter_bytes: fs::metadata(&path)?.len(),
        base_bytes: fs::metadata(&base.path)?.len(),
        models: ["base", "unmerged", "merged"],
        figures: [0, 1, 2].map(|i| Figures { loss: losses[i], tokens_per_second: speeds[i] }),
        difference: difference(&unmerged, &merged, batch)?,
        slots,
        sentences,
    })
}

/// What an adapter adds to a model: trained biases are the base's own.
fn lora_parameters(vars: &candle_nn::VarMap) -> Result<usize> {
    let data = vars.data().lock().map_err(|e| e.to_string())?;
    let added = data.iter().filter(|(name, _)| !name.ends_with("bias"));
    Ok(added.map(|(_, var)| var.elem_count()).sum())
}
