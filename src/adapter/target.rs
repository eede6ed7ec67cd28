//! A layer of a model, which an adapter adapts, or to which the adapters of a set can be added.

use super::options::Options;
use super::record::Record;
use super::state::{self, State};
use crate::base::var_builder;
use crate::layers::binding::active::LayerId;
use crate::layers::binding::target::TargetModule;
use crate::layers::{adapt, LayerKind, LoraConfig, Mode, SharedWeight, Weight, WeightTensors};
use crate::utils::Trainable;
use crate::weights::LayerConfig;
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What the layers that an adapter adapts need of it.
#[derive(Clone)]
pub(crate) struct AdapterParts {
    pub options: Arc<Options>,
    /// The factors are variables of it.
    pub vars: VarMap,
    pub state: Arc<Mutex<State>>,
}

/// A module whose weight a model has read.
pub(crate) struct Target {
    pub path: String,
    /// The table that the base ties this head to, which it lacks.
    pub table: Option<String>,
    pub record: Arc<Record>,
    /// The adapter, or `None` in a set of adapters.
    pub adapter: Option<AdapterParts>,
    /// Whether it has its layer. Others around the same tensor, such as a tied head, have no adapter, as in PEFT.
    pub is_built: AtomicBool,
}

impl TargetModule for Target {
    fn adapt(&self, weight: &Tensor, bias: Option<&Tensor>, kind: LayerKind) -> Option<Weight> {
        let is_first = !self.is_built.swap(true, Ordering::Relaxed);
        // A head that reads the table's tensor itself is tied to it, too.
        let is_first = is_first && !self.record.is_of_other(&self.path, &kind);
        self.record.built(&self.path, &kind, is_first);
        let rows = self
            .adapter
            .as_ref()
            .and_then(|adapter| self.with_rows(adapter, weight, &kind, is_first));
        let tied = || self.tied(self.adapter.as_ref()?, weight, &kind, is_first);
        let expert = || self.expert(self.adapter.as_ref()?, weight, &kind).filter(|_| is_first);
        let layer = match (rows.or_else(tied).or_else(expert), &self.adapter) {
            (Some(own), Some(adapter)) => self.shared(adapter, own, bias),
            // A variable is of a module that is trained as a whole.
            _ if !is_first || weight.is_variable() => None,
            (_, None) => self.without_update(weight, bias, &kind),
            (_, Some(adapter)) => self.adapted(adapter, weight, bias, &kind),
        }?;
        self.record.follows(&self.path, kind, &layer);
        Some(Weight::Shared(layer))
    }
}

impl Target {
    fn id(&self) -> LayerId {
        LayerId { scope: self.record.scope.clone(), path: self.path.clone() }
    }

    /// A layer of a set, whose adapters are chosen at each forward. One that cannot have any stays a plain layer.
    fn without_update(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        kind: &LayerKind,
    ) -> Option<Arc<SharedWeight>> {
        let vb = no_tensors(weight.dtype(), weight.device());
        let base = adapt(weight, kind, &LoraConfig::default(), &vb).ok()?;
        base.with_bias(bias.cloned()).shared(Mode::Train, self.id()).ok()
    }

    fn shared(
        &self,
        adapter: &AdapterParts,
        tensors: Result<WeightTensors, String>,
        bias: Option<&Tensor>,
    ) -> Option<Arc<SharedWeight>> {
        let mode = state::lock(&adapter.state).mode();
        tensors.ok()?.with_bias(bias.cloned()).shared(mode, self.id()).ok()
    }

    fn adapted(
        &self,
        adapter: &AdapterParts,
        weight: &Tensor,
        bias: Option<&Tensor>,
        kind: &LayerKind,
    ) -> Option<Arc<SharedWeight>> {
        let options = &adapter.options;
        if let Some(reason) = options.undecided(&self.path) {
            state::lock(&adapter.state).adapted.insert(&self.path, Err(reason));
            return None;
        }
        if !(options.selects(&self.path) && options.adapts(kind)) {
            return None;
        }
        // Without the adapter's lock: merging waits for other threads.
        let mode = state::lock(&adapter.state).mode();
        let built = adapted(options, &adapter.vars, &self.path, weight, kind).and_then(
            |(tensors, layer)| {
                let shared = tensors.with_bias(bias.cloned()).shared(mode, self.id());
                Ok((shared.map_err(|error| error.to_string())?, layer))
            },
        );
        let (shared, layer) = match built {
            Ok((shared, layer)) => (Some(shared), Ok(layer)),
            Err(reason) => (None, Err(reason)),
        };
        state::lock(&adapter.state).adapted.insert(&self.path, layer);
        shared
    }
}

/// The weight of a layer of this kind with its update, whose factors are variables of `vars`, and the layer's options.
pub(crate) fn adapted(
    options: &Options,
    vars: &VarMap,
    path: &str,
    weight: &Tensor,
    kind: &LayerKind,
) -> Result<(WeightTensors, LayerConfig), String> {
    let layer = options.layer(path).map_err(|error| error.to_string())?;
    let declared = layer.kind.as_ref().unwrap_or(kind);
    if declared != kind && !(*kind == LayerKind::Linear && declared.is_linear()) {
        return Err(format!("its layer is a {kind:?}, declared as a {declared:?}"));
    }
    let cfg = layer.over(options.config.lora);
    if declared.is_linear() && cfg.fan_in_fan_out {
        return Err("fan_in_fan_out is set, but candle_nn's weights are (out, in)".to_owned());
    }
    let tensors = adapt(weight, declared, &cfg, &variables_at(path, weight, options, vars));
    let tensors = tensors.map_err(|error| error.to_string())?;
    let tensors = match &options.dropout {
        Some(stream) => tensors.with_dropout_stream(stream),
        None => tensors,
    };
    Ok((tensors, LayerConfig { kind: Some(declared.clone()), ..layer }))
}

/// The variables of the layer at `path` around a weight, those that `vars` has and new ones.
pub(super) fn variables_at(
    path: &str,
    weight: &Tensor,
    options: &Options,
    vars: &VarMap,
) -> VarBuilder<'static> {
    let none = no_tensors(weight.dtype(), weight.device());
    options.seeded(var_builder(none, vars, Trainable::from(&options.config))).set_prefix(path)
}

fn no_tensors(dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_tensors(HashMap::new(), dtype, device)
}
