//! The value: an adapter's options, layers and other tensors.

use super::common_rank_alpha;
use super::config::{AdapterConfig, LayerConfig};
use super::conv;
use super::layer::LayerWeights;
use super::pair::Pair;
use crate::files::StateDict;
use crate::layers::{same_scaling, LayerKind, LoraConfig, Part};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
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

    pub(super) fn checked(self) -> Result<Self> {
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
            (path.clone(), own)
        };
        // An entry for every layer, or none: one for "q" would count for "a.q" too if that had none.
        let mut layers: BTreeMap<_, _> = self.layers.iter().map(layer).collect();
        if layers.values().all(|own| *own == LayerConfig::default()) {
            layers.clear();
        }
        let indices = self.token_rows.iter().map(|(path, own)| (path.clone(), own.indices.clone()));
        AdapterConfig { layers, trainable_token_indices: indices.collect(), ..self.options.clone() }
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

    /// The adapter with the factors of some convolutions as kernels, A (r, in, k..) and B (out, r, 1..) with PEFT's rank:
    /// to be trained. They are layers of no format.
    pub(crate) fn with_kernels(
        mut self,
        are_kernels: impl Fn(&str, &LayerWeights) -> bool,
    ) -> Result<Self> {
        let rslora = self.options.lora.rslora;
        for (path, layer) in &mut self.layers {
            let spatial = layer.kind.as_ref().and_then(LayerKind::spatial);
            let Some((n, 1)) = spatial.filter(|_| are_kernels(path, layer)) else { continue };
            let pair = Pair { a: layer.a.clone(), b: layer.b.clone(), r: layer.r };
            let pair = conv::to_peft(n, 1, &pair, layer.conv_rank);
            let Some(Pair { a, b, r }) = pair.map_err(|e| Error::tensor(Part::A.at(path), e))?
            else {
                continue;
            };
            let lora_alpha = same_scaling(layer.lora_alpha, layer.r, r, rslora);
            *layer = LayerWeights { a, b, r, lora_alpha, conv_rank: None, ..layer.clone() };
        }
        Ok(self)
    }

    /// An error if the adapter has something else than factors, for a `format` that has nothing else, with a `way_out`.
    pub(crate) fn refuse_others(&self, format: &str, way_out: &str) -> Result<()> {
        let parts = self.layers.iter().filter_map(|(path, own)| Some(own.other_part()?.at(path)));
        let rows = self.token_rows.keys().map(|path| Part::TokenRows.at(path));
        match parts.chain(rows).chain(self.others.keys().cloned()).next() {
            None if self.layers.is_empty() => {
                Err(Error::Invalid("the adapter is empty: there is nothing to save".to_owned()))
            }
            None => Ok(()),
            Some(name) => {
                let reason = format!("{format} has lora_A and lora_B alone: {way_out}");
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
            let same_scaling = is_close(saved.scaling(), model.scaling());
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

/// Whether two values are equal but for rounding, as when an alpha is converted to another rank and back.
pub(crate) fn is_close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * a.abs()
}

/// Whether two tensors have the same dtype, shape and values.
pub(crate) fn is_equal(a: &Tensor, b: &Tensor) -> candle_core::Result<bool> {
    Ok(a.dims() == b.dims()
        && a.dtype() == b.dtype()
        && a.ne(b)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()? == 0.)
}
