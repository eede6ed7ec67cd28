//! The `VarBuilder` by which layers learn that they are targets.

use super::built::{self, Built};
use super::merged_only::MergedOnly;
use super::options::Options;
use crate::layers::claims::{self, Adapt, Claim};
use crate::layers::{alias_quantized, LayerKind, Mode, Weight};
use crate::utils::names::split;
use crate::utils::{seeded, var_builder, var_builder_with, LayerConfig, Trainable};
use candle_core::{bail, DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::{Init, VarMap};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// `base` with adapters for the layers that `options` selects. Trainable parameters become variables of
/// `vars`; what the model builds is reported to `built`.
pub(super) fn targeted<'a>(
    base: VarBuilder<'a>,
    options: Arc<Options>,
    vars: VarMap,
    built: Arc<Mutex<Built>>,
) -> VarBuilder<'a> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    built::lock(&built).options(&options);
    let adapted = {
        let options = options.clone();
        move |path: &str| options.selects(path)
    };
    let vb = var_builder_with(base, &vars, &options.config, adapted);
    let vb = match options.seed {
        Some(seed) => seeded(vb, seed),
        None => vb,
    };
    let merged_only = MergedOnly::new(&options.config, &vars);
    let claims = Mutex::default();
    let backend = Targeted { vb, options, vars, built, merged_only, claims };
    VarBuilder::from_backend(Box::new(backend), dtype, device)
}

struct Targeted<'a> {
    vb: VarBuilder<'a>,
    options: Arc<Options>,
    vars: VarMap,
    built: Arc<Mutex<Built>>,
    merged_only: MergedOnly,
    /// Claims live as long as this.
    claims: Mutex<Vec<Arc<dyn Claim>>>,
}

impl Targeted<'_> {
    /// Registers a claim if this is a target's weight. The tensor then gets an id of its own, since a base in
    /// memory gives the same tensor to every reader.
    fn register(&self, name: &str, tensor: Tensor) -> Result<Tensor> {
        let (path, "weight") = split(name) else { return Ok(tensor) };
        if !self.options.selects(path) {
            return Ok(tensor);
        }
        let own = tensor.unsqueeze(0)?.squeeze(0)?;
        alias_quantized(&tensor, &own);
        let tensor = own;
        built::lock(&self.built).weight_read(path, tensor.rank());
        let claim: Arc<dyn Claim> = Arc::new(Target {
            path: path.to_owned(),
            options: self.options.clone(),
            vars: self.vars.clone(),
            built: self.built.clone(),
        });
        claims::register(&tensor, &claim);
        self.claims.lock().unwrap_or_else(PoisonError::into_inner).push(claim);
        Ok(tensor)
    }
}

impl SimpleBackend for Targeted<'_> {
    fn get(&self, s: Shape, name: &str, h: Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        self.merged_only.refuse(name)?;
        let tensor = match self.options.frozen.get(name) {
            Some(own) if own.shape() != &s => {
                bail!("the adapter has {name:?} as {:?}, expected {s:?}", own.shape())
            }
            Some(own) => own.to_device(dev)?.to_dtype(dtype)?,
            None => {
                self.vb.clone().set_device(dev.clone()).get_with_hints_dtype(s, name, h, dtype)?
            }
        };
        self.register(name, tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> Result<Tensor> {
        self.merged_only.refuse(name)?;
        let tensor = match self.options.frozen.get(name) {
            Some(own) => own.to_device(dev)?.to_dtype(dtype)?,
            None => self.vb.clone().set_device(dev.clone()).get_unchecked_dtype(name, dtype)?,
        };
        self.register(name, tensor)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.vb.contains_tensor(name)
    }
}

/// A target's weight that the model has read.
struct Target {
    path: String,
    options: Arc<Options>,
    vars: VarMap,
    built: Arc<Mutex<Built>>,
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

    /// The adapted weight, and the options of its layer.
    fn adapted(
        &self,
        weight: &Tensor,
        kind: LayerKind,
        adapt: &Adapt,
        mode: Mode,
    ) -> std::result::Result<(Weight, LayerConfig), String> {
        let layer = self.options.layer(&self.path).map_err(|error| error.to_string())?;
        let declared = layer.kind.clone().unwrap_or(kind.clone());
        if declared != kind && !(kind == LayerKind::Linear && declared.is_linear()) {
            return Err(format!("its layer is a {kind:?}, declared as a {declared:?}"));
        }
        let cfg = layer.over(self.options.config.lora);
        let weight = adapt(&cfg, &declared, &self.factors(weight))
            .map(|weight| match &self.options.dropout {
                Some(stream) => weight.with_dropout_stream(stream),
                None => weight,
            })
            .and_then(|weight| weight.shared(mode))
            .map_err(|error| error.to_string())?;
        Ok((weight, LayerConfig { kind: Some(declared), ..layer }))
    }
}

impl Claim for Target {
    fn adapt(&self, weight: &Tensor, kind: LayerKind, adapt: &Adapt) -> Option<Weight> {
        let (options, path) = (&self.options, self.path.as_str());
        let mode = {
            let mut built = built::lock(&self.built);
            built.claimed(path);
            built.mode()
        };
        if options.targets.is_all_linear() && kind != LayerKind::Linear {
            return None;
        }
        // Without the lock: merging waits for other threads.
        let adapted = self.adapted(weight, kind, adapt, mode);
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
