//! The training loop: AdamW, a rate that rises and falls, accumulated gradients, and a progress bar.

use crate::batch::{groups, Batch};
use crate::examples::Example;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use indicatif::{ProgressBar, ProgressStyle};
use lora::train::{add_grads, Schedule};
use loralib as lora;
use std::time::{Duration, Instant};

pub struct Plan {
    pub what: &'static str,
    pub steps: usize,
    pub lr: f64,
    /// Examples per batch, and batches per step.
    pub batch: usize,
    pub accumulate: usize,
    pub seed: u64,
}

/// Trains `vars`, which are those of `held` that a model should learn. Gives each step's time.
pub fn train(
    held: &VarMap,
    vars: Vec<Var>,
    plan: &Plan,
    examples: &[Example],
    device: &Device,
    loss: impl Fn(&Batch) -> candle_core::Result<Tensor>,
) -> Result<Vec<Duration>> {
    let bar = ProgressBar::new(plan.steps as u64).with_prefix(plan.what);
    bar.set_style(ProgressStyle::with_template(
        "{prefix:>12} {bar:30} step {pos}/{len}, loss {msg}, {eta} left",
    )?);
    let mut opt = AdamW::new(vars.clone(), ParamsAdamW { lr: plan.lr, ..Default::default() })?;
    let schedule = Schedule::Cosine { warmup: plan.steps / 20, steps: plan.steps };
    let mut rng = Rng::new(plan.seed);
    let (mut times, mut mean, mut tokens) = (vec![], None, 0);
    let (mut waiting, begin) = (vec![], Instant::now());
    for step in 0..plan.steps {
        while waiting.len() < plan.accumulate {
            waiting.extend(groups(examples, plan.batch, Some(&mut rng)));
        }
        let start = Instant::now();
        let batches = waiting.drain(..plan.accumulate).map(|group| Batch::new(&group, device));
        let batches = batches.collect::<Result<Vec<_>>>()?;
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
        let Some(grads) = grads else { return Err("a step without batches".into()) };
        if step == 0 {
            check_grads(lora::missing_grads(held, &grads))?;
        }
        if !sum.is_finite() {
            return Err(format!("step {step}: the loss is {sum}: try a smaller --lr").into());
        }
        opt.set_learning_rate(plan.lr * schedule.factor(step));
        opt.step(&grads)?;
        times.push(start.elapsed());
        let smooth = 0.9 * mean.unwrap_or(sum) + 0.1 * sum;
        mean = Some(smooth);
        let speed = tokens as f64 / begin.elapsed().as_secs_f64();
        bar.set_message(format!("{smooth:.3}, {speed:.0} tokens/s"));
        bar.inc(1);
    }
    bar.finish();
    Ok(times)
}

/// A fused operation that cuts the graph makes no error: what lies before it is just not trained.
fn check_grads(missing: Vec<String>) -> Result<()> {
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("no gradient for {}", missing.join(", ")).into()),
    }
}
