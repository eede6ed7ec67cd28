//! Which tensors of a base an adapter changes, and how.

use super::weight::merged_weight;
use crate::utils::names::{join, refuse_peft_names, split};
use crate::utils::{AdapterConfig, StateDict};
use crate::{Error, Result};
use candle_core::{bail, Tensor};
use std::collections::BTreeMap;

/// The changes by tensor of the base.
pub(crate) struct Plan {
    changes: BTreeMap<String, Change>,
    config: AdapterConfig,
}

enum Change {
    Update { path: String, a: Tensor, b: Tensor },
    Replace(Tensor),
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
        refuse_peft_names(adapter.keys())?;
        let missing = |name: &str| {
            Error::tensor(name, "the adapter changes it, but the base does not have it")
        };
        // A convolution's tensors may have loralib's second names.
        let find = |path: &str, last: &str| {
            let names = [join(path, last), join(&join(path, "conv"), last)];
            names.into_iter().find(|name| exists(name)).ok_or_else(|| missing(&join(path, last)))
        };
        let (mut updates, mut replacements) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in adapter {
            let (path, last) = split(name);
            let other = |last| {
                let other = adapter.get(&join(path, last)).cloned();
                other
                    .ok_or_else(|| Error::tensor(name, format!("the adapter has no {last} for it")))
            };
            match last {
                "lora_A" => {
                    let (a, b) = (tensor.clone(), other("lora_B")?);
                    let update = Change::Update { path: path.to_owned(), a, b };
                    updates.insert(find(path, "weight")?, update);
                }
                "lora_B" => drop(other("lora_A")?),
                _ if exists(name) => {
                    replacements.insert(name.clone(), Change::Replace(tensor.clone()));
                }
                _ => {
                    let path = path.strip_suffix(".conv").unwrap_or(path);
                    replacements.insert(find(path, last)?, Change::Replace(tensor.clone()));
                }
            }
        }
        config.check_used(updates.values().filter_map(|change| match change {
            Change::Update { path, .. } => Some(path.as_str()),
            Change::Replace(_) => None,
        }))?;
        if let Some(both) = replacements.keys().find(|name| updates.contains_key(*name)) {
            return Err(Error::tensor(both, "the adapter has both the tensor and an update of it"));
        }
        updates.append(&mut replacements);
        Ok(Self { changes: updates, config })
    }

    /// The tensor that replaces this one of the base, or `None` if it is unchanged.
    pub fn apply(&self, name: &str, base: &Tensor) -> Result<Option<Tensor>> {
        let changed = match self.changes.get(name) {
            None => return Ok(None),
            Some(Change::Replace(tensor)) => replaced(base, tensor),
            Some(Change::Update { path, a, b }) => {
                merged_weight(base, a, b, self.config.kind(path), self.config.lora_config(path))
            }
        };
        changed.map(Some).map_err(|e| Error::tensor(name, e))
    }

    pub fn changes(&self, name: &str) -> bool {
        self.changes.contains_key(name)
    }
}

fn replaced(base: &Tensor, tensor: &Tensor) -> candle_core::Result<Tensor> {
    if base.shape() != tensor.shape() {
        bail!("its shape is {:?} in the base, {:?} in the adapter", base.dims(), tensor.dims())
    }
    tensor.to_device(base.device())?.to_dtype(base.dtype())
}
