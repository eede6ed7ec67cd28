//! A head that is tied to the embeddings has no weight in the base. PEFT's `ensure_weight_tying` writes its change
//! beside that of the embeddings: the transposed factors, or an equal tensor.

use crate::layers::MAGNITUDE;
use crate::utils::names::{join, split};
use crate::utils::StateDict;
use candle_core::{DType, Result, Tensor};

/// Whether the adapter makes the change of the weight at `path` to another weight, which the base has. With DoRA it
/// does not: the outputs of the two layers, and so their magnitudes, are not the same.
pub(super) fn is_tied(
    path: &str,
    adapter: &StateDict,
    exists: impl Fn(&str) -> bool,
) -> Result<bool> {
    if adapter.contains_key(&join(path, MAGNITUDE)) {
        return Ok(false);
    }
    for other in adapter.keys().map(|name| split(name).0) {
        if other == path || !exists(&join(other, "weight")) {
            continue;
        }
        let equal = |last: &str, of_other: &str| {
            let pair = (adapter.get(&join(path, last)), adapter.get(&join(other, of_other)));
            let (Some(a), Some(b)) = pair else { return Ok(false) };
            match last {
                "weight" => is_equal(a, b),
                _ => is_equal(a, &b.t()?),
            }
        };
        if equal("weight", "weight")? || (equal("lora_A", "lora_B")? && equal("lora_B", "lora_A")?)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.dims() == b.dims()
        && a.dtype() == b.dtype()
        && a.ne(b)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()? == 0.)
}
