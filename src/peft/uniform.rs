//! One rank and one alpha for all layers of an adapter, for programs that have no others.

use super::factors::Factors;
use crate::layers::same_scaling;
use candle_core::{DType, Result};

/// Factors with the `lora_alpha` of each, padded with zeros to the largest rank, that all have the returned
/// alpha and rank: the most frequent alpha other than 0, after `rounded`. Where that changes the scaling, the
/// ratio is multiplied into B.
pub(crate) fn uniform(
    layers: Vec<(f64, Factors)>,
    rounded: impl Fn(f64) -> f64,
) -> Result<(Vec<Factors>, f64, usize)> {
    let rank = layers.iter().map(|(_, factors)| factors.r).max().unwrap_or(0);
    let own = |(alpha, factors): &(f64, Factors)| same_scaling(*alpha, factors.r, rank, false);
    let alphas: Vec<f64> = layers.iter().map(own).collect();
    let used = || alphas.iter().copied().filter(|alpha| *alpha != 0.);
    let count = |alpha: f64| used().filter(|other| *other == alpha).count();
    // `max_by_key` gives the last.
    let alpha = used().rev().max_by_key(|alpha| count(*alpha)).map_or(1., rounded);
    let padded = layers.into_iter().zip(&alphas).map(|((_, factors), own)| {
        let Factors { a, b, r } = factors;
        let (a, b) = (a.pad_with_zeros(0, 0, rank - r)?, b.pad_with_zeros(1, 0, rank - r)?);
        let b = match (*own == alpha, b.dtype()) {
            (true, _) => b,
            (false, DType::F64) => (b * (own / alpha))?,
            (false, _) => (b.to_dtype(DType::F64)? * (own / alpha))?.to_dtype(DType::F32)?,
        };
        Ok(Factors { a, b, r: rank })
    });
    Ok((padded.collect::<Result<_>>()?, alpha, rank))
}

/// The nearest whole number other than 0.
pub(super) fn whole(alpha: f64) -> f64 {
    match alpha.round() {
        0. => 1f64.copysign(alpha),
        whole => whole,
    }
}
