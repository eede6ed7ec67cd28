//! A head that is tied to the embeddings has no weight in the base. PEFT's `ensure_weight_tying` writes its change
//! beside that of the embeddings: the transposed factors, or an equal tensor.

use crate::layers::Part;
use crate::weights::{is_equal, LoraWeights};
use candle_core::Result;

/// Whether the adapter makes the change of the weight at `path` to another weight, which the base has. With DoRA it
/// does not: the outputs of the two layers, and so their magnitudes, are not the same.
pub(super) fn is_tied(
    path: &str,
    weights: &LoraWeights,
    exists: impl Fn(&str) -> bool,
) -> Result<bool> {
    let weight = |path: &str| Part::Base("weight").at(path);
    if let Some(own) = weights.others.get(&weight(path)) {
        for (name, other) in &weights.others {
            if matches!(Part::parse(name), (other, Part::Base("weight")) if other != path)
                && exists(name)
                && is_equal(own, other)?
            {
                return Ok(true);
            }
        }
    }
    let Some(own) = weights.layers.get(path).filter(|own| own.magnitude.is_none()) else {
        return Ok(false);
    };
    for (other_path, other) in weights.layers() {
        if other_path != path
            && exists(&weight(other_path))
            && is_equal(&own.a, &other.b.t()?)?
            && is_equal(&own.b, &other.a.t()?)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}
