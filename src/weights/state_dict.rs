//! From a state dict by loralib's names to an adapter's layers, and back: the door of this crate's own names.

use super::config::AdapterConfig;
use super::conv;
use super::foreign::refuse_other_names;
use super::layer::LayerWeights;
use super::lora_weights::{LoraWeights, TokenRows};
use super::selection::contains;
use crate::files::StateDict;
use crate::layers::{same_scaling, LayerKind, Part};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

impl LoraWeights {
    /// The adapter of these tensors by loralib's names (`<path>.lora_A`, `<path>.lora_B` and others), such as those of
    /// [`lora_state_dict`](crate::lora_state_dict). `config` is a [`LoraConfig`](crate::LoraConfig), or an
    /// [`AdapterConfig`] with the kinds, ranks and alphas of single layers.
    ///
    /// # Errors
    /// If there are no tensors; if none is of a layer although r > 0, and not all are selected as biases or modules; if
    /// names are those of another format; if a layer
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
        let selected = |name| contains(config.bias, &config.modules_to_save, name, |_| false);
        let none = found.is_empty() && rows.is_empty() && !tensors.keys().all(|n| selected(n));
        if (none && config.lora.r > 0) || tensors.is_empty() {
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
    let mut declared = config.layer(path).map(|(_, layer)| layer.clone()).unwrap_or_default();
    let (mut a, mut b) = (needed(Part::A, a)?, needed(Part::B, b)?);
    if declared.kind.is_none() && a.rank() == b.rank() && a.dim(0)? == b.dim(1)? {
        // Kernels tell it, unlike matrices.
        declared.kind = a.rank().checked_sub(2).and_then(|n| LayerKind::conv(n, 1));
    }
    let mut conv_rank = declared.conv_rank;
    let mut r = declared.r.unwrap_or(config.lora.r);
    let mut lora_alpha = declared.lora_alpha.unwrap_or(config.lora.lora_alpha);
    let in_peft = declared.kind.as_ref().and_then(LayerKind::spatial);
    if let Some((n, groups)) = in_peft.filter(|(n, _)| [a.rank(), b.rank()] == [n + 2; 2]) {
        // The rank is PEFT's, too.
        let own = b.dim(1)?;
        if own != r {
            let reason = format!("its rank is {own}, the configuration has r = {r}");
            return Err(Error::tensor(Part::B.at(path), reason));
        }
        let pair = conv::from_peft(groups, a, b).map_err(|e| Error::tensor(Part::A.at(path), e))?;
        conv_rank = conv::rank_in_peft(n, groups, &pair, own);
        lora_alpha = same_scaling(lora_alpha, own, pair.r, config.lora.rslora);
        (a, b, r) = (pair.a, pair.b, pair.r);
    }
    Ok(LayerWeights {
        r,
        lora_alpha,
        fan_in_fan_out: declared.fan_in_fan_out,
        kind: declared.kind,
        conv_rank,
        a,
        b,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::LoraConfig;
    use candle_core::{DType, Device};

    #[test]
    fn a_layer_whose_path_ends_in_another_s_keeps_its_options() -> Result<()> {
        let factor = |dims: (usize, usize)| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        let mut tensors = StateDict::new();
        for (path, r) in [("q", 4), ("a.q", 2)] {
            tensors.insert(Part::A.at(path), factor((r, 6))?);
            tensors.insert(Part::B.at(path), factor((5, r))?);
        }
        let cfg = LoraConfig { r: 2, ..Default::default() };
        let mut config = AdapterConfig::from(cfg);
        config.layers.entry("q".to_owned()).or_default().r = Some(4);
        config.layers.entry("a.q".to_owned()).or_default();
        let weights = LoraWeights::new(config, tensors)?;
        let again = LoraWeights::new(weights.config(), weights.state_dict())?;
        assert_eq!((again.layers["q"].r, again.layers["a.q"].r), (4, 2));
        Ok(())
    }
}
