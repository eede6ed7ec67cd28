//! The value: an adapter's options, layers and other tensors.

use super::common_rank_alpha;
use super::config::{AdapterConfig, LayerConfig};
use super::foreign::refuse_other_names;
use super::layer::LayerWeights;
use crate::files::StateDict;
use crate::layers::{LoraConfig, Part};
use crate::{Error, Result};
use candle_core::Tensor;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// An adapter's options and tensors, in loralib's names and shapes: what a file of any [format](crate::formats) has,
/// and what an [`Adapter`](crate::Adapter) trains.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Tensor};
/// use loralib::{LoraConfig, LoraWeights};
/// let cfg = LoraConfig { r: 2, lora_alpha: 4., ..Default::default() };
/// let tensors = [
///     ("q_proj.lora_A".to_owned(), Tensor::ones((2, 6), DType::F32, &Device::Cpu)?),
///     ("q_proj.lora_B".to_owned(), Tensor::ones((4, 2), DType::F32, &Device::Cpu)?),
/// ];
/// let weights = LoraWeights::new(cfg, tensors.into())?;
/// for (path, layer) in weights.layers() {
///     assert_eq!((path, layer.r, layer.a.dims()), ("q_proj", 2, &[2, 6][..]));
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct LoraWeights {
    /// The options of the adapter as a whole. `layers` and `trainable_token_indices` are empty: see below.
    pub(crate) options: AdapterConfig,
    /// The adapted layers by path.
    pub(crate) layers: BTreeMap<String, LayerWeights>,
    /// Rows of tables by the tables' paths.
    pub(crate) token_rows: BTreeMap<String, TokenRows>,
    /// Whole tensors in place of the base's, by name: biases, new heads, tables.
    pub(crate) others: StateDict,
}

/// Rows of a table, in place of those at the indices.
#[derive(Debug, Clone)]
pub(crate) struct TokenRows {
    pub indices: Vec<usize>,
    /// (indices, dim)
    pub rows: Tensor,
}

impl LoraWeights {
    /// The adapter of these tensors by loralib's names (`<path>.lora_A`, `<path>.lora_B` and others), such as those of
    /// [`lora_state_dict`](crate::lora_state_dict). `config` is a [`LoraConfig`], or an [`AdapterConfig`] with the
    /// kinds, ranks and alphas of single layers.
    ///
    /// # Errors
    /// If there are no tensors, or none of a layer although r > 0; if names are those of another format; if a layer
    /// lacks a factor, or a rank does not fit the options; if DoRA's magnitudes or token rows are not those that the
    /// options promise; and if the configuration has a layer that the tensors lack. The error names the tensor.
    pub fn new(config: impl Into<AdapterConfig>, tensors: StateDict) -> Result<Self> {
        let config = config.into();
        let weights = Self::parse(config.clone(), &tensors)?;
        config.check_used(weights.layers.keys().map(String::as_str))?;
        Ok(weights)
    }

    /// [`new`](Self::new) with the configuration of a model, which may have more layers than the tensors.
    pub(crate) fn parse(config: AdapterConfig, tensors: &StateDict) -> Result<Self> {
        refuse_other_names(tensors.keys())?;
        let mut found = BTreeMap::<&str, BTreeMap<&str, Tensor>>::new();
        let (mut rows, mut others) = (StateDict::new(), StateDict::new());
        for (name, tensor) in tensors {
            match Part::parse(name) {
                (_, Part::Base(_)) => drop(others.insert(name.clone(), tensor.clone())),
                (path, Part::TokenRows) => drop(rows.insert(path.to_owned(), tensor.clone())),
                (path, part) => {
                    found.entry(path).or_default().insert(part.name(), tensor.clone());
                }
            }
        }
        let none = found.is_empty() && rows.is_empty() && config.lora.r > 0;
        if none || tensors.is_empty() {
            return Err(without_layers(tensors));
        }
        let layers = found.into_iter().map(|(path, parts)| {
            let layer = grouped(path, parts, &config)?;
            Ok((path.to_owned(), layer))
        });
        let layers: BTreeMap<_, _> = layers.collect::<Result<_>>()?;
        let token_rows = token_rows(rows, &config.trainable_token_indices)?;
        let (own_layers, indices) = Default::default();
        let options =
            AdapterConfig { layers: own_layers, trainable_token_indices: indices, ..config };
        Self { options, layers, token_rows, others }.checked()
    }

