//! The tensors of a base that an adapter of PEFT's changes in a way that is merged, and not computed beside the
//! base: parameters without a layer.

use super::options::Options;
use crate::layers::{ends_in, LayerKind};
use crate::{Error, Result};
use std::collections::BTreeSet;

#[derive(Debug, Default)]
pub(crate) struct MergedOnly {
    paths: BTreeSet<String>,
    /// The ends of the paths of fused experts, which the layers of the experts train.
    fused: Vec<String>,
}

impl MergedOnly {
    pub fn new(options: &Options) -> Self {
        let layers = options.config.layers.iter();
        let parameters = layers.filter_map(|(path, layer)| match layer.kind {
            Some(LayerKind::Parameter { .. }) => Some(path.clone()),
            _ => None,
        });
        Self { paths: parameters.collect(), fused: options.parameters.clone() }
    }

    /// An error if there is one.
    pub fn refuse_any(&self) -> Result<()> {
        self.paths.iter().chain(&self.fused).try_for_each(|name| self.refuse(name))
    }

    /// An error for such a tensor.
    pub fn refuse(&self, name: &str) -> Result<()> {
        if self.fused.iter().any(|end| ends_in(name, end)) {
            let reason = "it is of fused experts, whose adapter is for a model with layers of each expert: build the \
                          model on `Adapter::merged`, or for several adapters split each by `LoraWeights::split_experts`";
            return Err(Error::tensor(name, reason));
        }
        if !self.paths.contains(name) {
            return Ok(());
        }
        let reason = "the adapter changes it by target_parameters, which are merged alone: build the model on `Adapter::merged`, or merge by `merge_files`";
        Err(Error::tensor(name, reason))
    }
}
