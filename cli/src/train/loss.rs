//! The loss: the mean over the tokens that are predicted.

use super::batch::{groups, Batch};
use super::examples::Example;
use crate::model::{Llama, Segment};
use crate::Result;
use candle_core::{Device, Tensor};
use loralib::train::linear_cross_entropy;
use loralib::Adapter;

/// Of one batch, with the activations of one layer at a time: the backward runs each layer again.
pub fn checkpointed_loss(
    model: &Llama,
    adapter: &Adapter,
    batch: &Batch,
) -> candle_core::Result<Tensor> {
    let run = |path: &str, x: &Tensor, layer: Segment| adapter.checkpoint(path, x, layer);
    let hidden = model.hidden_by(&batch.ids, run)?;
    linear_cross_entropy(&hidden, &model.lm_head, &batch.labels)
}

/// Of one batch. The logits, which are wide, are never all in memory.
pub fn batch_loss(model: &Llama, batch: &Batch) -> candle_core::Result<Tensor> {
    linear_cross_entropy(&model.hidden(&batch.ids, None)?, &model.lm_head, &batch.labels)
}

/// Of all examples, in batches of `size`.
pub fn mean_loss(model: &Llama, examples: &[Example], size: usize, device: &Device) -> Result<f64> {
    let (mut sum, mut predicted) = (0., 0);
    for group in groups(examples, size, None) {
        let batch = Batch::new(&group, device)?;
        let loss = f64::from(batch_loss(model, &batch)?.to_scalar::<f32>()?);
        sum += loss * batch.predicted as f64;
        predicted += batch.predicted;
    }
    Ok(sum / predicted as f64)
}