    /// An adapter that was read from another format. The common rank and alpha are those of `options`, if a layer has
    /// them, else the most frequent ones.
    pub(crate) fn of_layers(
        mut options: AdapterConfig,
        layers: BTreeMap<String, LayerWeights>,
    ) -> Result<Self> {
        let own = layers.values().map(|layer| (layer.r, layer.lora_alpha));
        if let Some(common) = common_rank_alpha(&options.lora, own) {
            (options.lora.r, options.lora.lora_alpha) = common;
        }
        let (token_rows, others) = Default::default();
        Self { options, layers, token_rows, others }.checked()
    }

    fn checked(self) -> Result<Self> {
        for (path, layer) in &self.layers {
            layer.check(path, &self.options.lora)?;
        }
        Ok(self)
    }

    /// The options, with those of each layer that are its own. Layers have an entry by their whole path.
    pub fn config(&self) -> AdapterConfig {
        let common = self.options.lora;
        let layer = |(path, layer): (&String, &LayerWeights)| {
            let mut own = layer.config();
            own.r = own.r.filter(|r| *r != common.r);
            own.lora_alpha = own.lora_alpha.filter(|alpha| *alpha != common.lora_alpha);
            (own != LayerConfig::default()).then(|| (path.clone(), own))
        };
        let indices = self.token_rows.iter().map(|(path, own)| (path.clone(), own.indices.clone()));
        AdapterConfig {
            layers: self.layers.iter().filter_map(layer).collect(),
            trainable_token_indices: indices.collect(),
            ..self.options.clone()
        }
    }

    /// The tensors by loralib's names.
    pub fn state_dict(&self) -> StateDict {
        let layers = self.layers.iter().flat_map(|(path, layer)| {
            layer.tensors().map(|(part, tensor)| (part.at(path), tensor.clone()))
        });
        let rows = self.token_rows.iter();
        let rows = rows.map(|(path, own)| (Part::TokenRows.at(path), own.rows.clone()));
        let others = self.others.iter().map(|(name, tensor)| (name.clone(), tensor.clone()));
        layers.chain(rows).chain(others).collect()
    }

    /// The adapted layers with their paths, sorted.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &LayerWeights)> {
        self.layers.iter().map(|(path, layer)| (path.as_str(), layer))
    }

    /// The options of the layer at `path`, if it is adapted.
    pub fn lora_config(&self, path: &str) -> Option<LoraConfig> {
        self.layers.get(path).map(|layer| layer.options(&self.options.lora))
    }

    /// The adapter without initial factors: they become a part of each layer's own, of twice the rank.
    pub(crate) fn joined(&self) -> Result<Cow<'_, Self>> {
        if self.layers.values().all(|layer| layer.initial.is_none()) {
            return Ok(Cow::Borrowed(self));
        }
        let rslora = self.options.lora.rslora;
        let layers = self.layers.iter();
        let layers = layers.map(|(path, layer)| Ok((path.clone(), layer.joined(path, rslora)?)));
        let layers = layers.collect::<Result<_>>()?;
        let Self { token_rows, others, .. } = self.clone();
        let joined = Self::of_layers(self.options.clone(), layers)?;
        Ok(Cow::Owned(Self { token_rows, others, ..joined }))
    }

    /// An error if the adapter has something else than factors, for a `format` that has nothing else.
    pub(crate) fn refuse_others(&self, format: &str) -> Result<()> {
        let parts = self.layers.iter().filter_map(|(path, own)| Some(own.other_part()?.at(path)));
        let rows = self.token_rows.keys().map(|path| Part::TokenRows.at(path));
        match parts.chain(rows).chain(self.others.keys().cloned()).next() {
            None if self.layers.is_empty() => {
                Err(Error::Invalid("the adapter is empty: there is nothing to save".to_owned()))
            }
            None => Ok(()),
            Some(name) => {
                let reason =
                    format!("{format} has lora_A and lora_B alone: merge it into the base");
                Err(Error::tensor(name, reason))
            }
        }
    }

    /// Whether this is the weight of an adapted layer: PEFT saves the table of an adapted embedding.
    pub(crate) fn is_adapted_weight(&self, name: &str) -> bool {
        matches!(Part::parse(name), (path, Part::Base("weight")) if self.layers.contains_key(path))
    }

    /// An error if the rank, use_dora or the scaling of a layer is not that of a model's `config`. PEFT's format may
    /// round `lora_alpha`.
    pub(crate) fn check_same_options(&self, model: &AdapterConfig) -> Result<()> {
        for (path, layer) in &self.layers {
            let (saved, model) = (layer.options(&self.options.lora), model.lora_config(path));
            let same_scaling =
                (saved.scaling() - model.scaling()).abs() <= 1e-12 * saved.scaling().abs();
            let reason = if saved.r != model.r {
                format!("its rank is {}, the configuration has r = {}", saved.r, model.r)
            } else if saved.use_dora != model.use_dora {
                format!(
                    "its use_dora is {}, the configuration's {}",
                    saved.use_dora, model.use_dora
                )
            } else if !same_scaling {
                format!(
                    "its scaling is {}, the configuration's {}",
                    saved.scaling(),
                    model.scaling()
                )
            } else {
                continue;
            };
            return Err(Error::tensor(Part::A.at(path), reason));
        }
        Ok(())
    }
}

