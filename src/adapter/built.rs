//! The layers of an adapter, as the model's constructors report them.

use super::targets::Targets;
use crate::layers::{LayerKind, Mode, SharedWeight, Weight};
use crate::utils::names::{join, split};
use crate::utils::variables;
use crate::{Error, Result};
use candle_nn::VarMap;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

/// What is known of the layers so far.
#[derive(Debug, Default)]
pub(super) struct Built {
    mode: Option<Mode>,
    layers: BTreeMap<String, (LayerKind, Vec<Weak<SharedWeight>>)>,
    /// Weights of targets that the model has read and no layer has taken.
    unclaimed: BTreeSet<String>,
    failures: BTreeMap<String, String>,
}

pub(super) fn lock(built: &Mutex<Built>) -> MutexGuard<'_, Built> {
    built.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Built {
    pub fn mode(&self) -> Mode {
        self.mode.unwrap_or(Mode::Train)
    }

    /// The model has read the weight of a target.
    pub fn read(&mut self, path: &str) {
        self.unclaimed.insert(path.to_owned());
    }

    /// A layer has taken the weight.
    pub fn claimed(&mut self, path: &str) {
        self.unclaimed.remove(path);
    }

    pub fn adapted(&mut self, path: &str, kind: LayerKind, weight: &Weight) {
        let entry = self.layers.entry(path.to_owned()).or_insert_with(|| (kind.clone(), vec![]));
        entry.0 = kind;
        entry.1.retain(|layer| layer.strong_count() > 0);
        entry.1.extend(weight.handle());
        self.failures.remove(path);
    }

    pub fn failed(&mut self, path: &str, reason: String) {
        self.failures.insert(path.to_owned(), reason);
    }

    pub fn kinds(&self) -> impl Iterator<Item = (&str, &LayerKind)> {
        self.layers.iter().map(|(path, (kind, _))| (path.as_str(), kind))
    }

    /// Sets the mode of all layers that are alive or, on an error, of none.
    pub fn set_mode(&mut self, mode: Mode) -> candle_core::Result<()> {
        let mut prepared = vec![];
        for (path, (_, layers)) in &self.layers {
            for layer in layers.iter().filter_map(Weak::upgrade) {
                let state = layer.prepare(mode).map_err(|e| e.context(path.clone()))?;
                prepared.push((layer, state));
            }
        }
        prepared.into_iter().for_each(|(layer, state)| layer.set(state));
        self.mode = Some(mode);
        Ok(())
    }

    pub fn check(&self, targets: &Targets, vars: &VarMap) -> Result<()> {
        if let Some((path, reason)) = self.failures.iter().next() {
            return Err(Error::tensor(join(path, "weight"), reason));
        }
        targets
            .check(self.layers.keys().map(String::as_str).chain(
                // Reported below, with another reason.
                self.unclaimed.iter().map(String::as_str),
            ))
            .map_err(Error::Invalid)?;
        if !targets.is_all_linear() {
            if let Some(path) = self.unclaimed.first() {
                let reason =
                    "it is a target, but the model builds no layer of `lora::nn` around it: it \
                              may use the tensor itself, transpose, cast or split it";
                return Err(Error::tensor(join(path, "weight"), reason));
            }
        }
        let of_layer =
            |name: &String| split(name).1 == "lora_A" && !self.layers.contains_key(split(name).0);
        match variables(vars).keys().find(|name| of_layer(name)) {
            None => Ok(()),
            Some(name) => {
                Err(Error::tensor(name, "the adapter has it, but the model has no such layer"))
            }
        }
    }
}
