//! A merged parameter of PEFT's `target_parameters`: a matrix (out, in), or fused experts, each with factors of
//! its own, A (experts, r, in) and B (experts, out, r). A matrix counts as one expert.

use super::weight::merged_weight;
use crate::layers::{LayerKind, LoraConfig};
use crate::weights::{Factors, LayerWeights, LoraWeights};
use candle_core::{bail, Result, Tensor};
use std::collections::BTreeMap;

/// `W + ΔW` of (out, in), (experts, out, in) or, with `fan_in_fan_out`, (experts, in, out). The shapes tell which,
/// unless they are square.
pub(super) fn merged_experts(
    w: &Tensor,
    layer: &LayerWeights,
    options: &LoraConfig,
) -> Result<Tensor> {
    if layer.magnitude.is_some() {
        bail!("it is a parameter without a layer, for which PEFT has no use_dora")
    }
    let (a, b) = (&layer.a, &layer.b);
    let ((experts, r, inputs), (of_b, outs, _)) = (a.dims3()?, b.dims3()?);
    let (rows, columns, transposed) = match *w.dims() {
        [rows, columns] if experts == 1 => (rows, columns, Some(false)),
        [count, rows, columns] if experts == count && rows == columns => {
            (rows, columns, layer.fan_in_fan_out)
        }
        [count, rows, columns] if experts == count => (rows, columns, Some(rows == inputs)),
        _ => bail!("its shape is {:?}, the adapter has factors of {experts} experts", w.dims()),
    };
    let Some(transposed) = transposed else {
        bail!(
            "its shape {:?} is square, and no other parameter of the module tells whether it is (experts, out, in) \
             or (experts, in, out): set `fan_in_fan_out` of its layer in `AdapterConfig::layers`, true for (experts, in, out)",
            w.dims()
        )
    };
    let shape = if transposed { (inputs, outs) } else { (outs, inputs) };
    if (rows, columns) != shape || of_b != experts || r != layer.r {
        bail!(
            "its shape is {:?}, the adapter has lora_A {:?} and lora_B {:?}, the configuration r = {}: in PEFT's \
             adapter_config.json `target_parameters` must list the parameters of a module in the order in which \
             the module has them",
            w.dims(),
            a.dims(),
            b.dims(),
            layer.r
        )
    }
    let each = w.reshape((experts, rows, columns))?;
    let merged = (0..experts).map(|e| {
        let factors = Factors { a: a.get(e)?, b: b.get(e)?, ..layer.factors() };
        let mut expert = LayerWeights::new(Some(LayerKind::Linear), factors);
        expert.fan_in_fan_out = Some(transposed);
        merged_weight(&each.get(e)?, &expert, options)
    });
    Tensor::stack(&merged.collect::<Result<Vec<_>>>()?, 0)?.reshape(w.shape())
}

/// Sets `fan_in_fan_out` of square parameters that do not have it, where another parameter of the module tells: PEFT
/// transposes all of a module's parameters or none. `dims` gives the base's shapes.
pub(super) fn set_orientations(
    weights: &mut LoraWeights,
    dims: impl Fn(&str) -> Option<Vec<usize>>,
) {
    let module = |path: &str| path.rsplit_once('.').map_or("", |(module, _)| module).to_owned();
    let mut known = BTreeMap::new();
    for (path, layer) in weights.layers().filter(|(_, layer)| layer.is_parameter()) {
        let (Some((inputs, outs)), Some(dims)) = (sizes(layer), dims(path)) else { continue };
        if let ([_, rows, columns], true) = (&dims[..], inputs != outs) {
            known.insert(module(path), (*rows, *columns) == (inputs, outs));
        }
    }
    for (path, layer) in &mut weights.layers {
        let square = sizes(layer).is_some_and(|(inputs, outs)| inputs == outs);
        if layer.is_parameter() && square && layer.fan_in_fan_out.is_none() {
            layer.fan_in_fan_out = known.get(&module(path)).copied();
        }
    }
}

/// The inputs and outputs of a parameter.
fn sizes(layer: &LayerWeights) -> Option<(usize, usize)> {
    Some((*layer.a.dims().get(2)?, *layer.b.dims().get(1)?))
}
