//! The merged weight of one layer, computed by the layer itself.

use crate::layers::{adapt, LayerKind, LoraConfig};
use crate::weights::LayerWeights;
use candle_core::{bail, DType, Result, Tensor};
use candle_nn::VarBuilder;

/// The merged weight of a layer of the adapter's kind or, if that is unknown, of the kind that the shapes determine.
pub(super) fn merged_weight(
    w: &Tensor,
    layer: &LayerWeights,
    options: &LoraConfig,
) -> Result<Tensor> {
    check_rank(w, layer)?;
    // A convolution with a kernel of 1 is a linear layer, whose weight has other dimensions.
    let (a, kind) = (&layer.a, layer.kind.as_ref());
    let pointwise = kind.and_then(LayerKind::spatial).is_some_and(|(_, groups)| groups == 1);
    let linear = LayerWeights {
        kind: Some(LayerKind::Linear),
        fan_in_fan_out: Some(false),
        ..layer.clone()
    };
    match w.dims() {
        &[_, columns] if pointwise && a.dims() == [layer.r, columns] => merged(w, &linear, options),
        [_, _, kernel @ ..]
            if kind == Some(&LayerKind::Linear)
                && !kernel.is_empty()
                && kernel.iter().all(|k| *k == 1) =>
        {
            merged(&w.flatten_from(1)?, &linear, options)?.reshape(w.shape())
        }
        _ => merged(w, layer, options),
    }
}

/// The merged weight by a layer around `w`.
fn merged(w: &Tensor, layer: &LayerWeights, options: &LoraConfig) -> Result<Tensor> {
    let (kind, fan_in_fan_out) = kind_of(w, layer, options.fan_in_fan_out)?;
    let dtype = match (layer.a.dtype(), layer.b.dtype()) {
        (DType::F64, _) | (_, DType::F64) => DType::F64,
        _ => DType::F32,
    };
    let tensors = layer.tensors().map(|(part, tensor)| (part.name().to_owned(), tensor.clone()));
    let vb = VarBuilder::from_tensors(tensors.collect(), dtype, w.device());
    let cfg = LoraConfig {
        lora_dropout: 0.,
        lora_dtype: Some(dtype),
        fan_in_fan_out,
        ..layer.options(options)
    };
    let adapted = adapt(w, &kind, &cfg, &vb);
    let context =
        || format!("its shape {:?} is not that of a {kind:?} with these factors", w.dims());
    adapted.map_err(|e| candle_core::Error::Msg(format!("{}: {e}", context())))?.merged()
}

/// The kind of the layer around `w`, by its shape if it is not known, and whether `w` is (in, out). What else does not
/// fit, the layer refuses.
fn kind_of(w: &Tensor, layer: &LayerWeights, common: bool) -> Result<(LayerKind, bool)> {
    let inputs = *layer.a.dims().last().unwrap_or(&0);
    match (&layer.kind, w.dims()) {
        (Some(kind), dims) if !kind.is_linear() => {
            match kind.spatial().and_then(|_| convolution(dims, inputs)) {
                Some((own, groups)) if own != *kind => {
                    bail!("its shape {dims:?} with {groups} groups is not that of a {kind:?}")
                }
                _ => Ok((kind.clone(), false)),
            }
        }
        (kind, &[rows, cols]) => {
            let declared = layer.fan_in_fan_out.unwrap_or(common);
            let fan_in_fan_out = match (rows == inputs, cols == inputs) {
                (true, false) => true,
                (false, true) => false,
                _ if kind.is_none() && rows == cols && !declared => bail!(
                    "its shape {:?} is square, which does not tell whether its layer is a Linear, a \
                     Linear with fan_in_fan_out or an Embedding: declare it with \
                     `AdapterConfig::with_layer`",
                    w.dims()
                ),
                _ => declared,
            };
            Ok((kind.clone().unwrap_or(LayerKind::Linear), fan_in_fan_out))
        }
        (Some(kind), dims) => bail!("its shape {dims:?} is not that of a {kind:?}"),
        (None, dims) => match convolution(dims, inputs) {
            Some((kind, _)) => Ok((kind, false)),
            None => bail!("its shape {dims:?} is not that of an adapted layer"),
        },
    }
}

/// The convolution with a kernel of these dimensions, and its groups: A has the inputs of all of them.
fn convolution(dims: &[usize], inputs: usize) -> Option<(LayerKind, usize)> {
    let &[_, per_group, k, ..] = dims else { return None };
    let n = dims.len() - 2;
    let width = k.saturating_pow((n as u32).div_ceil(2));
    let groups = inputs.checked_div(per_group.saturating_mul(width)).unwrap_or(0);
    Some((LayerKind::conv(n, groups)?, groups))
}

/// An error if the factors' rank is not the configuration's. The layer checks everything else.
fn check_rank(w: &Tensor, layer: &LayerWeights) -> Result<()> {
    let columns = *layer.b.dims().last().unwrap_or(&0);
    // A convolution's B has r·k columns.
    let k = *w.dims().get(2).unwrap_or(&1);
    match columns.checked_rem(k) {
        Some(0) if Some(columns) != layer.r.checked_mul(k) => {
            bail!("its adapter's rank is {}, the configuration has r = {}", columns / k, layer.r)
        }
        _ => Ok(()),
    }
}
