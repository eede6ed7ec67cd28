//! The layers of an adapter, as the model's constructors report them.

use super::options::Options;
use crate::layers::{Mode, Owner, Part, SharedWeight, Weight};
use crate::utils::variables;
use crate::weights::{Bias, LayerConfig};
use crate::{Error, Result};
use candle_core::Var;
use candle_nn::VarMap;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What is known of the layers so far.
#[derive(Debug, Default)]
pub(super) struct Built {
    mode: Option<Mode>,
    owner: Owner,
    layers: BTreeMap<String, (LayerConfig, Vec<Weak<SharedWeight>>)>,
    /// The layers whose weights the model has read and no layer has taken, with the weights' ranks.
    unclaimed: BTreeMap<String, usize>,
    failures: BTreeMap<String, String>,
    /// The tensors that the model has read, with their numbers of values.
    read: BTreeMap<String, usize>,
    /// The options of the last model.
    options: Option<Arc<Options>>,
}

pub(super) fn lock(built: &Mutex<Built>) -> MutexGuard<'_, Built> {
    built.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Built {
    pub fn mode(&self) -> Mode {
        self.mode.unwrap_or(Mode::Train)
    }

    /// The mode among other adapters: one that was loaded serves until it is to train.
    pub fn mode_among_others(&self, loaded: bool) -> Mode {
        self.mode.unwrap_or(if loaded { Mode::Eval } else { Mode::Train })
    }

    /// Of the layers' places.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// A model is built with these options.
    pub fn options(&mut self, options: &Arc<Options>) {
        self.options = Some(options.clone());
    }

    /// The model has read a tensor.
    pub fn read(&mut self, name: &str, values: usize) {
        self.read.insert(name.to_owned(), values);
    }

    /// The number of values in the model's tensors and in variables beside them.
    pub fn parameters(&self, vars: &BTreeMap<String, Var>) -> usize {
        let beside = vars.iter().filter(|(name, _)| !self.read.contains_key(*name));
        self.read.values().sum::<usize>() + beside.map(|(_, var)| var.elem_count()).sum::<usize>()
    }

    /// The last components of the layers whose weights the model has read.
    fn names(&self) -> String {
        let weights = self.read.keys().filter_map(|name| name.strip_suffix(".weight"));
        let names: BTreeSet<&str> =
            weights.map(|path| path.rsplit('.').next().unwrap_or(path)).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }

    /// The model has read the weight of a target.
    pub fn weight_read(&mut self, path: &str, rank: usize) {
        self.unclaimed.insert(path.to_owned(), rank);
    }

    /// A layer has taken the weight.
    pub fn claimed(&mut self, path: &str) {
        self.unclaimed.remove(path);
    }

    pub fn adapted(&mut self, path: &str, config: LayerConfig, weight: &Weight) {
        let entry = self.layers.entry(path.to_owned()).or_default();
        entry.0 = config;
        entry.1.retain(|layer| layer.strong_count() > 0);
        entry.1.extend(weight.handle());
        self.failures.remove(path);
    }

    pub fn failed(&mut self, path: &str, reason: String) {
        self.failures.insert(path.to_owned(), reason);
    }

    /// The options of the adapted layers, with their kinds.
    pub fn layers(&self) -> impl Iterator<Item = (&str, &LayerConfig)> {
        self.layers.iter().map(|(path, (config, _))| (path.as_str(), config))
    }

    /// The layers that are alive, with their paths.
    pub fn alive(&self) -> Vec<(String, Arc<SharedWeight>)> {
        let alive = |(path, (_, layers)): (&String, &(_, Vec<Weak<SharedWeight>>))| {
            let path = path.clone();
            layers
                .iter()
                .filter_map(Weak::upgrade)
                .map(move |l| (path.clone(), l))
                .collect::<Vec<_>>()
        };
        self.layers.iter().flat_map(alive).collect()
    }

    pub fn set_mode(&mut self, mode: Mode) {
        self.mode = Some(mode);
    }

    pub fn check(&self, options: &Arc<Options>, vars: &VarMap) -> Result<()> {
        let invalid = |reason: &str| Err(Error::Invalid(reason.to_owned()));
        match &self.options {
            None => return invalid("no model was built on the adapter's `var_builder` yet"),
            Some(built) if !Arc::ptr_eq(built, options) => {
                return invalid(
                    "the options of the adapter were changed after `var_builder`: set them before",
                );
            }
            Some(_) => {}
        }
        if let Some((path, reason)) = self.failures.iter().next() {
            return Err(Error::tensor(Part::Base("weight").at(path), reason));
        }
        let all_linear = options.targets.is_all_linear();
        if all_linear && options.config.bias == Bias::LoraOnly {
            let reason =
                "which biases belong to adapted layers is not known in advance: name the targets";
            return Err(Error::unsupported("`Bias::LoraOnly` with all linear layers", reason));
        }
        // An unclaimed weight is reported below, with another reason.
        let unclaimed = self.unclaimed.keys().filter(|_| !all_linear);
        let known = self.layers.keys().chain(unclaimed).map(String::as_str);
        options.valid().map_err(Error::Invalid)?;
        let hinted = |reason: String| {
            Error::Invalid(format!(
                "{reason}{}; its layers are named {}",
                options.layers.hint(),
                self.names()
            ))
        };
        options.targets.check(known).map_err(hinted)?;
        // All-linear also reads the weights of norms and other layers.
        if let Some((path, _)) = self.unclaimed.iter().find(|(_, rank)| !all_linear || **rank == 2)
        {
            let reason = match self.layers.is_empty() {
                true => "no layer of `lora::nn` was built around it: does the model's file have `use loralib::nn as \
                         candle_nn;` at its top?",
                false => "it is a target, but the model builds no layer of `lora::nn` around it: it may use the \
                          tensor itself, transpose, cast or split it; `exclude` it",
            };
            return Err(Error::tensor(Part::Base("weight").at(path), reason));
        }
        let of_layer = |name: &String| matches!(Part::parse(name), (path, Part::A) if !self.layers.contains_key(path));
        match variables(vars).keys().find(|name| of_layer(name)) {
            None => Ok(()),
            Some(name) => {
                Err(Error::tensor(name, "the adapter has it, but the model has no such layer"))
            }
        }
    }
}
