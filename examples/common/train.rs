//! The training loop: AdamW, a rate that rises and falls, and a progress bar.

use crate::rng::Rng;
use crate::Result;
use candle_core::{Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

pub struct Plan {
    pub what: &'static str,
    pub epochs: usize,
    pub lr: f64,
    pub seed: u64,
}

/// Trains `vars`, which are those of `held` that a model should learn, on the `batches` of each
/// epoch. Gives each step's time.
pub fn train<B>(
    held: &VarMap,
    vars: Vec<Var>,
    plan: &Plan,
    mut batches: impl FnMut(&mut Rng) -> Result<Vec<B>>,
    loss: impl Fn(&B) -> candle_core::Result<Tensor>,
) -> Result<Vec<Duration>> {
    let bar = ProgressBar::no_length().with_prefix(plan.what);
    bar.set_style(ProgressStyle::with_template(
        "{prefix:>12} {bar:30} step {pos}/{len}, loss {msg}, {eta} left",
    )?);
    let mut opt = AdamW::new(vars, ParamsAdamW { lr: plan.lr, ..Default::default() })?;
    let mut rng = Rng::new(plan.seed);
    let (mut times, mut mean) = (vec![], None);
    for _ in 0..plan.epochs {
        let batches = batches(&mut rng)?;
        let steps = plan.epochs * batches.len();
        bar.set_length(steps as u64);
        for batch in &batches {
            let (step, start) = (times.len(), Instant::now());
            opt.set_learning_rate(plan.lr * schedule(step, steps));
            let loss = loss(batch)?;
            let grads = loss.backward()?;
            if step == 0 {
                check_grads(loralib::missing_grads(held, &grads))?;
            }
            opt.step(&grads)?;
            // Reading the loss waits for the device.
            let loss = f64::from(loss.to_scalar::<f32>()?);
            times.push(start.elapsed());
            if !loss.is_finite() {
                return Err(format!("step {step}: the loss is {loss}: try a smaller --lr").into());
            }
            let smooth = 0.95 * mean.unwrap_or(loss) + 0.05 * loss;
            mean = Some(smooth);
            bar.set_message(format!("{smooth:.3}"));
            bar.inc(1);
        }
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

/// A factor that rises over the first twentieth of the steps and falls to zero over the others.
fn schedule(step: usize, steps: usize) -> f64 {
    let (step, steps) = (step as f64, steps as f64);
    let rise = (steps / 20.).max(1.);
    ((step + 1.) / rise).min((steps - step) / (steps - rise).max(1.)).min(1.)
}
