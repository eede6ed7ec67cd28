//! The linear layer.

use super::adapted::{sealed::Sealed, wrapped_bias, Adapted, Kind};
use super::batch_update::BatchUpdate;
use super::binding::placeholder::placeholder;
use super::config::{refuse_options, LoraConfig};
use super::init::{bias_of_b, low_rank, uniform, FactorInit};
use super::kind::LayerKind;
use super::placement::Placement;
use super::weight::{Effective, MergedCopy, View, Weight, WeightTensors};
use crate::ops;
use candle_core::quantized::QTensor;
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::VarBuilder;
use std::ops::Range;
use std::sync::Arc;

/// The kind of [`Linear`].
#[derive(Debug, Clone, Copy, Default)]
pub struct LinearKind {
    fan_in_fan_out: bool,
}

/// [`candle_nn::Linear`] with a low-rank update of its weight:
/// `y = x·Wᵀ + (alpha/r)·dropout(x)·Aᵀ·Bᵀ + bias`.
///
/// `x` is (.., in), `y` (.., out), `W` (out, in) or with `fan_in_fan_out` (in, out), `A` (r, in) and
/// `B` (out, r). A is initialised with U(±1/√in) and B with zeros, so that a new layer equals its base.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let cfg = lora::LoraConfig { r: 4, lora_alpha: 8., ..Default::default() };
/// let layer = lora::linear(6, 5, cfg, vb)?;
/// let y = layer.forward(&Tensor::ones((2, 3, 6), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(y.dims(), [2, 3, 5]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type Linear = Adapted<LinearKind>;

impl Linear {
    /// Wraps a layer. `vb`, at the layer's path, gives `lora_A` (r, in), `lora_B` (out, r) and perhaps
    /// `lora_bias` (out), and the bias if `vb` trains it. With `fan_in_fan_out` the layer's weight is (in, out).
    ///
    /// # Errors
    /// If an option is out of range or `vb` has tensors of other shapes.
    pub fn new(base: candle_nn::Linear, cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let weight = adapt(base.weight(), &cfg, &vb)?;
        let weight = weight.with_bias(wrapped_bias(base.bias(), &vb)?);
        Ok(Self { kind: LinearKind::new(&cfg), weight: weight.into() })
    }

    /// Wraps a quantised weight (out, in), which stays quantised: it is decoded in parts, forward and backward,
    /// and computes as its dequantised values would, in `vb`'s dtype. `vb` gives what it gives to
    /// [`Linear::new`]. Evaluation does not merge: a merged copy would be several times the size.
    ///
    /// ```
    /// use candle_core::quantized::{GgmlDType, QTensor};
    /// use candle_core::{DType, Device, Module, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use loralib as lora;
    /// use std::sync::Arc;
    ///
    /// let weight = Tensor::randn(0f32, 1., (16, 64), &Device::Cpu)?;
    /// let blocks = Arc::new(QTensor::quantize(&weight, GgmlDType::Q4_0)?);
    /// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    /// let cfg = lora::LoraConfig { r: 4, lora_alpha: 8., ..Default::default() };
    /// let layer = lora::Linear::quantized(blocks, None, cfg, vb)?;
    /// let y = layer.forward(&Tensor::ones((2, 64), DType::F32, &Device::Cpu)?)?;
    /// assert_eq!(y.dims(), [2, 16]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// If the weight is not a matrix, or as [`Linear::new`].
    pub fn quantized(
        weight: Arc<QTensor>,
        bias: Option<Tensor>,
        cfg: LoraConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let base = placeholder(weight, vb.dtype())?;
        Self::new(candle_nn::Linear::new(base.tensor.clone(), bias), cfg, vb)
    }

    /// out
    pub(crate) fn out_features(&self) -> Result<usize> {
        Ok(self.kind.dims(self.weight())?.0)
    }

    /// The candle_nn layer with the merged weight (out, in).
    ///
    /// # Errors
    /// If a merged value is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Linear> {
        self.kind.into_merged(self.weight.merged_copy()?)
    }
}

impl Sealed for LinearKind {}

impl Kind for LinearKind {
    fn layer_kind(&self) -> LayerKind {
        LayerKind::Linear
    }
}

impl LinearKind {
    pub(super) fn new(cfg: &LoraConfig) -> Self {
        Self { fan_in_fan_out: cfg.fan_in_fan_out }
    }

    pub(super) fn placement(&self) -> Placement {
        if self.fan_in_fan_out {
            Placement::Transposed
        } else {
            Placement::AsIs
        }
    }

    /// (out, in) to the stored shape, and back.
    fn shape(&self, (out_dim, in_dim): (usize, usize)) -> (usize, usize) {
        if self.fan_in_fan_out {
            (in_dim, out_dim)
        } else {
            (out_dim, in_dim)
        }
    }

