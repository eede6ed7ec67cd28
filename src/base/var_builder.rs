//! A `VarBuilder` over a frozen base and a trainable adapter.

use super::source::{from_source, Source, Wanted};
use crate::layers::binding::placeholder::{dequantized, on_device};
use crate::layers::Part;
use crate::utils::{variable, Trainable};
use crate::weights::untied_table;
use crate::{Error, Result};
use candle_core::{Shape, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
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
/// modules of the selection may be new. A head that `base` ties to its embeddings, as `lm_head.weight` of a model that is
/// built without tying, has the values of their table.
pub fn var_builder<'a>(
    base: VarBuilder<'a>,
    adapter: &VarMap,
    trainable: impl Into<Trainable>,
) -> VarBuilder<'a> {
    var_builder_with(base, adapter, trainable, false, |_| false)
}

/// [`var_builder`] in which the layers whose path is `adapted` count as such before their factors exist,
/// so that [`Bias::LoraOnly`](crate::Bias::LoraOnly) trains their biases.
pub(crate) fn var_builder_with<'a>(
    base: VarBuilder<'a>,
    adapter: &VarMap,
    trainable: impl Into<Trainable>,
    ignore_mismatched_sizes: bool,
    adapted: impl Fn(&str) -> bool + Send + Sync + 'static,
) -> VarBuilder<'a> {
    let (dtype, device) = (base.dtype(), base.device().clone());
    let (adapter, trainable) = (adapter.clone(), trainable.into());
    let source = WithVariables { base, adapter, trainable, ignore_mismatched_sizes, adapted };
    from_source(source, dtype, &device)
}

/// `base` with variables of `adapter` for what is trained.
struct WithVariables<'a, F> {
    base: VarBuilder<'a>,
    adapter: VarMap,
    trainable: Trainable,
    /// Whether a module that is trained as a whole may have other sizes than the base's, and is new then.
    ignore_mismatched_sizes: bool,
    /// Whether the layer of a path is adapted.
    adapted: F,
}

impl<F: Fn(&str) -> bool> WithVariables<'_, F> {
    fn trains(&self, name: &str) -> bool {
        let exists = |name: &str| {
            let (path, part) = Part::parse(name);
            variable(&self.adapter, name).is_some() || (part.is_lora() && (self.adapted)(path))
        };
        self.trainable.selects(name, exists)
    }

    /// The tensor of the base with the values of this one: itself, or the table that the base ties a head to.
    fn source(&self, name: &str) -> Option<String> {
        match self.base.has(name) {
            true => Some(name.to_owned()),
            false => untied_table(name, |name| self.base.has(name)),
        }
    }

    /// The base's value, which may be a placeholder of a quantised one.
    fn frozen(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        let Some(source) = self.source(name) else {
            let expected = wanted.shape.map(|shape| format!(" (expected {shape:?})"));
            return Err(Error::Invalid(format!(
                "the base has no tensor {name:?}{}",
                expected.unwrap_or_default()
            )));
        };
        // On the base's own device.
        let tensor =
            self.base.tensor(&source, &Wanted { device: self.base.device(), ..*wanted })?;
        // A copy of a variable: training or loading the base's VarMap must not change it.
        Ok(if tensor.is_variable() { tensor.copy()?.detach() } else { tensor })
    }

    /// A new variable with the base's value or, if the base lacks a tensor that may be new, with its initialisation.
    fn create(&self, name: &str, wanted: &Wanted) -> Result<Var> {
        let var = match self.new_shape(name, wanted)? {
            Some(shape) => wanted.init.var(shape.clone(), wanted.dtype, wanted.device)?,
            None => {
                let tensor = dequantized(self.frozen(name, wanted)?)?;
                Var::from_tensor(&tensor.to_device(wanted.device)?)?
            }
        };
        let mut data = self.adapter.data().lock().unwrap_or_else(PoisonError::into_inner);
        Ok(data.entry(name.to_owned()).or_insert(var).clone())
    }
}

impl<F: Fn(&str) -> bool> WithVariables<'_, F> {
    /// The shape of a tensor that is new. An error for one of a module of another size than the base's.
    fn new_shape<'w>(&self, name: &str, wanted: &Wanted<'w>) -> Result<Option<&'w Shape>> {
        let in_module = self.trainable.in_module(name);
        let Some(shape) = wanted.shape.filter(|_| in_module || Part::parse(name).1.is_adapter())
        else {
            return Ok(None);
        };
        let Some(source) = self.source(name) else { return Ok(Some(shape)) };
        let any = Wanted { shape: None, device: self.base.device(), ..*wanted };
        // Some bases, such as `VarBuilder::zeros`, have no shape of their own.
        let Ok(own) = self.base.tensor(&source, &any) else { return Ok(None) };
        match own.dims() == shape.dims() {
            true => Ok(None),
            false if self.ignore_mismatched_sizes => Ok(Some(shape)),
            false => {
                let reason =
                    "a new module of another size needs the adapter's `ignore_mismatched_sizes`";
                wanted
                    .check(name, own.dims())
                    .map_err(|e| Error::Invalid(format!("{e}; {reason}")))?;
                Ok(None)
            }
        }
    }
}

impl<F: Fn(&str) -> bool + Send + Sync> Source for WithVariables<'_, F> {
    fn tensor(&self, name: &str, wanted: &Wanted) -> Result<Tensor> {
        if !self.trains(name) {
            return Ok(on_device(self.frozen(name, wanted)?, wanted.device)?);
        }
        let var = match variable(&self.adapter, name) {
            Some(var) => var,
            None => self.create(name, wanted)?,
        };
        wanted.check(name, var.dims())?;
        if wanted.shape.is_some() && var.dtype() != wanted.dtype {
            let reason =
                format!("the adapter has it in {:?}, expected {:?}", var.dtype(), wanted.dtype);
            return Err(Error::tensor(name, reason));
        }
        Ok(var.as_tensor().clone())
    }

    fn has(&self, name: &str) -> bool {
        variable(&self.adapter, name).is_some() || self.base.has(name)
    }
}
