//! The order of the samples in a run, equal on any number of ranks.

use crate::{Error, Result};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Batches of sample indices: each epoch has every sample once, in an order that depends on the seed and the epoch
/// alone. The last batch of an epoch may be shorter.
///
/// A batch belongs to a step of the whole run, and the [`shard`](super::Process::shard) of each rank is cut from it: the
/// number of steps so far, which [`AdamW::steps`](crate::train::AdamW::steps) counts, is all that resuming needs, on
/// any number of ranks.
///
/// ```
/// use loralib::train::{Process, Sampler};
/// # fn main() -> loralib::Result<()> {
/// let mut sampler = Sampler::new(10, 4, 0)?;
/// assert_eq!(sampler.steps_per_epoch(), 3);
/// assert_eq!(sampler.batch(2).len(), 2);
/// let batch = sampler.batch(3); // the first of the second epoch
/// let samples = Process::new(1, 2)?.shard(batch);
/// assert_eq!(samples.len(), 2);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    batch: usize,
    seed: u64,
    epoch: usize,
    /// Of `epoch`.
    order: Vec<usize>,
}

impl Sampler {
    /// Of `samples` samples, `batch` in a step, of all ranks together.
    ///
    /// # Errors
    /// If one of them is 0.
    pub fn new(samples: usize, batch: usize, seed: u64) -> Result<Self> {
        if samples == 0 || batch == 0 {
            let reason =
                format!("batches of {batch} out of {samples} samples: both must be above 0");
            return Err(Error::Invalid(reason));
        }
        let mut sampler = Self { batch, seed, epoch: 0, order: (0..samples).collect() };
        sampler.shuffle(0);
        Ok(sampler)
    }

    /// How many steps see every sample once.
    pub fn steps_per_epoch(&self) -> usize {
        self.order.len().div_ceil(self.batch)
    }

    /// The samples of step `step` of the run, counted from 0, of all ranks.
    pub fn batch(&mut self, step: usize) -> &[usize] {
        let (epoch, step) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        if epoch != self.epoch {
            self.shuffle(epoch);
        }
        let from = step * self.batch;
        &self.order[from..self.order.len().min(from + self.batch)]
    }

    fn shuffle(&mut self, epoch: usize) {
        // A key of its own: the same seed also draws the masks of dropout.
        let mut key = *b"........loralib::train::Sampler.";
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(epoch as u64);
        self.epoch = epoch;
        self.order.iter_mut().enumerate().for_each(|(i, sample)| *sample = i);
        shuffle(&mut self.order, &mut rng);
    }
}

/// Written out, because `rand`'s own shuffle may draw otherwise in another version.
fn shuffle(order: &mut [usize], rng: &mut ChaCha8Rng) {
    for i in (1..order.len()).rev() {
        let below = (u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64;
        order.swap(i, below as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_has_every_sample_once() -> Result<()> {
        for (samples, batch) in [(1, 1), (7, 3), (12, 4), (5, 8)] {
            let mut sampler = Sampler::new(samples, batch, 3)?;
            let steps = sampler.steps_per_epoch();
            for epoch in 0..3 {
                let batches = (0..steps).map(|step| sampler.batch(epoch * steps + step).to_vec());
                let mut seen = batches.collect::<Vec<_>>().concat();
                seen.sort();
                assert_eq!(seen, (0..samples).collect::<Vec<_>>());
            }
        }
        Ok(())
    }

    #[test]
    fn a_batch_depends_on_seed_and_step_alone() -> Result<()> {
        let mut in_order = Sampler::new(100, 8, 5)?;
        let batches: Vec<_> = (0..40).map(|step| in_order.batch(step).to_vec()).collect();
        let mut resumed = Sampler::new(100, 8, 5)?;
        for step in (0..40).rev() {
            assert_eq!(resumed.batch(step), batches[step]);
        }
        assert_ne!(batches[0], batches[13], "the second epoch has another order");
        assert_ne!(Sampler::new(100, 8, 6)?.batch(0), batches[0]);
        Ok(())
    }

    /// A run that is resumed after an update of the crate must find its order again.
    #[test]
    fn the_order_is_stable() -> Result<()> {
        assert_eq!(Sampler::new(8, 8, 0)?.batch(0), [3, 4, 0, 1, 5, 7, 6, 2]);
        Ok(())
    }

    #[test]
    fn the_order_is_not_drawn_from_the_bits_of_dropout() -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(0); // of the first mask
        let mut order: Vec<_> = (0..8).collect();
        shuffle(&mut order, &mut rng);
        assert_ne!(Sampler::new(8, 8, 0)?.batch(0), order);
        Ok(())
    }

    #[test]
    fn empty_batches_are_refused() {
        assert!(Sampler::new(0, 4, 0).is_err());
        assert!(Sampler::new(4, 0, 0).unwrap_err().to_string().contains("batches of 0 out of 4"));
    }
}
