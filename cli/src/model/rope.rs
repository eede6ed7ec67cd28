//! The angles of rotary position embeddings.

use super::config::{Config, RopeParameters};
use candle_core::{bail, Device, Result, Tensor};
use std::f64::consts::TAU;

pub struct Rope {
    /// Radians a position, for each pair of values. In F32, as torch computes them.
    frequencies: Vec<f32>,
}

impl Rope {
    pub fn new(cfg: &Config) -> Result<Self> {
        let (rope, d) = (cfg.rope(), cfg.head_dim());
        let theta = rope.rope_theta.unwrap_or(10_000.) as f32;
        let frequency = |i| scaled(1. / theta.powf(2. * i as f32 / d as f32), &rope);
        Ok(Self { frequencies: (0..d / 2).map(frequency).collect::<Result<_>>()? })
    }

    /// Cosines and sines (tokens, d/2) of the positions from `first` on.
    pub fn tables(&self, first: usize, tokens: usize, device: &Device) -> Result<(Tensor, Tensor)> {
        let shape = (tokens, self.frequencies.len());
        let angles = |position| self.frequencies.iter().map(move |f| position as f32 * f);
        let angles: Vec<f32> = (first..first + tokens).flat_map(angles).collect();
        let angles = Tensor::from_vec(angles, shape, device)?;
        Ok((angles.cos()?, angles.sin()?))
    }
}

/// A frequency after the model's extension to longer texts.
fn scaled(frequency: f32, rope: &RopeParameters) -> Result<f32> {
    let kind = rope.rope_type.as_deref().unwrap_or("default");
    let given = |value: Option<f64>, name| match value {
        Some(value) => Ok(value),
        None => bail!("rope type {kind:?} without {name}"),
    };
    match kind {
        "default" => Ok(frequency),
        "linear" => Ok(frequency / given(rope.factor, "factor")? as f32),
        // Slow rotations are stretched, fast ones stay, and those between are interpolated.
        "llama3" => {
            let old = rope.original_max_position_embeddings.map(|n| n as f64);
            let old = given(old, "original_max_position_embeddings")?;
            let factor = given(rope.factor, "factor")?;
            let low = given(rope.low_freq_factor, "low_freq_factor")?;
            let high = given(rope.high_freq_factor, "high_freq_factor")?;
            let turns = old * f64::from(frequency) / TAU;
            let kept = ((turns - low) / (high - low)).clamp(0., 1.) as f32;
            Ok((1. - kept) * frequency / factor as f32 + kept * frequency)
        }
        _ => bail!("the rope type {kind:?} is not supported: default, linear and llama3 are"),
    }
}
