//! The factors of each layer in a state dict.

use super::names::{is_factor, is_lora, join, split};
use super::{AdapterConfig, StateDict};
use crate::layers::MAGNITUDE;
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// `lora_A` and `lora_B` of each layer, by its path. An error if one of them is missing, and that of
/// [`check_magnitudes`].
pub(crate) fn factors<'a>(
    tensors: &'a StateDict,
    config: &AdapterConfig,
) -> Result<BTreeMap<&'a str, [&'a Tensor; 2]>> {
    check_magnitudes(tensors, config)?;
    let layers = tensors.keys().filter(|name| is_lora(name)).map(|name| split(name).0);
    let pair = |path| {
        let factor = |last| {
            let name = join(path, last);
            let missing =
                || Error::tensor(&name, "it is missing, the layer has other tensors of an adapter");
            tensors.get(&name).ok_or_else(missing)
        };
        Ok((path, [factor("lora_A")?, factor("lora_B")?]))
    };
    layers.map(pair).collect()
}

/// An error if a layer has DoRA's magnitude and its options have not `use_dora`, or the other way round.
pub(crate) fn check_magnitudes(tensors: &StateDict, config: &AdapterConfig) -> Result<()> {
    for path in tensors.keys().filter(|name| is_factor(name)).map(|name| split(name).0) {
        let name = join(path, MAGNITUDE);
        match (tensors.contains_key(&name), config.lora_config(path).use_dora) {
            (true, false) => {
                return Err(Error::tensor(name, "the configuration's use_dora is not set"))
            }
            (false, true) => {
                return Err(Error::tensor(name, "it is missing, the configuration has use_dora"))
            }
            _ => {}
        }
    }
    Ok(())
}

/// An error if the rank, use_dora or the scaling of a layer of `tensors` differs. PEFT's format may round `lora_alpha`.
pub(crate) fn check_same_options(
    tensors: &StateDict,
    saved: &AdapterConfig,
    model: &AdapterConfig,
) -> Result<()> {
    for name in tensors.keys().filter(|name| is_lora(name)) {
        let path = split(name).0;
        let (saved, model) = (saved.lora_config(path), model.lora_config(path));
        let same_scaling =
            (saved.scaling() - model.scaling()).abs() <= 1e-12 * saved.scaling().abs();
        let reason = if saved.r != model.r {
            format!("its rank is {}, the configuration has r = {}", saved.r, model.r)
        } else if saved.use_dora != model.use_dora {
            format!("its use_dora is {}, the configuration's {}", saved.use_dora, model.use_dora)
        } else if !same_scaling {
            format!("its scaling is {}, the configuration's {}", saved.scaling(), model.scaling())
        } else {
            continue;
        };
        return Err(Error::tensor(name, reason));
    }
    Ok(())
}
