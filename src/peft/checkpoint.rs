//! PEFT's folder into the variables of a model that is there already.

use super::{load_pretrained_as, PeftConfig};
use crate::utils::{is_lora, load_state_dict, split, LoadReport, Strict};
use crate::{Error, Result};
use candle_core::Device;
use candle_nn::VarMap;
use std::path::Path;

/// Reads an adapter into the variables of `vars`, all of it or, on an error, nothing, for a model that
/// was built with `config`: a [`LoraConfig`](crate::LoraConfig), or a [`PeftConfig`] that says which
/// layers are no [`Linear`](crate::Linear). A model that is merged runs on as it was until `eval()` is
/// called again.
///
/// # Errors
/// As [`load_pretrained_as`] and [`load_state_dict`]; and when a layer's rank or scaling is not what
/// `config` says of it.
pub fn load_checkpoint(
    dir: impl AsRef<Path>,
    vars: &VarMap,
    config: impl Into<PeftConfig>,
    strict: Strict,
) -> Result<LoadReport> {
    let (dir, config) = (dir.as_ref(), config.into());
    let kinds: Vec<_> = config.layers.iter().map(|(m, layer)| (m, layer.kind.clone())).collect();
    let (saved, tensors) = load_pretrained_as(dir, &kinds, &Device::Cpu)?;
    let load = || {
        for name in tensors.keys().filter(|name| is_lora(name)) {
            let path = split(name).0;
            let (saved, model) = (saved.lora_config(path), config.lora_config(path));
            if saved.r != model.r {
                let reason =
                    format!("its rank is {}, the configuration has r = {}", saved.r, model.r);
                return Err(Error::tensor(name, reason));
            }
            let (saved, model) = (saved.scaling(), model.scaling());
            // A conversion to another rank and back rounds lora_alpha.
            let same = (saved - model).abs() <= 1e-12 * saved.abs();
            if !same {
                let reason = format!("its scaling is {saved}, the configuration's {model}");
                return Err(Error::tensor(name, reason));
            }
        }
        load_state_dict(vars, &tensors, strict)
    };
    load().map_err(|e: Error| e.at(dir))
}
