//! The next token: the likeliest, or drawn from the likeliest few.

use crate::rng::Rng;
use crate::Result;
use candle_core::{DType, Tensor};
use candle_nn::ops::softmax_last_dim;

#[derive(Clone)]
pub struct Sampler {
    temperature: f64,
    top_p: f64,
    rng: Rng,
}

impl Sampler {
    /// Temperature 0 always gives the likeliest token.
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Self {
        Self { temperature, top_p, rng: Rng::new(seed) }
    }

    /// A token from its logits (vocabulary). Above temperature 0, it is drawn from the fewest tokens that have a
    /// probability of `top_p` together.
    pub fn next(&mut self, logits: &Tensor) -> Result<u32> {
        if self.temperature <= 0. {
            return Ok(logits.argmax(0)?.to_scalar()?);
        }
        let logits = (logits.to_dtype(DType::F32)? / self.temperature)?;
        let probabilities = softmax_last_dim(&logits)?.to_vec1::<f32>()?;
        let mut likeliest: Vec<_> = (0..).zip(probabilities).collect();
        likeliest.sort_by(|(_, p), (_, q)| q.total_cmp(p));
        let (mut sum, mut kept) = (0., 0);
        while kept < likeliest.len() && sum < self.top_p {
            sum += f64::from(likeliest[kept].1);
            kept += 1;
        }
        likeliest.truncate(kept.max(1));
        let mut drawn = self.rng.below(1 << 53) as f64 / (1u64 << 53) as f64 * sum;
        for (token, p) in &likeliest {
            drawn -= f64::from(*p);
            if drawn < 0. {
                return Ok(*token);
            }
        }
        Ok(likeliest[0].0)
    }
}
