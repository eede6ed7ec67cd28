//! One rank and one alpha for all layers of an adapter, for programs that have no others.

use super::layer::Factors;
use crate::layers::LoraConfig;
use candle_core::{DType, Result, Tensor};

/// The value that occurs most often, the first of several.
fn most_frequent<T: PartialEq + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: Vec<(T, usize)> = vec![];
    for value in values {
        match counts.iter_mut().find(|(seen, _)| *seen == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    // `max_by_key` gives the last of equals.
    counts.into_iter().rev().max_by_key(|(_, count)| *count).map(|(value, _)| value)
}

/// The rank and alpha that most layers have: those of the adapter's options if a layer has them, else the most frequent
/// ones; `None` without layers.
pub(crate) fn common_rank_alpha(
    options: &LoraConfig,
    layers: impl Iterator<Item = (usize, f64)> + Clone,
) -> Option<(usize, f64)> {
    let common = (options.r, options.lora_alpha);
    if layers.clone().any(|own| own == common) {
        return Some(common);
    }
    most_frequent(layers)
}

/// The `lora_alpha` that all layers get: the most frequent one that is a normal number. 0 has no ratio to another.
pub(crate) fn common_alpha(alphas: impl Iterator<Item = f64>) -> Option<f64> {
    most_frequent(alphas.filter(|alpha| alpha.is_normal()))
}

/// B for the common alpha: multiplied by the ratio of its own to it, in F32 at least, which is exact if the ratio is a
/// power of two.
pub(crate) fn rescaled(b: Tensor, own: f64, common: f64) -> Result<Tensor> {
    match (own == common, b.dtype()) {
        (true, _) => Ok(b),
        (false, DType::F64) => b * (own / common),
        (false, _) => (b.to_dtype(DType::F64)? * (own / common))?.to_dtype(DType::F32),
    }
}

/// Factors, whose alphas have no `rslora`, with the largest rank, padded with zeros, and one alpha: the most frequent
/// one after `rounded`. Both are returned.
pub(crate) fn uniform(
    layers: Vec<Factors>,
    rounded: impl Fn(f64) -> f64,
) -> Result<(Vec<Factors>, f64, usize)> {
    let rank = layers.iter().map(|factors| factors.r).max().unwrap_or(0);
    let layers: Vec<_> =
        layers.into_iter().map(|own| own.padded(rank, false)).collect::<Result<_>>()?;
    let common = common_alpha(layers.iter().map(|own| own.lora_alpha)).map_or(1., rounded);
    let scaled = layers.into_iter().map(|Factors { a, b, r, lora_alpha }| {
        Ok(Factors { a, b: rescaled(b, lora_alpha, common)?, r, lora_alpha: common })
    });
    Ok((scaled.collect::<Result<_>>()?, common, rank))
}
