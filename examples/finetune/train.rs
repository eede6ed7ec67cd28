//! The training loop, the same for the base and for the adapter.

use crate::data::{batches, Batch, Example};
use crate::gpt2::Gpt2;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use indicatif::{ProgressBar, ProgressStyle};

pub struct Plan {
    pub what: &'static str,
    pub epochs: usize,
    pub batch: usize,
    pub lr: f64,
    pub seed: u64,
}

/// The mean loss over the tokens that a batch predicts.
pub fn loss(model: &Gpt2, batch: &Batch) -> candle_core::Result<Tensor> {
    let hidden = model.hidden(&batch.ids)?.flatten(0, 1)?.index_select(&batch.rows, 0)?;
    candle_nn::loss::cross_entropy(&model.head(&hidden)?, &batch.targets)
}

/// Trains `vars`, which are those of `held` that the model should learn.
pub fn train(
    model: &Gpt2,
    held: &VarMap,
    vars: Vec<Var>,
    examples: &[Example],
    plan: &Plan,
    device: &Device,
) -> Result<()> {
    let steps = plan.epochs * examples.len().div_ceil(plan.batch);
    let bar = ProgressBar::new(steps as u64).with_prefix(plan.what);
    bar.set_style(ProgressStyle::with_template(
        "{prefix:>12} {bar:30} step {pos}/{len}, loss {msg}, {eta} left",
    )?);
    let mut opt = AdamW::new(vars, ParamsAdamW { lr: plan.lr, ..Default::default() })?;
    let mut rng = Rng::new(plan.seed);
    let (mut step, mut mean) = (0, None);
    for _ in 0..plan.epochs {
        for batch in batches(examples, plan.batch, Some(&mut rng), device)? {
            opt.set_learning_rate(plan.lr * schedule(step, steps));
            let loss = loss(model, &batch)?;
            let grads = loss.backward()?;
            if step == 0 {
                check_grads(loralib::missing_grads(held, &grads))?;
            }
            opt.step(&grads)?;
            let loss = f64::from(loss.to_scalar::<f32>()?);
            if !loss.is_finite() {
                return Err(format!("step {step}: the loss is {loss}: try a smaller --lr").into());
            }
            let smooth = 0.95 * mean.unwrap_or(loss) + 0.05 * loss;
            (mean, step) = (Some(smooth), step + 1);
            bar.set_message(format!("{smooth:.3}"));
            bar.inc(1);
        }
    }
    bar.finish();
    Ok(())
}

/// A fused operation that cuts the graph makes no error: what lies before it is just not trained.
fn check_grads(missing: Vec<String>) -> Result<()> {
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("no gradient for {}", missing.join(", ")).into()),
    }
}

/// A factor that rises over the first twentieth of the steps and falls to zero over the others.
fn schedule(step: usize, steps: usize) -> f64 {
    let (step, steps) = (step as f64, steps as f64);
    let rise = (steps / 20.).max(1.);
    ((step + 1.) / rise).min((steps - step) / (steps - rise).max(1.)).min(1.)
}

/// As many passes as show at least `seen` lines.
pub fn epochs(lines: usize, seen: usize) -> usize {
    seen.div_ceil(lines)
}
