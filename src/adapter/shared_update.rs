//! Layers that have a part of what is trained elsewhere: rows of a table, a tied head's update, an expert's projection.

use super::state;
use super::target::{adapted, variables_at, AdapterParts, Target};
use crate::layers::{projection, LayerKind, Part, Placement, View, WeightTensors};
use crate::utils::variable;
use crate::weights::{head_of, ExpertProjection, LayerConfig};
use candle_core::Tensor;

impl Target {
    /// A table of which some rows are trained, or a head that is tied to it.
    pub(super) fn with_rows(
        &self,
        adapter: &AdapterParts,
        weight: &Tensor,
        kind: &LayerKind,
        is_first: bool,
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
            // Another layer around the same tensor would have no factors.
            if is_first && options.selects(&self.path) && options.adapts(kind) {
                return Err(format!(
                    "it has trainable_token_indices, and {:?} is a target of the adapter: its rows are trained, or factors",
                    self.path
                ));
            }
            let (cfg, vb) =
                (options.config.lora, variables_at(path, weight, options, &adapter.vars));
            WeightTensors::with_rows(weight.clone(), indices, placement, &cfg, &vb)
                .map_err(|error| error.to_string())
        };
        let rows = rows();
        // A head does not make up for its table.
        let is_table = is_first && *path == self.path;
        let given = rows.as_ref().map(|_| indices.to_vec()).map_err(String::clone);
        if is_table || given.is_err() {
            state::lock(&adapter.state).adapted.insert_tokens(path, given);
        }
        Some(rows)
    }

    /// A head whose update is that of the table that it is tied to, if the adapter says so.
    pub(super) fn tied(
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
    pub(super) fn expert(
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
            let vb = variables_at(&path, weight, options, vars);
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
}
