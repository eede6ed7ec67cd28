//! The angles of rotary position embeddings.

use crate::Result;
use serde::Deserialize;
use serde_json::Value;
use std::f64::consts::TAU;
use std::ops::Range;

/// How positions become angles.
#[derive(Debug, Clone)]
pub struct Rotary {
    /// Radians a position, for each pair of the values that are rotated. In F32, as torch computes them.
    frequencies: Vec<f32>,
    /// Those of texts that are longer than this.
    long: Option<(usize, Vec<f32>)>,
    /// What cosines and sines are multiplied by.
    factor: f32,
}

/// transformers' names.
#[derive(Deserialize)]
struct Options {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    attention_factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    long_factor: Option<Vec<f64>>,
    short_factor: Option<Vec<f64>>,
}

impl Rotary {
    /// Of a model with heads of `head_dim` values that takes `longest` tokens.
    pub fn new(options: Value, head_dim: usize, longest: usize) -> Result<Self> {
        let options: Options = serde_json::from_value(options)?;
        let theta = options.rope_theta.unwrap_or(10_000.) as f32;
        let rotated = (head_dim as f64 * options.partial_rotary_factor.unwrap_or(1.)) as usize;
        let powers = (0..rotated / 2).map(|i| theta.powf(2. * i as f32 / rotated as f32));
        let kind = options.rope_type.as_deref().unwrap_or("default");
        let given = |value: Option<f64>, name| {
            value.ok_or_else(|| format!("the rope type {kind:?} has no {name}"))
        };
        let original = options.original_max_position_embeddings;
        let original = || given(original.map(|n| n as f64), "original_max_position_embeddings");
        let scaled = |scale: &dyn Fn(f32) -> f32| Self {
            frequencies: powers.clone().map(|power| scale(1. / power)).collect(),
            long: None,
            factor: 1.,
        };
        match kind {
            "default" => Ok(scaled(&|f| f)),
            "linear" => {
                let factor = given(options.factor, "factor")? as f32;
                Ok(scaled(&|f| f / factor))
            }
            // Slow rotations are stretched, fast ones stay, and those between are interpolated.
            "llama3" => {
                let (old, factor) = (original()?, given(options.factor, "factor")?);
                let low = given(options.low_freq_factor, "low_freq_factor")?;
                let high = given(options.high_freq_factor, "high_freq_factor")?;
                Ok(scaled(&|f| {
                    let turns = old * f64::from(f) / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0., 1.) as f32;
                    (1. - kept) * f / factor as f32 + kept * f
                }))
            }
            // "su" is what the first files of Phi-3 call it.
            "longrope" | "su" => {
                let old = original()?;
                let divided = |by: &Option<Vec<f64>>, name| match by {
                    Some(by) if by.len() == rotated / 2 => Ok(powers
                        .clone()
                        .zip(by)
                        .map(|(power, by)| 1. / (*by as f32 * power))
                        .collect()),
                    Some(by) => {
                        Err(format!("{name} has {} values, expected {}", by.len(), rotated / 2))
                    }
                    None => Err(format!("the rope type {kind:?} has no {name}")),
                };
                let stretched = options.factor.unwrap_or(longest as f64 / old);
                let factor = options.attention_factor.unwrap_or(match stretched > 1. {
                    true => (1. + stretched.ln() / old.ln()).sqrt(),
                    false => 1.,
                });
                Ok(Self {
                    frequencies: divided(&options.short_factor, "short_factor")?,
                    long: Some((old as usize, divided(&options.long_factor, "long_factor")?)),
                    factor: factor as f32,
                })
            }
            _ => {
                let known = "default, linear, llama3 and longrope are supported";
                Err(format!("the rope type is {kind:?}: {known}").into())
            }
        }
    }

    /// The length of a text above which all of its rotations are others.
    pub fn turn(&self) -> Option<usize> {
        self.long.as_ref().map(|(longest, _)| *longest)
    }

    /// How many values of a head are rotated.
    pub fn rotated(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// The cosines and the sines (tokens, rotated / 2) of the positions of texts that lie one after another.
    pub fn tables(&self, texts: &[Range<usize>]) -> [Vec<f32>; 2] {
        let of_text = |text: &Range<usize>| {
            let long = self.long.as_ref().filter(|(longest, _)| text.end > *longest);
            let frequencies = long.map_or(&self.frequencies, |(_, long)| long);
            text.clone().flat_map(|at| frequencies.iter().map(move |f| at as f32 * f))
        };
        let angles: Vec<f32> = texts.iter().flat_map(of_text).collect();
        let of = |f: fn(f32) -> f32| angles.iter().map(|angle| f(*angle) * self.factor).collect();
        [of(f32::cos), of(f32::sin)]
    }
}
