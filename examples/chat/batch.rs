//! Examples of similar lengths as tensors, padded on the right.

use crate::buckets::buckets;
use crate::examples::Example;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};

pub struct Batch {
    /// (batch, tokens)
    pub ids: Tensor,
    /// Where in the flattened ids the next token is predicted, and what it is.
    pub rows: Tensor,
    pub targets: Tensor,
    /// Tokens that are not padding.
    pub tokens: usize,
}

impl Batch {
    pub fn new(examples: &[&Example], device: &Device) -> Result<Self> {
        let width = examples.iter().map(|example| example.inputs()).max().unwrap_or(0);
        let (mut ids, mut rows, mut targets, mut tokens) = (vec![], vec![], vec![], 0);
        for (i, example) in examples.iter().enumerate() {
            let inputs = example.inputs();
            tokens += inputs;
            ids.extend_from_slice(&example.ids[..inputs]);
            ids.resize((i + 1) * width, 0);
            let predicting = (0..inputs).filter(|row| example.learned[row + 1]);
            for row in predicting {
                rows.push((i * width + row) as u32);
                targets.push(example.ids[row + 1]);
            }
        }
        Ok(Self {
            ids: Tensor::from_vec(ids, (examples.len(), width), device)?,
            rows: Tensor::new(rows, device)?,
            targets: Tensor::new(targets, device)?,
            tokens,
        })
    }

    /// How many tokens are predicted.
    pub fn predicted(&self) -> usize {
        self.targets.elem_count()
    }
}

/// Groups of examples of similar lengths, in a random order if there is an `rng`.
pub fn groups<'a>(
    examples: &'a [Example],
    size: usize,
    rng: Option<&mut Rng>,
) -> Vec<Vec<&'a Example>> {
    buckets(examples, size, Example::inputs, rng)
}
