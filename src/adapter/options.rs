//! The options of an adapter, and which layers they select.

use super::targets::Targets;
use super::transformer_layers::TransformerLayers;
use crate::base::seeded;
use crate::files::StateDict;
use crate::formats::peft::Patterns;
use crate::layers::{ends_in, is_within, LayerKind};
use crate::ops::DropoutStream;
use crate::weights::{is_input_table, AdapterConfig, LayerConfig};
use crate::Result;
use candle_nn::VarBuilder;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub config: AdapterConfig,
    pub targets: Targets,
    pub exclude: Targets,
    pub layers: TransformerLayers,
    /// Ranks and alphas by PEFT's patterns; those of `config` come first.
    pub patterns: Patterns,
    /// Whether a module that is trained as a whole may have other sizes than the base's.
    pub ignore_mismatched_sizes: bool,
    /// Parameters of fused experts that are trained by the experts' layers, by the ends of their paths.
    pub parameters: Vec<String>,
    pub seed: Option<u64>,
    /// The masks that are drawn from the seed.
    pub dropout: Option<Arc<DropoutStream>>,
    /// Whether its variables come from a file.
    pub loaded: bool,
    /// Base tensors that a loaded adapter replaces.
    pub frozen: StateDict,
    /// The weights of heads that a loaded adapter trains as one tensor with a table, and the tables.
    pub tied: BTreeMap<String, String>,
}

impl Options {
    /// The options of an adapter without targets.
    pub fn new(config: AdapterConfig) -> Self {
        Self {
            config,
            targets: Targets::none(),
            exclude: Targets::none(),
            layers: TransformerLayers::default(),
            patterns: Patterns::default(),
            ignore_mismatched_sizes: false,
            parameters: vec![],
            seed: None,
            dropout: None,
            loaded: false,
            frozen: StateDict::new(),
            tied: BTreeMap::new(),
        }
    }

    /// Whether the layer at `path` is a target.
    pub fn selects(&self, path: &str) -> bool {
        // PEFT adapts a layer that is named by its whole path, whatever its index.
        let in_layers = self.layers.contain(path) || self.targets.names(path);
        // A module that is trained as a whole has no adapters.
        let whole = self.config.modules_to_save.iter().any(|module| is_within(path, module));
        in_layers && !whole && self.targets.matches(path) && !self.exclude.matches(path)
    }

    /// Why it is not known whether the layer at `path` is a target.
    pub fn undecided(&self, path: &str) -> Option<String> {
        self.targets.undecided(path).or_else(|| self.exclude.undecided(path))
    }

    /// Whether a selected layer of this kind is adapted.
    pub fn adapts(&self, kind: &LayerKind) -> bool {
        !self.targets.is_all_linear() || *kind == LayerKind::Linear
    }

    /// Whether the fused experts at `path` are trained.
    pub fn trains_parameter(&self, path: &str) -> bool {
        self.parameters.iter().any(|end| ends_in(path, end))
    }

    /// The key of the table at `path` whose rows are trained, and the rows.
    pub fn token_rows(&self, path: &str) -> Option<(&str, &[usize])> {
        let named = |key: &str| match key {
            "" => is_input_table(path),
            key => ends_in(path, key),
        };
        let tables = self.config.trainable_token_indices.iter();
        let longest = tables.filter(|(key, _)| named(key)).max_by_key(|(key, _)| key.len());
        longest.map(|(key, indices)| (&key[..], &indices[..]))
    }

    /// The options of the layer at `path` that are not the adapter's. An error if its patterns are
    /// ambiguous.
    pub fn layer(&self, path: &str) -> Result<LayerConfig> {
        // A loaded adapter has an entry for each layer, the whole path, which comes before all shorter ones.
        let by_end = || self.config.layer(path).map(|(_, layer)| layer);
        let layer = self.config.layers.get(path).or_else(by_end).cloned().unwrap_or_default();
        let r = layer.r.map_or_else(|| self.patterns.rank(path), |r| Ok(Some(r)))?;
        let alpha = layer.lora_alpha.map_or_else(|| self.patterns.alpha(path), |a| Ok(Some(a)))?;
        Ok(LayerConfig { r, lora_alpha: alpha, ..layer })
    }

    /// `vb` with the adapter's seed, if it has one.
    pub fn seeded<'a>(&self, vb: VarBuilder<'a>) -> VarBuilder<'a> {
        match self.seed {
            Some(seed) => seeded(vb, seed),
            None => vb,
        }
    }

    /// An error for an expression that is invalid, or has no effect.
    pub fn valid(&self) -> std::result::Result<(), String> {
        self.targets.valid().and_then(|()| self.exclude.valid()).and_then(|()| self.layers.valid())
    }
}
