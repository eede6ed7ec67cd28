//! The causal mask: a token sees itself and those before it.

use candle_core::{Device, Result, Tensor};

/// 0 where a token sees another, else -∞: (tokens, first + tokens), for tokens that follow `first` others. Padding on
/// the right needs no mask of its own.
pub fn causal_mask(first: usize, tokens: usize, device: &Device) -> Result<Tensor> {
    let (all, seen) = (first + tokens, |i, j| if j <= first + i { 0. } else { f32::NEG_INFINITY });
    let mask = (0..tokens).flat_map(|i| (0..all).map(move |j| seen(i, j)));
    Tensor::from_vec(mask.collect(), (tokens, all), device)
}
