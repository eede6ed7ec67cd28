//! The adapted weight of a layer of [`nn`](crate::nn), by the layer's kind.

use super::config::LoraConfig;
use super::conv::{self, Conv3dConfig};
use super::embedding;
use super::kind::{LayerKind, Total};
use super::linear;
use super::merged_linear;
use super::weight::WeightTensors;
use candle_core::{bail, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, VarBuilder};

/// `base` with an update from `vb`, for a layer of `kind`, whose shapes the weight must have.
pub(crate) fn adapt(
    base: &Tensor,
    kind: &LayerKind,
    cfg: &LoraConfig,
    vb: &VarBuilder,
) -> Result<WeightTensors> {
    if kind.is_linear() && cfg.fan_in_fan_out {
        bail!("fan_in_fan_out is set, but candle_nn's weights are (out, in)")
    }
    match *kind {
        LayerKind::Linear => linear::adapt(base, cfg, vb),
        LayerKind::MergedLinear(_) | LayerKind::MergedSplits(_) => {
            match kind.splits(Total::All(base.dim(0)?)) {
                Some(splits) => merged_linear::adapt(base, &splits, cfg, vb),
                None => bail!("its weight {:?} is not that of a {kind:?}", base.dims()),
            }
        }
        // The adapter's dropout is for its other layers, as in PEFT.
        LayerKind::Embedding => {
            embedding::adapt(base, &LoraConfig { lora_dropout: 0., ..*cfg }, vb)
        }
        LayerKind::Conv1d { groups } => {
            conv::adapt(base, Conv1dConfig { groups, ..Default::default() }, cfg, vb)
        }
        LayerKind::Conv2d { groups } => {
            conv::adapt(base, Conv2dConfig { groups, ..Default::default() }, cfg, vb)
        }
        LayerKind::Conv3d { groups } => {
            conv::adapt(base, Conv3dConfig { groups, ..Default::default() }, cfg, vb)
        }
        LayerKind::Parameter { .. } => bail!("an adapted parameter is merged, and is no layer"),
    }
}
