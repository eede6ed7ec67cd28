//! An adapter's updates for the layers of a model.

use super::places::Layer;
use crate::adapter::built::{self, Built};
use crate::adapter::merged_only::MergedOnly;
use crate::adapter::target::Target;
use crate::adapter::Adapter;
use crate::layers::{dequantized, Part, SharedWeight, Weight};
use crate::ops::LowRank;
use crate::utils::variables;
use crate::weights::{Bias, LayerConfig};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::VarMap;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What an adapter gets from a model, before it knows of it.
pub(super) struct Fitted {
    vars: VarMap,
    layers: Vec<(String, LayerConfig, Weight)>,
}

impl Fitted {
    pub fn new(adapter: &Adapter, layers: &[Layer<Arc<SharedWeight>>]) -> Result<Self> {
        refuse_others(adapter)?;
        if layers.is_empty() {
            let reason = "no layer of `lora::nn` was built on `Adapters::var_builder`, or the model was dropped";
            return Err(Error::Invalid(reason.to_owned()));
        }
        let (options, held) = (&adapter.options, variables(&adapter.vars));
        let (vars, built) = (VarMap::new(), Arc::<Mutex<Built>>::default());
        vars.data().lock().unwrap_or_else(PoisonError::into_inner).extend(held.clone());
        built::lock(&built).options(options);
        let mut fitted = vec![];
        for (path, kind, base) in layers {
            built::lock(&built).read(&Part::Base("weight").at(path), base.tensor().elem_count());
            if !(options.selects(path) && options.adapts(kind)) {
                continue;
            }
            let (path, options) = (path.clone(), options.clone());
            let target = Target { path, options, vars: vars.clone(), built: built.clone() };
            match target.adapted(base.tensor(), kind.clone()) {
                Ok((weight, layer)) => {
                    same_table(adapter, &target.path, base.tensor())?;
                    built::lock(&built).adapted(&target.path, layer.clone(), &weight);
                    fitted.push((target.path, layer, weight));
                }
                Err(reason) => built::lock(&built).failed(&target.path, reason),
            }
        }
        built::lock(&built).check(options, &vars)?;
        if fitted.iter().all(|(.., weight)| weight.update().is_none()) {
            let reason =
                "it adapts no layer: it needs targets, and a model on `Adapters::var_builder`";
            return Err(Error::Invalid(reason.to_owned()));
        }
        let created = variables(&vars).into_keys().find(|name| !held.contains_key(name));
        if let Some(name) = created.filter(|_| options.loaded) {
            return Err(Error::tensor(name, "the adapter does not have it"));
        }
        Ok(Self { vars, layers: fitted })
    }

    /// Gives the adapter what it has got, and returns the updates by path.
    pub fn report(self, adapter: &Adapter) -> Arc<BTreeMap<String, LowRank>> {
        let vars = variables(&self.vars);
        adapter.vars.data().lock().unwrap_or_else(PoisonError::into_inner).extend(vars);
        let mut built = built::lock(&adapter.built);
        built.options(&adapter.options);
        let updates = self.layers.into_iter().filter_map(|(path, layer, weight)| {
            built.adapted(&path, layer, &weight);
            Some((path, weight.update()?.clone()))
        });
        Arc::new(updates.collect())
    }
}

/// An error if the adapter has biases or modules, or changes that are merged alone.
fn refuse_others(adapter: &Adapter) -> Result<()> {
    let config = &adapter.options.config;
    MergedOnly::new(config, &adapter.vars).refuse_any()?;
    let vars = variables(&adapter.vars);
    let other =
        vars.keys().find(|name| !Part::parse(name).1.is_lora()).or(config.modules_to_save.first());
    let what = match other {
        Some(name) => format!("{name:?} beside factors"),
        None if config.bias != Bias::None => "a bias beside factors".to_owned(),
        None => return Ok(()),
    };
    let reason =
        "it would replace the base's own, which all adapters share: merge this adapter with \
                  `Adapter::merged`, or build a model on its `var_builder`";
    Err(Error::unsupported(what, reason))
}

/// An error if the adapter replaces the weight of a layer by another, as it may in PEFT's files of embeddings.
fn same_table(adapter: &Adapter, path: &str, base: &Tensor) -> Result<()> {
    let name = Part::Base("weight").at(path);
    let Some(own) = adapter.options.frozen.get(&name) else { return Ok(()) };
    let base = dequantized(base.clone())?;
    let own = own.to_device(base.device())?.to_dtype(base.dtype())?;
    if own.shape() != base.shape() || own.ne(&base)?.max_all()?.to_scalar::<u8>()? != 0 {
        let reason = "the adapter replaces it by another, but the adapters have one base";
        return Err(Error::tensor(name, reason));
    }
    Ok(())
}
