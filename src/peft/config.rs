//! What an adapter's tensors do not tell: its options, and which kind of layer each pair adapts.

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

/// The kind of an adapted layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Kind {
    /// [`Linear`](crate::Linear).
    #[default]
    Linear,
    /// [`MergedLinear`](crate::MergedLinear) of equal parts, with its `enable_lora`.
    MergedLinear(Vec<bool>),
    /// [`MergedLinear`](crate::MergedLinear) of parts of any sizes, each (outputs, enabled).
    Splits(Vec<(usize, bool)>),
    /// [`Embedding`](crate::Embedding).
    Embedding,
    /// [`Conv1d`](crate::Conv1d).
    Conv1d {
        /// Its groups, which its tensors do not tell: 1 for a plain convolution.
        groups: usize,
    },
    /// [`Conv2d`](crate::Conv2d).
    Conv2d {
        /// Its groups.
        groups: usize,
    },
    /// [`Conv3d`](crate::Conv3d).
    Conv3d {
        /// Its groups.
        groups: usize,
    },
}

impl Kind {
    /// A convolution's spatial dimensions and groups.
    pub(crate) fn spatial(&self) -> Option<(usize, usize)> {
        match *self {
            Self::Conv1d { groups } => Some((1, groups)),
            Self::Conv2d { groups } => Some((2, groups)),
            Self::Conv3d { groups } => Some((3, groups)),
            _ => None,
        }
    }

    /// The parts of a merged linear layer's outputs; `total` is the sum of all, or of those enabled.
    pub(crate) fn splits(&self, total: Total) -> Option<Vec<(usize, bool)>> {
        match self {
            Self::MergedLinear(enabled) => {
                let (sum, parts) = match total {
                    Total::All(sum) => (sum, enabled.len()),
                    Total::Enabled(sum) => (sum, enabled.iter().filter(|on| **on).count()),
                };
                let size = (sum.checked_rem(parts) == Some(0)).then(|| sum / parts)?;
                Some(enabled.iter().map(|on| (size, *on)).collect())
            }
            Self::Splits(splits) => {
                let counted = |on| on || matches!(total, Total::All(_));
                let parts = splits.iter().filter(|(_, on)| counted(*on)).map(|(size, _)| *size);
                let sum = parts.clone().try_fold(0usize, |sum, size| sum.checked_add(size));
                let (Total::All(total) | Total::Enabled(total)) = total;
                (sum == Some(total) && parts.clone().all(|n| n > 0)).then(|| splits.clone())
            }
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Total {
    All(usize),
    Enabled(usize),
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

impl PeftConfig {
    /// Says what the layers are whose path is `module` or ends in it after a dot.
    pub fn with(mut self, module: impl Into<String>, kind: Kind) -> Self {
        self.layers.entry(module.into()).or_default().kind = kind;
        self
    }

    /// Takes the biases and modules of a selection, which are trained and saved with the adapter.
    ///
    /// ```
    /// use loralib::{peft::PeftConfig, Bias, LoraConfig};
    /// let cfg = LoraConfig { r: 8, lora_alpha: 16., ..Default::default() };
    /// let config = PeftConfig::from(cfg).trains(Bias::All.and("classifier"));
    /// assert_eq!((config.bias, config.modules_to_save), (Bias::All, vec!["classifier".into()]));
    /// ```
    pub fn trains(mut self, what: impl Into<Trainable>) -> Self {
        (self.bias, self.modules_to_save) = what.into().into_parts();
        self
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
