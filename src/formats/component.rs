//! The part of an adapter that belongs to one model of a pipeline.

use crate::utils::names::{is_lora, join, split};
use crate::utils::{AdapterConfig, StateDict};
use crate::{Error, Result};

/// Why the layer of one model is not written for a pipeline.
pub(super) const NO_COMPONENT: &str =
    "its name begins with no component of a pipeline, such as `unet.` or `transformer.`: add it with `in_component`";

/// diffusers' components with adapters, and `diffusion_model`, which ComfyUI names the original release's denoiser.
pub const COMPONENTS: [&str; 10] = [
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_conditioner",
    "connectors",
    "diffusion_model",
];

/// Whether a path begins with the component of a pipeline.
pub(super) fn has_component(path: &str) -> bool {
    path.split_once('.').is_some_and(|(component, _)| COMPONENTS.contains(&component))
}

/// The part of an adapter whose names begin with `component` and a dot, by the names after it: those of
/// the component's own model.
///
/// # Errors
/// If the adapter has no such part.
pub fn of_component(
    component: &str,
    config: &AdapterConfig,
    tensors: &StateDict,
) -> Result<(AdapterConfig, StateDict)> {
    let within = |name: &str| Some(name.strip_prefix(component)?.strip_prefix('.')?.to_owned());
    let (config, part) = renamed(config, tensors, within);
    if part.is_empty() {
        let first = |name: &String| name.split('.').next().map(str::to_owned);
        let mut all: Vec<_> = tensors.keys().filter_map(first).collect();
        all.dedup();
        let reason = format!("the adapter has no component {component:?}, but {all:?}");
        return Err(Error::Invalid(reason));
    }
    Ok((config, part))
}

/// The adapter of one model as the part `component` of a pipeline's: the inverse of [`of_component`].
pub fn in_component(
    component: &str,
    config: &AdapterConfig,
    tensors: &StateDict,
) -> (AdapterConfig, StateDict) {
    renamed(config, tensors, |name| Some(join(component, name)))
}

/// The tensors that have a new name, with the options of each layer by its new path.
fn renamed(
    config: &AdapterConfig,
    tensors: &StateDict,
    new: impl Fn(&str) -> Option<String>,
) -> (AdapterConfig, StateDict) {
    let (mut config, old) = (AdapterConfig { layers: [].into(), ..config.clone() }, config);
    let mut all = StateDict::new();
    for (name, tensor) in tensors {
        let Some(new) = new(name) else { continue };
        if let (true, Some((_, layer))) = (is_lora(name), old.layer(split(name).0)) {
            config.layers.insert(split(&new).0.to_owned(), layer.clone());
        }
        all.insert(new, tensor.clone());
    }
    (config, all)
}
