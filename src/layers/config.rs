//! The options of an adapter.

use super::init_lora_weights::InitLoraWeights;
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
    /// The rank of the update. Default 0, which makes a layer without an adapter.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`. Default 1.
    pub lora_alpha: f64,
    /// The dropout probability of the update's input in training, in [0, 1). Default 0. An error for
    /// [`Embedding`](crate::Embedding), which has no dropout in loralib either; the embeddings that an
    /// [`Adapter`](crate::Adapter) adapts have none, as in PEFT.
    pub lora_dropout: f32,
    /// Whether evaluation merges the update into a copy of the weight. Default `true`.
    pub merge_weights: bool,
    /// Whether the base stores its weight as (in, out), as GPT-2's `Conv1D` does. Default `false`. Only
    /// for [`Linear`](crate::Linear) and [`MergedLinear`](crate::MergedLinear).
    pub fan_in_fan_out: bool,
    /// Whether the update is scaled by `lora_alpha / √r` instead, which keeps the learning speed of large
    /// ranks ([Kalajdzievski 2023](https://arxiv.org/abs/2312.03732); not in loralib). Default `false`.
    pub rslora: bool,
    /// Whether the layer trains the magnitude of each output too (DoRA, [Liu et al.
    /// 2024](https://arxiv.org/abs/2402.09353); PEFT's `use_dora`, not in loralib): the effective weight is
    /// `m ∘ (W + ΔW)/‖W + ΔW‖`, whose norm has no gradient. m is a variable `lora_magnitude_vector` (out), which is
    /// initialised with the norms of W when the layer is built: variables of the base are loaded before, or by
    /// [`load_state_dict`](crate::load_state_dict). Training computes the norms in each forward. Evaluation that does
    /// not merge computes them once, with the values at `eval()`, in linear layers and embeddings over a frozen base;
    /// in convolutions, and among [`Adapters`](crate::Adapters), each forward does. Default `false`. An error for
    /// [`MergedLinear`](crate::MergedLinear), and for a new layer over a W with an output of zeros.
    pub use_dora: bool,
    /// Whether a new layer also trains a bias of B, `lora_bias` (out), which starts as 0: the bias of the layer is `bias +
    /// scaling · lora_bias`. PEFT's option of this name, not in loralib; a layer that has the tensor has it without the
    /// option. Default `false`. Only for [`Linear`](crate::Linear) and convolutions, and not with `use_dora`.
    pub lora_bias: bool,
    /// Whether a new convolution of one group has PEFT's factors, two kernels whose product is the update: A (r, in, k..),
    /// initialised with U(±1/√(in·kⁿ)), and B (out, r, 1..). Not in loralib, whose factors have r·k ranks, and not saved.
    /// Default `false`; [`Adapter::from_peft_config`](crate::Adapter::from_peft_config) sets it, and adapters that PEFT
    /// saved are trained so.
    pub conv_kernels: bool,
    /// How new factors are initialised, PEFT's `init_lora_weights`. Not in loralib, and not saved. Of no effect in
    /// an [`Embedding`](crate::Embedding), whose `lora_A` is zero.
    pub init_lora_weights: InitLoraWeights,
    /// The dtype of `lora_A`, `lora_B` and the magnitude. By default the base's, but F32 for F16 and BF16 bases:
    /// in F16 AdamW's epsilon rounds to 0, and its first step makes all of `lora_A` NaN.
    pub lora_dtype: Option<DType>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl LoraConfig {
    /// The default, for constants.
    pub const DEFAULT: Self = Self {
        r: 0,
        lora_alpha: 1.,
        lora_dropout: 0.,
        merge_weights: true,
        fan_in_fan_out: false,
        rslora: false,
        use_dora: false,
        lora_bias: false,
        conv_kernels: false,
        init_lora_weights: InitLoraWeights::Uniform,
        lora_dtype: None,
    };

    /// The scaling of the update, `lora_alpha / r` (`lora_alpha / √r` with `rslora`); 0 for r = 0.
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
        if self.lora_bias && self.use_dora {
            bail!("lora_bias and use_dora are set: with magnitudes B has no bias")
        }
        for (name, dtype) in [("base weight", Some(base)), ("lora_dtype", self.lora_dtype)] {
            if let Some(dtype) = dtype {
                if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
                    bail!("the {name} is {dtype:?}, expected F16, BF16, F32 or F64")
                }
            }
        }
        Ok(())
    }
}

/// The `lora_alpha` that gives rank `to` the scaling of `alpha` and rank `from`.
pub(crate) fn same_scaling(alpha: f64, from: usize, to: usize, rslora: bool) -> f64 {
    match (from == to, rslora) {
        (true, _) => alpha,
        (false, true) => alpha * (to as f64 / from as f64).sqrt(),
        (false, false) => alpha * to as f64 / from as f64,
    }
}

/// An error if an option is set that a layer does not support.
pub(super) fn refuse_options(layer: &str, unsupported: &[(&str, bool)]) -> Result<()> {
    match unsupported.iter().find(|(_, set)| *set) {
        Some((option, _)) => bail!("{layer} does not support {option}: leave it at its default"),
        None => Ok(()),
    }
}
