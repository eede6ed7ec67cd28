//! A run on disk: its state to resume from, its best adapter, and its curve.

use super::curve::Curve;
use super::examples::Example;
use super::steps::Plan;
use crate::Result;
use lora::train::AdamW;
use lora::Adapter;
use loralib as lora;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What to do between the steps.
pub struct Run<'a> {
    /// The folder for the state and the curve.
    pub out: PathBuf,
    pub save_every: usize,
    pub validate_every: usize,
    /// Goes on with the run in the folder.
    pub resume: bool,
    /// It draws the masks of dropout.
    pub adapter: Adapter,
    /// The validation loss.
    pub validate: &'a dyn Fn() -> Result<f64>,
    /// Keeps the adapter as the best so far.
    pub keep: &'a dyn Fn() -> Result<()>,
}

/// What a saved run says beside the optimizer's state. The order of the examples follows from the seed.
#[derive(Serialize, Deserialize)]
struct Progress<C> {
    dropout: u64,
    options: Options,
    curve: C,
}

/// What has to be the same when a run goes on.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Options {
    seed: u64,
    steps: usize,
    lr: f64,
    clip: f64,
    batch: usize,
    accumulate: usize,
    alpha: f64,
    dropout: f32,
    init_lora_weights: String,
    /// A hash of all tokens.
    data: u64,
}

impl Run<'_> {
    /// The curve so far: of the run that is resumed, or with the loss before the first step.
    pub fn begin(&self, opt: &mut AdamW, plan: &Plan, examples: &[Example]) -> Result<Curve> {
        if !self.resume {
            let mut curve = Curve::default();
            self.measure(0, &mut curve)?;
            return Ok(curve);
        }
        let file = self.state();
        let Progress { dropout, options: was, curve } = opt.load(&file)?;
        let now = self.options(plan, examples);
        if was != now {
            let file = file.display();
            return Err(format!("{file}: the run was {was:?}, and is now {now:?}").into());
        }
        self.adapter.set_dropout_position(dropout)?;
        match opt.steps() {
            done if done == plan.steps => println!("the run has all its {done} steps"),
            done => println!("going on after step {done}"),
        }
        Ok(curve)
    }

    /// Measures and saves where it is time to, and after the last step.
    pub fn after(
        &self,
        opt: &AdamW,
        plan: &Plan,
        examples: &[Example],
        curve: &mut Curve,
    ) -> Result<()> {
        let step = opt.steps();
        let due = |every| step.is_multiple_of(every) || step == plan.steps;
        if due(self.validate_every) {
            let best = curve.best();
            let loss = self.measure(step, curve)?;
            if best.is_none_or(|(_, best)| loss < best) {
                (self.keep)()?;
            }
            curve.draw(&self.out.join("loss.svg"))?;
        }
        if due(self.save_every) {
            let (dropout, options) =
                (self.adapter.dropout_position(), self.options(plan, examples));
            opt.save(self.state(), &Progress { dropout, options, curve })?;
        }
        Ok(())
    }

    fn measure(&self, step: usize, curve: &mut Curve) -> Result<f64> {
        let loss = (self.validate)()?;
        curve.validation.push((step, loss));
        println!("step {step}: validation loss {loss:.4}, perplexity {:.3}", loss.exp());
        Ok(loss)
    }

    fn state(&self) -> PathBuf {
        self.out.join("state.safetensors")
    }

    fn options(&self, plan: &Plan, examples: &[Example]) -> Options {
        let &Plan { seed, steps, lr, clip, batch, accumulate, .. } = plan;
        let lora = self.adapter.config().lora;
        let tokens = examples.iter().flat_map(|example| example.ids.iter().zip(&example.learned));
        // FNV-1a.
        let data = tokens.fold(0xcbf2_9ce4_8422_2325, |hash: u64, (id, learned)| {
            let token = u64::from(*id) << 1 | u64::from(*learned);
            (hash ^ token).wrapping_mul(0x100_0000_01b3)
        });
        Options {
            seed,
            steps,
            lr,
            clip,
            batch,
            accumulate,
            alpha: lora.lora_alpha,
            dropout: lora.lora_dropout,
            init_lora_weights: format!("{:?}", lora.init_lora_weights),
            data,
        }
    }
}
