//! The `VarBuilder` by which layers learn that they are targets.

use super::built::{self, Built};
use super::merged_only::MergedOnly;
use super::options::Options;
use super::target::Target;
use crate::layers::claims::Claims;
use crate::layers::Part;
use crate::utils::{seeded, var_builder_with};
use candle_core::{bail, DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::{Init, VarMap};
use std::sync::{Arc, Mutex};

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
    let claims = Claims::default();
    let backend = Targeted { vb, options, vars, built, merged_only, claims };
    VarBuilder::from_backend(Box::new(backend), dtype, device)
}

struct Targeted<'a> {
    vb: VarBuilder<'a>,
    options: Arc<Options>,
    vars: VarMap,
    built: Arc<Mutex<Built>>,
    merged_only: MergedOnly,
    claims: Claims,
}

impl Targeted<'_> {
    /// Reports the tensor, and registers a claim if this is a target's weight.
    fn register(&self, name: &str, tensor: Tensor) -> Result<Tensor> {
        built::lock(&self.built).read(name, tensor.elem_count());
        let (path, Part::Base("weight")) = Part::parse(name) else { return Ok(tensor) };
        if !self.options.selects(path) {
            return Ok(tensor);
        }
        built::lock(&self.built).weight_read(path, tensor.rank());
        let claim = Target {
            path: path.to_owned(),
            options: self.options.clone(),
            vars: self.vars.clone(),
            built: self.built.clone(),
        };
        self.claims.register(&tensor, Arc::new(claim))
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
