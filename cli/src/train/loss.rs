//! A language model's loss: the mean over the tokens that are predicted.

use super::batch::{Batch, Packed, Rows};
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
    linear_cross_entropy_with(&hidden, &model.lm_head, &batch.labels, model.capped())
}

/// Of all examples, in batches of as many rows.
pub fn mean_loss(
    model: &Decoder,
    examples: &[Example],
    (batch, length): (usize, usize),
    device: &Device,
) -> Result<f64> {
    let examples = Packed { examples, length: Some(length) };
    let (mut sum, mut counted) = (0., 0);
    for rows in examples.rows(None).chunks(batch) {
        let batch = examples.batch(rows, device)?;
        let loss = f64::from(batch_loss(model, &batch)?.to_scalar::<f32>()?);
        sum += loss * batch.counted as f64;
        counted += batch.counted;
    }
    Ok(sum / counted as f64)
}
