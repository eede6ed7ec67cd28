//! Several adapters over one base.

mod attach;
mod choice;
mod sum;
#[cfg(test)]
mod tests;
mod weights;
mod with;

use crate::adapter::record::Record;
use crate::adapter::{var_builder, Adapter};
use crate::layers::binding::active::Updates;
use crate::{Error, Result};
use attach::Attached;
use candle_nn::VarBuilder;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

pub use weights::WeightedAdapters;

/// Named adapters over one base: a model on [`lora::nn`](crate::nn) is built once, and each forward chooses
/// its adapters.
///
/// Adapters are added and removed at run time, and may differ in ranks, targets and options. Each takes the memory
/// of its factors; the base is neither copied nor written. A choice holds for the thread of the closure: other threads
/// choose for themselves, and a forward without a choice is one of the base, or an error if the set
/// [requires](Self::require_choice) one. [`Choice`](crate::adapter::Choice) tells what holds in rayon's tasks, and is a value to carry into
/// other threads. A forward keeps its adapters, whatever is removed meanwhile. A clone is the same set.
///
/// The layers stay unmerged. If one adapter serves alone, a model on its [`merged`](Adapter::merged) weights is
/// faster.
///
/// ```
/// # fn main() -> loralib::Result<()> {
/// use candle_core::{DType, Device, Module, Tensor};
/// use loralib::{nn as candle_nn, Adapter, Adapters, LoraConfig};
/// # let device = Device::Cpu;
/// # let base = candle_nn::VarBuilder::zeros(DType::F32, &device);
/// let adapters = Adapters::new();
/// let model = candle_nn::linear(4, 3, adapters.var_builder(base).pp("fc"))?; // or `Llama::load(..)`
///
/// let cfg = LoraConfig { r: 2, lora_alpha: 4., ..Default::default() };
/// let (sql, chat) = (Adapter::new(cfg).targets(["fc"]), Adapter::new(cfg).targets("all-linear"));
/// adapters.add("sql", &sql)?; // usually one of `Adapter::load("folder", &device)?`
/// adapters.add("chat", &chat)?;
/// # chat.eval()?;
///
/// let x = Tensor::ones((2, 4), DType::F32, &device)?;
/// let y = adapters.with("sql", || model.forward(&x))?;
/// let y = adapters.with([("sql", 0.7), ("chat", 0.3)], || model.forward(&x))?; // a weighted sum
/// let y = adapters.with_rows(&[Some("chat"), None], || model.forward(&x))?; // one product with the base
/// let y = adapters.with_none(|| model.forward(&x))?; // the base
/// adapters.remove("sql")?;
/// # let _ = y; Ok(()) }
/// ```
#[derive(Clone, Default)]
pub struct Adapters {
    record: Arc<Record>,
    added: Arc<RwLock<BTreeMap<String, Added>>>,
}

#[derive(Clone)]
struct Added {
    adapter: Adapter,
    updates: Arc<Updates>,
}

impl fmt::Debug for Adapters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Adapters").field(&self.names()).finish()
    }
}

impl Adapters {
    /// No adapters.
    pub fn new() -> Self {
        Self::default()
    }

    /// A `VarBuilder` for the model, to be built before adapters are added: frozen tensors from `base`, which may be
    /// quantised. Every layer of [`nn`](crate::nn) that takes its weight from it is a place for adapters.
    pub fn var_builder<'a>(&self, base: VarBuilder<'a>) -> VarBuilder<'a> {
        var_builder::recorded(base, self.record.clone(), None)
    }

    /// Adds an adapter, whose variables it shares.
    ///
    /// One that was [loaded](Adapter::load) serves: it computes without dropout and without a graph, until its
    /// [`train`](Adapter::train). A new one gets its variables here, those that a model on its own `var_builder`
    /// would create, and trains until its [`eval`](Adapter::eval). Nothing is merged.
    ///
    /// # Errors
    /// If the name is taken; if the adapter adapts no layer of the model, or has one that the model lacks or
    /// that has another shape; and if it has biases or modules of its own, which have no place beside the
    /// base's. Then neither this nor the adapter has changed.
    pub fn add(&self, name: impl Into<String>, adapter: &Adapter) -> Result<()> {
        let name = name.into();
        let of_adapter = |e: Error| Error::Invalid(format!("adapter {name:?}: {e}"));
        let attached = Attached::new(adapter, &self.record).map_err(of_adapter)?;
        match self.added.write().unwrap_or_else(PoisonError::into_inner).entry(name) {
            Entry::Occupied(taken) => Err(Error::Invalid(format!(
                "there is an adapter {:?} already: remove it first",
                taken.key()
            ))),
            Entry::Vacant(free) => {
                free.insert(Added { adapter: adapter.clone(), updates: attached.give_to(adapter) });
                Ok(())
            }
        }
    }

    /// Removes an adapter and returns it. Its memory is free when the last forward with it ends and nobody else
    /// holds it.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn remove(&self, name: &str) -> Result<Adapter> {
        let removed = self.added.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        removed.map(|added| added.adapter).ok_or_else(|| self.unknown(name))
    }

    /// The names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.added().keys().cloned().collect()
    }

    fn added(&self) -> RwLockReadGuard<'_, BTreeMap<String, Added>> {
        self.added.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn one(&self, name: &str) -> Result<Added> {
        let added = self.added().get(name).cloned();
        added.ok_or_else(|| self.unknown(name))
    }

    /// The adapters of a sum, which has at least one.
    fn named<'a>(
        &self,
        WeightedAdapters(adapters): &'a WeightedAdapters,
    ) -> Result<Vec<(&'a str, Added, f64)>> {
        if adapters.is_empty() {
            let reason = "no adapter is chosen: to compute with the base, use `with_none`";
            return Err(Error::Invalid(reason.to_owned()));
        }
        let named = adapters.iter().enumerate().map(|(i, (name, weight))| {
            if !weight.is_finite() {
                let reason = format!("the weight of the adapter {name:?} is {weight}");
                return Err(Error::Invalid(reason));
            }
            if adapters[..i].iter().any(|(other, _)| other == name) {
                return Err(Error::Invalid(format!("the adapter {name:?} is chosen twice")));
            }
            Ok((name.as_str(), self.one(name)?, *weight))
        });
        named.collect()
    }

    fn unknown(&self, name: &str) -> Error {
        Error::Invalid(format!("there is no adapter {name:?}; there are {:?}", self.names()))
    }
}
