//! The options of an adapter, and what its tensors do not tell of the layers.

use super::bias::Bias;
use crate::layers::{ends_in, LayerKind, LoraConfig, Part};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The options of an adapter, and those of single layers.
///
/// `AdapterConfig::from(cfg)` is the configuration of an adapter whose layers all have the options `cfg`,
/// with undeclared kinds. A [`LoraConfig`] is accepted wherever an `AdapterConfig` is.
///
/// ```
/// use loralib::{adapter::AdapterConfig, layers::LayerKind, LoraConfig};
/// let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
/// let config = AdapterConfig::from(cfg)
///     .with_layer("", LayerKind::Linear) // every layer, if no other entry matches
///     .with_layer("c_attn", LayerKind::MergedLinear(vec![true, false, true]))
///     .with_layer("wte", LayerKind::Embedding);
/// assert_eq!(config.kind("h.0.attn.c_attn"), Some(&LayerKind::MergedLinear(vec![true, false, true])));
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterConfig {
    /// The options of every layer that has no others in `layers`.
    pub lora: LoraConfig,
    /// The biases that the adapter contains. Default none.
    pub bias: Bias,
    /// Modules that the adapter contains as a whole, such as a new head.
    pub modules_to_save: Vec<String>,
    /// The tokens whose rows the adapter replaces, by the path of the table, as PEFT's `trainable_token_indices`. The rows
    /// are the adapter's tensor `trainable_tokens` (tokens, dim) at this path. A new [`Adapter`](crate::Adapter) trains
    /// them, from the base's values; a head that is tied to the table has them too. Its tables may be named by the end
    /// of the path, and `""` is a model's input embeddings, if their name is one of transformers' (`embed_tokens`, `wte`,
    /// `word_embeddings`, `embed_in`, `embeddings` or `shared`).
    pub trainable_token_indices: BTreeMap<String, Vec<usize>>,
    /// Whether a head that the base ties to a table of embeddings gets the table's change, as in MLX's models and by
    /// PEFT's option of this name. By default only a head that the adapter has itself changes.
    pub ensure_weight_tying: bool,
    /// Layers by their path or the end of it after a dot. The longest entry that matches counts; the
    /// empty one matches every layer.
    pub layers: BTreeMap<String, LayerConfig>,
    /// For [`peft::save`](crate::formats::peft::save): saves all layers with one rank and
    /// alpha, for servers such as vLLM that ignore `rank_pattern` and `alpha_pattern`. Smaller factors
    /// are padded with zeros; all layers must have one scaling. Default `false`.
    pub one_rank: bool,
    /// PEFT's name of the base model, which its loaders look for.
    pub base_model_name_or_path: Option<String>,
    /// PEFT's task type, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
}

/// The options of one layer; `None` where they are the adapter's, or the kind is not known.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerConfig {
    /// The kind of the layer. Tensors do not tell it: a square weight may belong to a `Linear`, a `Linear`
    /// with `fan_in_fan_out` or an `Embedding`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<LayerKind>,
    /// The rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r: Option<usize>,
    /// `lora_alpha`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Whether the weight is stored as (in, out).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fan_in_fan_out: Option<bool>,
    /// The rank of a convolution in PEFT's shapes, A (r, in, k..) and B (out, r, 1..), if its factors are copies of
    /// such: an [`Adapter`](crate::Adapter) trains those.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conv_rank: Option<usize>,
}

impl LayerConfig {
    /// The adapter's options `cfg` with the layer's own in their place.
    pub(crate) fn over(&self, mut cfg: LoraConfig) -> LoraConfig {
        cfg.r = self.r.unwrap_or(cfg.r);
        cfg.lora_alpha = self.lora_alpha.unwrap_or(cfg.lora_alpha);
        cfg.fan_in_fan_out = self.fan_in_fan_out.unwrap_or(cfg.fan_in_fan_out);
        let kind = self.kind.as_ref();
        cfg.fan_in_fan_out &= kind.is_none_or(LayerKind::is_linear);
        if kind == Some(&LayerKind::Embedding) {
            cfg.lora_dropout = 0.;
        }
        cfg
    }
}

impl From<LoraConfig> for AdapterConfig {
    fn from(lora: LoraConfig) -> Self {
        Self { lora, ..Default::default() }
    }
}

impl From<&LoraConfig> for AdapterConfig {
    fn from(lora: &LoraConfig) -> Self {
        Self::from(*lora)
    }
}

impl From<&AdapterConfig> for AdapterConfig {
    fn from(config: &AdapterConfig) -> Self {
        config.clone()
    }
}

impl AdapterConfig {
    /// Declares the kind of the layers whose path is `module` or ends in it after a dot. A layer gives
    /// its own by [`kind`](crate::layers::Adapted::kind).
    pub fn with_layer(mut self, module: impl Into<String>, kind: LayerKind) -> Self {
        self.layers.entry(module.into()).or_default().kind = Some(kind);
        self
    }

    /// The options of the layer at `path`: the adapter's, with the layer's own rank, alpha and
    /// orientation, and without options that its kind does not support.
    pub fn lora_config(&self, path: &str) -> LoraConfig {
        self.layer(path).map_or(self.lora, |(_, layer)| layer.over(self.lora))
    }

    /// The kind of the layer at `path`, if it is known.
    pub fn kind(&self, path: &str) -> Option<&LayerKind> {
        self.layer(path)?.1.kind.as_ref()
    }

    /// The entry of `layers` for a path.
    pub(crate) fn layer(&self, path: &str) -> Option<(&str, &LayerConfig)> {
        // A whole path is the longest entry that can match, so that many layers are found in little time.
        if let Some((module, layer)) = self.layers.get_key_value(path) {
            return Some((module, layer));
        }
        let matching = self.layers.iter().filter(|(module, _)| ends_in(path, module));
        matching.max_by_key(|(module, _)| module.len()).map(|(module, layer)| (&**module, layer))
    }

    /// An error if an entry of `layers` matches none of these layers. The empty entry, a default, may.
    pub(super) fn check_used<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Result<()> {
        let used: BTreeSet<_> = paths.filter_map(|path| Some(self.layer(path)?.0)).collect();
        // An entry without options says nothing of a layer.
        let mut set = self.layers.iter().filter(|(_, own)| **own != LayerConfig::default());
        match set.find(|(module, _)| !module.is_empty() && !used.contains(module.as_str())) {
            None => Ok(()),
            Some((module, _)) => Err(Error::tensor(
                Part::A.at(module),
                "the configuration has this layer, the adapter does not",
            )),
        }
    }
}
