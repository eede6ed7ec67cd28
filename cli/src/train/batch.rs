//! Examples of similar lengths as tensors, padded on the right.

use super::examples::Example;
use crate::rng::Rng;
use crate::Result;
use candle_core::{Device, Tensor};

/// The label of what is not predicted.
const IGNORED: i64 = -100;

pub struct Batch {
    /// (batch, tokens)
    pub ids: Tensor,
    /// The token after each, (batch, tokens), or -100 where it is given or padding.
    pub labels: Tensor,
    /// How many tokens are predicted.
    pub predicted: usize,
    /// Tokens that are not padding.
    pub tokens: usize,
}

impl Batch {
    pub fn new(examples: &[&Example], device: &Device) -> Result<Self> {
        let width = examples.iter().map(|example| example.inputs()).max().unwrap_or(0);
        let shape = (examples.len(), width);
        let (mut ids, mut labels, mut predicted, mut tokens) = (vec![], vec![], 0, 0);
        for (i, example) in examples.iter().enumerate() {
            let inputs = example.inputs();
            tokens += inputs;
            predicted += example.predicted();
            ids.extend_from_slice(&example.ids[..inputs]);
            let next = example.ids.iter().zip(&example.learned).skip(1);
            labels
                .extend(next.map(|(&id, &learned)| if learned { i64::from(id) } else { IGNORED }));
            ids.resize((i + 1) * width, 0);
            labels.resize((i + 1) * width, IGNORED);
        }
        Ok(Self {
            ids: Tensor::from_vec(ids, shape, device)?,
            labels: Tensor::from_vec(labels, shape, device)?,
            predicted,
            tokens,
        })
    }
}

/// Groups of `size` examples of similar lengths: little padding. With an `rng` the order is random, of equal
/// lengths and of groups.
pub fn groups<'a>(
    examples: &'a [Example],
    size: usize,
    mut rng: Option<&mut Rng>,
) -> Vec<Vec<&'a Example>> {
    let mut sorted: Vec<_> = examples.iter().collect();
    if let Some(rng) = &mut rng {
        rng.shuffle(&mut sorted);
    }
    sorted.sort_by_key(|example| example.inputs());
    let mut groups: Vec<_> = sorted.chunks(size).map(<[_]>::to_vec).collect();
    if let Some(rng) = &mut rng {
        rng.shuffle(&mut groups);
    }
    groups
}
