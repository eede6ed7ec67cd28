//! A layer that becomes adapted.

use super::built::{self, Built};
use super::options::Options;
use crate::layers::claims::Claim;
use crate::layers::{adapt, LayerKind, Place, Weight};
use crate::utils::{seeded, var_builder, Trainable};
use crate::weights::LayerConfig;
use candle_core::Tensor;
use candle_nn::{VarBuilder, VarMap};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// A layer that `options` selects. Its factors are variables of `vars`.
pub(super) struct Target {
    pub path: String,
    pub options: Arc<Options>,
    pub vars: VarMap,
    pub built: Arc<Mutex<Built>>,
}

impl Target {
    /// A `VarBuilder` at the layer's path that creates factors.
    fn factors(&self, weight: &Tensor) -> VarBuilder<'static> {
        let none = VarBuilder::from_tensors(HashMap::new(), weight.dtype(), weight.device());
        let vb = var_builder(none, &self.vars, Trainable::from(&self.options.config));
        let vb = match self.options.seed {
            Some(seed) => seeded(vb, seed),
            None => vb,
        };
        vb.set_prefix(&self.path)
    }

    /// The weight of a layer of this kind with its update, and the options of the layer.
    pub fn adapted(
        &self,
        weight: &Tensor,
        kind: LayerKind,
    ) -> std::result::Result<(Weight, LayerConfig), String> {
        let layer = self.options.layer(&self.path).map_err(|error| error.to_string())?;
        let declared = layer.kind.clone().unwrap_or(kind.clone());
        if declared != kind && !(kind == LayerKind::Linear && declared.is_linear()) {
            return Err(format!("its layer is a {kind:?}, declared as a {declared:?}"));
        }
        let cfg = layer.over(self.options.config.lora);
        if declared.is_linear() && cfg.fan_in_fan_out {
            return Err("fan_in_fan_out is set, but candle_nn's weights are (out, in)".to_owned());
        }
        let weight = adapt(weight, &declared, &cfg, &self.factors(weight))
            .map_err(|error| error.to_string())?;
        let weight = match &self.options.dropout {
            Some(stream) => weight.with_dropout_stream(stream),
            None => weight,
        };
        Ok((weight, LayerConfig { kind: Some(declared), ..layer }))
    }
}

impl Claim for Target {
    fn adapt(&self, weight: &Tensor, bias: Option<&Tensor>, kind: LayerKind) -> Option<Weight> {
        let path = self.path.as_str();
        let (mode, owner) = {
            let mut built = built::lock(&self.built);
            built.claimed(path);
            (built.mode(), built.owner())
        };
        if !self.options.adapts(&kind) {
            return None;
        }
        // Without the lock: merging waits for other threads.
        let place = Place { owner, path: path.to_owned() };
        let adapted = self.adapted(weight, kind).and_then(|(weight, layer)| {
            let weight = weight.with_bias(bias.cloned()).shared(mode, place);
            Ok((weight.map_err(|error| error.to_string())?, layer))
        });
        let mut built = built::lock(&self.built);
        match adapted {
            Ok((weight, layer)) => {
                built.adapted(path, layer, &weight);
                Some(weight)
            }
            Err(reason) => {
                built.failed(path, reason);
                None
            }
        }
    }
}
