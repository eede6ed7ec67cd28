//! Which tensors of a base an adapter changes, and into what.

use super::merged_weight::merged_weight;
use super::{join, split, StateDict};
use crate::peft::{refuse_names, PeftConfig};
use crate::{Error, Result};
use candle_core::{bail, Tensor};
use std::collections::BTreeMap;

/// What happens to which tensor of the base.
pub(super) struct Plan {
    changes: BTreeMap<String, Change>,
    config: PeftConfig,
}

enum Change {
    Update { path: String, a: Tensor, b: Tensor },
    Replace(Tensor),
}

impl Plan {
    pub fn new(
        adapter: &StateDict,
        config: PeftConfig,
        exists: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        if adapter.is_empty() {
            return Err(Error::Empty { wanted: "an empty adapter".to_owned(), held: 0 });
        }
        refuse_names(adapter.keys())?;
        let missing = |name: &str| Error::tensor(name, "the base has no such tensor to change");
        // A convolution's tensors may stand under loralib's second name.
        let find = |path: &str, last: &str| {
            let names = [join(path, last), join(&join(path, "conv"), last)];
            names.into_iter().find(|name| exists(name)).ok_or_else(|| missing(&join(path, last)))
        };
        let (mut updates, mut replacements) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in adapter {
            let (path, last) = split(name);
            let other = |last| {
                let other = adapter.get(&join(path, last)).cloned();
                other.ok_or_else(|| Error::tensor(name, format!("it has no {last} beside it")))
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
            return Err(Error::tensor(both, "the adapter has it and an update of it"));
        }
        updates.append(&mut replacements);
        Ok(Self { changes: updates, config })
    }

    /// The tensor that stands for this one of the base, where that is another.
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
