//! An adapter's updates for the layers of a set's model.

use crate::adapter::check::check;
use crate::adapter::merged_only::MergedOnly;
use crate::adapter::record::Record;
use crate::adapter::state::Adapted;
use crate::adapter::target::adapted;
use crate::adapter::Adapter;
use crate::layers::binding::active::Updates;
use crate::layers::binding::placeholder::dequantized;
use crate::layers::Part;
use crate::utils::variables;
use crate::weights::Bias;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::VarMap;
use std::sync::{Arc, PoisonError};

/// What an adapter gets from a model, before it knows of it.
pub(super) struct Attached {
    vars: VarMap,
    adapted: Adapted,
    updates: Updates,
}

impl Attached {
    /// The updates for the layers of the models that the record has, as on the adapter's own `var_builder`.
    pub fn new(adapter: &Adapter, record: &Record) -> Result<Self> {
        let layers = record.layers();
        refuse_others(adapter, |path| layers.iter().any(|(layer, ..)| layer == path))?;
        if layers.is_empty() {
            let reason = "no layer of `lora::nn` was built on `Adapters::var_builder`, or the model was dropped";
            return Err(Error::Invalid(reason.to_owned()));
        }
        let (options, held) = (&adapter.options, variables(&adapter.vars));
        let (vars, mut attached, mut updates) = (VarMap::new(), Adapted::default(), Updates::new());
        vars.data().lock().unwrap_or_else(PoisonError::into_inner).extend(held.clone());
        for (path, kind, layer) in layers {
            same_table(adapter, &path, layer.tensor())?;
            if !(options.selects(&path) && options.adapts(&kind)) {
                continue;
            }
            let layer = match adapted(options, &vars, &path, layer.tensor(), &kind) {
                Ok((tensors, config)) => {
                    updates.extend(tensors.low_rank().map(|update| (path.clone(), update.clone())));
                    Ok(config)
                }
                Err(reason) => Err(reason),
            };
            attached.insert(&path, layer);
        }
        check(options, &vars, &attached, record)?;
        if updates.is_empty() {
            let reason =
                "it adapts no layer: it needs r > 0, targets, and a model on `Adapters::var_builder`";
            return Err(Error::Invalid(reason.to_owned()));
        }
        let created = variables(&vars).into_keys().find(|name| !held.contains_key(name));
        if let Some(name) = created.filter(|_| options.loaded) {
            return Err(Error::tensor(name, "the adapter does not have it"));
        }
        Ok(Self { vars, adapted: attached, updates })
    }

    /// Gives the adapter its variables and layers, and returns the updates.
    pub fn give_to(self, adapter: &Adapter) -> Arc<Updates> {
        let vars = variables(&self.vars);
        adapter.vars.data().lock().unwrap_or_else(PoisonError::into_inner).extend(vars);
        let mut state = adapter.state();
        state.options = Some(adapter.options.clone());
        state.adapted.layers.extend(self.adapted.layers);
        Arc::new(self.updates)
    }
}

/// An error if the adapter has biases or modules, or changes that are merged alone.
fn refuse_others(adapter: &Adapter, is_layer: impl Fn(&str) -> bool) -> Result<()> {
    let config = &adapter.options.config;
    MergedOnly::new(&adapter.options).refuse_any()?;
    let vars = variables(&adapter.vars);
    let replaces = |name: &&String| match Part::parse(name) {
        (path, Part::Base("weight")) => !is_layer(path),
        (_, part) => !part.is_lora(),
    };
    let others = vars.keys().filter(|name| !Part::parse(name).1.is_lora());
    let mut others = others.chain(adapter.options.frozen.keys().filter(replaces));
    let other = others.next().or(config.modules_to_save.first());
    let what = match other {
        Some(name) => format!("{name:?} beside factors"),
        None if config.bias != Bias::None => "a bias beside factors".to_owned(),
        None if config.lora.lora_bias => "lora_bias beside factors".to_owned(),
        None if !config.trainable_token_indices.is_empty() => {
            "trainable_token_indices beside factors".to_owned()
        }
        None => return Ok(()),
    };
    let reason = "a layer of several adapters has factors alone, and the base's own for all: merge this adapter with \
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
