//! Inverted dropout as a mask that forward and backward share.

use super::cpu::filled;
use candle_core::{DType, Result, Tensor};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
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

/// Values that one thread draws at a time: the mask does not depend on the number of threads.
const BLOCK: usize = 1 << 14;

/// The mask number `index` of a seed: 0 with probability `p`, to within 2⁻¹⁷, else 1 / (1 - p).
fn seeded_mask(seed: u64, index: u64, len: usize, p: f32) -> Vec<f32> {
    let (mut mask, kept) = (filled(0., len), 1. / (1. - p));
    // 16 bits for each value.
    let dropped = (f64::from(p) * 65536.).round() as u32;
    mask.par_chunks_mut(BLOCK).enumerate().for_each(|(block, mask)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        rng.set_word_pos(block as u128 * (BLOCK / 2) as u128);
        for pair in mask.chunks_mut(2) {
            let mut bits = rng.next_u32();
            for value in pair {
                *value = if (bits & 0xffff) < dropped { 0. } else { kept };
                bits >>= 16;
            }
        }
    });
    mask
}

#[cfg(test)]
mod tests {
    use super::seeded_mask;

    #[test]
    fn a_mask_depends_on_seed_and_index_alone_and_drops_its_share() {
        let mask = |seed, index| seeded_mask(seed, index, 100_001, 0.1);
        assert_eq!(mask(1, 2), mask(1, 2));
        assert!(mask(1, 2) != mask(1, 3) && mask(1, 2) != mask(2, 2));
        // A longer one begins with the shorter.
        assert_eq!(seeded_mask(1, 2, 7, 0.1), mask(1, 2)[..7]);
        let dropped = mask(1, 2).iter().filter(|value| **value == 0.).count();
        assert!((9_500..10_500).contains(&dropped), "{dropped}");
        assert!(mask(1, 2).iter().all(|value| *value == 0. || *value == 1. / 0.9));
        assert!(seeded_mask(1, 2, 100, 0.).iter().all(|value| *value == 1.));
    }
}
