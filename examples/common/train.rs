//! The training loop: AdamW, with a rate that rises and falls.

use crate::Result;
use candle_core::{Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use loralib::train::{AdamW, Sampler, Schedule};
use std::time::{Duration, Instant};

pub struct Plan {
    pub what: &'static str,
    pub epochs: usize,
    /// The rate at its peak.
    pub lr: f64,
    pub seed: u64,
}

/// Trains `vars`, which are those of `held` that a model should learn, on all batches in each epoch. Gives each step's
/// time.
pub fn train<B>(
    held: &VarMap,
    vars: Vec<Var>,
    plan: &Plan,
    batches: &[B],
    loss: impl Fn(&B) -> candle_core::Result<Tensor>,
) -> Result<Vec<Duration>> {
    let &Plan { what, epochs, lr, seed } = plan;
    let mut opt = AdamW::new(vars, ParamsAdamW { lr, ..Default::default() })?;
    let mut sampler = Sampler::new(batches.len(), 1, seed)?;
    let steps = epochs * batches.len();
    let schedule = Schedule::Linear { warmup: steps / 20, steps };
    let (mut times, mut sum) = (vec![], 0.);
    for step in 0..steps {
        let start = Instant::now();
        let loss = loss(&batches[sampler.batch(step)[0]])?;
        let grads = loss.backward()?;
        if step == 0 {
            // An operation that cuts the graph makes no error: what lies before it is just not trained.
            let missing = loralib::missing_grads(held, &grads);
            if !missing.is_empty() {
                return Err(format!("no gradient for {}", missing.join(", ")).into());
            }
        }
        opt.set_learning_rate(lr * schedule.factor(step));
        opt.step(&grads)?;
        // Reading the loss waits for the device.
        let loss = loss.to_scalar::<f32>()?;
        times.push(start.elapsed());
        if !loss.is_finite() {
            return Err(format!("step {step}: the loss is {loss}: try a smaller rate").into());
        }
        sum += loss;
        let (done, tenth) = (step + 1, steps.div_ceil(10));
        if done % tenth == 0 {
            println!("{what}: step {done} of {steps}, loss {:.3}", sum / tenth as f32);
            sum = 0.;
        }
    }
    Ok(times)
}
