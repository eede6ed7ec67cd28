//! A merged parameter of PEFT's `target_parameters`: a matrix (out, in), or fused experts, each with factors of
//! its own, A (experts, r, in) and B (experts, out, r). A matrix counts as one expert.

use super::weight::{merged_weight, Factors};
use crate::layers::{LayerKind, LoraConfig};
use candle_core::{bail, Result, Tensor};

/// `W + ΔW` of (out, in), (experts, out, in) or, if `transposed`, (experts, in, out). The shapes tell which, unless
/// they are square.
pub(super) fn merged_parameter(
    w: &Tensor,
    Factors { a, b, magnitude }: &Factors,
    cfg: LoraConfig,
    transposed: Option<bool>,
) -> Result<Tensor> {
    if magnitude.is_some() {
        bail!("it is a parameter without a layer, for which PEFT has no use_dora")
    }
    let ((experts, r, inputs), (of_b, outs, _)) = (a.dims3()?, b.dims3()?);
    let (rows, columns, transposed) = match *w.dims() {
        [rows, columns] if experts == 1 => (rows, columns, Some(false)),
        [count, rows, columns] if experts == count && rows == columns => {
            (rows, columns, transposed)
        }
        [count, rows, columns] if experts == count => (rows, columns, Some(rows == inputs)),
        _ => bail!("its shape is {:?}, the adapter has factors of {experts} experts", w.dims()),
    };
    let Some(fan_in_fan_out) = transposed else {
        bail!(
            "its shape {:?} is square, and no other parameter of the module tells whether it is (experts, out, in) \
             or (experts, in, out): set `fan_in_fan_out` of its layer in `AdapterConfig::layers`, true for (experts, in, out)",
            w.dims()
        )
    };
    let shape = if fan_in_fan_out { (inputs, outs) } else { (outs, inputs) };
    if (rows, columns) != shape || of_b != experts || r != cfg.r {
        bail!(
            "its shape is {:?}, the adapter has lora_A {:?} and lora_B {:?}, the configuration r = {}: in PEFT's \
             adapter_config.json `target_parameters` must list the parameters of a module in the order in which \
             the module has them",
            w.dims(),
            a.dims(),
            b.dims(),
            cfg.r
        )
    }
    let cfg = LoraConfig { fan_in_fan_out, ..cfg };
    let each = w.reshape((experts, rows, columns))?;
    let merged = (0..experts).map(|e| {
        let factors = Factors { a: a.get(e)?, b: b.get(e)?, magnitude: None };
        merged_weight(&each.get(e)?, &factors, Some(&LayerKind::Linear), cfg)
    });
    Tensor::stack(&merged.collect::<Result<Vec<_>>>()?, 0)?.reshape(w.shape())
}
