//! The factors of each layer in a state dict.

use super::names::{is_lora, join, split};
use super::StateDict;
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// `lora_A` and `lora_B` of each layer, by its path. An error if one of them is missing.
pub(crate) fn factors(tensors: &StateDict) -> Result<BTreeMap<&str, [&Tensor; 2]>> {
    let layers = tensors.keys().filter(|name| is_lora(name)).map(|name| split(name).0);
    let pair = |path| {
        let factor = |last| {
            let name = join(path, last);
            let missing = || Error::tensor(&name, "it is missing, its other factor is there");
            tensors.get(&name).ok_or_else(missing)
        };
        Ok((path, [factor("lora_A")?, factor("lora_B")?]))
    };
    layers.map(pair).collect()
}
