//! The linear layer of several fused projections.

use super::adapted::{sealed::Sealed, wrapped_bias, Adapted, Kind};
use super::binding::placeholder::placeholder;
use super::config::{refuse_options, LoraConfig};
use super::init::{has_bias_of_b, split_low_rank, uniform, FactorInit};
use super::kind::LayerKind;
use super::linear::LinearKind;
use super::weight::WeightTensors;
use crate::ops::{checked_product, Split};
use candle_core::quantized::QTensor;
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::VarBuilder;
use std::sync::Arc;

/// The kind of [`MergedLinear`].
#[derive(Debug, Clone)]
pub struct MergedLinearKind {
    linear: LinearKind,
    splits: Vec<(usize, bool)>,
}

impl Sealed for MergedLinearKind {}

impl Kind for MergedLinearKind {
    fn layer_kind(&self) -> LayerKind {
        let size = self.splits.first().map(|(size, _)| *size);
        if self.splits.iter().all(|(own, _)| Some(*own) == size) {
            LayerKind::MergedLinear(self.splits.iter().map(|(_, enabled)| *enabled).collect())
        } else {
            LayerKind::MergedSplits(self.splits.clone())
        }
    }
}

/// A linear layer whose outputs are several fused projections, some with a low-rank update:
/// `y = x·Wᵀ + bias`, with `(alpha/r)·dropout(x)·A_jᵀ·B_jᵀ` added to the outputs of each enabled
/// split j, such as the query and the value of GPT-2's `c_attn`.
///
/// `x` is (.., in), `y` (.., out). With e of m equal splits enabled `A` is (r·e, in) and `B`
/// (out/m·e, r), split after split. `W` is (out, in), or with `fan_in_fan_out` (in, out). A is
/// initialised with U(±1/√in) and B with zeros. loralib multiplies by a dense ΔW on each forward; here
/// the update of each split stays in its two factors.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use loralib as lora;
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let cfg = lora::LoraConfig { r: 4, lora_alpha: 32., ..Default::default() };
/// let c_attn = lora::merged_linear(8, 24, &[true, false, true], cfg, vb)?;
/// let qkv = c_attn.forward(&Tensor::ones((2, 8), DType::F32, &Device::Cpu)?)?;
/// assert_eq!(qkv.dims(), [2, 24]);
/// assert_eq!(c_attn.lora_b().unwrap().dims(), [16, 4]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub type MergedLinear = Adapted<MergedLinearKind>;

impl MergedLinear {
    /// Wraps a layer whose outputs are `enable_lora.len()` equal splits. `vb`, at the layer's path, gives
    /// `lora_A` and `lora_B`, and the bias if `vb` trains it. With nothing enabled, or r = 0, the layer
    /// has no adapter.
    ///
    /// # Errors
    /// If the outputs do not divide into the splits, an option is out of range or not supported (`use_dora`),
    /// or `vb` has tensors of other shapes.
    pub fn new(
        base: candle_nn::Linear,
        enable_lora: &[bool],
        cfg: LoraConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (out_dim, _) = LinearKind::new(&cfg).dims(base.weight())?;
        Self::with_splits(base, &equal_splits(out_dim, enable_lora)?, cfg, vb)
    }

    /// [`MergedLinear::new`] with splits of any sizes, each `(outputs, enabled)`: for grouped-query
    /// attention, where query, key and value differ in size. Each enabled split has rank r. `lora_B` has
    /// the rows of the enabled splits, in order.
    ///
    /// # Errors
    /// As [`MergedLinear::new`]; the splits must sum to the outputs.
    pub fn with_splits(
        base: candle_nn::Linear,
        splits: &[(usize, bool)],
        cfg: LoraConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weight = adapt(base.weight(), splits, &cfg, &vb)?;
        let weight = weight.with_bias(wrapped_bias(base.bias(), &vb)?);
        let (linear, splits) = (LinearKind::new(&cfg), splits.to_vec());
        Ok(Self { kind: MergedLinearKind { linear, splits }, weight: weight.into() })
    }

    /// [`MergedLinear::with_splits`] over a quantised weight (out, in), as
    /// [`Linear::quantized`](super::Linear::quantized).
    ///
    /// # Errors
    /// If the weight is not a matrix, or as [`MergedLinear::with_splits`].
    pub fn quantized(
        weight: Arc<QTensor>,
        bias: Option<Tensor>,
        splits: &[(usize, bool)],
        cfg: LoraConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let base = placeholder(weight, vb.dtype())?;
        Self::with_splits(candle_nn::Linear::new(base.tensor.clone(), bias), splits, cfg, vb)
    }

