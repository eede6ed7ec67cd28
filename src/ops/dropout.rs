//! Inverted dropout as a mask that forward and backward share.

use super::backend::Backend;
use super::cpu::{filled, map_rows, on_cpu};
use super::op::{if_tracked, run, Fused, Grads, Operand};
use candle_core::{CpuStorage, Result, Shape, Tensor};
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
    /// A mask of `x`'s shape. `None` if `p` is 0, or `x` has no values.
    pub fn mask(&self, x: &Tensor) -> Result<Option<Mask>> {
        if self.p == 0. || x.elem_count() == 0 {
            return Ok(None);
        }
        let kept = match &self.stream {
            Some(stream) => {
                let index = stream.position.fetch_add(1, Ordering::Relaxed);
                let kept = seeded_mask(stream.seed, index, x.elem_count(), self.p);
                Tensor::from_vec(kept, x.shape(), x.device())?
            }
            None => Tensor::rand(0f32, 1f32, x.shape(), x.device())?.ge(self.p)?,
        };
        Ok(Some(Mask { kept, scale: 1. / (1. - f64::from(self.p)) }))
    }
}

/// What a dropout keeps, one byte a value: 0, or 1 with the probability 1 - p.
#[derive(Debug, Clone)]
pub(crate) struct Mask {
    kept: Tensor,
    /// 1 / (1 - p)
    scale: f64,
}

impl Mask {
    /// x̃ of the mask's shape, with a gradient for `x`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        run(self.clone(), [x])
    }

    /// x̃ and x − x̃.
    pub fn split(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let kept = self.apply(x)?;
        let rest = (x - &kept)?;
        Ok((kept, rest))
    }
}

impl Fused<1> for Mask {
    const NAME: &'static str = "dropout";

    fn forward(&self, x: [Operand; 1]) -> Result<(CpuStorage, Shape)> {
        let (kept, _) = self.kept.storage_and_layout();
        let kept = CpuStorage::of(&kept)?.as_slice::<u8>()?;
        let scale = self.scale as f32;
        map_rows(
            x,
            #[inline(always)]
            |row, [x], y| {
                let kept = &kept[row * x.len()..][..x.len()];
                for ((y, x), kept) in y.iter_mut().zip(x).zip(kept) {
                    *y = if *kept == 0 { 0. } else { x * scale };
                }
            },
        )
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        Ok([if_tracked(x, || on_cpu([grad], |grad| self.forward(grad)))?])
    }

    fn composed(&self, [x]: [&Tensor; 1]) -> Result<Tensor> {
        (x * self.kept.to_dtype(x.dtype())?)? * self.scale
    }

    fn composed_backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<Grads<1>> {
        Ok([if_tracked(x, || self.composed([grad]))?])
    }
}

/// Values that one thread draws at a time: the mask does not depend on the number of threads.
const BLOCK: usize = 1 << 14;

/// The mask number `index` of a seed: 0 with probability `p`, to within 2⁻¹⁷, else 1.
fn seeded_mask(seed: u64, index: u64, len: usize, p: f32) -> Vec<u8> {
    let mut mask = filled(0, len);
    // 16 bits for each value.
    let dropped = (f64::from(p) * 65536.).round() as u32;
    mask.par_chunks_mut(BLOCK).enumerate().for_each(|(block, mask)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(index);
        rng.set_word_pos(block as u128 * (BLOCK / 2) as u128);
        for pair in mask.chunks_mut(2) {
            let mut bits = rng.next_u32();
            for value in pair {
                *value = u8::from((bits & 0xffff) >= dropped);
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
        let dropped = mask(1, 2).iter().filter(|value| **value == 0).count();
        assert!((9_500..10_500).contains(&dropped), "{dropped}");
        assert!(mask(1, 2).iter().all(|value| *value <= 1));
        assert!(seeded_mask(1, 2, 100, 0.).iter().all(|value| *value == 1));
    }
}
