//! An adapter for a base: trained, measured, and the best one saved.

use super::args::Args;
use super::batch::{rows, Batch};
use super::data::{self, Document};
use super::examples::{examples, Example, Examples};
use super::loss::{batch_loss, checkpointed_loss, mean_loss};
use super::peak;
use super::run::{self, Options, Run};
use super::steps::{train, Plan, Steps};
use crate::model::Base;
use crate::report::Report;
use crate::rng::Rng;
use crate::Result;
use lora::adapter::{Adapter, AdapterConfig};
use loralib as lora;
use serde_json::json;
use std::path::Path;

/// Unless the options say otherwise.
const STEPS: u32 = 200;

/// More examples would cost time, and hardly make the measure better.
const HELD_OUT: usize = 256;

/// Trains on a file, keeps the best adapter in `--out` and gives a document to talk about; `None` if the run was stopped.
pub fn adapt(args: &Args, base: &Base, file: &Path, report: Report) -> Result<Option<Document>> {
    let (rank, widest) = (args.rank as usize, base.config.hidden_size);
    if rank > widest {
        return Err(format!("--rank {rank} is above the model's hidden_size, {widest}").into());
    }
    peak::reset(); // without the tiny model's training
    let length = (args.length as usize).min(base.config.longest);
    if length < args.length as usize {
        let line = format!("rows have {length} tokens, as many as the model takes");
        report.tell(line, "length", json!({ "length": length }));
    }
    let (train_on, mut valid) = documents(args, base, file)?;
    let training = examples(&train_on, &base.tokens, length)?;
    let measured = examples(&valid, &base.tokens, length)?;
    let packed = (!args.no_packing).then_some(length);
    tell_examples("to train on", &training, length, packed, report);
    tell_examples("to measure on", &measured, length, Some(length), report);

    let config = AdapterConfig {
        base_model_name_or_path: args.base_model.clone().or(base.folder()),
        task_type: Some("CAUSAL_LM".to_owned()),
        ..args.lora().into()
    };
    let adapter = Adapter::new(config).targets(args.targets()).seed(args.seed);
    let plan = Plan {
        what: "adapting",
        steps: steps(args, rows(&training.all, packed, None).len(), report),
        lr: args.lr.unwrap_or(if args.model.is_some() { 2e-4 } else { 5e-3 }),
        batch: args.batch as usize,
        accumulate: args.accumulate as usize,
        packed,
        clip: args.clip,
        seed: args.seed,
    };
    let options = Options {
        model: base.name(),
        rank: args.rank as usize,
        alpha: args.alpha,
        dropout: args.dropout,
        init_lora_weights: format!("{:?}", args.init_lora_weights),
        targets: args.targets.clone(),
        lr: plan.lr,
        steps: plan.steps,
        batch: plan.batch,
        accumulate: plan.accumulate,
        length,
        no_packing: args.no_packing,
        clip: plan.clip,
        seed: plan.seed,
        data: hash(&training.all),
        valid: hash(&measured.all),
    };
    if args.resume {
        run::check_options(&args.out, &options)?;
    }
    let model = base.model(adapter.var_builder(base.var_builder()?))?;
    adapter.check()?;
    let summary = adapter.summary()?;
    let (trained, layers) = (summary.trainable(), summary.adapted.len());
    let values = json!({ "parameters": trained, "layers": layers });
    report.tell(format!("{trained} parameters in {layers} layers"), "adapter", values);
    if !args.resume {
        run::prepare(&args.out)?;
    }

    let validate = || -> Result<f64> {
        adapter.eval()?; // without a graph
        let loss = mean_loss(&model, &measured.all, (plan.batch, length), &base.device)?;
        adapter.train()?;
        Ok(loss)
    };
    let run = Run {
        out: args.out.clone(),
        options,
        save_every: args.save_every as usize,
        validate_every: args.validate_every as usize,
        resume: args.resume,
        adapter: adapter.clone(),
        validate: &validate,
        keep: &|| base.save(&adapter, &args.out),
        report,
    };
    let loss = |batch: &Batch| match args.checkpointing {
        true => checkpointed_loss(&model, &adapter, batch),
        false => batch_loss(&model, batch),
    };
    let (vars, frozen) = (adapter.named_vars()?, adapter.frozen_vars());
    let examples = &training.all;
    let steps = train(vars, frozen, (&plan, Some(&run)), examples, &base.device, report, loss)?;
    tell_end(args, base, &steps, report);
    Ok(steps.ended.then(|| valid.swap_remove(0)))
}

/// The steps that were asked for, and how often each example is seen in them.
fn steps(args: &Args, rows: usize, report: Report) -> usize {
    let each = args.batch as usize * args.accumulate as usize;
    let steps = match args.epochs {
        Some(epochs) => (epochs as usize * rows).div_ceil(each),
        None => args.steps.unwrap_or(STEPS) as usize,
    };
    let epochs = (steps * each) as f64 / rows.max(1) as f64;
    let line = format!("{steps} steps, which see each example {epochs:.1} times");
    report.tell(line, "steps", json!({ "steps": steps, "epochs": epochs }));
    steps
}

