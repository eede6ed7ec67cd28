//! A layer of a model, which an adapter adapts, or to which the adapters of a set can be added.

use super::options::Options;
use super::record::Record;
use super::state::{self, State};
use crate::base::var_builder;
use crate::layers::binding::active::LayerId;
use crate::layers::binding::target::TargetModule;
use crate::layers::{
    adapt, LayerKind, LoraConfig, Mode, Placement, SharedWeight, Weight, WeightTensors,
};
use crate::layers::{projection, Part, View};
use crate::utils::{variable, Trainable};
use crate::weights::{head_of, ExpertProjection, LayerConfig};
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
        let rows = self.adapter.as_ref().and_then(|adapter| self.with_rows(adapter, weight, &kind));
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

    /// A table of which some rows are trained, or a head that is tied to it.
    fn with_rows(
        &self,
        adapter: &AdapterParts,
        weight: &Tensor,
        kind: &LayerKind,
    ) -> Option<Result<WeightTensors, String>> {
        let options = &adapter.options;
        let own = options.token_rows(&self.path).map(|(_, indices)| (&self.path, indices));
        let of_table = || {
            let table = self.table.as_ref()?;
            options.token_rows(table).map(|(_, indices)| (table, indices))
        };
        let (path, indices) = own.or_else(of_table)?;
        let placement = match kind {
            LayerKind::Embedding => Placement::Transposed,
            LayerKind::Linear => Placement::AsIs,
            _ => return None,
        };
        let rows = || {
            if weight.is_variable() {
                return Err("it has trainable_token_indices, and is trained as a whole".to_owned());
            }
            if options.selects(&self.path) && options.adapts(kind) {
                return Err(format!(
                    "it has trainable_token_indices, and {:?} is a target of the adapter: its rows are trained, or factors",
                    self.path
                ));
            }
            let vb = var_builder(
                no_tensors(weight.dtype(), weight.device()),
                &adapter.vars,
                Trainable::from(&options.config),
            );
            let (cfg, vb) = (options.config.lora, options.seeded(vb).set_prefix(path));
            WeightTensors::with_rows(weight.clone(), indices, placement, &cfg, &vb)
                .map_err(|error| error.to_string())
        };
        let rows = rows();
        let given = rows.as_ref().map(|_| indices.to_vec()).map_err(String::clone);
        state::lock(&adapter.state).adapted.insert_tokens(path, given);
        Some(rows)
    }

    /// A head whose update is that of the table that it is tied to, if the adapter says so.
    fn tied(
        &self,
        adapter: &AdapterParts,
        weight: &Tensor,
        kind: &LayerKind,
        is_first: bool,
    ) -> Option<Result<WeightTensors, String>> {
        let AdapterParts { options, vars, state } = adapter;
        if !options.config.ensure_weight_tying || weight.is_variable() || *kind != LayerKind::Linear
        {
            return None;
        }
        let shares = || self.record.is_of_other(&self.path, kind).then_some(&self.path);
        let table = self.table.as_ref().or_else(|| shares().filter(|_| !is_first))?;
        let has_own = self.table.is_some() && variable(vars, &Part::A.at(&self.path)).is_some();
        if has_own || !(options.selects(table) && options.adapts(&LayerKind::Embedding)) {
            return None;
        }
        let tied = || {
            let (own, _) = adapted(options, vars, table, weight, &LayerKind::Embedding)?;
            let Some(update) = own.low_rank() else { return Ok(None) };
            if update.magnitude().is_some() {
                return Err("with use_dora a tied head has other magnitudes than its table: \
                            ensure_weight_tying is for LoRA alone"
                    .to_owned());
            }
            let (update, cfg) = (update.clone(), &options.config.lora);
            Ok(Some(WeightTensors::sharing(weight.clone(), update, View::Transposed, cfg)))
        };
        let (tied, mut state) = (tied().transpose()?, state::lock(state));
        match &tied {
            Ok(_) => {
                let head = self.head_of(table);
                state.adapted.tied.extend(head.map(|head| (head, table.clone())));
            }
            Err(reason) => state.adapted.insert(table, Err(reason.clone())),
        }
        Some(tied)
    }

    /// A projection of an expert whose fused parameter is trained.
    fn expert(
        &self,
        adapter: &AdapterParts,
        weight: &Tensor,
        kind: &LayerKind,
    ) -> Option<Result<WeightTensors, String>> {
        let AdapterParts { options, vars, state } = adapter;
        if options.parameters.is_empty() || *kind != LayerKind::Linear {
            return None;
        }
        let own = ExpertProjection::of(&self.path)?;
        // A loaded adapter's module has a name already; a new one has transformers'.
        let held = |path: &str| variable(vars, &Part::A.at(path)).is_some();
        let paths = own.modules.iter().rev().map(|module| own.paths(module));
        let mut paths = paths.filter(|[parameter, _]| options.trains_parameter(parameter));
        let [_, path] = paths.find(|[_, path]| !options.loaded || held(path))?;
        let built = || {
            if weight.is_variable() {
                let reason = "its experts are trained by target_parameters, and it is trained as a whole, too";
                return Err(reason.to_owned());
            }
            let layer = options.layer(&path).map_err(|error| error.to_string())?;
            let vb = var_builder(
                no_tensors(weight.dtype(), weight.device()),
                vars,
                Trainable::from(&options.config),
            );
            let vb = options.seeded(vb).set_prefix(&path);
            let outs = weight.dim(0).map_err(|error| error.to_string())?;
            let ((part, parts), cfg) = (own.part, layer.over(options.config.lora));
            let tensors =
                projection(weight, (part * outs..(part + 1) * outs, parts * outs), &cfg, &vb);
            let layer = LayerConfig { kind: Some(LayerKind::Linear), ..layer };
            Ok((tensors.map_err(|error| error.to_string())?, layer))
        };
        let (tensors, layer) = match built() {
            Ok((tensors, layer)) => (Ok(tensors), Ok(layer)),
            Err(reason) => (Err(reason.clone()), Err(reason)),
        };
        state::lock(state).adapted.insert(&path, layer);
        Some(tensors)
    }

    /// The path of the head that is tied to a table: its own, or by the table's name if it has the table's.
    fn head_of(&self, table: &str) -> Option<String> {
        match self.table {
            Some(_) => Some(self.path.clone()),
            None => head_of(table, |name| self.record.has(name)),
        }
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
    let vb = var_builder(
        no_tensors(weight.dtype(), weight.device()),
        vars,
        Trainable::from(&options.config),
    );
    let cfg = layer.over(options.config.lora);
    if declared.is_linear() && cfg.fan_in_fan_out {
        return Err("fan_in_fan_out is set, but candle_nn's weights are (out, in)".to_owned());
    }
    let tensors = adapt(weight, declared, &cfg, &options.seeded(vb).set_prefix(path));
    let tensors = tensors.map_err(|error| error.to_string())?;
    let tensors = match &options.dropout {
        Some(stream) => tensors.with_dropout_stream(stream),
        None => tensors,
    };
    Ok((tensors, LayerConfig { kind: Some(declared.clone()), ..layer }))
}

fn no_tensors(dtype: DType, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_tensors(HashMap::new(), dtype, device)
}