    /// The splits of the outputs, each (outputs, enabled).
    pub fn splits(&self) -> &[(usize, bool)] {
        &self.kind.splits
    }

    /// The candle_nn layer with the merged weight (out, in).
    ///
    /// # Errors
    /// If a merged value is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Linear> {
        self.kind.linear.into_merged(self.weight.merged_copy()?)
    }
}

fn equal_splits(out_dim: usize, enable_lora: &[bool]) -> Result<Vec<(usize, bool)>> {
    match out_dim.checked_rem(enable_lora.len()) {
        Some(0) => {}
        _ => bail!(
            "merged_linear: out_features = {out_dim} does not divide into the {} splits of enable_lora",
            enable_lora.len()
        ),
    }
    Ok(enable_lora.iter().map(|&enabled| (out_dim / enable_lora.len(), enabled)).collect())
}

/// The weight with the updates of its splits from `vb`.
pub(super) fn adapt(
    base: &Tensor,
    splits: &[(usize, bool)],
    cfg: &LoraConfig,
    vb: &VarBuilder,
) -> Result<WeightTensors> {
    cfg.validate(base.dtype())?;
    refuse_options(
        "a merged linear layer",
        &[
            ("use_dora", cfg.use_dora),
            ("lora_bias", has_bias_of_b(cfg, vb)),
            ("init_lora_weights", cfg.init_lora_weights.of_base()),
        ],
    )?;
    let kind = LinearKind::new(cfg);
    let (out_dim, in_dim) = kind.dims(base)?;
    let total = splits.iter().try_fold(0usize, |sum, (size, _)| sum.checked_add(*size));
    if total != Some(out_dim) || splits.iter().any(|&(size, _)| size == 0) {
        bail!("merged_linear: the splits {splits:?} do not sum to out_features = {out_dim}")
    }
    let (mut enabled_splits, mut out, mut b_rows) = (vec![], 0, 0);
    for &(size, enabled) in splits {
        if enabled {
            let e = enabled_splits.len();
            let ranks = checked_product(&[e, cfg.r])?..checked_product(&[e + 1, cfg.r])?;
            let (outputs, rows) = (out..out + size, b_rows..b_rows + size);
            enabled_splits.push(Split { outputs, ranks, b_rows: rows });
            b_rows += size;
        }
        out += size;
    }
    let update = || {
        let (a, b) = ((enabled_splits.len() * cfg.r, in_dim), (b_rows, cfg.r));
        split_low_rank(a, b, enabled_splits, FactorInit::RandomA, cfg, base.dtype(), vb)
    };
    let update = (cfg.r > 0 && b_rows > 0).then(update).transpose()?;
    WeightTensors::new(base.clone(), update, kind.placement(), cfg)
}

impl Module for MergedLinear {
    /// (.., in) to (.., out).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.kind.linear.forward(x, &self.weight)
    }
}

/// A [`MergedLinear`] with a bias, its base and adapter from `vb`: `weight`, `bias`, `lora_A`,
/// `lora_B`.
///
/// # Errors
/// If `out_dim` does not divide into the splits, an option is out of range, or `vb` lacks a tensor or
/// has it in another shape.
pub fn merged_linear(
    in_dim: usize,
    out_dim: usize,
    enable_lora: &[bool],
    cfg: LoraConfig,
    vb: VarBuilder,
) -> Result<MergedLinear> {
    build(in_dim, out_dim, enable_lora, true, cfg, vb)
}

/// [`merged_linear`] without a bias.
///
/// # Errors
/// As [`merged_linear`].
pub fn merged_linear_no_bias(
    in_dim: usize,
    out_dim: usize,
    enable_lora: &[bool],
    cfg: LoraConfig,
    vb: VarBuilder,
) -> Result<MergedLinear> {
    build(in_dim, out_dim, enable_lora, false, cfg, vb)
}

fn build(
    in_dim: usize,
    out_dim: usize,
    enable_lora: &[bool],
    bias: bool,
    cfg: LoraConfig,
    vb: VarBuilder,
) -> Result<MergedLinear> {
    let linear = LinearKind::new(&cfg);
    let splits = equal_splits(out_dim, enable_lora)?;
    let weight = adapt(&linear.get_weight(in_dim, out_dim, &vb)?, &splits, &cfg, &vb)?;
    let bias = bias.then(|| vb.get_with_hints(out_dim, "bias", uniform(in_dim))).transpose()?;
    let kind = MergedLinearKind { linear, splits };
    Ok(MergedLinear { kind, weight: weight.with_bias(bias).into() })
}