/// To train on, and to measure on.
fn documents(args: &Args, base: &Base, file: &Path) -> Result<(Vec<Document>, Vec<Document>)> {
    let columns = args.columns.clone().unwrap_or_default();
    let read = |file: &Path| data::read(file, &columns, base.template.as_ref());
    let mut documents = read(file)?;
    if let Some(valid) = &args.valid {
        return Ok((documents, read(valid)?));
    }
    if documents.len() < 2 {
        let reason = "one example, none is left to measure on: give --valid";
        return Err(format!("{}: {reason}", file.display()).into());
    }
    Rng::new(args.seed).shuffle(&mut documents);
    let held_out = (documents.len() / 20).clamp(1, HELD_OUT);
    let valid = documents.split_off(documents.len() - held_out);
    Ok((documents, valid))
}

/// What the examples are: their lengths, what of them is learned, their rows, and what became of longer ones.
fn tell_examples(
    what: &str,
    examples: &Examples,
    length: usize,
    packed: Option<usize>,
    report: Report,
) {
    let Examples { all, cut, dropped } = examples;
    let mut lens: Vec<_> = all.iter().map(Example::inputs).collect();
    lens.sort_unstable();
    let (tokens, learned) =
        (lens.iter().sum::<usize>(), all.iter().map(Example::predicted).sum::<usize>());
    let rows = rows(all, packed, None).len();
    let (shortest, median, longest) =
        (lens.first().copied(), lens.get(lens.len() / 2).copied(), lens.last().copied());
    let [shortest, median, longest] = [shortest, median, longest].map(Option::unwrap_or_default);
    let share = 100. * learned as f64 / tokens.max(1) as f64;
    let line = format!(
        "{} examples {what}: {shortest} to {longest} tokens, median {median}, {share:.0} % learned; {rows} rows",
        all.len()
    );
    let values = json!({
        "what": what, "examples": all.len(), "tokens": tokens, "learned": learned, "shortest": shortest,
        "median": median, "longest": longest, "rows": rows, "cut": cut, "dropped": dropped.len(),
    });
    report.tell(line, "examples", values);
    if *cut > 0 {
        let line = format!("{cut} of them are cut off after {length} tokens: see --length");
        report.tell(line, "cut", json!({ "examples": cut }));
    }
    if let Some(first) = dropped.first() {
        let line = format!(
            "{} more are left out, the first is {first}: nothing to learn among the first {length} tokens",
            dropped.len()
        );
        report.tell(line, "dropped", json!({ "examples": dropped }));
    }
}

/// What the run took, and where its results are.
fn tell_end(args: &Args, base: &Base, steps: &Steps, report: Report) {
    let mut times = steps.times.clone();
    times.sort();
    if let Some(median) = times.get(times.len() / 2) {
        let seconds = times.iter().sum::<std::time::Duration>().as_secs_f64();
        let speed = steps.tokens as f64 / seconds;
        let median = median.as_secs_f64();
        let line = format!("a step took {:.0} ms (median), {speed:.0} tokens/s", median * 1e3);
        report.tell(line, "time", json!({ "step_seconds": median, "tokens_per_second": speed }));
    }
    if let Some(peak) = peak::peak() {
        report.tell(format!("peak of memory {peak:.0} MiB"), "memory", json!({ "peak_mib": peak }));
    }
    if let Some((step, loss)) = steps.curve.best() {
        let out = args.out.display();
        let also = if base.gguf().is_some() { ", for llama.cpp in adapter.gguf" } else { "" };
        let line = format!("adapter of step {step} in {out}{also}, losses in loss.svg");
        report.tell(
            line,
            "saved",
            json!({ "step": step, "loss": loss, "out": args.out.display().to_string() }),
        );
        let before = steps.curve.validation.first().filter(|(step, _)| *step == 0);
        if let Some((_, before)) = before.filter(|(_, before)| loss > *before) {
            let line = format!(
                "its validation loss is above {before:.4}, that without it: try a smaller --lr"
            );
            report.tell(line, "worse", json!({ "loss": loss, "without": before }));
        }
    }
}

/// FNV-1a of all tokens and of what is learned.
fn hash(examples: &[Example]) -> u64 {
    let tokens = examples.iter().flat_map(|example| example.ids.iter().zip(&example.learned));
    tokens.fold(0xcbf2_9ce4_8422_2325, |hash: u64, (id, learned)| {
        let token = u64::from(*id) << 1 | u64::from(*learned);
        (hash ^ token).wrapping_mul(0x100_0000_01b3)
    })
}
