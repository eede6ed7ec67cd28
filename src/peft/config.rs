//! What an adapter's tensors do not tell: its options, and the layers that differ.

use super::Kind;
use crate::utils::join;
use crate::{Bias, Error, LoraConfig, Result, Trainable};
use std::collections::BTreeMap;

/// The options of an adapter, and the layers that differ from a [`Linear`](crate::Linear) with them.
///
/// `PeftConfig::from(cfg)` is the configuration of a model whose layers all are that.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PeftConfig {
    /// The options that hold where `layers` has no others.
    pub lora: LoraConfig,
    /// Which biases the adapter carries. Default none.
    pub bias: Bias,
    /// Modules that the adapter carries as a whole, such as a new head.
    pub modules_to_save: Vec<String>,
    /// Layers that differ, by their path or the end of it after a dot; the longest that fits counts.
    pub layers: BTreeMap<String, Layer>,
    /// Whether to save all layers with one rank and alpha, for servers such as vLLM that look at no
    /// others: smaller factors are filled up with zeros. It needs one scaling. Default `false`, where
    /// layers of another rank or alpha are named in `rank_pattern` and `alpha_pattern`.
    pub one_rank: bool,
    /// PEFT's name of the base model, which its own loaders look for.
    pub base_model_name_or_path: Option<String>,
    /// PEFT's word for what the model does, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
}

/// A layer that differs from a [`Linear`](crate::Linear) with the common options.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Layer {
    /// What it is.
    pub kind: Kind,
    /// Its own rank.
    pub r: Option<usize>,
    /// Its own `lora_alpha`.
    pub lora_alpha: Option<f64>,
}

impl From<LoraConfig> for PeftConfig {
    fn from(lora: LoraConfig) -> Self {
        Self { lora, ..Default::default() }
    }
}

impl From<&LoraConfig> for PeftConfig {
    fn from(lora: &LoraConfig) -> Self {
        Self::from(*lora)
    }
}

impl From<&PeftConfig> for PeftConfig {
    fn from(config: &PeftConfig) -> Self {
        config.clone()
    }
}

impl From<&PeftConfig> for Trainable {
    fn from(config: &PeftConfig) -> Self {
        config.modules_to_save.iter().fold(config.bias.into(), Self::and)
    }
}

impl PeftConfig {
    /// Says what the layers are whose path is `module` or ends in it after a dot.
    pub fn with(mut self, module: impl Into<String>, kind: Kind) -> Self {
        self.layers.entry(module.into()).or_default().kind = kind;
        self
    }

    /// Takes the biases and modules of a selection, which are trained and saved with the adapter. The
    /// way back is a selection of a `&PeftConfig`, such as one that was loaded.
    ///
    /// ```
    /// use loralib::{peft::PeftConfig, Bias, LoraConfig, Trainable};
    /// let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
    /// let what = Bias::All.and("classifier");
    /// let config = PeftConfig::from(cfg).trains(what.clone())?;
    /// assert_eq!(config.modules_to_save, ["classifier"]);
    /// assert_eq!(Trainable::from(&config), what);
    /// # Ok::<(), loralib::Error>(())
    /// ```
    ///
    /// # Errors
    /// When it is [`Trainable::everything`], for which PEFT has no form.
    pub fn trains(mut self, what: impl Into<Trainable>) -> Result<Self> {
        let parts = what.into().into_parts();
        (self.bias, self.modules_to_save) = parts.ok_or_else(|| {
            super::malformed("full fine-tuning is no adapter: PEFT has no form for it")
        })?;
        Ok(self)
    }

    /// The options of one layer: the common ones with its own rank and `lora_alpha`, and without
    /// those that its kind has no use for.
    pub fn lora_config(&self, path: &str) -> LoraConfig {
        let (mut cfg, Some((_, layer))) = (self.lora, self.layer(path)) else { return self.lora };
        cfg.r = layer.r.unwrap_or(cfg.r);
        cfg.lora_alpha = layer.lora_alpha.unwrap_or(cfg.lora_alpha);
        let dense = !matches!(layer.kind, Kind::Embedding) && layer.kind.spatial().is_none();
        cfg.fan_in_fan_out &= dense;
        if layer.kind == Kind::Embedding {
            cfg.lora_dropout = 0.;
        }
        cfg
    }

    /// The entry of `layers` that holds for a path.
    pub(crate) fn layer(&self, path: &str) -> Option<(&str, &Layer)> {
        let fits = |module: &str| match path.strip_suffix(module) {
            Some(before) => before.is_empty() || before.ends_with('.'),
            None => false,
        };
        let fitting = self.layers.iter().filter(|(module, _)| fits(module));
        fitting.max_by_key(|(module, _)| module.len()).map(|(module, layer)| (&**module, layer))
    }

    pub(crate) fn kind(&self, path: &str) -> Option<&Kind> {
        self.layer(path).map(|(_, layer)| &layer.kind)
    }

    /// An error if an entry of `layers` is about no layer of the adapter.
    pub(crate) fn check_used<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Result<()> {
        let used: Vec<_> = paths.filter_map(|path| Some(self.layer(path)?.0)).collect();
        match self.layers.keys().find(|module| !used.contains(&module.as_str())) {
            None => Ok(()),
            Some(module) => Err(Error::tensor(
                join(module, "lora_A"),
                "the configuration has this layer, the adapter does not",
            )),
        }
    }
}
