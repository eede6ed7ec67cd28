//! The options that all adapted layers share.

use candle_core::{bail, DType, Result};

/// loralib's options, with loralib's names and defaults.
///
/// ```
/// use loralib::LoraConfig;
/// let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
/// assert_eq!(cfg.scaling(), 2.);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    /// The rank of the update; 0 (the default) makes a plain layer.
    pub r: usize,
    /// The update's strength: it is scaled by `lora_alpha / r`. Default 1.
    pub lora_alpha: f64,
    /// The probability in [0, 1) with which a value of the update's input is dropped in training.
    /// Default 0. An [`Embedding`](crate::Embedding) takes none, as in loralib.
    pub lora_dropout: f32,
    /// Whether evaluation merges the update into a copy of the weight. Default `true`.
    pub merge_weights: bool,
    /// Whether the base stores its weight as (in, out), as GPT-2's `Conv1D` does. Default `false`;
    /// for [`Linear`](crate::Linear) and [`MergedLinear`](crate::MergedLinear) alone.
    pub fan_in_fan_out: bool,
    /// Scale by `lora_alpha / √r` instead, which keeps large ranks from learning ever more slowly
    /// ([Kalajdzievski 2023](https://arxiv.org/abs/2312.03732); not in loralib). Default `false`.
    pub rslora: bool,
    /// The dtype of `lora_A` and `lora_B`. By default the base's, and F32 beside F16 and BF16: in
    /// F16 AdamW's epsilon rounds to 0, and its first step makes all of `lora_A` NaN.
    pub lora_dtype: Option<DType>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 0,
            lora_alpha: 1.,
            lora_dropout: 0.,
            merge_weights: true,
            fan_in_fan_out: false,
            rslora: false,
            lora_dtype: None,
        }
    }
}

impl LoraConfig {
    /// The factor of the update, `lora_alpha / r` (`lora_alpha / √r` with `rslora`); 0 for r = 0.
    pub fn scaling(&self) -> f64 {
        match self.r {
            0 => 0.,
            r if self.rslora => self.lora_alpha / (r as f64).sqrt(),
            r => self.lora_alpha / r as f64,
        }
    }

    pub(crate) fn adapter_dtype(&self, base: DType) -> DType {
        self.lora_dtype.unwrap_or(match base {
            DType::F16 | DType::BF16 => DType::F32,
            dtype => dtype,
        })
    }

    pub(crate) fn validate(&self, base: DType) -> Result<()> {
        if !self.lora_alpha.is_finite() {
            bail!("lora_alpha is {}, expected a finite number", self.lora_alpha)
        }
        if !(0. ..1.).contains(&self.lora_dropout) {
            bail!("lora_dropout is {}, expected a probability in [0, 1)", self.lora_dropout)
        }
        for (what, dtype) in [("base weight", Some(base)), ("lora_dtype", self.lora_dtype)] {
            if let Some(dtype) = dtype {
                if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
                    bail!("the {what} is {dtype:?}, expected F16, BF16, F32 or F64")
                }
            }
        }
        Ok(())
    }

    /// Refuses options that a layer has no use for.
    pub(crate) fn refuse(layer: &str, ignored: &[(&str, bool)]) -> Result<()> {
        match ignored.iter().find(|(_, set)| *set) {
            Some((option, _)) => bail!("{layer} takes no {option}: leave it at its default"),
            None => Ok(()),
        }
    }
}
