//! Inverted dropout as a mask that forward and backward share.

use super::cpu::seeded_mask;
use candle_core::{DType, Result, Tensor};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// The probability that a value is dropped, and where the masks come from: without a stream candle draws them,
/// unseeded on the CPU.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dropout {
    pub p: f32,
    pub stream: Option<Arc<DropoutStream>>,
}

/// A sequence of masks that depends on the seed alone. All layers of a model share it.
#[derive(Debug)]
pub(crate) struct DropoutStream {
    seed: u64,
    position: AtomicU64,
}

impl DropoutStream {
    pub fn new(seed: u64) -> Self {
        Self { seed, position: AtomicU64::new(0) }
    }

    /// How many masks have been drawn.
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Continues with the mask after the first `position`.
    pub fn seek(&self, position: u64) {
        self.position.store(position, Ordering::Relaxed);
    }
}

impl Dropout {
    /// A mask of `x`'s shape: 0 with probability `p`, else 1 / (1 - p). `None` if `p` is 0, or `x` has no
    /// values.
    pub fn mask(&self, x: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
        if self.p == 0. || x.elem_count() == 0 {
            return Ok(None);
        }
        if let Some(stream) = &self.stream {
            let index = stream.position.fetch_add(1, Ordering::Relaxed);
            let mask = seeded_mask(stream.seed, index, x.elem_count(), self.p);
            return Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(dtype).map(Some);
        }
        let kept = Tensor::rand(0f32, 1f32, x.shape(), x.device())?.ge(self.p)?;
        Ok(Some((kept.to_dtype(dtype)? * (1. / (1. - f64::from(self.p))))?))
    }
}
