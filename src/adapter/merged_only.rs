//! The tensors of a base that an adapter of PEFT's changes in a way that is merged, and not computed beside the
//! base: parameters without a layer.

use crate::layers::LayerKind;
use crate::weights::AdapterConfig;
use crate::{Error, Result};
use std::collections::BTreeSet;

#[derive(Debug, Default)]
pub(crate) struct MergedOnly(BTreeSet<String>);

impl MergedOnly {
    pub fn new(config: &AdapterConfig) -> Self {
        let parameters = config.layers.iter().filter_map(|(path, layer)| match layer.kind {
            Some(LayerKind::Parameter { .. }) => Some(path.clone()),
            _ => None,
        });
        Self(parameters.collect())
    }

    /// An error if there is one.
    pub fn refuse_any(&self) -> Result<()> {
        self.0.iter().try_for_each(|name| self.refuse(name))
    }

    /// An error for such a tensor.
    pub fn refuse(&self, name: &str) -> Result<()> {
        if !self.0.contains(name) {
            return Ok(());
        }
        let reason = "the adapter changes it by target_parameters, which are merged alone: build the model on `Adapter::merged`, or merge by `merge_files`";
        Err(Error::tensor(name, reason))
    }
}
