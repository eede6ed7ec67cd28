//! One process among those of a data-parallel run.

use crate::{Error, Result};

/// Process `index` of `count`, whose index is its rank in MPI: its share of each batch, and its masks of dropout.
///
/// ```
/// use loralib::train::Process;
/// # fn main() -> loralib::Result<()> {
/// let batch = ["a", "b", "c", "d", "e"];
/// assert_eq!(Process::new(0, 2)?.shard(&batch), ["a", "b"]);
/// assert_eq!(Process::new(1, 2)?.shard(&batch), ["c", "d", "e"]);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    index: usize,
    count: usize,
}

impl Process {
    /// # Errors
    /// If `index` is not less than `count`.
    pub fn new(index: usize, count: usize) -> Result<Self> {
        if index >= count {
            return Err(Error::Invalid(format!(
                "rank {index} of {count} ranks: they count from 0"
            )));
        }
        Ok(Self { index, count })
    }

    /// This rank's number, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The number of ranks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// This rank's part of a batch that is the same on all ranks. The parts of all ranks, one after another,
    /// are the batch; their lengths differ by at most one, and are 0 for some where the batch has fewer samples than
    /// there are ranks.
    pub fn shard<'a, T>(&self, batch: &'a [T]) -> &'a [T] {
        // In u128, since the product may exceed usize.
        let start =
            |rank: usize| (batch.len() as u128 * rank as u128 / self.count as u128) as usize;
        &batch[start(self.index)..start(self.index + 1)]
    }

    /// The [`Adapter::set_dropout_position`](crate::Adapter::set_dropout_position) of this rank in step `step`,
    /// counted from 0: no two ranks, and no two steps, draw the same mask from the common
    /// [`Adapter::seed`](crate::Adapter::seed).
    ///
    /// Set before each step, it leaves nothing to save: a run resumed on as many ranks has the masks of one that was
    /// not stopped, and on another number of ranks other masks of the same distribution.
    ///
    /// # Errors
    /// From step 2²⁸ or rank 2¹⁴ on. A step has room for 2²² masks.
    pub fn dropout_position(&self, step: usize) -> Result<u64> {
        if step >> 28 != 0 || self.index >> 14 != 0 {
            let reason = format!(
                "no dropout position for step {step} on rank {}: the limits are 2^28 steps and 2^14 ranks",
                self.index
            );
            return Err(Error::Invalid(reason));
        }
        Ok(((step as u64) << 36) | ((self.index as u64) << 22))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn shards_are_the_batch_in_order_and_of_even_length() -> Result<()> {
        for len in 0..20 {
            let batch: Vec<usize> = (0..len).collect();
            for of in 1..9 {
                let ranks = (0..of).map(|index| Process::new(index, of));
                let shards: Vec<_> =
                    ranks.map(|rank| Ok(rank?.shard(&batch))).collect::<Result<_>>()?;
                assert_eq!(shards.concat(), batch);
                assert!(shards
                    .iter()
                    .all(|shard| (len / of..=len.div_ceil(of)).contains(&shard.len())));
            }
        }
        Ok(())
    }

    #[test]
    fn each_step_of_each_rank_has_masks_of_its_own() -> Result<()> {
        let mut positions = HashSet::new();
        for step in [0, 1, 2, (1 << 28) - 1] {
            for index in [0, 1, 2, (1 << 14) - 1] {
                let position = Process::new(index, 1 << 14)?.dropout_position(step)?;
                assert!(positions.insert(position) && position % (1 << 22) == 0);
            }
        }
        assert!(Process::new(0, 1)?.dropout_position(1 << 28).is_err());
        assert!(Process::new(1 << 14, 1 << 15)?.dropout_position(0).is_err());
        Ok(())
    }

    #[test]
    fn a_rank_outside_of_the_ranks_is_refused() {
        assert!(Process::new(2, 2).unwrap_err().to_string().contains("rank 2 of 2"));
    }
}
