//! The run of an adapter, whatever its model is: trained, measured, and the best one saved.

use super::args::Args;
use super::batch::Rows;
use super::peak;
use super::run::{self, Measured, Options, Run};
use super::steps::{train, Plan, Steps};
use crate::report::Report;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};
use loralib::Adapter;
use serde_json::json;
use std::path::Path;

/// Unless the options say otherwise.
const STEPS: u32 = 200;

/// More examples would cost time, and hardly make the measure better.
const HELD_OUT: usize = 256;

/// An adapter, which a model has, and what to do with it.
pub struct Fit<'a, R: Rows> {
    pub args: &'a Args,
    pub adapter: &'a Adapter,
    pub device: &'a Device,
    pub examples: &'a R,
    /// Of a batch.
    pub rows: usize,
    pub options: Options,
    pub loss: &'a dyn Fn(&R::Batch) -> candle_core::Result<Tensor>,
    pub validate: &'a dyn Fn() -> Result<Measured>,
    /// Writes the adapter into `--out`.
    pub save: &'a dyn Fn() -> Result<()>,
    /// Files that it writes besides, for people.
    pub also: &'a str,
}

impl<R: Rows> Fit<'_, R> {
    /// Whether the run has all its steps: else it was stopped.
    pub fn run(self, report: Report) -> Result<bool> {
        let Self { args, adapter, device, examples, options, .. } = self;
        adapter.check()?;
        let summary = adapter.summary()?;
        let (trained, layers) = (summary.trainable(), summary.adapted.len());
        let values = json!({ "parameters": trained, "layers": layers });
        report.tell(format!("{trained} parameters in {layers} layers"), "adapter", values);
        if !args.resume {
            run::prepare(&args.out)?;
        }
        let validate = || {
            adapter.eval()?; // without a graph
            let measured = (self.validate)()?;
            adapter.train()?;
            Ok(measured)
        };
        let plan = Plan {
            what: "adapting",
            steps: options.steps,
            lr: options.lr,
            batch: self.rows,
            accumulate: options.accumulate,
            clip: options.clip,
            seed: options.seed,
        };
        let run = Run {
            out: args.out.clone(),
            options,
            save_every: args.save_every as usize,
            validate_every: args.validate_every as usize,
            resume: args.resume,
            adapter: adapter.clone(),
            validate: &validate,
            keep: self.save,
            report,
        };
        let (vars, frozen) = (adapter.named_vars()?, adapter.frozen_vars());
        let plan = (&plan, Some(&run));
        let steps = train(vars, frozen, plan, examples, device, report, self.loss)?;
        tell_end(&args.out, self.also, &steps, report);
        Ok(steps.ended)
    }
}

/// An error for a rank that could add nothing.
pub fn check_rank(args: &Args, widest: usize) -> Result<()> {
    match args.rank as usize > widest {
        true => {
            Err(format!("--rank {} is above the model's hidden_size, {widest}", args.rank).into())
        }
        false => Ok(()),
    }
}

/// What is read from DATA, and from `--valid` or held out of it, `least` then.
pub fn to_train_and_measure<T>(
    args: &Args,
    file: &Path,
    least: usize,
    read: impl Fn(&Path) -> Result<Vec<T>>,
) -> Result<(Vec<T>, Vec<T>)> {
    let mut all = read(file)?;
    if let Some(valid) = &args.valid {
        return Ok((all, read(valid)?));
    }
    if all.len() < 2 * least {
        let reason = format!("{} example, none is left to measure on: give --valid", all.len());
        return Err(format!("{}: {reason}", file.display()).into());
    }
    Rng::new(args.seed).shuffle(&mut all);
    let held_out = (all.len() / 20).clamp(least, HELD_OUT);
    let valid = all.split_off(all.len() - held_out);
    Ok((all, valid))
}

/// The steps that were asked for, and how often each example is seen in them.
pub fn steps(args: &Args, (rows, batch): (usize, usize), report: Report) -> usize {
    let each = batch * args.accumulate as usize;
    let steps = match args.epochs {
        Some(epochs) => (epochs as usize * rows).div_ceil(each),
        None => args.steps.unwrap_or(STEPS) as usize,
    };
    let epochs = (steps * each) as f64 / rows.max(1) as f64;
    let line = format!("{steps} steps, which see each example {epochs:.1} times");
    report.tell(line, "steps", json!({ "steps": steps, "epochs": epochs }));
    steps
}

/// What the run took, and where its results are.
fn tell_end(out: &Path, also: &str, steps: &Steps, report: Report) {
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
        let out = out.display();
        let line = format!("adapter of step {step} in {out}{also}, losses in loss.svg");
        report.tell(line, "saved", json!({ "step": step, "loss": loss, "out": out.to_string() }));
        let before = steps.curve.validation.first().filter(|(step, _)| *step == 0);
        if let Some((_, before)) = before.filter(|(_, before)| loss > *before) {
            let line = format!(
                "its validation loss is above {before:.4}, that without it: try a smaller --lr"
            );
            report.tell(line, "worse", json!({ "loss": loss, "without": before }));
        }
    }
}

/// FNV-1a of what a run is about.
pub fn fnv(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0xcbf2_9ce4_8422_2325, |hash: u64, value| {
        (hash ^ value).wrapping_mul(0x100_0000_01b3)
    })
}
