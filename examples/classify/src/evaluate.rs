//! How often a model is right, merged and unmerged.

use crate::base::Base;
use crate::classifier::Classifier;
use crate::data::{batches, Example};
use crate::task::Task;
use crate::Result;
use candle_core::{DType, Device, D};
use candle_nn::VarMap;
use lora::{LoraConfig, LoraModule};
use loralib as lora;
use std::fmt;

/// How many of `of` examples were labelled rightly.
#[derive(Clone, Copy)]
pub struct Score {
    pub merged: usize,
    pub unmerged: usize,
    pub of: usize,
}

impl Score {
    /// Of the model that a merge makes, in percent.
    pub fn accuracy(&self) -> f64 {
        100. * self.merged as f64 / self.of as f64
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { merged, unmerged, of } = self;
        write!(f, "merged {merged} of {of} right ({:.2} %), ", self.accuracy())?;
        write!(f, "unmerged {unmerged} of {of}")
    }
}

/// With what is trained in `vars`.
pub fn score(
    base: &Base,
    task: &Task,
    lora: LoraConfig,
    vars: &VarMap,
    examples: &[Example],
    device: &Device,
) -> Result<Score> {
    let right = |merge_weights| -> Result<usize> {
        let mut model = base.model(task, LoraConfig { merge_weights, ..lora }, vars)?;
        model.eval()?;
        right(&model, examples, device)
    };
    Ok(Score { merged: right(true)?, unmerged: right(false)?, of: examples.len() })
}

fn right(model: &Classifier, examples: &[Example], device: &Device) -> Result<usize> {
    let mut right = 0.;
    for batch in batches(examples, 32, device)? {
        let guess = model.forward(&batch.ids, batch.real.as_ref())?.argmax(D::Minus1)?;
        let hits = guess.eq(&batch.labels)?.to_dtype(DType::F32)?.sum_all()?;
        right += f64::from(hits.to_scalar::<f32>()?);
    }
    Ok(right as usize)
}