/// The tensors of one layer as a value.
fn grouped(
    path: &str,
    mut parts: BTreeMap<&str, Tensor>,
    config: &AdapterConfig,
) -> Result<LayerWeights> {
    let other = parts.keys().next().map(|last| Part::Base(last).at(path)).unwrap_or_default();
    let needed = |part: Part, tensor: Option<Tensor>| {
        let missing = || format!("it is missing, the layer has other tensors, such as {other:?}");
        tensor.ok_or_else(|| Error::tensor(part.at(path), missing()))
    };
    let mut take = |part: Part<'static>| parts.remove(part.name());
    let (a, b) = (take(Part::A), take(Part::B));
    let initial = match (take(Part::InitialA), take(Part::InitialB)) {
        (None, None) => None,
        (a0, b0) => Some([needed(Part::InitialA, a0)?, needed(Part::InitialB, b0)?]),
    };
    let declared = config.layer(path).map(|(_, layer)| layer.clone()).unwrap_or_default();
    Ok(LayerWeights {
        r: declared.r.unwrap_or(config.lora.r),
        lora_alpha: declared.lora_alpha.unwrap_or(config.lora.lora_alpha),
        fan_in_fan_out: declared.fan_in_fan_out,
        kind: declared.kind,
        a: needed(Part::A, a)?,
        b: needed(Part::B, b)?,
        initial,
        magnitude: take(Part::Magnitude),
        bias: take(Part::BiasOfB),
    })
}

/// The rows of tables with their indices: an adapter has the rows of each table that the options name, and no others.
fn token_rows(
    mut rows: StateDict,
    indices: &BTreeMap<String, Vec<usize>>,
) -> Result<BTreeMap<String, TokenRows>> {
    let wrong = |path: &str, reason: String| Error::tensor(Part::TokenRows.at(path), reason);
    let mut found = BTreeMap::new();
    for (path, indices) in indices {
        let rows = rows
            .remove(path)
            .ok_or_else(|| wrong(path, "it is missing, its token indices are set".to_owned()))?;
        if rows.dims().first() != Some(&indices.len()) {
            let dims = rows.dims();
            return Err(wrong(
                path,
                format!("its shape is {dims:?}, it has {} token indices", indices.len()),
            ));
        }
        found.insert(path.clone(), TokenRows { indices: indices.clone(), rows });
    }
    match rows.keys().next() {
        None => Ok(found),
        Some(path) => {
            let reason = "the configuration has no trainable_token_indices for it";
            Err(wrong(path, reason.to_owned()))
        }
    }
}

fn without_layers(tensors: &StateDict) -> Error {
    if tensors.is_empty() {
        return Error::Invalid(
            "the adapter is empty: it has no layers, there is nothing to merge or save".to_owned(),
        );
    }
    let names: Vec<_> = tensors.keys().take(3).collect();
    let reason = format!(
        "it has no lora_A or lora_B, but tensors such as {names:?}; to load a base use `load_state_dict`"
    );
    Error::Format { format: "LoRA adapter", reason }
}
