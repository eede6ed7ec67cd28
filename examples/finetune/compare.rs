//! Base, unmerged and merged side by side, and the saved adapter in a new model.

use crate::corpus::Line;
use crate::data::batches;
use crate::evaluate::{difference, loss, speeds};
use crate::generate::generate;
use crate::gpt2::Gpt2;
use crate::slots::said;
use crate::{adapter, Base, Result};
use lora::Adapter;
use loralib as lora;
use std::fs;
use std::path::Path;

/// How many sentences are shown.
const SHOWN: usize = 3;

/// With the adapter that was trained in a model, and saved in a file.
pub fn compare(
    base: &Base,
    (adapter, unmerged): (&Adapter, &Gpt2),
    file: &Path,
    valid: &[Line],
) -> Result<()> {
    adapter.eval()?;
    let plain = base.model(base.var_builder()?)?;
    let merged = base.model(Adapter::load(file, &base.device)?.merged(base.var_builder()?)?)?;
    for (what, file) in [("adapter", file), ("base", &base.weights)] {
        println!("{what:<8} {:>9} bytes", fs::metadata(file)?.len());
    }

    println!("\nvalidation      loss   perplexity   tokens/s");
    let batches = batches(valid, &base.bpe, &base.device)?;
    let batch = &batches[batches.len() / 2];
    let models = [("base", &plain), ("unmerged", unmerged), ("merged", &merged)];
    let speeds = speeds(models.map(|(_, model)| model), batch)?;
    for ((name, model), speed) in models.into_iter().zip(speeds) {
        let loss = loss(model, &batches)?;
        println!("  {name:<10} {loss:>7.4} {:>12.3} {speed:>10.0}", loss.exp());
    }
    let apart = difference(unmerged, &merged, batch)?;
    println!("\nmerged and unmerged logits differ by {apart:.1e} at most");
    check_restored(base, unmerged, file, &batches)?;
    println!("the adapter, loaded into a new model, gives the same loss to the last bit");

    let descriptions: Vec<_> = valid.iter().map(|line| &line.description[..]).collect();
    let say = |model| generate(model, &base.config, &base.bpe, &descriptions, &base.device);
    let (before, after) = (say(&plain)?, say(&merged)?);
    let slots: usize = valid.iter().map(|line| line.slots.len()).sum();
    println!("\nslot accuracy, of {slots} slots of {} descriptions", valid.len());
    for (when, sentences) in [("before", &before), ("after", &after)] {
        let said: usize = valid.iter().zip(sentences).map(|(line, said_)| said(line, said_)).sum();
        println!("  {when:<10} {:>5.1} %", 100. * said as f64 / slots as f64);
    }
    println!("a slot counts where the grammar's words for its value stand in the sentence");
    for i in (0..valid.len()).step_by(valid.len().div_ceil(SHOWN)) {
        println!("\n{}\n  before     {}", valid[i].description, before[i]);
        println!("  after      {}\n  reference  {}", after[i], valid[i].sentence);
    }
    Ok(())
}

/// An error unless a new model with the saved adapter has the loss of the one that trained it.
fn check_restored(
    base: &Base,
    trained: &Gpt2,
    file: &Path,
    batches: &[crate::data::Batch],
) -> Result<()> {
    let adapter = adapter();
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    let _ = adapter.restore(file)?; // strict: what is missing or left over is an error
    adapter.eval()?;
    let (before, after) = (loss(trained, batches)?, loss(&model, batches)?);
    match before.to_bits() == after.to_bits() {
        true => Ok(()),
        false => Err(format!("the loaded adapter's loss is {after}, it was {before}").into()),
    }
}
