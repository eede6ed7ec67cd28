//! The loss: the mean over the tokens that are predicted.

use super::batch::{rows, Batch};
use super::examples::Example;
use crate::model::{Decoder, Segment};
use crate::Result;
use candle_core::{Device, Tensor};
use loralib::train::linear_cross_entropy_with;
use loralib::Adapter;

/// Of one batch. The logits, which are wide, are never all in memory.
pub fn batch_loss(model: &Decoder, batch: &Batch) -> candle_core::Result<Tensor> {
    of(model, batch, |_, x, layer| layer(x))
}

/// Of one batch, with the activations of one layer at a time: the backward runs each layer again.
pub fn checkpointed_loss(
    model: &Decoder,
    adapter: &Adapter,
    batch: &Batch,
) -> candle_core::Result<Tensor> {
    of(model, batch, |path, x, layer| adapter.checkpoint(path, x, layer))
}

fn of(
    model: &Decoder,
    batch: &Batch,
    run: impl Fn(&str, &Tensor, Segment) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    let hidden = model.packed(&batch.ids, &batch.lens, run)?;
    linear_cross_entropy_with(&hidden, &model.lm_head, &batch.labels, |l| model.capped(l))
}

/// Of all examples, in batches of as many rows.
pub fn mean_loss(
    model: &Decoder,
    examples: &[Example],
    (batch, length): (usize, usize),
    device: &Device,
) -> Result<f64> {
    let (mut sum, mut predicted) = (0., 0);
    for rows in rows(examples, Some(length), None).chunks(batch) {
        let batch = Batch::new(rows, device)?;
        let loss = f64::from(batch_loss(model, &batch)?.to_scalar::<f32>()?);
        sum += loss * batch.predicted as f64;
        predicted += batch.predicted;
    }
    Ok(sum / predicted as f64)
}
