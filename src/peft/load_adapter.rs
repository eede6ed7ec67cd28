//! Loads a folder in PEFT's format into the variables of an existing model.

use super::load::load_pretrained_as;
use crate::utils::names::is_adapted_weight;
use crate::utils::{
    check_same_options, load_state_dict, variables, AdapterConfig, LayerConfig, LoadReport,
    StateDict, Strict,
};
use crate::{Error, Result};
use candle_core::Device;
use candle_nn::VarMap;
use std::path::Path;

/// Reads an adapter into the variables of `vars`: all of it or, on an error, nothing. The model was built
/// with `config`: a [`LoraConfig`](crate::LoraConfig), or an [`AdapterConfig`] with the layers that are not a
/// [`Linear`](crate::Linear). In evaluation the new values count from the next `eval()` on.
///
/// PEFT also saves the table under an adapted embedding, which equals the base's. Without a variable for it the
/// report lists it as unexpected, also with [`Strict::Yes`].
///
/// # Errors
/// As [`load_pretrained_as`] and [`load_state_dict`]; and if a layer's rank, scaling or use_dora
/// differs from `config`'s.
pub fn load_adapter(
    dir: impl AsRef<Path>,
    vars: &VarMap,
    config: impl Into<AdapterConfig>,
    strict: Strict,
) -> Result<LoadReport> {
    let (dir, config) = (dir.as_ref(), config.into());
    let kind = |(module, layer): (_, &LayerConfig)| Some((module, layer.kind.clone()?));
    let kinds: Vec<_> = config.layers.iter().filter_map(kind).collect();
    let (saved, tensors) = load_pretrained_as(dir, &kinds, &Device::Cpu)?;
    let load = || {
        check_same_options(&tensors, &saved, &config)?;
        load_beside_base(vars, tensors, strict)
    };
    load().map_err(|e: Error| e.at(dir))
}

/// [`load_state_dict`] of tensors that PEFT saved, in which the tables under adapted embeddings need no variable.
pub(crate) fn load_beside_base(
    vars: &VarMap,
    tensors: StateDict,
    strict: Strict,
) -> Result<LoadReport> {
    let held = variables(vars);
    let exists = |name: &str| tensors.contains_key(name);
    let table = |name: &String| is_adapted_weight(name, exists) && !held.contains_key(name);
    let tables: Vec<_> = tensors.keys().filter(|name| table(name)).cloned().collect();
    let others = tensors.into_iter().filter(|(name, _)| !tables.contains(name)).collect();
    let mut report = load_state_dict(vars, &others, strict)?;
    report.unexpected.extend(tables);
    Ok(report)
}
