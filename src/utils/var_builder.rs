//! A `VarBuilder` over a frozen base and a trainable adapter.

use super::trainable::{variables, Trainable};
use crate::layers::{dequantized, on_device, Part};
use candle_core::{bail, DType, Device, Result, Shape, Tensor, Var};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::{Init, VarMap};
use std::sync::PoisonError;

/// A `VarBuilder` that takes frozen tensors from `base` and creates the trainable ones as variables of
/// `adapter`: the factors with their initialisation, the selected biases and modules with the base's
/// values; with [`Trainable::all_parameters`] the whole base.
///
/// Variables that `adapter` already has are used as they are. dtype and device are the base's. Give
/// `mark_only_lora_as_trainable` and `lora_state_dict` the same selection.
///
/// # Errors
/// Asking for a tensor that `base` lacks is an error, never a random value. Only the factors and the
/// modules of the selection may be new.
pub fn var_builder<'a>(
    base: VarBuilder<'a>,
    adapter: &VarMap,
    trainable: impl Into<Trainable>,
) -> VarBuilder<'a> {
    var_builder_with(base, adapter, trainable, |_| false)
}

/// [`var_builder`] in which the layers whose path is `adapted` count as such before their factors exist,
/// so that [`Bias::LoraOnly`](super::Bias::LoraOnly) trains their biases.
pub(crate) fn var_builder_with<'a>(
    base: VarBuilder<'a>,
    adapter: &VarMap,
    trainable: impl Into<Trainable>,
    adapted: impl Fn(&str) -> bool + Send + Sync + 'static,
) -> VarBuilder<'a> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    let (adapter, trainable) = (adapter.clone(), trainable.into());
    let backend = Split { base, adapter, trainable, adapted: Box::new(adapted) };
    VarBuilder::from_backend(Box::new(backend), dtype, device)
}

struct Split<'a> {
    base: VarBuilder<'a>,
    adapter: VarMap,
    trainable: Trainable,
    adapted: Box<dyn Fn(&str) -> bool + Send + Sync>,
}

impl Split<'_> {
    fn holds(&self, name: &str) -> bool {
        variables(&self.adapter).contains_key(name)
    }

    fn trains(&self, name: &str) -> bool {
        self.trainable.selects(name, |n| {
            let (path, part) = Part::parse(n);
            self.holds(n) || (part.is_lora() && (self.adapted)(path))
        })
    }

    /// The base's value, which may be a placeholder of a quantised one, or `None` if the tensor may be new.
    fn base(&self, shape: &Shape, name: &str, dtype: DType) -> Result<Option<Tensor>> {
        let may_be_new = Part::parse(name).1.is_lora() || self.trainable.in_module(name);
        if !self.base.contains_tensor(name) {
            if may_be_new {
                return Ok(None);
            }
            bail!("the base has no tensor {name:?} (expected {shape:?})")
        }
        // The hint has no effect, because the base has the tensor.
        let tensor = self.base.get_with_hints_dtype(shape.clone(), name, Init::default(), dtype)?;
        // A copy of a variable: training or loading the base's VarMap must not change it.
        Ok(Some(if tensor.is_variable() { tensor.copy()?.detach() } else { tensor }))
    }
}

impl SimpleBackend for Split<'_> {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if !self.trains(name) {
            return match self.base(&shape, name, dtype)? {
                Some(tensor) => on_device(tensor, device),
                None => bail!("the base has no tensor {name:?} (expected {shape:?})"),
            };
        }
        if !self.holds(name) {
            let var = match self.base(&shape, name, dtype)? {
                Some(tensor) => Var::from_tensor(&dequantized(tensor)?.to_device(device)?)?,
                None => init.var(shape.clone(), dtype, device)?,
            };
            let mut data = self.adapter.data().lock().unwrap_or_else(PoisonError::into_inner);
            data.entry(name.to_owned()).or_insert(var);
        }
        let Some(var) = variables(&self.adapter).remove(name) else {
            bail!("{name:?} was removed from the adapter")
        };
        if var.shape() != &shape {
            bail!("the adapter has {name:?} as {:?}, expected {shape:?}", var.shape())
        }
        if var.dtype() != dtype {
            bail!("the adapter has {name:?} in {:?}, expected {dtype:?}", var.dtype())
        }
        Ok(var.as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let var = variables(&self.adapter).remove(name);
        if let Some(var) = var {
            return Ok(var.as_tensor().clone());
        }
        if !self.base.contains_tensor(name) {
            bail!("the base has no tensor {name:?}")
        }
        let tensor = self.base.get_unchecked_dtype(name, dtype)?;
        self.get(tensor.shape().clone(), name, Init::default(), dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.holds(name) || self.base.contains_tensor(name)
    }
}
