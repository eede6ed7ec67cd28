//! The linear layer of several projections side by side.

use super::adapted::{wrapped_bias, Adapted};
use super::linear::{uniform, Dense};
use super::low_rank::{checked, Part, Start};
use super::weight::Weight;
use super::{LoraConfig, LowRank};
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::VarBuilder;

/// The kind of [`MergedLinear`]: how its weight is stored.
#[derive(Debug, Clone, Copy)]
pub struct Merged(Dense);

/// A linear layer whose outputs are several projections side by side, some with a low-rank update:
/// `y = x·Wᵀ + bias`, with `(alpha/r)·dropout(x)·A_jᵀ·B_jᵀ` added to the outputs of each enabled
/// part j, as for the query and value of one `c_attn`.
///
/// `x` is (.., in), `y` (.., out); with e of m equal parts enabled `A` is (r·e, in) and `B`
/// (out/m·e, r), part after part. `W` is (out, in), or with `fan_in_fan_out` (in, out). A starts at
/// U(±1/√in) and B at zero. loralib multiplies by a dense ΔW on each forward; here each part's
/// update stays two thin products.
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
pub type MergedLinear = Adapted<Merged>;

impl MergedLinear {
    /// Wraps a layer whose outputs are `enable_lora.len()` equal parts. Only `lora_A` and `lora_B`
    /// come from `vb`, and the bias if `vb` trains it. With nothing enabled, or r = 0, it is a
    /// plain layer.
    ///
    /// # Errors
    /// When the parts do not divide the outputs, an option is out of its range, or `vb` has tensors
    /// of other shapes.
    pub fn new(
        base: candle_nn::Linear,
        enable_lora: &[bool],
        cfg: LoraConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let (out_dim, _) = Dense::new(&cfg).dims(base.weight())?;
        Self::with_splits(base, &equal_splits(out_dim, enable_lora)?, cfg, vb)
    }

    /// [`MergedLinear::new`] with parts of any sizes, each `(outputs, enabled)`: for grouped-query
    /// attention, where query, key and value differ. Each enabled part has rank r; the rows of
    /// `lora_B` are those of the enabled parts, in order.
    ///
    /// # Errors
    /// As [`MergedLinear::new`]; the parts must sum to the outputs.
    pub fn with_splits(
        base: candle_nn::Linear,
        splits: &[(usize, bool)],
        cfg: LoraConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let weight = adapt(base.weight(), splits, &cfg, &vb)?;
        let weight = weight.with_bias(wrapped_bias(base.bias(), &vb)?);
        Ok(Self { kind: Merged(Dense::new(&cfg)), weight })
    }

    /// The plain layer with the update merged into its weight, (out, in).
    ///
    /// # Errors
    /// When a merged weight is not finite.
    pub fn into_merged(self) -> Result<candle_nn::Linear> {
        self.kind.0.plain(self.weight.plain()?)
    }
}

fn equal_splits(out_dim: usize, enable_lora: &[bool]) -> Result<Vec<(usize, bool)>> {
    match out_dim.checked_rem(enable_lora.len()) {
        Some(0) => {}
        _ => bail!(
            "merged_linear: the {} parts of enable_lora do not divide out_features = {out_dim}",
            enable_lora.len()
        ),
    }
    Ok(enable_lora.iter().map(|&enabled| (out_dim / enable_lora.len(), enabled)).collect())
}

fn adapt(
    base: &Tensor,
    splits: &[(usize, bool)],
    cfg: &LoraConfig,
    vb: &VarBuilder,
) -> Result<Weight> {
    cfg.validate(base.dtype())?;
    let kind = Dense::new(cfg);
    let (out_dim, in_dim) = kind.dims(base)?;
    let total = splits.iter().try_fold(0usize, |sum, (size, _)| sum.checked_add(*size));
    if total != Some(out_dim) || splits.iter().any(|&(size, _)| size == 0) {
        bail!("merged_linear: the parts {splits:?} do not make up out_features = {out_dim}")
    }
    let (mut parts, mut out, mut b_rows) = (vec![], 0, 0);
    for &(size, enabled) in splits {
        if enabled {
            let ranks = checked(&[parts.len(), cfg.r])?..checked(&[parts.len() + 1, cfg.r])?;
            parts.push(Part { out: out..out + size, ranks, b_rows: b_rows..b_rows + size });
            b_rows += size;
        }
        out += size;
    }
    let low_rank = || {
        let (a, b) = ((parts.len() * cfg.r, in_dim), (b_rows, cfg.r));
        LowRank::in_parts(a, b, parts.clone(), Start::UniformA, cfg, base.dtype(), vb)
    };
    let update = (cfg.r > 0 && b_rows > 0).then(low_rank).transpose()?;
    Weight::new(base.clone(), update, kind.placement(), cfg)
}

impl Module for MergedLinear {
    /// (.., in) to (.., out).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.kind.0.forward(x, &self.weight)
    }
}

/// A [`MergedLinear`] with a bias, its base and adapter from `vb`: `weight`, `bias`, `lora_A`,
/// `lora_B`.
///
/// # Errors
/// When the parts do not divide `out_dim`, an option is out of its range, or `vb` lacks a tensor or
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
    let kind = Dense::new(&cfg);
    let splits = equal_splits(out_dim, enable_lora)?;
    let weight = adapt(&kind.weight(in_dim, out_dim, &vb)?, &splits, &cfg, &vb)?;
    let bias = bias.then(|| vb.get_with_hints(out_dim, "bias", uniform(in_dim))).transpose()?;
    Ok(MergedLinear { kind: Merged(kind), weight: weight.with_bias(bias) })
}
