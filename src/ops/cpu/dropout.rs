//! Seeded [masks](crate::ops::dropout), drawn by all threads.

use super::buffer::filled;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Values that one thread draws at a time: the mask does not depend on the number of threads.
const BLOCK: usize = 1 << 14;

/// The mask number `index` of a seed: 0 with probability `p`, to within 2⁻¹⁷, else 1 / (1 - p).
pub(in crate::ops) fn seeded_mask(seed: u64, index: u64, len: usize, p: f32) -> Vec<f32> {
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
