//! The training loop: AdamW, a rate that rises and falls, clipped and accumulated gradients.

use super::batch::{Batch, Rows};
use super::curve::Curve;
use super::run::Run;
use crate::interrupt;
use crate::report::Report;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use lora::train::{add_grads, clip_grad_norm, AdamW, Schedule};
use loralib as lora;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub struct Plan {
    pub what: &'static str,
    pub steps: usize,
    pub lr: f64,
    /// Rows per batch, and batches per step.
    pub batch: usize,
    pub accumulate: usize,
    /// The largest norm of the gradients.
    pub clip: f64,
    pub seed: u64,
}

/// What the steps were.
pub struct Steps {
    pub times: Vec<Duration>,
    pub tokens: usize,
    pub curve: Curve,
    /// Whether the run has all its steps.
    pub ended: bool,
}

/// Trains the variables of an optimizer, a `run` of which is on disk, until the end or Ctrl-C.
pub fn train<R: Rows>(
    named: impl IntoIterator<Item = (String, Var)>,
    frozen: BTreeMap<String, Var>,
    (plan, run): (&Plan, Option<&Run>),
    examples: &R,
    device: &Device,
    report: Report,
    loss: impl Fn(&R::Batch) -> candle_core::Result<Tensor>,
) -> Result<Steps> {
    let named: Vec<_> = named.into_iter().collect();
    let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
    let params = ParamsAdamW { lr: plan.lr, ..Default::default() };
    let mut opt = AdamW::named(named, params)?.with_frozen(frozen)?;
    let curve = match run {
        Some(run) => run.begin(&mut opt)?,
        None => Curve::default(),
    };
    let mut steps = Steps { times: vec![], tokens: 0, curve, ended: true };
    let mut progress = report.progress(plan.what, plan.steps as u64).of_steps();
    let schedule = Schedule::Cosine { warmup: plan.steps / 20, steps: plan.steps };
    let mut rng = Rng::new(plan.seed);
    let (mut mean, mut waiting, done) = (None, vec![], opt.steps());
    progress.start(done as u64);
    for step in 0..plan.steps {
        let needed = plan.accumulate * plan.batch;
        while waiting.len() < needed {
            let all = examples.rows(Some(&mut rng));
            if all.is_empty() {
                return Err("no rows to train on".into());
            }
            waiting.extend(all);
        }
        let rows: Vec<_> = waiting.drain(..needed).collect();
        if step < done {
            continue;
        }
        let start = Instant::now();
        let batches = rows.chunks(plan.batch).map(|rows| examples.batch(rows, device));
        let batches = batches.collect::<Result<Vec<_>>>()?;
        let counted: usize = batches.iter().map(|batch| batch.as_ref().counted).sum();
        let (mut sum, mut grads) = (0., None);
        for batch in &batches {
            // Every label of the step counts alike.
            let Batch { counted: own, .. } = batch.as_ref();
            let loss = (loss(batch)? * (*own as f64 / counted as f64))?;
            match &mut grads {
                None => grads = Some(loss.backward()?),
                Some(grads) => add_grads(&vars, grads, loss.backward()?)?,
            }
            sum += f64::from(loss.to_scalar::<f32>()?);
            steps.tokens += batch.as_ref().tokens();
        }
        let Some(mut grads) = grads else { return Err("a step without batches".into()) };
        if !sum.is_finite() {
            return Err(format!("step {}: the loss is {sum}: try a smaller --lr", step + 1).into());
        }
        clip_grad_norm(&vars, &mut grads, plan.clip)?;
        opt.set_learning_rate(plan.lr * schedule.factor(step));
        opt.step(&grads)?;
        steps.times.push(start.elapsed());
        let smooth = 0.9 * mean.unwrap_or(sum) + 0.1 * sum;
        mean = Some(smooth);
        let speed = steps.tokens as f64 / steps.times.iter().sum::<Duration>().as_secs_f64();
        progress.step(step as u64 + 1, sum, smooth, speed);
        steps.curve.training.push((step + 1, sum));
        let stop = interrupt::asked();
        if let Some(run) = run {
            progress.suspend(|| run.after(&opt, stop, &mut steps.curve))?;
        }
        if stop && step + 1 < plan.steps {
            steps.ended = false;
            break;
        }
    }
    progress.finish();
    Ok(steps)
}
