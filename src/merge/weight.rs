//! The merged weight of one layer, computed by the layer itself.

use crate::layers::{
    Conv1d, Conv2d, Conv3d, Conv3dConfig, Embedding, LayerKind, Linear, LoraConfig, MergedLinear,
    Total, MAGNITUDE,
};
use candle_core::{bail, DType, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};

/// What the adapter has of a layer.
pub(super) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    /// With DoRA.
    pub magnitude: Option<Tensor>,
}

/// The merged weight of the layer that `kind` declares or, if it is `None`, that the shapes determine.
pub(super) fn merged_weight(
    w: &Tensor,
    factors: &Factors,
    kind: Option<&LayerKind>,
    cfg: LoraConfig,
) -> Result<Tensor> {
    let Factors { a, b, magnitude } = factors;
    if cfg.r == 0 {
        bail!("the configuration has r = 0, the adapter a lora_A {:?}", a.dims())
    }
    check_rank(w, b, cfg.r)?;
    let dtype = match (a.dtype(), b.dtype()) {
        (DType::F64, _) | (_, DType::F64) => DType::F64,
        _ => DType::F32,
    };
    let tensors = [("lora_A", Some(a)), ("lora_B", Some(b)), (MAGNITUDE, magnitude.as_ref())];
    let tensors = tensors.into_iter().filter_map(|(name, t)| Some((name.to_owned(), t?.clone())));
    let vb = VarBuilder::from_tensors(tensors.collect(), dtype, w.device());
    let cfg = LoraConfig { lora_dropout: 0., lora_dtype: Some(dtype), ..cfg };
    let inputs = *a.dims().last().unwrap_or(&0);
    // A convolution with a kernel of 1 is a linear layer, whose weight has other dimensions.
    let pointwise = |kind: &LayerKind| kind.spatial().is_some_and(|(_, groups)| groups == 1);
    let as_linear = (Some(&LayerKind::Linear), LoraConfig { fan_in_fan_out: false, ..cfg });
    let (kind, cfg) = match (kind, w.dims()) {
        (Some(kind), &[_, columns]) if pointwise(kind) && a.dims() == [cfg.r, columns] => as_linear,
        (kind, _) => (kind, cfg),
    };
    match (kind, w.dims()) {
        (Some(LayerKind::Linear), [_, _, kernel @ ..])
            if !kernel.is_empty() && kernel.iter().all(|k| *k == 1) =>
        {
            let (kind, cfg) = as_linear;
            merged_weight(&w.flatten_from(1)?, factors, kind, cfg)?.reshape(w.shape())
        }
        (Some(LayerKind::Embedding), &[_, dim]) => {
            let cfg = LoraConfig { fan_in_fan_out: false, ..cfg };
            Embedding::new(candle_nn::Embedding::new(w.clone(), dim), cfg, vb)?.merged_weight()
        }
        (kind, &[rows, cols]) if kind.is_none_or(LayerKind::is_linear) => {
            let fan_in_fan_out = match (rows == inputs, cols == inputs) {
                (true, false) => true,
                (false, true) => false,
                _ if kind.is_none() && rows == cols && !cfg.fan_in_fan_out => bail!(
                    "its shape {:?} is square, which does not tell whether its layer is a Linear, a \
                     Linear with fan_in_fan_out or an Embedding: declare it with \
                     `AdapterConfig::with_layer`",
                    w.dims()
                ),
                _ => cfg.fan_in_fan_out,
            };
            let cfg = LoraConfig { fan_in_fan_out, ..cfg };
            let base = candle_nn::Linear::new(w.clone(), None);
            let out = if fan_in_fan_out { cols } else { rows };
            match kind {
                None | Some(LayerKind::Linear) => Linear::new(base, cfg, vb)?.merged_weight(),
                Some(kind) => match kind.splits(Total::All(out)) {
                    Some(splits) => {
                        MergedLinear::with_splits(base, &splits, cfg, vb)?.merged_weight()
                    }
                    None => bail!("the splits of {kind:?} do not sum to its {out} outputs"),
                },
            }
        }
        (kind, &[_, per_group, k, ..]) if kind.is_none_or(|kind| kind.spatial().is_some()) => {
            // A has the inputs of all groups.
            let width = k.saturating_pow((w.rank() as u32 - 2).div_ceil(2));
            let groups = inputs.checked_div(per_group.saturating_mul(width)).unwrap_or(0);
            if let Some(kind) = kind.filter(|kind| kind.spatial() != Some((w.rank() - 2, groups))) {
                bail!("its shape {:?} with {groups} groups is not that of a {kind:?}", w.dims())
            }
            let cfg = LoraConfig { fan_in_fan_out: false, ..cfg };
            match w.rank() {
                3 => {
                    let options = Conv1dConfig { groups, ..Default::default() };
                    let base = candle_nn::Conv1d::new(w.clone(), None, options);
                    Conv1d::new(base, cfg, vb)?.merged_weight()
                }
                4 => {
                    let options = Conv2dConfig { groups, ..Default::default() };
                    let base = candle_nn::Conv2d::new(w.clone(), None, options);
                    Conv2d::new(base, cfg, vb)?.merged_weight()
                }
                _ => {
                    let options = Conv3dConfig { groups, ..Default::default() };
                    Conv3d::new(w.clone(), None, options, cfg, vb)?.merged_weight()
                }
            }
        }
        (Some(kind), dims) => bail!("its shape {dims:?} is not that of a {kind:?}"),
        (None, dims) => bail!("its shape {dims:?} is not that of an adapted layer"),
    }
}

/// An error if the factors' rank is not the configuration's. The layer checks everything else.
fn check_rank(w: &Tensor, b: &Tensor, r: usize) -> Result<()> {
    let columns = *b.dims().last().unwrap_or(&0);
    // A convolution's B has r·k columns.
    let k = *w.dims().get(2).unwrap_or(&1);
    match columns.checked_rem(k) {
        Some(0) if columns != r * k => {
            bail!("its adapter's rank is {}, the configuration has r = {r}", columns / k)
        }
        _ => Ok(()),
    }
}
