//! The loss: the mean over the tokens that are predicted.

use crate::batch::{groups, Batch};
use crate::examples::Example;
use crate::llama::Llama;
use crate::Result;
use candle_core::{Device, Tensor};
use candle_nn::loss::cross_entropy;

/// Of one batch. Only the hidden states before a predicted token get logits, which are wide.
pub fn batch_loss(model: &Llama, batch: &Batch) -> candle_core::Result<Tensor> {
    let hidden = model.hidden(&batch.ids, None)?.flatten(0, 1)?.index_select(&batch.rows, 0)?;
    cross_entropy(&model.head(&hidden)?, &batch.targets)
}

/// Of all examples, in batches of `size`.
pub fn mean_loss(model: &Llama, examples: &[Example], size: usize, device: &Device) -> Result<f64> {
    let (mut sum, mut predicted) = (0., 0);
    for group in groups(examples, size, None) {
        let batch = Batch::new(&group, device)?;
        let loss = f64::from(batch_loss(model, &batch)?.to_scalar::<f32>()?);
        sum += loss * batch.predicted() as f64;
        predicted += batch.predicted();
    }
    Ok(sum / predicted as f64)
}