    pub(super) fn into_merged(self, merged: MergedCopy) -> Result<candle_nn::Linear> {
        let MergedCopy { mut weight, bias } = merged;
        if self.fan_in_fan_out {
            weight = weight.t()?.contiguous()?;
        }
        Ok(candle_nn::Linear::new(weight, bias))
    }

    pub(super) fn forward(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let Effective { weight, bias, update } = weight.effective()?;
        let w = if self.fan_in_fan_out { weight } else { weight.t()? };
        match &update {
            BatchUpdate::Whole(update) => ops::linear(x, &w, bias.as_ref(), update.as_ref()),
            BatchUpdate::Rows(groups) => ops::linear_rows(x, &w, bias.as_ref(), groups),
        }
    }

    /// (out, in) of a stored weight.
    pub(super) fn dims(&self, weight: &Tensor) -> Result<(usize, usize)> {
        Ok(self.shape(weight.dims2()?))
    }

    /// The stored weight from `vb`, with torch's initialisation if it is new.
    pub(super) fn get_weight(
        &self,
        in_dim: usize,
        out_dim: usize,
        vb: &VarBuilder,
    ) -> Result<Tensor> {
        if in_dim == 0 || out_dim == 0 {
            bail!("linear: in_features = {in_dim}, out_features = {out_dim}, expected at least 1")
        }
        vb.get_with_hints(self.shape((out_dim, in_dim)), "weight", uniform(in_dim))
    }
}

/// The weight with its update from `vb`.
pub(super) fn adapt(base: &Tensor, cfg: &LoraConfig, vb: &VarBuilder) -> Result<WeightTensors> {
    cfg.validate(base.dtype())?;
    let kind = LinearKind::new(cfg);
    let (out_dim, in_dim) = kind.dims(base)?;
    let placed = (base, kind.placement());
    let update = || low_rank((cfg.r, in_dim), out_dim, FactorInit::RandomA, cfg, placed, vb);
    let update = (cfg.r > 0).then(update).transpose()?;
    let bias_of_b = bias_of_b(out_dim, cfg, base.dtype(), vb)?;
    Ok(WeightTensors::new(base.clone(), update, kind.placement(), cfg)?.with_bias_of_b(bias_of_b))
}

/// One of the linear layers (out, in) whose projections are fused in an update: the outputs `rows` of the `all` that its
/// factors from `vb` have.
pub(crate) fn projection(
    base: &Tensor,
    (rows, all): (Range<usize>, usize),
    cfg: &LoraConfig,
    vb: &VarBuilder,
) -> Result<WeightTensors> {
    cfg.validate(base.dtype())?;
    refuse_options(
        "a parameter of experts",
        &[
            ("lora_dropout", cfg.lora_dropout > 0.),
            ("use_dora", cfg.use_dora),
            ("lora_bias", cfg.lora_bias),
            ("fan_in_fan_out", cfg.fan_in_fan_out),
            ("init_lora_weights", cfg.init_lora_weights.of_base()),
        ],
    )?;
    let (_, in_dim) = base.dims2()?;
    let placed = (base, Placement::AsIs);
    let update = low_rank((cfg.r, in_dim), all, FactorInit::RandomA, cfg, placed, vb)?;
    Ok(WeightTensors::sharing(base.clone(), update, View::Outputs(rows), cfg))
}

impl Module for Linear {
    /// (.., in) to (.., out).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.kind.forward(x, &self.weight)
    }
}

/// A linear layer with a bias, its base and adapter from `vb`: `weight`, `bias`, `lora_A`, `lora_B`.
///
/// # Errors
/// If an option is out of range, or `vb` lacks a tensor or has it in another shape.
pub fn linear(in_dim: usize, out_dim: usize, cfg: LoraConfig, vb: VarBuilder) -> Result<Linear> {
    linear_b(in_dim, out_dim, true, cfg, vb)
}

/// [`linear`] without a bias.
///
/// # Errors
/// As [`linear`].
pub fn linear_no_bias(
    in_dim: usize,
    out_dim: usize,
    cfg: LoraConfig,
    vb: VarBuilder,
) -> Result<Linear> {
    linear_b(in_dim, out_dim, false, cfg, vb)
}

/// [`linear`] or [`linear_no_bias`].
///
/// # Errors
/// As [`linear`].
pub fn linear_b(
    in_dim: usize,
    out_dim: usize,
    bias: bool,
    cfg: LoraConfig,
    vb: VarBuilder,
) -> Result<Linear> {
    let kind = LinearKind::new(&cfg);
    // The adapter before the bias: `Bias::LoraOnly` trains a bias that has a `lora_A` beside it.
    let weight = adapt(&kind.get_weight(in_dim, out_dim, &vb)?, &cfg, &vb)?;
    let bias = bias.then(|| vb.get_with_hints(out_dim, "bias", uniform(in_dim))).transpose()?;
    Ok(Linear { kind, weight: weight.with_bias(bias).into() })
}
