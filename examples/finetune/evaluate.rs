//! What a model is worth: its loss and its speed.

use crate::data::Batch;
use crate::gpt2::Gpt2;
use crate::Result;
use candle_core::{IndexOp, Module, Tensor};
use loralib::train::linear_cross_entropy;
use std::time::{Duration, Instant};

/// The mean loss over the tokens that a batch predicts.
pub fn batch_loss(model: &Gpt2, batch: &Batch) -> candle_core::Result<Tensor> {
    linear_cross_entropy(&model.hidden(&batch.ids)?, &model.head, &batch.labels)
}

/// The mean loss over all tokens that are predicted.
pub fn loss(model: &Gpt2, batches: &[Batch]) -> Result<f64> {
    let (mut sum, mut predicted) = (0., 0);
    for batch in batches {
        sum += f64::from(batch_loss(model, batch)?.to_scalar::<f32>()?) * batch.predicted as f64;
        predicted += batch.predicted;
    }
    Ok(sum / predicted as f64)
}

fn logits(model: &Gpt2, batch: &Batch) -> Result<Tensor> {
    Ok(model.head.forward(&model.hidden(&batch.ids)?)?)
}

/// The largest difference between two models' logits.
pub fn difference(a: &Gpt2, b: &Gpt2, batch: &Batch) -> Result<f32> {
    let difference = (logits(a, batch)? - logits(b, batch)?)?;
    Ok(difference.abs()?.max_all()?.to_scalar()?)
}

/// Tokens a second of each model: the fastest of a few rounds in turn, so that what else the
/// machine does hits all alike.
pub fn speeds<const N: usize>(models: [&Gpt2; N], batch: &Batch) -> Result<[f64; N]> {
    let start = Instant::now();
    let mut fastest = [Duration::MAX; N];
    for round in 0.. {
        if round > 2 && start.elapsed() > Duration::from_secs(2) {
            break;
        }
        for (model, fastest) in models.iter().zip(&mut fastest) {
            let start = Instant::now();
            // Reading a value waits for the device.
            logits(model, batch)?.i((0, 0, 0))?.to_scalar::<f32>()?;
            *fastest = start.elapsed().min(*fastest);
        }
    }
    Ok(fastest.map(|time| batch.tokens as f64 / time.as_secs_f64()))
}
