//! The training loop: AdamW, a rate that rises and falls, clipped and accumulated gradients, a state to resume
//! from, and a progress bar.

use crate::batch::{groups, Batch};
use crate::examples::Example;
use crate::rng::Rng;
use crate::Result;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use indicatif::{ProgressBar, ProgressStyle};
use lora::train::{add_grads, clip_grad_norm, AdamW, Schedule};
use lora::Adapter;
use loralib as lora;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
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
    pub saved: Option<Saved>,
}

/// Where a run is saved, and how often.
pub struct Saved {
    pub file: PathBuf,
    pub every: usize,
    /// Goes on with the run in the file.
    pub resume: bool,
    /// It draws the masks of dropout.
    pub adapter: Adapter,
}

/// What a saved run says beside the optimizer's state. The order of the examples follows from the seed.
#[derive(Serialize, Deserialize)]
struct Progress {
    dropout: u64,
    run: Run,
}

/// What has to be the same when a run goes on.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Run {
    seed: u64,
    steps: usize,
    lr: f64,
    clip: f64,
    batch: usize,
    accumulate: usize,
    alpha: f64,
    dropout: f32,
    /// A hash of all tokens.
    data: u64,
}

/// Trains variables that a model learns. Gives each step's time.
pub fn train(
    named: impl IntoIterator<Item = (String, Var)>,
    plan: &Plan,
    examples: &[Example],
    device: &Device,
    loss: impl Fn(&Batch) -> candle_core::Result<Tensor>,
) -> Result<Vec<Duration>> {
    let named: Vec<_> = named.into_iter().collect();
    let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
    let mut opt = AdamW::named(named.clone(), ParamsAdamW { lr: plan.lr, ..Default::default() })?;
    if let Some(saved) = plan.saved.as_ref().filter(|saved| saved.resume) {
        saved.load(&mut opt, plan, examples)?;
    }
    let bar = ProgressBar::new(plan.steps as u64).with_prefix(plan.what);
    bar.set_style(ProgressStyle::with_template(
        "{prefix:>12} {bar:30} step {pos}/{len}, loss {msg}, {eta} left",
    )?);
    let schedule = Schedule::Cosine { warmup: plan.steps / 20, steps: plan.steps };
    let mut rng = Rng::new(plan.seed);
    let (mut times, mut mean, mut tokens) = (vec![], None, 0);
    let (mut waiting, begin, done) = (vec![], Instant::now(), opt.steps());
    for step in 0..plan.steps {
        while waiting.len() < plan.accumulate {
            waiting.extend(groups(examples, plan.batch, Some(&mut rng)));
        }
        let groups = waiting.drain(..plan.accumulate);
        bar.inc(1);
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
        if step == done {
            check_grads(&named, &grads)?;
        }
        if !sum.is_finite() {
            return Err(format!("step {step}: the loss is {sum}: try a smaller --lr").into());
        }
        clip_grad_norm(&vars, &mut grads, plan.clip)?;
        opt.set_learning_rate(plan.lr * schedule.factor(step));
        opt.step(&grads)?;
        if let Some(saved) = plan.saved.as_ref().filter(|saved| (step + 1) % saved.every == 0) {
            let dropout = saved.adapter.dropout_position();
            opt.save(&saved.file, &Progress { dropout, run: saved.run(plan, examples) })?;
        }
        times.push(start.elapsed());
        let smooth = 0.9 * mean.unwrap_or(sum) + 0.1 * sum;
        mean = Some(smooth);
        let speed = tokens as f64 / begin.elapsed().as_secs_f64();
        bar.set_message(format!("{smooth:.3}, {speed:.0} tokens/s"));
    }
    bar.finish();
    Ok(times)
}

impl Saved {
    fn run(&self, plan: &Plan, examples: &[Example]) -> Run {
        let &Plan { seed, steps, lr, clip, batch, accumulate, .. } = plan;
        let lora = self.adapter.config().lora;
        let tokens = examples.iter().flat_map(|example| example.ids.iter().zip(&example.learned));
        // FNV-1a.
        let data = tokens.fold(0xcbf2_9ce4_8422_2325, |hash: u64, (id, learned)| {
            let token = u64::from(*id) << 1 | u64::from(*learned);
            (hash ^ token).wrapping_mul(0x100_0000_01b3)
        });
        let (alpha, dropout) = (lora.lora_alpha, lora.lora_dropout);
        Run { seed, steps, lr, clip, batch, accumulate, alpha, dropout, data }
    }

    fn load(&self, opt: &mut AdamW, plan: &Plan, examples: &[Example]) -> Result<()> {
        let found: Progress = opt.load(&self.file)?;
        self.adapter.set_dropout_position(found.dropout)?;
        let (found, now) = (found.run, self.run(plan, examples));
        if found != now {
            let file = self.file.display();
            return Err(format!("{file}: the run was {found:?}, and is now {now:?}").into());
        }
        println!("going on after step {}", opt.steps());
        Ok(())
    }
}

/// A fused operation that cuts the graph makes no error: what lies before it is just not trained.
fn check_grads(named: &[(String, Var)], grads: &GradStore) -> Result<()> {
    let missing = named.iter().filter(|(_, var)| grads.get(var).is_none());
    let missing: Vec<_> = missing.map(|(name, _)| name.as_str()).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("no gradient for {}", missing.join(", ")).into()),
    }
}
