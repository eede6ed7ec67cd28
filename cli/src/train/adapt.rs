//! An adapter for a base: trained, measured, and the best one saved.

use super::args::Args;
use super::batch::Batch;
use super::data::{self, Document};
use super::examples::examples;
use super::loss::{batch_loss, checkpointed_loss, mean_loss};
use super::peak;
use super::run::Run;
use super::steps::{train, Plan};
use crate::model::Base;
use crate::rng::Rng;
use crate::Result;
use lora::adapter::{Adapter, AdapterConfig};
use loralib as lora;
use std::path::Path;

/// More examples would cost time, and hardly make the measure better.
const HELD_OUT: usize = 256;

/// Trains on a file, keeps the best adapter in `--out` and gives a document to talk about.
pub fn adapt(args: &Args, base: &Base, file: &Path) -> Result<Document> {
    peak::reset(); // without the tiny model's training
    let length = (args.length as usize).min(base.config.longest());
    let (train_on, mut valid) = documents(args, base, file)?;
    let (training, cut) = examples(&train_on, &base.tokens, length)?;
    let (measured, _) = examples(&valid, &base.tokens, length)?;
    println!("{} examples to train on, {} to measure on", training.len(), measured.len());
    if cut > 0 {
        println!("{cut} of {} are cut off after {length} tokens: see --length", training.len());
    }

    let config = AdapterConfig {
        base_model_name_or_path: args.base_model.clone().or(base.folder()),
        task_type: Some("CAUSAL_LM".to_owned()),
        ..args.lora().into()
    };
    let adapter = Adapter::new(config).targets(args.targets()).seed(args.seed);
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    adapter.check()?;
    let summary = adapter.summary()?;
    println!("{} parameters in {} layers", summary.trainable(), summary.adapted.len());

    let validate = || -> Result<f64> {
        adapter.eval()?; // without a graph
        let loss = mean_loss(&model, &measured, args.batch as usize, &base.device)?;
        adapter.train()?;
        Ok(loss)
    };
    let plan = Plan {
        what: "adapting",
        steps: args.steps as usize,
        lr: args.lr.unwrap_or(if args.model.is_some() { 2e-4 } else { 5e-3 }),
        batch: args.batch as usize,
        accumulate: args.accumulate as usize,
        clip: args.clip,
        seed: args.seed,
    };
    let run = Run {
        out: args.out.clone(),
        save_every: args.save_every as usize,
        validate_every: args.validate_every as usize,
        resume: args.resume,
        adapter: adapter.clone(),
        validate: &validate,
        keep: &|| base.save(&adapter, &args.out),
    };
    let loss = |batch: &Batch| match args.checkpointing {
        true => checkpointed_loss(&model, &adapter, batch),
        false => batch_loss(&model, batch),
    };
    let (vars, frozen) = (adapter.named_vars()?, adapter.frozen_vars());
    let (mut times, curve) = train(vars, frozen, &plan, Some(&run), &training, &base.device, loss)?;
    times.sort();
    if let Some(median) = times.get(times.len() / 2) {
        println!("a step took {:.0} ms (median)", median.as_secs_f64() * 1e3);
    }
    if let Some(peak) = peak::peak() {
        println!("peak of memory {peak:.0} MiB");
    }
    if let Some((step, _)) = curve.best() {
        println!("adapter of step {step} in {}, losses in loss.svg", args.out.display());
    }
    Ok(valid.swap_remove(0))
}

/// To train on, and to measure on.
fn documents(args: &Args, base: &Base, file: &Path) -> Result<(Vec<Document>, Vec<Document>)> {
    let mut documents = data::read(file, base.template.as_ref())?;
    if let Some(valid) = &args.valid {
        return Ok((documents, data::read(valid, base.template.as_ref())?));
    }
    if documents.len() < 2 {
        return Err(format!("{}: one document, none is left to measure on", file.display()).into());
    }
    Rng::new(args.seed).shuffle(&mut documents);
    let held_out = (documents.len() / 20).clamp(1, HELD_OUT);
    let valid = documents.split_off(documents.len() - held_out);
    Ok((documents, valid))
}
