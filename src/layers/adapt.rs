//! The adapted weight of a layer, by the layer's kind.

use super::config::LoraConfig;
use super::conv;
use super::embedding;
use super::kind::{LayerKind, Total};
use super::linear;
use super::merged_linear;
use super::weight::WeightTensors;
use candle_core::{bail, Result, Tensor};
use candle_nn::VarBuilder;

/// `base` with an update from `vb`, for a layer of `kind`, whose shapes the weight must have.
pub(crate) fn adapt(
    base: &Tensor,
    kind: &LayerKind,
    cfg: &LoraConfig,
    vb: &VarBuilder,
) -> Result<WeightTensors> {
    if let Some((n, groups)) = kind.spatial() {
        return conv::adapt(base, n, groups, cfg, vb);
    }
    match kind {
        LayerKind::Linear => linear::adapt(base, cfg, vb),
        // The adapter's dropout is for its other layers, as in PEFT.
        LayerKind::Embedding => {
            embedding::adapt(base, &LoraConfig { lora_dropout: 0., ..*cfg }, vb)
        }
        LayerKind::Parameter { .. } => bail!("an adapted parameter is merged, and is no layer"),
        fused => {
            let out = base.dim(usize::from(cfg.fan_in_fan_out))?;
            match fused.splits(Total::All(out)) {
                Some(splits) => merged_linear::adapt(base, &splits, cfg, vb),
                None => bail!("the splits of {fused:?} do not sum to its {out} outputs"),
            }
        }
    }
}
