//! Named tensors, taken from a model's variables and put back.

use super::names::{is_lora, join, split};
use super::trainable::{expected, variables, Trainable};
use crate::ops::is_finite;
use crate::{peft, Error, Result};
use candle_core::{Tensor, Var};
use candle_nn::VarMap;
use std::collections::BTreeMap;

/// Tensors by name.
pub type StateDict = BTreeMap<String, Tensor>;

/// Whether names that do not fit are an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strict {
    /// They are.
    Yes,
    /// They are only reported. That nothing at all fits is still an error, and so is a shape that
    /// does not.
    No,
}

/// What was loaded and what was not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "what was not loaded is in here"]
pub struct LoadReport {
    /// The variables that were set, sorted.
    pub loaded: Vec<String>,
    /// Variables that the state dict lacks, sorted. Where the variables include the frozen base too, a
    /// state dict with `lora_A` or `lora_B` is an adapter, of which these alone are expected; one
    /// without is a base, of which all others are. The factors that a base lacks keep their values.
    pub missing: Vec<String>,
    /// Names of the state dict that no variable has.
    pub unexpected: Vec<String>,
}

/// A copy of the variables that are trained, to save. It is the same in training and evaluation.
///
/// # Errors
/// When there are none, or none in a module that was named.
pub fn lora_state_dict(vars: &VarMap, what: impl Into<Trainable>) -> Result<StateDict> {
    let selected = what.into().select(vars)?;
    // A copy, because an optimizer writes into the variable's own storage.
    selected.into_iter().map(|(name, var)| Ok((name, var.as_tensor().copy()?.detach()))).collect()
}

/// Sets the variables of `vars` to the values in `tensors`, all of them or, on an error, none.
///
/// A model that is merged runs on as it was until `eval()` is called again. Rank and alpha are not
/// looked at: [`load_checkpoint`](crate::load_checkpoint) does that.
///
/// A value takes its variable's dtype and device. A convolution's `conv.weight` and `conv.bias` are
/// also found under the layer's own name.
///
/// # Errors
/// When a shape differs, a value is not finite, or nothing fits; with [`Strict::Yes`] also when a
/// name is missing or unexpected.
pub fn load_state_dict(vars: &VarMap, tensors: &StateDict, strict: Strict) -> Result<LoadReport> {
    let vars = variables(vars);
    let mut staged: BTreeMap<&str, (&Var, Tensor)> = BTreeMap::new();
    let mut unexpected = vec![];
    for (name, tensor) in tensors {
        match find(&vars, name) {
            None => unexpected.push(name.clone()),
            Some((own, var)) => {
                if staged.insert(own, (var, fitted(name, tensor, var)?)).is_some() {
                    return Err(Error::tensor(own, "the checkpoint has it under two names"));
                }
            }
        }
    }
    let factors = tensors.keys().any(|name| is_lora(name));
    let missing: Vec<_> = expected(&vars, factors)
        .filter(|name| !staged.contains_key(name))
        .map(str::to_owned)
        .collect();
    let fits = missing.is_empty() && unexpected.is_empty();
    if staged.is_empty() || (strict == Strict::Yes && !fits) {
        peft::refuse_names(&unexpected)?;
        return Err(Error::Names { missing, unexpected });
    }
    let loaded = staged.keys().map(|name| name.to_string()).collect();
    set_all(staged)?;
    Ok(LoadReport { loaded, missing, unexpected })
}

/// The variable that a checkpoint's name means.
fn find<'a>(vars: &'a BTreeMap<String, Var>, name: &str) -> Option<(&'a str, &'a Var)> {
    let (layer, last) = split(name);
    let own = match (vars.contains_key(name), split(layer)) {
        (false, (layer, "conv")) if matches!(last, "weight" | "bias") => join(layer, last),
        _ => name.to_owned(),
    };
    vars.get_key_value(&own).map(|(name, var)| (name.as_str(), var))
}

/// A copy of `tensor` that `var` can be set to.
fn fitted(name: &str, tensor: &Tensor, var: &Var) -> Result<Tensor> {
    if tensor.shape() != var.shape() {
        let reason = format!("its shape is {:?}, the model's {:?}", tensor.dims(), var.dims());
        return Err(Error::tensor(name, reason));
    }
    if !tensor.dtype().is_float() {
        let reason = format!("it holds {:?}, the model {:?}", tensor.dtype(), var.dtype());
        return Err(Error::tensor(name, reason));
    }
    let fitted = tensor.to_device(var.device())?.to_dtype(var.dtype())?.copy()?.detach();
    check_finite(name, &fitted)?;
    Ok(fitted)
}

/// An error if a value of a float tensor is not finite.
pub(crate) fn check_finite(name: &str, tensor: &Tensor) -> Result<()> {
    let finite = is_finite(tensor).map_err(|e| Error::tensor(name, e));
    match !tensor.dtype().is_float() || finite? {
        true => Ok(()),
        false => Err(Error::tensor(name, "it has values that are not finite")),
    }
}

/// Sets every variable, or puts back what was there.
fn set_all(staged: BTreeMap<&str, (&Var, Tensor)>) -> Result<()> {
    let mut done: Vec<(&Var, Tensor)> = vec![];
    for (name, (var, value)) in &staged {
        let before = var.as_tensor().copy()?.detach();
        if let Err(error) = var.set(value) {
            for (var, before) in done {
                var.set(&before)?;
            }
            return Err(Error::tensor(*name, error));
        }
        done.push((var, before));
    }
    Ok(())
}

/// The number of elements of a shape; `None` where it, or a stride, does not fit a machine's word.
pub(crate) fn elements(dims: &[usize]) -> Option<usize> {
    // A stride is a product of dimensions, whatever zero stands before them.
    dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)))?;
    Some(dims.iter().product())
}
