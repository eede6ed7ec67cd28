//! Where the tokens of a forward stand in their texts.

use super::config::{Config, Span};
use candle_core::{bail, Device, Result, Tensor};
use std::ops::Range;

#[derive(Clone)]
pub struct Texts {
    /// The cosines and sines (tokens, rotated / 2) for layers that see all, and for those with a window.
    angles: [[Tensor; 2]; 2],
    /// Of several texts in one row: where each begins and the last ends, and the length of the longest.
    pub bounds: Option<(Tensor, usize)>,
}

impl Texts {
    /// A text that goes on at `at`, for each row of the batch.
    pub fn one(cfg: &Config, at: Range<usize>, device: &Device) -> Result<Self> {
        Self::new(cfg, &[at], None, device)
    }

    /// Texts of these lengths, one after another.
    pub fn packed(cfg: &Config, lens: &[usize], device: &Device) -> Result<Self> {
        let ends = lens.iter().scan(0, |end, len| {
            *end += *len as i64;
            Some(*end)
        });
        let bounds: Vec<i64> = std::iter::once(0).chain(ends).collect();
        let bounds = Tensor::new(bounds, device)?;
        let longest = lens.iter().max().copied().unwrap_or(0);
        let texts: Vec<_> = lens.iter().map(|len| 0..*len).collect();
        Self::new(cfg, &texts, Some((bounds, longest)), device)
    }

    fn new(
        cfg: &Config,
        texts: &[Range<usize>],
        bounds: Option<(Tensor, usize)>,
        device: &Device,
    ) -> Result<Self> {
        if let Some(text) = texts.iter().find(|text| text.end > cfg.longest) {
            bail!("{} tokens, the model takes {}", text.end, cfg.longest)
        }
        let tokens: usize = texts.iter().map(|text| text.len()).sum();
        let [all, windows] = cfg.rotary.each_ref().map(|rotary| {
            let shape = (tokens, rotary.rotated() / 2);
            let [cos, sin] = rotary.tables(texts).map(|t| Tensor::from_vec(t, shape, device));
            Ok::<_, candle_core::Error>([cos?, sin?])
        });
        Ok(Self { angles: [all?, windows?], bounds })
    }

    /// The cosines and sines for a layer.
    pub fn angles(&self, span: Span) -> &[Tensor; 2] {
        &self.angles[usize::from(span != Span::All)]
    }
}
