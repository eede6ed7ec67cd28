//! The training loop: AdamW, a rate that rises and falls, clipped and accumulated gradients, and a progress bar.

use super::batch::{groups, Batch};
use super::curve::Curve;
use super::examples::Example;
use super::run::Run;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use indicatif::{ProgressBar, ProgressStyle};
use lora::train::{add_grads, clip_grad_norm, AdamW, Schedule};
use loralib as lora;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub struct Plan {
    pub what: &'static str,
    pub steps: usize,
    pub lr: f64,
    /// Examples per batch, and batches per step.
    pub batch: usize,
    pub accumulate: usize,
    /// The largest norm of the gradients.
    pub clip: f64,
    pub seed: u64,
}

/// Trains the variables of an optimizer, a `run` of which is on disk. Gives each step's time and the losses.
pub fn train(
    named: impl IntoIterator<Item = (String, Var)>,
    frozen: BTreeMap<String, Var>,
    plan: &Plan,
    run: Option<&Run>,
    examples: &[Example],
    device: &Device,
    loss: impl Fn(&Batch) -> candle_core::Result<Tensor>,
) -> Result<(Vec<Duration>, Curve)> {
    let named: Vec<_> = named.into_iter().collect();
    let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
    let params = ParamsAdamW { lr: plan.lr, ..Default::default() };
    let mut opt = AdamW::named(named, params)?.with_frozen(frozen)?;
    let mut curve = match run {
        Some(run) => run.begin(&mut opt, plan, examples)?,
        None => Curve::default(),
    };
    let bar = ProgressBar::new(plan.steps as u64).with_prefix(plan.what);
    bar.set_style(ProgressStyle::with_template(
        "{prefix:>12} {bar:30} step {pos}/{len}, loss {msg}, {eta} left",
    )?);
    let schedule = Schedule::Cosine { warmup: plan.steps / 20, steps: plan.steps };
    let mut rng = Rng::new(plan.seed);
    let (mut times, mut mean, mut tokens) = (vec![], None, 0);
    let (mut waiting, done) = (vec![], opt.steps());
    bar.set_position(done as u64);
    bar.reset_eta();
    for step in 0..plan.steps {
        while waiting.len() < plan.accumulate {
            waiting.extend(groups(examples, plan.batch, Some(&mut rng)));
        }
        let groups = waiting.drain(..plan.accumulate);
        if step < done {
            continue;
        }
        let start = Instant::now();
        let batches = groups.map(|group| Batch::new(&group, device)).collect::<Result<Vec<_>>>()?;
        let predicted: usize = batches.iter().map(|batch| batch.predicted).sum();
        let (mut sum, mut grads) = (0., None);
        for batch in &batches {
            // Every predicted token of the step counts alike.
            let loss = (loss(batch)? * (batch.predicted as f64 / predicted as f64))?;
            match &mut grads {
                None => grads = Some(loss.backward()?),
                Some(grads) => add_grads(&vars, grads, loss.backward()?)?,
            }
            sum += f64::from(loss.to_scalar::<f32>()?);
            tokens += batch.tokens;
        }
        let Some(mut grads) = grads else { return Err("a step without batches".into()) };
        if !sum.is_finite() {
            return Err(format!("step {step}: the loss is {sum}: try a smaller --lr").into());
        }
        clip_grad_norm(&vars, &mut grads, plan.clip)?;
        opt.set_learning_rate(plan.lr * schedule.factor(step));
        opt.step(&grads)?;
        times.push(start.elapsed());
        let smooth = 0.9 * mean.unwrap_or(sum) + 0.1 * sum;
        mean = Some(smooth);
        let speed = tokens as f64 / times.iter().sum::<Duration>().as_secs_f64();
        bar.set_message(format!("{smooth:.3}, {speed:.0} tokens/s"));
        bar.inc(1);
        curve.training.push((step + 1, sum));
        if let Some(run) = run {
            bar.suspend(|| run.after(&opt, plan, examples, &mut curve))?;
        }
    }
    bar.finish();
    Ok((times, curve))
}
