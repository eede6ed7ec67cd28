//! The linear layer.

use super::adapted::{wrapped_bias, Adapted};
use super::low_rank::Start;
use super::weight::{Placement, Plain, Running, Weight};
use super::{LoraConfig, LowRank};
use crate::ops;
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// The kind of [`Linear`]: how its weight is stored.
#[derive(Debug, Clone, Copy)]
pub struct Dense {
    fan_in_fan_out: bool,
}

/// [`candle_nn::Linear`] with a low-rank update of its weight:
/// `y = x·Wᵀ + (alpha/r)·dropout(x)·Aᵀ·Bᵀ + bias`.
///
/// `x` is (.., in), `y` (.., out), `W` (out, in) or with `fan_in_fan_out` (in, out), `A` (r, in) and
/// `B` (out, r). A starts at U(±1/√in) and B at zero, so that a fresh layer equals its base.
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
pub type Linear = Adapted<Dense>;

impl Linear {
    /// Wraps a layer. Only `lora_A` (r, in) and `lora_B` (out, r) come from `vb`, which is at the
    /// layer's own path, and the bias if `vb` trains it. With `fan_in_fan_out` the layer's weight is (in, out).
    ///
    /// # Errors
    /// When an option is out of its range or `vb` has tensors of other shapes.
    pub fn new(base: candle_nn::Linear, cfg: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let weight = adapt(base.weight(), &cfg, &vb)?;
        let weight = weight.with_bias(wrapped_bias(base.bias(), &vb)?);
        Ok(Self { kind: Dense::new(&cfg), weight })
    }

    /// The plain layer with the update merged into its weight, (out, in).
    ///
    /// # Errors
    /// When a merged weight is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Linear> {
        self.kind.plain(self.weight.plain()?)
    }
}

impl Dense {
    pub(super) fn new(cfg: &LoraConfig) -> Self {
        Self { fan_in_fan_out: cfg.fan_in_fan_out }
    }

    pub(super) fn placement(&self) -> Placement {
        match self.fan_in_fan_out {
            true => Placement::Transposed,
            false => Placement::AsIs,
        }
    }

    /// (in, out) as (out, in) and back, where the weight is stored the other way round.
    fn shape(&self, (out_dim, in_dim): (usize, usize)) -> (usize, usize) {
        match self.fan_in_fan_out {
            true => (in_dim, out_dim),
            false => (out_dim, in_dim),
        }
    }

    pub(super) fn plain(&self, Plain { weight, bias }: Plain) -> Result<candle_nn::Linear> {
        let weight = match self.fan_in_fan_out {
            true => weight.t()?.contiguous()?,
            false => weight,
        };
        Ok(candle_nn::Linear::new(weight, bias))
    }

    pub(super) fn forward(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let Running { weight, bias, update } = weight.running();
        let w = match self.fan_in_fan_out {
            true => weight,
            false => weight.t()?,
        };
        ops::linear(x, &w, bias.as_ref(), update.as_ref())
    }

    /// (out, in) of a stored weight.
    pub(super) fn dims(&self, weight: &Tensor) -> Result<(usize, usize)> {
        Ok(self.shape(weight.dims2()?))
    }

    /// The stored weight of a new layer; torch's initial values where there are none yet.
    pub(super) fn weight(&self, in_dim: usize, out_dim: usize, vb: &VarBuilder) -> Result<Tensor> {
        if in_dim == 0 || out_dim == 0 {
            bail!("linear: in_features = {in_dim} and out_features = {out_dim}, expected some of both")
        }
        vb.get_with_hints(self.shape((out_dim, in_dim)), "weight", uniform(in_dim))
    }
}

/// U(±1/√fan_in), where torch starts weights and biases.
pub(super) fn uniform(fan_in: usize) -> Init {
    let bound = 1. / (fan_in as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

fn adapt(base: &Tensor, cfg: &LoraConfig, vb: &VarBuilder) -> Result<Weight> {
    cfg.validate(base.dtype())?;
    let kind = Dense::new(cfg);
    let (out_dim, in_dim) = kind.dims(base)?;
    let low_rank =
        || LowRank::new((cfg.r, in_dim), out_dim, Start::UniformA, cfg, base.dtype(), vb);
    let update = (cfg.r > 0).then(low_rank).transpose()?;
    Weight::new(base.clone(), update, kind.placement(), cfg)
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
/// When an option is out of its range, or `vb` lacks a tensor or has it in another shape.
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
    let kind = Dense::new(&cfg);
    // The adapter comes before the bias: under `Bias::LoraOnly` it is what marks a bias for training.
    let weight = adapt(&kind.weight(in_dim, out_dim, &vb)?, &cfg, &vb)?;
    let bias = bias.then(|| vb.get_with_hints(out_dim, "bias", uniform(in_dim))).transpose()?;
    Ok(Linear { kind, weight: weight.with_bias(bias) })
}
