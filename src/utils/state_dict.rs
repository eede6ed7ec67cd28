//! State dicts: the tensors of a model's variables by name.

use super::magnitudes::renew;
use super::trainable::{expected, is_initial, variables, Trainable};
use crate::files::fp8::refuse_scaled;
use crate::files::{check_finite, refuse_wrapped_names, StateDict};
use crate::layers::{without_conv, Part};
use crate::weights::refuse_other_names;
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use std::collections::BTreeMap;

/// torch's `strict`: whether missing and unexpected names are an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strict {
    /// They are an error.
    Yes,
    /// They are listed in the [`LoadReport`]. It is still an error if no name matches or a shape differs, and of a
    /// checkpoint, which is an adapter, also if a layer has one factor of two.
    No,
}

/// The names that were loaded, and those that were not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "lists the names that were not loaded"]
pub struct LoadReport {
    /// The variables that were set, sorted.
    pub loaded: Vec<String>,
    /// Expected variables that the state dict lacks, sorted. If the variables include the frozen base,
    /// a state dict with `lora_A` or `lora_B` is expected to have the factors alone, and one without to
    /// have all other variables.
    pub missing: Vec<String>,
    /// Names of the state dict that no variable has.
    pub unexpected: Vec<String>,
}

/// A copy of the selected variables, to save, with the initial factors of
/// [`InitLoraWeights`](crate::layers::InitLoraWeights). It is the same in training and evaluation.
///
/// # Errors
/// If there are none, or none in a named module.
pub fn lora_state_dict(vars: &VarMap, trainable: impl Into<Trainable>) -> Result<StateDict> {
    let selected = trainable.into().select(vars)?;
    // A copy: an optimizer writes into the variable's storage.
    selected.into_iter().map(|(name, var)| Ok((name, var.as_tensor().copy()?.detach()))).collect()
}

/// Sets the variables of `vars` to the values in `tensors`: all of them or, on an error, none.
///
/// Values are converted to the variable's dtype and device. `conv.weight` and `conv.bias`, loralib's second names of a
/// convolution's tensors, match `weight` and `bias`. DoRA's magnitude of a layer that is not trained yet becomes the
/// norms of a weight that is loaded without it. In evaluation the new values count from the next `eval()` on; layers
/// that are not merged may use them before. Ranks and scalings are compared only by
/// [`load_checkpoint`](crate::load_checkpoint) and [`load_weights`](super::load_weights).
///
/// # Errors
/// If a shape differs, a value is not finite, or no name matches; if a layer would have factors and initial factors of
/// two adapters; with [`Strict::Yes`] also if a name is missing or unexpected.
pub fn load_state_dict(vars: &VarMap, tensors: &StateDict, strict: Strict) -> Result<LoadReport> {
    let vars = variables(vars);
    let mut staged: BTreeMap<&str, (&Var, Tensor)> = BTreeMap::new();
    let mut unexpected = vec![];
    for (name, tensor) in tensors {
        match find(&vars, name) {
            None => unexpected.push(name.clone()),
            Some((own, var)) => {
                if tensor.dtype() == DType::F8E4M3 && var.dtype() != DType::F8E4M3 {
                    refuse_scaled(name, |name| tensors.contains_key(name))?;
                }
                if staged.insert(own, (var, converted(name, tensor, var)?)).is_some() {
                    return Err(Error::tensor(own, "the checkpoint has it under two names"));
                }
            }
        }
    }
    let factors = tensors.keys().any(|name| Part::parse(name).1.is_adapter());
    let missing: Vec<_> = expected(&vars, factors)
        .filter(|name| !staged.contains_key(name))
        .map(str::to_owned)
        .collect();
    check_initial(&vars, &staged, &unexpected)?;
    let fits = missing.is_empty() && unexpected.is_empty();
    if staged.is_empty() || (strict == Strict::Yes && !fits) {
        refuse_other_names(&unexpected)?;
        refuse_wrapped_names(&unexpected, &missing)?;
        return Err(Error::Names { missing, unexpected });
    }
    renew(&vars, &mut staged)?;
    let loaded = staged.keys().map(|name| name.to_string()).collect();
    set_all(staged)?;
    Ok(LoadReport { loaded, missing, unexpected })
}

/// An error if a layer would have factors and initial factors of two adapters.
fn check_initial(
    vars: &BTreeMap<String, Var>,
    staged: &BTreeMap<&str, (&Var, Tensor)>,
    unexpected: &[String],
) -> Result<()> {
    for name in vars.keys() {
        let (layer, Part::InitialA) = Part::parse(name) else { continue };
        let parts = [Part::A, Part::B, Part::InitialA, Part::InitialB];
        let names = parts.map(|part| part.at(layer));
        let (there, missing): (Vec<_>, Vec<_>) =
            names.iter().partition(|name| staged.contains_key(name.as_str()));
        if let (Some(_), Some(name)) = (there.first(), missing.first()) {
            let reason = format!(
                "it is missing, and the layer has initial factors, which belong to its own: load all four, {names:?}, \
                 or build the model without init_lora_weights"
            );
            return Err(Error::tensor(*name, reason));
        }
    }
    let alone =
        |name: &&String| is_initial(name) && staged.contains_key(&*Part::A.at(Part::parse(name).0));
    match unexpected.iter().find(alone) {
        None => Ok(()),
        Some(name) => Err(Error::tensor(
            name,
            "the model lacks it, and the factors would be wrong without it: build the model with the \
             init_lora_weights of the saved adapter, or read the file by `Adapter::load`",
        )),
    }
}

/// The variable for a name in a checkpoint.
fn find<'a>(vars: &'a BTreeMap<String, Var>, name: &str) -> Option<(&'a str, &'a Var)> {
    let (layer, part) = Part::parse(name);
    let own = match (vars.contains_key(name), without_conv(layer), part) {
        (false, Some(layer), Part::Base("weight" | "bias")) => part.at(layer),
        _ => name.to_owned(),
    };
    vars.get_key_value(&own).map(|(name, var)| (name.as_str(), var))
}

/// A copy of `tensor` in the dtype and on the device of `var`.
fn converted(name: &str, tensor: &Tensor, var: &Var) -> Result<Tensor> {
    if tensor.shape() != var.shape() {
        let reason = format!("its shape is {:?}, the model's {:?}", tensor.dims(), var.dims());
        return Err(Error::tensor(name, reason));
    }
    if !tensor.dtype().is_float() {
        let reason = format!("it holds {:?}, the model {:?}", tensor.dtype(), var.dtype());
        return Err(Error::tensor(name, reason));
    }
    let converted = tensor.to_device(var.device())?.to_dtype(var.dtype())?.copy()?.detach();
    check_finite(name, &converted)?;
    Ok(converted)
}

/// Sets every variable or, on an error, restores those that were set.
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
