//! The options of an adapter, and which layers they select.

use super::targets::Targets;
use crate::utils::names::is_within;
use crate::utils::{AdapterConfig, StateDict};

#[derive(Debug, Clone)]
pub(super) struct Options {
    pub config: AdapterConfig,
    pub targets: Targets,
    pub exclude: Targets,
    /// Indices of transformer layers; `None` for all.
    pub layers: Option<Vec<usize>>,
    pub seed: Option<u64>,
    /// Base tensors that a loaded adapter replaces.
    pub frozen: StateDict,
}

impl Options {
    /// Whether the layer at `path` is a target.
    pub fn selects(&self, path: &str) -> bool {
        let in_layers = self.layers.as_ref().is_none_or(|indices| {
            let index = path.rsplit('.').skip(1).find_map(|part| part.parse::<usize>().ok());
            index.is_some_and(|index| indices.contains(&index))
        });
        // A module that is trained as a whole has no adapters.
        let whole = self.config.modules_to_save.iter().any(|module| is_within(path, module));
        in_layers && !whole && self.targets.matches(path) && !self.exclude.matches(path)
    }
}
