//! Tokens are drawn by their probabilities.

use super::Sampler;
use crate::Result;
use candle_core::{Device, Tensor};

#[test]
fn tokens_are_drawn_by_their_probabilities_from_the_likeliest() -> Result<()> {
    let probabilities = [0.1f32, 0.5, 0.3, 0.1];
    let logits = Tensor::new(&probabilities.map(f32::ln), &Device::Cpu)?;
    let shares = |temperature, top_p| -> Result<[f64; 4]> {
        let (mut sampler, mut shares) = (Sampler::new(temperature, top_p, 7), [0.; 4]);
        for _ in 0..20_000 {
            shares[sampler.next(&logits)? as usize] += 1. / 20_000.;
        }
        Ok(shares)
    };
    for (temperature, top_p, expected) in [
        (0., 1., [0., 1., 0., 0.]),
        (1., 1e-9, [0., 1., 0., 0.]),
        (1., 0.7, [0., 0.625, 0.375, 0.]),
        (1., 1., [0.1, 0.5, 0.3, 0.1]),
        // The squares, in proportion.
        (0.5, 1., [1. / 36., 25. / 36., 9. / 36., 1. / 36.]),
    ] {
        let found = shares(temperature, top_p)?;
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 0.02, "{temperature}, {top_p}: {found:?}");
        }
    }
    Ok(())
}

#[test]
fn the_same_seed_draws_the_same_tokens() -> Result<()> {
    let logits = Tensor::zeros(100, candle_core::DType::F32, &Device::Cpu)?;
    let drawn = |seed| -> Result<Vec<u32>> {
        let mut sampler = Sampler::new(1., 1., seed);
        (0..20).map(|_| sampler.next(&logits)).collect()
    };
    assert_eq!(drawn(1)?, drawn(1)?);
    assert_ne!(drawn(1)?, drawn(2)?);
    Ok(())
}
