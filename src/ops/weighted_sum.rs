//! The weighted sum of low-rank updates.

use super::low_rank::{LowRank, Split};
use candle_core::{Result, Tensor};
use std::ops::Range;

/// The sum of updates, each times a strength, as one update: `[s₁B₁ s₂B₂]·[A₁; A₂] = s₁B₁·A₁ + s₂B₂·A₂`. It has no
/// dropout.
pub(crate) fn weighted_sum(updates: &[(LowRank, f64)]) -> Result<LowRank> {
    let (mut all_a, mut all_b, mut rows) = (vec![], vec![], 0);
    for (update, strength) in updates {
        let update = update.joined()?;
        for f in update.factors(update.a().dtype())? {
            rows = rows.max(f.outputs.end);
            all_a.push(f.a);
            all_b.push(((f.b * *strength)?, f.outputs));
        }
    }
    let padded = |(b, outputs): (Tensor, Range<usize>)| {
        b.pad_with_zeros(0, outputs.start, rows - outputs.end)
    };
    let b = Tensor::cat(&all_b.into_iter().map(padded).collect::<Result<Vec<_>>>()?, 1)?;
    let split = Split { outputs: 0..rows, ranks: 0..b.dim(1)?, b_rows: 0..rows };
    Ok(LowRank::new(Tensor::cat(&all_a, 0)?, b, 1., 0., vec![split]))
}
