//! Adapters of a pipeline: the names of each model's layers begin with its component.

use super::lora_weights::LoraWeights;
use crate::layers::is_within;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};

/// Why the layer of one model is not written for a pipeline.
pub(crate) const NO_COMPONENT: &str =
    "its name begins with no component of a pipeline, such as `unet.` or \
                                       `transformer.`: add it by `LoraWeights::in_component`";

/// diffusers' components with adapters, and `diffusion_model`, which ComfyUI names the original release's denoiser.
const COMPONENTS: [&str; 10] = [
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
pub(crate) fn has_component(path: &str) -> bool {
    path.split_once('.').is_some_and(|(component, _)| COMPONENTS.contains(&component))
}

impl LoraWeights {
    /// The part for one model of a pipeline, such as `unet`: the layers whose paths begin with `component` and a dot,
    /// by the paths after it, which are those of the model.
    ///
    /// # Errors
    /// If the adapter has no such part.
    pub fn component(&self, component: &str) -> Result<Self> {
        let within = |name: &str| match name.strip_prefix(component)? {
            "" => Some(String::new()),
            inner => Some(inner.strip_prefix('.')?.to_owned()),
        };
        let mut part = self.renamed(within);
        let modules = std::mem::take(&mut part.options.modules_to_save).into_iter();
        let modules = modules.map(|module| within(&module).unwrap_or(module));
        let has = |module: &String| part.others.keys().any(|name| is_within(name, module));
        part.options.modules_to_save =
            modules.filter(|module| !module.is_empty() && has(module)).collect();
        if part.layers.is_empty() && part.others.is_empty() && part.token_rows.is_empty() {
            let all: BTreeSet<_> = self.components().collect();
            let reason = format!("the adapter has no component {component:?}, but {all:?}");
            return Err(Error::Invalid(reason));
        }
        Ok(part)
    }

    /// The adapter of one model as the part `component` of a pipeline's: the inverse of
    /// [`component`](Self::component).
    pub fn in_component(&self, component: &str) -> Self {
        self.renamed(|name| match component.is_empty() || name.is_empty() {
            true => Some(format!("{component}{name}")),
            false => Some(format!("{component}.{name}")),
        })
    }

    /// The components of a pipeline that the adapter's paths begin with, sorted; none for the adapter of one model.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        let paths = self.layers.keys().chain(self.token_rows.keys()).chain(self.others.keys());
        let first = paths.map(|path| path.split('.').next().unwrap_or_default());
        first.filter(|first| COMPONENTS.contains(first)).collect::<BTreeSet<_>>().into_iter()
    }

    /// The layers and tensors that `new` gives a path.
    pub(crate) fn renamed(&self, new: impl Fn(&str) -> Option<String>) -> Self {
        Self {
            options: self.options.clone(),
            layers: renamed(&self.layers, &new),
            token_rows: renamed(&self.token_rows, &new),
            others: renamed(&self.others, &new),
        }
    }
}

fn renamed<T: Clone>(
    all: &BTreeMap<String, T>,
    new: impl Fn(&str) -> Option<String>,
) -> BTreeMap<String, T> {
    all.iter().filter_map(|(path, own)| Some((new(path)?, own.clone()))).collect()
}
