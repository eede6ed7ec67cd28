//! Which tensors of a base an adapter changes, and how.

use super::change::Change;
use super::tied::is_tied;
use super::weight::Factors;
use crate::layers::{LayerKind, MAGNITUDE};
use crate::utils::names::{is_factor, join, refuse_other_names, split};
use crate::utils::{check_magnitudes, plain, AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The changes by tensor of the base, in the order in which they are applied.
pub(crate) struct Plan {
    changes: BTreeMap<String, Vec<Change>>,
    config: AdapterConfig,
}

impl Plan {
    pub fn new(
        adapter: &StateDict,
        config: AdapterConfig,
        exists: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        if adapter.is_empty() {
            return Err(Error::Invalid(
                "the adapter is empty: there is nothing to merge".to_owned(),
            ));
        }
        refuse_other_names(adapter.keys())?;
        check_magnitudes(adapter, &config)?;
        let (adapter, config) = plain(adapter, &config)?;
        // A convolution's tensors may have loralib's second names.
        let find = |path: &str, last: &str| {
            let names = [join(path, last), join(&join(path, "conv"), last)];
            names.into_iter().find(|name| exists(name)).ok_or_else(|| missing(&join(path, last)))
        };
        let (mut changes, mut updates) = (BTreeMap::<String, Vec<Change>>::new(), vec![]);
        for (name, tensor) in adapter.iter() {
            let (path, last) = split(name);
            let other = |last| {
                let other = adapter.get(&join(path, last)).cloned();
                other
                    .ok_or_else(|| Error::tensor(name, format!("the adapter has no {last} for it")))
            };
            let tensor = tensor.clone();
            match last {
                "lora_A" => {
                    let b = other("lora_B")?;
                    let weight = join(path, "weight");
                    if !exists(&weight) && is_tied(path, &adapter, &exists)? {
                        continue;
                    }
                    let base = match config.kind(path) {
                        Some(LayerKind::Parameter { .. }) if exists(path) => path.to_owned(),
                        Some(LayerKind::Parameter { .. }) => return Err(missing(path)),
                        _ => find(path, "weight")?,
                    };
                    let magnitude = adapter.get(&join(path, MAGNITUDE)).cloned();
                    let factors = Factors { a: tensor, b, magnitude };
                    updates.push((base, Change::Update { path: path.to_owned(), factors }));
                }
                "lora_B" | MAGNITUDE => drop(other("lora_A")?),
                "lora_bias" => {
                    let change = Change::AddBias { path: path.to_owned(), bias: tensor };
                    updates.push((find(path, "bias")?, change));
                }
                "trainable_tokens" => {
                    let indices = config.trainable_token_indices.get(path).cloned();
                    let indices = indices.ok_or_else(|| {
                        Error::tensor(
                            name,
                            "the configuration has no trainable_token_indices for it",
                        )
                    })?;
                    updates.push((find(path, "weight")?, Change::Rows { indices, rows: tensor }));
                }
                "weight" if !exists(name) && is_tied(path, &adapter, &exists)? => {}
                _ => {
                    let name = match exists(name) {
                        true => name.clone(),
                        false => find(path.strip_suffix(".conv").unwrap_or(path), last)?,
                    };
                    changes.entry(name).or_default().push(Change::Replace(tensor));
                }
            }
        }
        config
            .check_used(adapter.keys().filter(|name| is_factor(name)).map(|name| split(name).0))?;
        for (name, change) in updates {
            // PEFT also saves the table under an embedding's adapter. In a state dict of a whole model
            // it may be merged already.
            match (changes.get(&name), &change) {
                (Some(_), Change::Update { path, .. }) if config.kind(path).is_none() => {
                    let reason = "the adapter has both the tensor and an update of it";
                    return Err(Error::tensor(name, reason));
                }
                _ => changes.entry(name).or_default().push(change),
            }
        }
        Ok(Self { changes, config: config.into_owned() })
    }

    /// The tensor that replaces this one of the base, or `None` if it is unchanged.
    pub fn apply(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        let Some(changes) = self.changes.get(name) else { return Ok(None) };
        let apply = |tensor: Tensor, change: &Change| change.apply(&tensor, &self.config);
        let changed = changes.iter().try_fold(base.clone(), apply);
        changed.map(Some).map_err(|e| Error::tensor(name, e))
    }

    /// The tensors of the base that change.
    pub fn changed(&self) -> impl Iterator<Item = &str> {
        self.changes.keys().map(String::as_str)
    }

    pub fn changes(&self, name: &str) -> bool {
        self.changes.contains_key(name)
    }
}

fn missing(name: &str) -> Error {
    let compiled = match name.split('.').any(|component| component == "_orig_mod") {
        true => {
            ": _orig_mod is of a model that torch.compile wrapped, rename the tensors without it"
        }
        false => "",
    };
    Error::tensor(name, format!("the adapter changes it, but the base does not have it{compiled}"))
}
